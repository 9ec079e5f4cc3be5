"""What backends share of products: whether wide accesses read the operands, which one to scale, and that of experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gain_ops.reference import expert_rows


def fuses(a: Tensor, weight: Tensor, *tiles: Tensor) -> bool:
    """Whether a fused GEMM serves a [M, K], weight [N, K], the [M, N] tiles that it reads and a contiguous result [M, N].

    16-bit dtypes alone: fp32 in full precision gains nothing (benchmarks/NOTES.md), and Triton's dot truncates to tf32 where
    the vendor's GEMM rounds. Features that are no multiple of 8, and rows that wide accesses cannot read, would be read element
    by element, at about 4 % of the tensor cores' rate.
    """
    return (
        a.dtype in (torch.bfloat16, torch.float16)
        and a.shape[1] % 8 == 0
        and weight.shape[0] % 8 == 0
        and _aligned(a, weight, *tiles)
    )


def _aligned(a: Tensor, weight: Tensor, *tiles: Tensor) -> bool:
    """Whether TMA and wide loads can read all of a GEMM's tensors: weight in either orientation, the others row-major."""
    return (_row_major(weight) or _row_major(weight.t())) and all(_row_major(t) for t in (a, *tiles))


def _row_major(t: Tensor) -> bool:
    """Whether it is not empty and has unit-stride rows that do not overlap, with 16-byte steps and a 16-byte base."""
    (rows, columns), (step, within) = t.shape, t.stride()
    return within == 1 and rows > 0 and 0 < columns <= step and (step * t.itemsize | t.data_ptr()) % 16 == 0


def linear_input(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    scale: Callable[[Tensor, Tensor], Tensor],
    scale_rows: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """``(x * gain) @ W.T + b``, line (5): x [T, in], weight [out, in], delta [in] -> [T, out].

    ``scale(x, delta)`` is the pass ``gain * x``, and ``scale_rows`` is ``gain[:, None] * x``. The smaller of x and W goes
    through one of them, and the GEMM stays the vendor's (the count is in benchmarks/NOTES.md).
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.shape[0] <= weight.shape[0]:
        return F.linear(scale(x, delta), weight, bias)
    if weight.stride(0) == 1:
        # a transposed view stays transposed: in its memory the gain goes along the rows
        return F.linear(x, scale_rows(weight.t(), delta).t(), bias)
    return F.linear(x, scale(weight, delta), bias)


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Line (21) without a bias, by torch's grouped_mm where it serves the operands; rows of nobody hold anything."""
    if _has_grouped_mm(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    z = x.new_zeros(x.shape[0], weight.shape[1])
    for e, rows in expert_rows(offsets):
        torch.mm(x[rows], weight[e].t(), out=z[rows])
    return z


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm serves the operands: its devices, its dtypes, rows of 16 bytes."""

    def by_rows(t: Tensor) -> bool:
        step = t.stride(-2) * t.itemsize
        return t.stride(-1) == 1 and t.stride(-2) >= t.shape[-1] and (step | t.data_ptr()) % 16 == 0

    return (
        x.device.type in ("cpu", "cuda")
        and x.dtype != torch.float64
        and x.numel() * weight.numel() > 0
        and weight.shape[1] * x.itemsize % 16 == 0
        and by_rows(x)
        and (by_rows(weight) or by_rows(weight.transpose(1, 2)))
    )

"""Two decisions on a GEMM's operands, for the fused backends: whether wide accesses can read them, and which one to scale."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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

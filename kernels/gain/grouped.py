"""One pass over rows that are sorted by expert, with a gain row an expert; the GEMM before or after is the vendor's.

    grouped_scale      y = gain[e] * x + b[e]                          line (22): reads x, writes y
    grouped_backward   dz = gain[e] * dy, partials of sum dy * z       line (23): reads dy and z, writes dz
    grouped_ddelta     the partials alone                              line (23): reads dy and z
    grouped_mm         torch's product, + b[e], and zeros past the last expert's rows, which torch leaves as they are: line (21)

All are one kernel. A program takes a chunk of one expert's rows, so the gain is read once a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends.operands import grouped_product
from gain_ops.kernels import launching
from gain_ops.kernels._common import cdiv, load_tile, multiple, row_unit, rows_schedule
from gain_ops.kernels.config import ROWS, rows_chunk
from gain_ops.kernels.expert_rows import block_e, contiguous, rows_of_slot, slots
from gain_ops.kernels.partials import sum_expert_partials


@triton.jit(do_not_specialize=["T"])
def grouped_kernel(
    offsets,  # [E]
    x,  # [T, N], or None: zeros are written where a row is nobody's, and no other row
    z,  # [T, N]; None when partials is None
    delta,  # [E, N] or None
    bias,  # [E, N] or None
    y,  # [T, N] contiguous, or None
    partials,  # [slots, N] fp32, or None
    T,
    N,
    E,
    chunk,  # rows of a chunk
    stride_xt,
    stride_xn,
    stride_zt,
    stride_zn,
    UNIT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes a chunk of BLOCK_N columns."""
    N = multiple(N, UNIT)
    stride_xt = multiple(stride_xt, UNIT)
    stride_zt = multiple(stride_zt, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    slot = tl.program_id(0) // n_blocks
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = cols < N
    expert, first, end = rows_of_slot(offsets, slot, T, E, chunk, BLOCK_E)
    of_expert = cols < tl.where(expert < E, N, 0)
    gain = tl.full((BLOCK_N,), 1.0, tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    if delta is not None:
        gain += tl.load(delta + expert * N + cols, mask=of_expert, other=0.0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + expert * N + cols, mask=of_expert, other=0.0).to(tl.float32)
    if x is None:
        first = tl.where(expert < E, end, first)
    running = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in tl.range(first, end, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        inside = (rows < end)[:, None]
        tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        if x is not None:
            tile += load_tile(x, rows, cols, stride_xt, stride_xn, inside & of_expert[None, :])
        if partials is not None:
            running += tile * load_tile(z, rows, cols, stride_zt, stride_zn, inside & of_expert[None, :])
        if y is not None:
            to = y + rows[:, None] * N + cols[None, :]
            tl.store(to, (tile * gain[None, :] + shift[None, :]).to(y.dtype.element_ty), mask=inside & in_n[None, :])
    if partials is not None:
        tl.store(partials + slot.to(tl.int64) * N + cols, tl.sum(running, axis=0), mask=in_n)


def grouped_mm(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``x @ W[e].T + b[e]`` [T, out], zeros past the last end: torch's product, and without a bias zeros into its memory."""
    z = grouped_product(x, weight, offsets)
    if bias is not None:
        return _scaled(z, None, bias, offsets)
    _launch(None, None, None, None, z, None, offsets)
    return z


def grouped_scale(x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``gain[e] * x + b[e]`` [T, n]."""
    return _scaled(x, delta, bias, offsets)


def grouped_backward(dy: Tensor, z: Tensor, delta: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``gain[e] * dy`` [T, n] and ddelta [E, n], in one pass."""
    dz = dy.new_empty(dy.shape)
    return dz, _with_sums(dy, z, delta, dz, offsets)


def grouped_ddelta(dy: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
    """Ddelta [E, n]; nothing else is written."""
    return _with_sums(dy, z, None, None, offsets)


def _scaled(x: Tensor, delta: Tensor | None, bias: Tensor | None, offsets: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    _launch(x, None, delta, bias, y, None, offsets)
    return y


def _with_sums(dy: Tensor, z: Tensor, delta: Tensor | None, dz: Tensor | None, offsets: Tensor) -> Tensor:
    """Run the pass and its second stage: -> ddelta [E, n] fp32, and ``dz`` written."""
    (t, n), experts = dy.shape, offsets.shape[0]
    chunk = rows_chunk(t, n)
    partials = dy.new_empty((slots(t, experts, chunk), n), dtype=torch.float32)
    _launch(dy, z, delta, None, dz, partials, offsets)
    return sum_expert_partials(partials, offsets, chunk)


def _launch(
    x: Tensor | None,
    z: Tensor | None,
    delta: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    partials: Tensor | None,
    offsets: Tensor,
) -> None:
    like = y if x is None else x
    assert like is not None
    (t, n), experts = like.shape, offsets.shape[0]
    if t and n:
        chunk = rows_chunk(t, n)
        of_x, of_z = ((0, 0) if tensor is None else tensor.stride() for tensor in (x, z))
        launching.launch(
            grouped_kernel,
            slots(t, experts, chunk) * cdiv(n, ROWS.block_n),
            (offsets.contiguous(), x, z, contiguous(delta), contiguous(bias), y, partials),
            t,
            (n, experts, chunk, *of_x, *of_z),
            rows_schedule(ROWS, row_unit(like, of_x[0], of_z[0]), True, block_e(offsets)),
        )

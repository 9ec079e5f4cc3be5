"""One pass over [T, n]: the backward from a saved z (or x), and the scaling of an operand.

    backward        dz = gain * dy,  partials of sum_t dy * z     lines (3), (4): reads dy and z, writes dz
    ddelta          partials of sum_t dy * z                      line (4): reads dy and z
    scale           y = gain * x, + b                             reads x, writes y

All are bound by bandwidth, and read and write nothing twice. The input side's forward scales before the GEMM (line (5)): a
pass over the smaller of x [T, in] and W [out, in] costs 527 / max(T, out) of the GEMM. This is less than scaling in the main
loop for all but small layers, and the GEMM stays the vendor's (the count is in benchmarks/NOTES.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends import operands
from gain_ops.backends.composed import Composed
from gain_ops.kernels import launching
from gain_ops.kernels._common import cdiv, load_gain, load_tile, multiple, row_unit, rows_schedule
from gain_ops.kernels.config import ROWS, RowsConfig, rows_chunk
from gain_ops.kernels.partials import sum_partials


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy,  # [T, N]
    z,  # [T, N]
    delta,  # [N]; None when dz is None
    dz,  # [T, N] contiguous, or None
    partials,  # [chunks, N] fp32
    T,
    N,
    chunk,  # rows of a chunk
    stride_dyt,
    stride_dyn,
    stride_zt,
    stride_zn,
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes a chunk of rows of BLOCK_N columns; neighbours in the grid are neighbours in memory."""
    N = multiple(N, UNIT)
    stride_dyt = multiple(stride_dyt, UNIT)
    stride_zt = multiple(stride_zt, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    place = (tl.program_id(0) // n_blocks).to(tl.int64)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = cols < N
    running = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if dz is not None:
        gain = load_gain(delta, cols, N)
    for start in tl.range(0, chunk, BLOCK_T, num_stages=STAGES):
        rows = place * chunk + start + tl.arange(0, BLOCK_T)
        mask = (rows < T)[:, None] & in_n[None, :]
        dy_tile = load_tile(dy, rows, cols, stride_dyt, stride_dyn, mask)
        running += dy_tile * load_tile(z, rows, cols, stride_zt, stride_zn, mask)
        if dz is not None:
            to = dz + rows[:, None] * N + cols[None, :]
            tl.store(to, (dy_tile * gain[None, :]).to(dz.dtype.element_ty), mask=mask)
    tl.store(partials + place * N + cols, tl.sum(running, axis=0), mask=in_n)


@triton.jit(do_not_specialize=["T"])
def scale_kernel(
    x,  # [T, N]
    delta,  # [T] when BY_ROW, else [N]
    bias,  # [N] or None
    y,  # [T, N] contiguous
    T,
    N,
    stride_xt,
    stride_xn,
    UNIT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program scales one [BLOCK_T, BLOCK_N] tile, and shifts it by the bias."""
    N = multiple(N, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < T)[:, None] & (cols < N)[None, :]
    tile = load_tile(x, rows, cols, multiple(stride_xt, UNIT), stride_xn, mask)
    tile *= load_gain(delta, rows, T)[:, None] if BY_ROW else load_gain(delta, cols, N)[None, :]
    if bias is not None:
        tile += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * N + cols[None, :], tile.to(y.dtype.element_ty), mask=mask)


def backward(dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dz = gain * dy [T, out] and ddelta = sum_t dy * z [out], in one pass."""
    dz = dy.new_empty(dy.shape)
    return dz, launch_backward(dy, z, delta, dz)


def ddelta(dy: Tensor, z: Tensor) -> Tensor:
    """sum_t dy * z [out]; nothing else is written."""
    return launch_backward(dy, z, None, None)


def launch_backward(
    dy: Tensor,
    z: Tensor,
    delta: Tensor | None,
    dz: Tensor | None,
    config: RowsConfig = ROWS,
    chunk: int | None = None,
) -> Tensor:
    """Run the pass and its second stage: -> ddelta [n] fp32, and ``dz`` written; chunk: rows_chunk's, if not given."""
    t, n = dy.shape
    if t == 0 or n == 0:
        return torch.zeros(n, dtype=torch.float32, device=dy.device)
    chunk = rows_chunk(t, n) if chunk is None else chunk
    chunks = cdiv(t, chunk)
    partials = dy.new_empty((chunks, n), dtype=torch.float32)
    launching.launch(
        backward_kernel,
        chunks * cdiv(n, config.block_n),
        (dy, z, None if delta is None else delta.contiguous(), dz, partials),
        t,
        (n, chunk, *dy.stride(), *z.stride()),
        rows_schedule(config, row_unit(dy, dy.stride(0), z.stride(0)), True),
    )
    return sum_partials(partials)


def scale(x: Tensor, delta: Tensor) -> Tensor:
    """Gain * x over the last dimension: x [T, n], delta [n] -> [T, n] contiguous."""
    return _scale(x, delta, None, by_row=False)


def scale_and_shift(x: Tensor, delta: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
    """Gain * x + bias over the last dimension: x [T, n], delta and bias [n] -> [T, n] contiguous, rounded once.

    in_place: into x, which is contiguous.
    """
    return _scale(x, delta, bias, by_row=False, into=x if in_place else None)


def scale_rows(x: Tensor, delta: Tensor) -> Tensor:
    """gain[:, None] * x: x [n, k], delta [n] -> [n, k] contiguous."""
    return _scale(x, delta, None, by_row=True)


def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """``(x * gain) @ W.T + b``: x [T, in], weight [out, in], delta [in] -> [T, out], the smaller operand scaled first."""
    return operands.linear_input(x, weight, delta, bias, scale, scale_rows)


def _scale(
    x: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    by_row: bool,
    into: Tensor | None = None,
    config: RowsConfig = ROWS,
) -> Tensor:
    y = x.new_empty(x.shape) if into is None else into
    t, n = x.shape
    if y.numel():
        launching.launch(
            scale_kernel,
            cdiv(t, config.block_t) * cdiv(n, config.block_n),
            (x, delta.contiguous(), None if bias is None else bias.contiguous(), y),
            t,
            (n, *x.stride()),
            rows_schedule(config, row_unit(x, x.stride(0)), False, ("BY_ROW", by_row)),
        )
    return y


COMPOSED = Composed(scale_and_shift, backward, ddelta)
"""The GEMMs by the vendor's product and these passes."""

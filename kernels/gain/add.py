"""The gain on the way into the residual stream: one pass, which reads the residual and z and writes h.

add    h = residual + gain * z + b    line (14)

Its backward is rows.py's: the gradient of h is that of the residual, and lines (3), (4) make dz and ddelta of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gain_ops.kernels import launching
from gain_ops.kernels._common import cdiv, load_gain, load_tile, multiple, row_unit, rows_schedule
from gain_ops.kernels.config import ROWS


@triton.jit(do_not_specialize=["T"])
def add_kernel(
    residual,  # [T, N]
    z,  # [T, N]
    delta,  # [N]
    bias,  # [N] or None
    h,  # [T, N] contiguous
    T,
    N,
    stride_rt,
    stride_rn,
    stride_zt,
    stride_zn,
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program makes one [BLOCK_T, BLOCK_N] tile."""
    N = multiple(N, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < T)[:, None] & (cols < N)[None, :]
    tile = load_tile(residual, rows, cols, multiple(stride_rt, UNIT), stride_rn, mask)
    if bias is not None:
        tile += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    gained = load_tile(z, rows, cols, multiple(stride_zt, UNIT), stride_zn, mask) * load_gain(delta, cols, N)[None, :]
    tl.store(h + rows[:, None] * N + cols[None, :], (tile + gained).to(h.dtype.element_ty), mask=mask)


def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """h [T, n] contiguous."""
    t, n = z.shape
    h = z.new_empty(z.shape)
    if h.numel():
        launching.launch(
            add_kernel,
            cdiv(t, ROWS.block_t) * cdiv(n, ROWS.block_n),
            (residual, z, delta.contiguous(), None if bias is None else bias.contiguous(), h),
            t,
            (n, *residual.stride(), *z.stride()),
            rows_schedule(ROWS, row_unit(z, residual.stride(0), z.stride(0)), False),
        )
    return h

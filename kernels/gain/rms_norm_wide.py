"""The kernels of rms_norm.py for rows too wide for registers: column blocks in turn, twice, the second time from a cache.

rms_norm             reads x, and once more from the cache; writes y
rms_norm_backward    reads dy and x twice, since a cache does not hold a chunk of rows; writes dx
"""

from __future__ import annotations

import triton
import triton.language as tl

from gain_ops.kernels._common import load_gain, load_tile, multiple


@triton.jit
def rms_norm_kernel(
    x,  # [T, N]
    weight,  # [N]
    delta,  # [N]
    y,  # [T, N] contiguous
    r,  # [T] fp32
    N,
    stride_xt,
    stride_xn,
    eps: tl.float32,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes one row."""
    N = multiple(N, UNIT)
    stride_xt = multiple(stride_xt, UNIT)
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        tile = tl.load(x + row * stride_xt + cols.to(tl.int64) * stride_xn, mask=cols < N, other=0.0).to(tl.float32)
        squares += tile * tile
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / N + eps)
    tl.store(r + row, scale)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        tile = tl.load(x + row * stride_xt + cols.to(tl.int64) * stride_xn, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32) * load_gain(delta, cols, N)
        tl.store(y + row * N + cols, (tile * scale * factor).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def rms_norm_backward_kernel(
    dy,  # [T, N]
    x,  # [T, N]
    weight,  # [N]
    delta,  # [N]
    r,  # [T] fp32
    dx,  # [T, N] contiguous
    partials,  # [chunks, N] fp32
    T,
    N,
    stride_dt,
    stride_dn,
    stride_xt,
    stride_xn,
    chunk: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes a chunk of rows at once: first their means, then dx and the column sums, block by block."""
    N = multiple(N, UNIT)
    stride_dt = multiple(stride_dt, UNIT)
    stride_xt = multiple(stride_xt, UNIT)
    place = tl.program_id(0).to(tl.int64)
    rows = place * chunk + tl.arange(0, chunk)
    in_t = rows < T
    scale = tl.load(r + rows, mask=in_t, other=0.0)[:, None]
    products = tl.zeros((chunk, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_t[:, None] & (cols < N)[None, :]
        d = load_tile(dy, rows, cols, stride_dt, stride_dn, mask)
        n = scale * load_tile(x, rows, cols, stride_xt, stride_xn, mask)
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        products += d * (w * load_gain(delta, cols, N))[None, :] * n
    mean = tl.sum(products, axis=1)[:, None] / N
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_t[:, None] & (cols < N)[None, :]
        d = load_tile(dy, rows, cols, stride_dt, stride_dn, mask)
        n = scale * load_tile(x, rows, cols, stride_xt, stride_xn, mask)
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        v = d * (w * load_gain(delta, cols, N))[None, :]
        to = dx + rows[:, None] * N + cols[None, :]
        tl.store(to, (scale * (v - n * mean)).to(dx.dtype.element_ty), mask=mask)
        tl.store(partials + place * N + cols, tl.sum(d * n, axis=0) * w, mask=cols < N)

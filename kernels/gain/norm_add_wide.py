"""The kernels of norm_add.py for rows too wide for registers: column blocks in turn, twice, the second time from a cache.

rms_norm_add             reads z, and once more from the cache, and residual; writes h
rms_norm_add_backward    reads dh and z twice, since a cache does not hold a chunk of rows; writes dz
"""

from __future__ import annotations

import triton
import triton.language as tl

from gain_ops.kernels._common import load_gain, load_tile, multiple


@triton.jit
def rms_norm_add_kernel(
    residual,  # [T, N]
    z,  # [T, N]
    delta,  # [N]
    weight,  # [N]
    h,  # [T, N] contiguous
    r,  # [T] fp32
    N,
    stride_rt,
    stride_rn,
    stride_zt,
    stride_zn,
    eps: tl.float32,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes one row."""
    N = multiple(N, UNIT)
    row = tl.program_id(0).to(tl.int64)
    from_residual = residual + row * multiple(stride_rt, UNIT)
    from_z = z + row * multiple(stride_zt, UNIT)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        tile = tl.load(from_z + cols.to(tl.int64) * stride_zn, mask=cols < N, other=0.0).to(tl.float32)
        tile *= load_gain(delta, cols, N)
        squares += tile * tile
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / N + eps)
    tl.store(r + row, scale)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < N
        tile = tl.load(from_z + cols.to(tl.int64) * stride_zn, mask=mask, other=0.0).to(tl.float32)
        tile *= load_gain(delta, cols, N)
        total = tl.load(from_residual + cols.to(tl.int64) * stride_rn, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(h + row * N + cols, (total + tile * scale * w).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def rms_norm_add_backward_kernel(
    dh,  # [T, N]
    z,  # [T, N]
    delta,  # [N]
    weight,  # [N]
    r,  # [T] fp32
    dz,  # [T, N] contiguous
    partials,  # [chunks, N] fp32
    T,
    N,
    stride_dt,
    stride_dn,
    stride_zt,
    stride_zn,
    chunk: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes a chunk of rows at once: first their means, then dz and the column sums, block by block."""
    N = multiple(N, UNIT)
    stride_dt = multiple(stride_dt, UNIT)
    stride_zt = multiple(stride_zt, UNIT)
    place = tl.program_id(0).to(tl.int64)
    rows = place * chunk + tl.arange(0, chunk)
    in_t = rows < T
    scale = tl.load(r + rows, mask=in_t, other=0.0)[:, None]
    products = tl.zeros((chunk, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_t[:, None] & (cols < N)[None, :]
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        v = load_tile(dh, rows, cols, stride_dt, stride_dn, mask) * w[None, :]
        n = scale * (load_gain(delta, cols, N)[None, :] * load_tile(z, rows, cols, stride_zt, stride_zn, mask))
        products += v * n
    mean = tl.sum(products, axis=1)[:, None] / N
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_t[:, None] & (cols < N)[None, :]
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        gain = load_gain(delta, cols, N)[None, :]
        v = load_tile(dh, rows, cols, stride_dt, stride_dn, mask) * w[None, :]
        tile = load_tile(z, rows, cols, stride_zt, stride_zn, mask)
        gradient = scale * (v - scale * (gain * tile) * mean)
        to = dz + rows[:, None] * N + cols[None, :]
        tl.store(to, (gradient * gain).to(dz.dtype.element_ty), mask=mask)
        tl.store(partials + place * N + cols, tl.sum(gradient * tile, axis=0), mask=cols < N)

"""The kernels of add_norm.py for rows too wide for registers: column blocks in turn, the later times from a cache.

forward     reads residual and z, once more from the cache (of a LayerNorm twice more); writes h and y
backward    reads dy and h twice, since a cache does not hold a chunk of rows, dh and z once; writes dx and dz
"""

from __future__ import annotations

import triton
import triton.language as tl

from gain_ops.kernels._common import load_gain, load_tile, multiple


@triton.jit
def add_norm_kernel(
    residual,  # [T, N]
    z,  # [T, N]
    delta,  # [N]
    bias,  # [N] or None
    weight,  # [N]
    shift,  # [N] or None
    h,  # [T, N] contiguous
    y,  # [T, N] contiguous
    mean,  # [T] fp32, or None of an RMSNorm
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
    """A program takes one row; h is computed again for y, which costs no wait for the program's own stores."""
    N = multiple(N, UNIT)
    row = tl.program_id(0).to(tl.int64)
    from_residual = residual + row * multiple(stride_rt, UNIT)
    from_z = z + row * multiple(stride_zt, UNIT)
    running = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        stored = _stored(from_residual, from_z, delta, bias, h, cols, N, stride_rn, stride_zn)
        tl.store(h + row * N + cols, stored, mask=cols < N)
        tile = stored.to(tl.float32)
        if mean is not None:
            running += tile
        else:
            running += tile * tile
    centre = 0.0
    if mean is not None:
        centre = tl.sum(running, axis=0) / N
        tl.store(mean + row, centre)
        running = tl.zeros((BLOCK_N,), tl.float32)
        for start in tl.range(0, N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            stored = _stored(from_residual, from_z, delta, bias, h, cols, N, stride_rn, stride_zn)
            tile = tl.where(cols < N, stored.to(tl.float32) - centre, 0.0)
            running += tile * tile
    scale = 1.0 / tl.sqrt_rn(tl.sum(running, axis=0) / N + eps)
    tl.store(r + row, scale)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        stored = _stored(from_residual, from_z, delta, bias, h, cols, N, stride_rn, stride_zn)
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        out = (stored.to(tl.float32) - centre) * scale * w
        if shift is not None:
            out += tl.load(shift + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(y + row * N + cols, out.to(y.dtype.element_ty), mask=cols < N)


@triton.jit
def _stored(from_residual, from_z, delta, bias, h, cols, N, stride_rn, stride_zn):
    """h[cols] of one row, rounded to h's dtype, 0 past the end."""
    mask = cols < N
    total = tl.load(from_residual + cols.to(tl.int64) * stride_rn, mask=mask, other=0.0).to(tl.float32)
    tile = tl.load(from_z + cols.to(tl.int64) * stride_zn, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    return (total + tile * load_gain(delta, cols, N)).to(h.dtype.element_ty)


@triton.jit(do_not_specialize=["T"])
def add_norm_backward_kernel(
    dy,  # [T, N]
    dh,  # [T, N] or None
    h,  # [T, N]
    z,  # [T, N]
    delta,  # [N]
    weight,  # [N]
    mean,  # [T] fp32, or None of an RMSNorm
    r,  # [T] fp32
    dx,  # [T, N] contiguous
    dz,  # [T, N] contiguous
    partials,  # [chunks, N] fp32
    T,
    N,
    stride_dyt,
    stride_dyn,
    stride_dht,
    stride_dhn,
    stride_ht,
    stride_hn,
    stride_zt,
    stride_zn,
    chunk: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes a chunk of rows at once: first their means, then dx, dz and the column sums, block by block."""
    N = multiple(N, UNIT)
    stride_dyt = multiple(stride_dyt, UNIT)
    stride_ht = multiple(stride_ht, UNIT)
    place = tl.program_id(0).to(tl.int64)
    rows = place * chunk + tl.arange(0, chunk)
    in_t = rows < T
    scale = tl.load(r + rows, mask=in_t, other=0.0)[:, None]
    centre = 0.0
    if mean is not None:
        centre = tl.load(mean + rows, mask=in_t, other=0.0)[:, None]
        sums = tl.zeros((chunk, BLOCK_N), tl.float32)
    products = tl.zeros((chunk, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_t[:, None] & (cols < N)[None, :]
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        v = load_tile(dy, rows, cols, stride_dyt, stride_dyn, mask) * w[None, :]
        if mean is not None:
            sums += v
        products += v * (scale * (load_tile(h, rows, cols, stride_ht, stride_hn, mask) - centre))
    slope = tl.sum(products, axis=1)[:, None] / N
    level = 0.0
    if mean is not None:
        level = tl.sum(sums, axis=1)[:, None] / N
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_t[:, None] & (cols < N)[None, :]
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        v = load_tile(dy, rows, cols, stride_dyt, stride_dyn, mask) * w[None, :]
        n = scale * (load_tile(h, rows, cols, stride_ht, stride_hn, mask) - centre)
        gradient = scale * (v - n * slope - level)
        if dh is not None:
            gradient += load_tile(dh, rows, cols, multiple(stride_dht, UNIT), stride_dhn, mask)
        to = rows[:, None] * N + cols[None, :]
        tl.store(dx + to, gradient.to(dx.dtype.element_ty), mask=mask)
        tl.store(dz + to, (gradient * load_gain(delta, cols, N)[None, :]).to(dz.dtype.element_ty), mask=mask)
        product = gradient * load_tile(z, rows, cols, multiple(stride_zt, UNIT), stride_zn, mask)
        tl.store(partials + place * N + cols, tl.sum(product, axis=0), mask=cols < N)

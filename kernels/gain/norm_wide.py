"""norm.py's two kernels for rows too wide for registers: column blocks in turn, twice, the second time from a cache at best.

rms_norm             reads x, and once more from the cache; writes y
rms_norm_backward    reads dy and x twice, 16 rows being more than a cache holds; writes dx
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.kernels._common import load_gain, on_device_of, options
from gain_ops.kernels.config import NORM_WIDE
from gain_ops.kernels.partials import sum_partials


@triton.jit
def rms_norm_kernel(
    x,  # [T, N]
    weight,  # [N]
    delta,  # [N]
    y,  # [T, N] contiguous
    r,  # [T] fp32
    N,
    stride_xt: tl.int64,
    stride_xn: tl.int64,
    eps: tl.float32,
    BLOCK_N: tl.constexpr,
):
    """A program takes one row."""
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


@triton.jit
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
    stride_dt: tl.int64,
    stride_dn: tl.int64,
    stride_xt: tl.int64,
    stride_xn: tl.int64,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes CHUNK rows at once: their means first, then dx and the column sums, which no register outlives."""
    chunk = tl.program_id(0).to(tl.int64)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    in_t = rows < T
    scale = tl.load(r + rows, mask=in_t, other=0.0)[:, None]
    products = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        cols64 = cols.to(tl.int64)
        mask = in_t[:, None] & (cols < N)[None, :]
        d = tl.load(dy + rows[:, None] * stride_dt + cols64[None, :] * stride_dn, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(x + rows[:, None] * stride_xt + cols64[None, :] * stride_xn, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32) * load_gain(delta, cols, N)
        products += d * factor[None, :] * (scale * n)
    mean = tl.sum(products, axis=1)[:, None] / N
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        cols64 = cols.to(tl.int64)
        mask = in_t[:, None] & (cols < N)[None, :]
        d = tl.load(dy + rows[:, None] * stride_dt + cols64[None, :] * stride_dn, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(x + rows[:, None] * stride_xt + cols64[None, :] * stride_xn, mask=mask, other=0.0).to(tl.float32)
        n = scale * n
        w = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        v = d * (w * load_gain(delta, cols, N))[None, :]
        tl.store(dx + rows[:, None] * N + cols64[None, :], (scale * (v - n * mean)).to(dx.dtype.element_ty), mask=mask)
        tl.store(partials + chunk * N + cols, tl.sum(d * n, axis=0) * w, mask=cols < N)


def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [T, n] contiguous and r [T] fp32; neither T nor n is 0."""
    t, n = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty(t, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        rms_norm_kernel[(t,)](
            x,
            weight.contiguous(),
            delta.contiguous(),
            y,
            r,
            n,
            *x.stride(),
            eps,
            BLOCK_N=NORM_WIDE.block_t * NORM_WIDE.block_n,
            **options(NORM_WIDE.num_warps),
        )
    return y, r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """dx [T, n] contiguous and ddelta [n]; neither T nor n is 0."""
    t, n = x.shape
    chunks = triton.cdiv(t, NORM_WIDE.chunk)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partials = torch.empty((chunks, n), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        rms_norm_backward_kernel[(chunks,)](
            dy,
            x,
            weight.contiguous(),
            delta.contiguous(),
            r,
            dx,
            partials,
            t,
            n,
            *dy.stride(),
            *x.stride(),
            CHUNK=NORM_WIDE.chunk,
            BLOCK_N=NORM_WIDE.block_n,
            **options(NORM_WIDE.num_warps),
        )
    return dx, sum_partials(partials)

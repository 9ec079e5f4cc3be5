"""The gain in an RMSNorm: one pass forward, one pass backward over [T, n], a row in registers at a time. rms_norm_wide.py
serves rows that are too wide for this.

rms_norm             y = r * x * w * gain, r                 line (11): reads x, writes y
rms_norm_backward    dx, partials of sum_t dy * n * w        lines (12), (13): reads dy and x, writes dx
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends import eager
from gain_ops.kernels import launching, rms_norm_wide
from gain_ops.kernels._common import cdiv, load_gain, multiple, norm_schedule, row_unit
from gain_ops.kernels.config import rms_norm_chunk, rms_norm_config
from gain_ops.kernels.partials import sum_partials


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
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    tile = tl.load(x + row * multiple(stride_xt, UNIT) + cols.to(tl.int64) * stride_xn, mask=mask, other=0.0).to(
        tl.float32
    )
    scale = 1.0 / tl.sqrt_rn(tl.sum(tile * tile, axis=0) / N + eps)
    tl.store(r + row, scale)
    factor = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32) * load_gain(delta, cols, N)
    tl.store(y + row * N + cols, (tile * scale * factor).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunk"])
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
    chunk,  # rows of a chunk
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes a chunk of rows, one after the other."""
    N = multiple(N, UNIT)
    stride_dt = multiple(stride_dt, UNIT)
    stride_xt = multiple(stride_xt, UNIT)
    place = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    cols64 = cols.to(tl.int64)
    mask = cols < N
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    factor = w * load_gain(delta, cols, N)
    running = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(0, chunk):
        row = place * chunk + step
        inside = cols < tl.where(row < T, N, 0)
        scale = tl.load(r + tl.minimum(row, T - 1))
        d = tl.load(dy + row * stride_dt + cols64 * stride_dn, mask=inside, other=0.0).to(tl.float32)
        n = scale * tl.load(x + row * stride_xt + cols64 * stride_xn, mask=inside, other=0.0).to(tl.float32)
        running += d * n
        v = d * factor
        mean = tl.sum(v * n, axis=0) / N
        tl.store(dx + row * N + cols, (scale * (v - n * mean)).to(dx.dtype.element_ty), mask=inside)
    tl.store(partials + place * N + cols, running * w, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [T, n] contiguous and r [T] fp32."""
    t, n = x.shape
    if n == 0:
        return eager.rms_norm(x, weight, delta, eps)
    y = x.new_empty(x.shape)
    r = x.new_empty(t, dtype=torch.float32)
    if t:
        config = rms_norm_config(n, rows=1)
        kernel = rms_norm_kernel if config.whole_row else rms_norm_wide.rms_norm_kernel
        launching.launch(
            kernel,
            t,
            (x, weight.contiguous(), delta.contiguous(), y, r),
            None,
            (n, *x.stride(), eps),
            norm_schedule(config, row_unit(x, x.stride(0))),
        )
    return y, r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """dx [T, n] contiguous and ddelta [n]."""
    t, n = x.shape
    if n == 0:
        return eager.rms_norm_backward(dy, x, weight, delta, r)
    dx = x.new_empty(x.shape)
    if t == 0:
        return dx, torch.zeros(n, dtype=torch.float32, device=x.device)
    chunk = rms_norm_chunk(t)
    config = rms_norm_config(n, rows=chunk)
    kernel = rms_norm_backward_kernel if config.whole_row else rms_norm_wide.rms_norm_backward_kernel
    chunks = cdiv(t, chunk)
    partials = x.new_empty((chunks, n), dtype=torch.float32)
    launching.launch(
        kernel,
        chunks,
        (dy, x, weight.contiguous(), delta.contiguous(), r, dx, partials),
        t,
        (n, *dy.stride(), *x.stride()),
        norm_schedule(config, row_unit(x, dy.stride(0), x.stride(0)), chunk),
    )
    return dx, sum_partials(partials)

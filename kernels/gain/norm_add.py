"""A gain, an RMSNorm of what it scales, and the add to the residual stream: one pass each way, a row in registers at a time.
norm_add_wide.py serves rows that are too wide for this.

rms_norm_add             h = residual + r * s * w, s = gain * z    line (17): reads residual and z, writes h
rms_norm_add_backward    dz, partials of sum_t ds * z              line (18): reads dh and z, writes dz
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends import eager
from gain_ops.kernels import launching, norm_add_wide
from gain_ops.kernels._common import cdiv, load_gain, multiple, norm_schedule, row_unit
from gain_ops.kernels.config import rms_norm_chunk, rms_norm_config
from gain_ops.kernels.partials import sum_partials


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
    cols = tl.arange(0, BLOCK_N)
    cols64 = cols.to(tl.int64)
    mask = cols < N
    tile = tl.load(z + row * multiple(stride_zt, UNIT) + cols64 * stride_zn, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(residual + row * multiple(stride_rt, UNIT) + cols64 * stride_rn, mask=mask, other=0.0).to(
        tl.float32
    )
    tile *= load_gain(delta, cols, N)
    scale = 1.0 / tl.sqrt_rn(tl.sum(tile * tile, axis=0) / N + eps)
    tl.store(r + row, scale)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + row * N + cols, (total + tile * scale * w).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunk"])
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
    chunk,  # rows of a chunk
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes a chunk of rows, one after the other."""
    N = multiple(N, UNIT)
    stride_dt = multiple(stride_dt, UNIT)
    stride_zt = multiple(stride_zt, UNIT)
    place = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    cols64 = cols.to(tl.int64)
    mask = cols < N
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    gain = load_gain(delta, cols, N)
    running = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(0, chunk):
        row = place * chunk + step
        inside = cols < tl.where(row < T, N, 0)
        scale = tl.load(r + tl.minimum(row, T - 1))
        v = w * tl.load(dh + row * stride_dt + cols64 * stride_dn, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(z + row * stride_zt + cols64 * stride_zn, mask=inside, other=0.0).to(tl.float32)
        n = scale * (gain * tile)
        mean = tl.sum(v * n, axis=0) / N
        gradient = scale * (v - n * mean)
        tl.store(dz + row * N + cols, (gradient * gain).to(dz.dtype.element_ty), mask=inside)
        running += gradient * tile
    tl.store(partials + place * N + cols, running, mask=mask)


def rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h [T, n] contiguous and r [T] fp32."""
    t, n = z.shape
    if n == 0:
        return eager.rms_norm_add(residual, z, delta, weight, eps)
    h = z.new_empty(z.shape)
    r = z.new_empty(t, dtype=torch.float32)
    if t:
        config = rms_norm_config(n, rows=1)
        launching.launch(
            rms_norm_add_kernel if config.whole_row else norm_add_wide.rms_norm_add_kernel,
            t,
            (residual, z, delta.contiguous(), weight.contiguous(), h, r),
            None,
            (n, *residual.stride(), *z.stride(), eps),
            norm_schedule(config, row_unit(z, residual.stride(0), z.stride(0))),
        )
    return h, r


def rms_norm_add_backward(dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """dz [T, n] contiguous and ddelta [n]."""
    t, n = z.shape
    if n == 0:
        return eager.rms_norm_add_backward(dh, z, delta, weight, r)
    dz = z.new_empty(z.shape)
    if t == 0:
        return dz, torch.zeros(n, dtype=torch.float32, device=z.device)
    chunk = rms_norm_chunk(t)
    config = rms_norm_config(n, rows=chunk)
    chunks = cdiv(t, chunk)
    partials = z.new_empty((chunks, n), dtype=torch.float32)
    launching.launch(
        rms_norm_add_backward_kernel if config.whole_row else norm_add_wide.rms_norm_add_backward_kernel,
        chunks,
        (dh, z, delta.contiguous(), weight.contiguous(), r, dz, partials),
        t,
        (n, *dh.stride(), *z.stride()),
        norm_schedule(config, row_unit(z, dh.stride(0), z.stride(0)), chunk),
    )
    return dz, sum_partials(partials)

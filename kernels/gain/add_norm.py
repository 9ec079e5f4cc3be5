"""The gain on the way into the residual stream and the norm that reads the stream: one pass each way, a row in registers at a
time. add_norm_wide.py serves rows that are too wide for this.

add_rms_norm               h = residual + gain * z + b, y = r * h * w    lines (14), (15): reads residual and z, writes h and y
add_rms_norm_backward      dx, dz, partials of sum_t dx * z              line (16): reads dy, dh, h and z, writes dx and dz
add_layer_norm             the same, y = r * (h - mean) * w + c          lines (14), (19)
add_layer_norm_backward                                                  line (20)

The norm is that of h as it is stored, so that the backward, which reads h, differentiates what the forward computed. Both norms
are one kernel: a LayerNorm has a mean, an RMSNorm has none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends import eager
from gain_ops.kernels import add_norm_wide, launching
from gain_ops.kernels._common import cdiv, load_gain, multiple, norm_schedule, row_unit
from gain_ops.kernels.config import rms_norm_chunk, rms_norm_config
from gain_ops.kernels.partials import sum_partials


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
    """A program takes one row."""
    N = multiple(N, UNIT)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    cols64 = cols.to(tl.int64)
    mask = cols < N
    total = tl.load(residual + row * multiple(stride_rt, UNIT) + cols64 * stride_rn, mask=mask, other=0.0).to(
        tl.float32
    )
    tile = tl.load(z + row * multiple(stride_zt, UNIT) + cols64 * stride_zn, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    stored = (total + tile * load_gain(delta, cols, N)).to(h.dtype.element_ty)
    tl.store(h + row * N + cols, stored, mask=mask)
    tile = stored.to(tl.float32)
    if mean is not None:
        centre = tl.sum(tile, axis=0) / N
        tl.store(mean + row, centre)
        tile = tl.where(mask, tile - centre, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(tile * tile, axis=0) / N + eps)
    tl.store(r + row, scale)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    out = tile * scale * w
    if shift is not None:
        out += tl.load(shift + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * N + cols, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunk"])
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
    chunk,  # rows of a chunk
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes a chunk of rows, one after the other."""
    N = multiple(N, UNIT)
    stride_dyt = multiple(stride_dyt, UNIT)
    stride_ht = multiple(stride_ht, UNIT)
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
        v = w * tl.load(dy + row * stride_dyt + cols64 * stride_dyn, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(h + row * stride_ht + cols64 * stride_hn, mask=inside, other=0.0).to(tl.float32)
        if mean is not None:
            tile -= tl.load(mean + tl.minimum(row, T - 1))  # past the end too, where v and z are 0
        n = scale * tile
        gradient = v - n * (tl.sum(v * n, axis=0) / N)
        if mean is not None:
            gradient -= tl.sum(v, axis=0) / N
        gradient *= scale
        if dh is not None:
            at = dh + row * multiple(stride_dht, UNIT) + cols64 * stride_dhn
            gradient += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * N + cols, gradient.to(dx.dtype.element_ty), mask=inside)
        tl.store(dz + row * N + cols, (gradient * gain).to(dz.dtype.element_ty), mask=inside)
        running += gradient * tl.load(z + row * stride_zt + cols64 * stride_zn, mask=inside, other=0.0).to(tl.float32)
    tl.store(partials + place * N + cols, running, mask=mask)


def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h and y [T, n] contiguous, and r [T] fp32."""
    if z.shape[1] == 0:
        return eager.add_rms_norm(residual, z, delta, bias, weight, eps)
    r = z.new_empty(z.shape[0], dtype=torch.float32)
    return *_forward(residual, z, delta, bias, weight, None, eps, None, r), r


def add_layer_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and y [T, n] contiguous, and mean and r [T] fp32."""
    if z.shape[1] == 0:
        return eager.add_layer_norm(residual, z, delta, bias, weight, shift, eps)
    mean, r = (z.new_empty(z.shape[0], dtype=torch.float32) for _ in range(2))
    return *_forward(residual, z, delta, bias, weight, shift, eps, mean, r), mean, r


def add_rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dz [T, n] contiguous, and ddelta [n]."""
    if h.shape[1] == 0:
        return eager.add_rms_norm_backward(dy, dh, h, z, delta, weight, r)
    return _backward(dy, dh, h, z, delta, weight, None, r)


def add_layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dz [T, n] contiguous, and ddelta [n]."""
    if h.shape[1] == 0:
        return eager.add_layer_norm_backward(dy, dh, h, z, delta, weight, mean, r)
    return _backward(dy, dh, h, z, delta, weight, mean, r)


def _forward(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    mean: Tensor | None,
    r: Tensor,
) -> tuple[Tensor, Tensor]:
    """h and y [T, n] contiguous; mean (of a LayerNorm) and r are written."""
    t, n = z.shape
    h, y = z.new_empty(z.shape), z.new_empty(z.shape)
    if t:
        config = rms_norm_config(n, rows=1)
        vectors = [None if vector is None else vector.contiguous() for vector in (delta, bias, weight, shift)]
        launching.launch(
            add_norm_kernel if config.whole_row else add_norm_wide.add_norm_kernel,
            t,
            (residual, z, *vectors, h, y, mean, r),
            None,
            (n, *residual.stride(), *z.stride(), eps),
            norm_schedule(config, row_unit(z, residual.stride(0), z.stride(0))),
        )
    return h, y


def _backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    z: Tensor,
    delta: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    r: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    t, n = h.shape
    dx, dz = h.new_empty(h.shape), h.new_empty(h.shape)
    if t == 0:
        return dx, dz, torch.zeros(n, dtype=torch.float32, device=h.device)
    chunk = rms_norm_chunk(t)
    config = rms_norm_config(n, rows=chunk)
    chunks = cdiv(t, chunk)
    partials = h.new_empty((chunks, n), dtype=torch.float32)
    strides = [(0, 0) if tensor is None else tensor.stride() for tensor in (dy, dh, h, z)]
    launching.launch(
        add_norm_backward_kernel if config.whole_row else add_norm_wide.add_norm_backward_kernel,
        chunks,
        (dy, dh, h, z, delta.contiguous(), weight.contiguous(), mean, r, dx, dz, partials),
        t,
        (n, *(stride for pair in strides for stride in pair)),
        norm_schedule(config, row_unit(h, *(stride for stride, _ in strides)), chunk),
    )
    return dx, dz, sum_partials(partials)

"""The weighted sum of what a token's k experts make, with a gain row an expert: one pass each way.

    combine            y[t] = sum_j w * (gain[e] * z[s] + b[e])            line (24): reads z, writes y
    combine_backward   dz, partials of ddelta and of dw                    line (25): reads dy k times and z, writes dz

The forward takes a token after the other, the backward a chunk of one expert's rows. Of the k reads of dy, all but one find it
in the L2 cache where dy [T, n] fits that. dw is a sum over features, so each block of columns has a partial sum of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops import reference
from gain_ops.kernels import launching
from gain_ops.kernels._common import cdiv, load_tile, multiple, row_unit, rows_schedule
from gain_ops.kernels.config import COMBINE, GLU, rows_chunk
from gain_ops.kernels.expert_rows import block_e, contiguous, rows_of_slot, slots
from gain_ops.kernels.partials import sum_expert_partials


@triton.jit(do_not_specialize=["T", "top_k"])
def combine_kernel(
    z,  # [T top_k, N]
    delta,  # [E, N]
    bias,  # [E, N] or None
    y,  # [T, N] contiguous
    weights,  # [T, top_k] contiguous
    place,  # [T, top_k]: the row of z
    offsets,  # [E]
    T,
    N,
    E,
    top_k,
    stride_zt,
    stride_zn,
    UNIT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program computes BLOCK_N columns of one token's row; BLOCK_T is 1."""
    N = multiple(N, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets + experts, mask=experts < E, other=0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for j in tl.range(0, top_k):
        row = tl.load(place + token * top_k + j)
        expert = tl.sum(((experts < E) & (ends <= row)).to(tl.int32), axis=0).to(tl.int64)
        mask = cols < tl.where(expert < E, N, 0)
        at = z + row * multiple(stride_zt, UNIT) + cols.to(tl.int64) * stride_zn
        term = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        term *= 1.0 + tl.load(delta + expert * N + cols, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            term += tl.load(bias + expert * N + cols, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weights + token * top_k + j).to(tl.float32)
        total += tl.where(expert < E, weight, 0.0) * term
    tl.store(y + token * N + cols, total.to(y.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["T", "top_k"])
def combine_backward_kernel(
    dy,  # [T / top_k, N]
    z,  # [T, N]
    delta,  # [E, N]
    bias,  # [E, N] or None
    dz,  # [T, N] contiguous
    weights,  # [T] contiguous, by slot
    order,  # [T]: the slot of a row
    partials,  # [slots, N] fp32, of ddelta
    dw,  # [column blocks, T] fp32, by slot
    offsets,  # [E]
    T,  # rows of z
    N,
    E,
    top_k,
    chunk,  # rows of a chunk
    stride_dyt,
    stride_dyn,
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
    stride_dyt = multiple(stride_dyt, UNIT)
    stride_zt = multiple(stride_zt, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    slot = tl.program_id(0) // n_blocks
    block = (tl.program_id(0) % n_blocks).to(tl.int64)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, first, end = rows_of_slot(offsets, slot, T, E, chunk, BLOCK_E)
    of_expert = cols < tl.where(expert < E, N, 0)
    gain = (1.0 + tl.load(delta + expert * N + cols, mask=of_expert, other=0.0).to(tl.float32))[None, :]
    if bias is not None:
        shift = tl.load(bias + expert * N + cols, mask=of_expert, other=0.0).to(tl.float32)[None, :]
    running = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in tl.range(first, end, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        inside = rows < end
        mask = inside[:, None] & of_expert[None, :]
        number = tl.load(order + rows, mask=inside, other=0)
        weight = tl.load(weights + number, mask=inside, other=0.0).to(tl.float32)
        d = load_tile(dy, number // top_k, cols, stride_dyt, stride_dyn, mask)
        tile = load_tile(z, rows, cols, stride_zt, stride_zn, mask)
        # a row of nobody has d = 0, whatever its weight
        weighted = tl.where(mask, d * weight[:, None], 0.0)
        running += weighted * tile
        tl.store(
            dz + rows[:, None] * N + cols[None, :],
            (weighted * gain).to(dz.dtype.element_ty),
            mask=inside[:, None] & (cols < N)[None, :],
        )
        tile *= gain
        if bias is not None:
            tile += shift
        tl.store(dw + block * T + number, tl.sum(d * tile, axis=1), mask=inside)
    tl.store(partials + slot.to(tl.int64) * N + cols, tl.sum(running, axis=0), mask=cols < N)


def combine(z: Tensor, delta: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """y [T, n] contiguous."""
    tokens, top_k = weights.shape
    n = z.shape[1]
    y = z.new_empty((tokens, n))
    if y.numel():
        launching.launch(
            combine_kernel,
            tokens * cdiv(n, COMBINE.block_n),
            (
                z,
                delta.contiguous(),
                contiguous(bias),
                y,
                weights.contiguous(),
                reference.places(order),
                offsets.contiguous(),
            ),
            tokens,
            (n, offsets.shape[0], top_k, *z.stride()),
            rows_schedule(COMBINE, row_unit(z, z.stride(0)), False, block_e(offsets)),
        )
    return y


def combine_backward(
    dy: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [S, n] contiguous, ddelta [E, n], dw [T, k]."""
    (t, n), experts = z.shape, offsets.shape[0]
    dz = z.new_empty(z.shape)
    if not dz.numel():
        sums = torch.zeros((experts, n), dtype=torch.float32, device=z.device)
        return dz, sums, sums.new_zeros(weights.shape)
    chunk = rows_chunk(t, n)
    partials = z.new_empty((slots(t, experts, chunk), n), dtype=torch.float32)
    blocks = cdiv(n, GLU.block_n)
    dw = partials.new_empty((blocks, t))
    launching.launch(
        combine_backward_kernel,
        partials.shape[0] * blocks,
        (
            dy,
            z,
            delta.contiguous(),
            contiguous(bias),
            dz,
            weights.contiguous(),
            order.contiguous(),
            partials,
            dw,
            offsets.contiguous(),
        ),
        t,
        (n, experts, weights.shape[1], chunk, *dy.stride(), *z.stride()),
        rows_schedule(GLU, row_unit(z, dy.stride(0), z.stride(0)), True, block_e(offsets)),
    )
    return dz, sum_expert_partials(partials, offsets, chunk), dw.sum(0).view(weights.shape)

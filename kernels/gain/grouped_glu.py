"""glu.py for rows that are sorted by expert, with a gain row an expert: lines (8) to (10) of reference.py.

The bytes are those of glu.py, and a gain and a partial sum an expert more. A program takes a chunk of one expert's rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.kernels import launching
from gain_ops.kernels._common import cdiv, load_tile, multiple, row_unit, rows_schedule
from gain_ops.kernels.config import GLU, rows_chunk
from gain_ops.kernels.expert_rows import block_e, contiguous, rows_of_slot, slots
from gain_ops.kernels.glu import act_and_slope
from gain_ops.kernels.partials import sum_expert_partials


@triton.jit(do_not_specialize=["T"])
def grouped_glu_kernel(
    gate,  # [T, N]
    up,  # [T, N] or None
    delta,  # [E, N]
    h,  # [T, N] contiguous
    offsets,  # [E]
    T,
    N,
    E,
    chunk,  # rows of a chunk
    stride_gt,
    stride_gn,
    stride_ut,
    stride_un,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes a chunk of BLOCK_N columns."""
    N = multiple(N, UNIT)
    stride_gt = multiple(stride_gt, UNIT)
    stride_ut = multiple(stride_ut, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, first, end = rows_of_slot(offsets, tl.program_id(0) // n_blocks, T, E, chunk, BLOCK_E)
    of_expert = cols < tl.where(expert < E, N, 0)
    gain = 1.0 + tl.load(delta + expert * N + cols, mask=of_expert, other=0.0).to(tl.float32)
    for start in tl.range(first, end, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        inside = (rows < end)[:, None]
        mask = inside & of_expert[None, :]
        tile, _ = act_and_slope(load_tile(gate, rows, cols, stride_gt, stride_gn, mask), ACTIVATION)
        if up is not None:
            tile *= load_tile(up, rows, cols, stride_ut, stride_un, mask)
        # act(0) is 0 for every activation, so rows of nobody are too
        to = h + rows[:, None] * N + cols[None, :]
        tl.store(to, (tile * gain[None, :]).to(h.dtype.element_ty), mask=inside & (cols < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def grouped_glu_backward_kernel(
    dh,  # [T, N]
    gate,  # [T, N]
    up,  # [T, N] or None
    delta,  # [E, N]; None when dgate_up is None
    dgate_up,  # [T, 2 N] contiguous, without up [T, N], or None
    partials,  # [slots, N] fp32
    offsets,  # [E]
    T,
    N,
    E,
    chunk,  # rows of a chunk
    stride_dt,
    stride_dn,
    stride_gt,
    stride_gn,
    stride_ut,
    stride_un,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes a chunk of BLOCK_N columns."""
    N = multiple(N, UNIT)
    stride_dt = multiple(stride_dt, UNIT)
    stride_gt = multiple(stride_gt, UNIT)
    stride_ut = multiple(stride_ut, UNIT)
    stride_out = N if up is None else 2 * N
    n_blocks = tl.cdiv(N, BLOCK_N)
    slot = tl.program_id(0) // n_blocks
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, first, end = rows_of_slot(offsets, slot, T, E, chunk, BLOCK_E)
    of_expert = cols < tl.where(expert < E, N, 0)
    running = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if dgate_up is not None:
        gain = 1.0 + tl.load(delta + expert * N + cols, mask=of_expert, other=0.0).to(tl.float32)[None, :]
    for start in tl.range(first, end, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        inside = (rows < end)[:, None]
        mask = inside & of_expert[None, :]
        to_store = inside & (cols < N)[None, :]
        d = load_tile(dh, rows, cols, stride_dt, stride_dn, mask)
        act, slope = act_and_slope(load_tile(gate, rows, cols, stride_gt, stride_gn, mask), ACTIVATION)
        through = d * act
        if up is not None:
            u = load_tile(up, rows, cols, stride_ut, stride_un, mask)
            slope *= u
            if dgate_up is not None:
                du = (through * gain).to(dgate_up.dtype.element_ty)
                tl.store(dgate_up + rows[:, None] * stride_out + N + cols[None, :], du, mask=to_store)
            running += through * u
        else:
            running += through
        if dgate_up is not None:
            dg = (d * gain * slope).to(dgate_up.dtype.element_ty)
            tl.store(dgate_up + rows[:, None] * stride_out + cols[None, :], dg, mask=to_store)
    tl.store(partials + slot.to(tl.int64) * N + cols, tl.sum(running, axis=0), mask=cols < N)


def grouped_glu(gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """h = act(gate) * up * gain[e]: -> [T, n] contiguous."""
    h = gate.new_empty(gate.shape)
    (t, n), experts = gate.shape, offsets.shape[0]
    if h.numel():
        chunk = rows_chunk(t, n)
        unit = row_unit(gate, gate.stride(0), _strides(up)[0])
        launching.launch(
            grouped_glu_kernel,
            slots(t, experts, chunk) * cdiv(n, GLU.block_n),
            (gate, up, delta.contiguous(), h, offsets.contiguous()),
            t,
            (n, experts, chunk, *gate.stride(), *_strides(up)),
            rows_schedule(GLU, unit, True, ("ACTIVATION", activation), block_e(offsets)),
        )
    return h


def grouped_glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """dg and du side by side [T, 2n] (without up: dg [T, n]) and ddelta [E, n], in one pass."""
    t, n = gate.shape
    dgate_up = gate.new_empty((t, n if up is None else 2 * n))
    return dgate_up, _launch_backward(dh, gate, up, delta, dgate_up, offsets, activation)


def grouped_glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, offsets: Tensor, activation: str) -> Tensor:
    """Ddelta [E, n]; nothing else is written."""
    return _launch_backward(dh, gate, up, None, None, offsets, activation)


def _launch_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor | None,
    dgate_up: Tensor | None,
    offsets: Tensor,
    activation: str,
) -> Tensor:
    """Run the backward pass and its second stage: -> ddelta [E, n] fp32, and ``dgate_up`` written."""
    (t, n), experts = gate.shape, offsets.shape[0]
    chunk = rows_chunk(t, n)
    partials = gate.new_empty((slots(t, experts, chunk), n), dtype=torch.float32)
    if t and n:
        unit = row_unit(gate, dh.stride(0), gate.stride(0), _strides(up)[0])
        launching.launch(
            grouped_glu_backward_kernel,
            partials.shape[0] * cdiv(n, GLU.block_n),
            (dh, gate, up, contiguous(delta), dgate_up, partials, offsets.contiguous()),
            t,
            (n, experts, chunk, *dh.stride(), *gate.stride(), *_strides(up)),
            rows_schedule(GLU, unit, True, ("ACTIVATION", activation), block_e(offsets)),
        )
    return sum_expert_partials(partials, offsets, chunk)


def _strides(up: Tensor | None) -> tuple[int, int]:
    return (0, 0) if up is None else (up.stride(0), up.stride(1))

"""The gain in an FFN's activation: one pass forward, one pass backward over [T, n].

    glu             h = act(g) * u * gain                       line (8): reads g and u, writes h
    glu_backward    dg, du, partials of sum_t dh * act(g) * u   lines (9), (10): reads dh, g and u, writes dg and du
    glu_ddelta      the partials alone                          line (10): reads dh, g and u

Without u, they read g alone. dg and du are the halves of one tensor [T, 2n], which a packed projection's GEMM reads directly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.kernels import launching
from gain_ops.kernels._common import cdiv, load_gain, load_tile, multiple, row_unit, rows_schedule
from gain_ops.kernels.config import GLU, RowsConfig, rows_chunk
from gain_ops.kernels.partials import sum_partials


@triton.jit
def act_and_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x) in fp32; NaN stays NaN."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu2":
        r = tl.where(x < 0.0, 0.0, x)
        return r * r, 2.0 * r
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:  # gelu_tanh: 1/2 (1 + tanh(v)) = sigmoid(2 v)
        square = x * x
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        return x * s, s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * square))


@triton.jit(do_not_specialize=["T"])
def glu_kernel(
    gate,  # [T, N]
    up,  # [T, N] or None
    delta,  # [N]
    h,  # [T, N] contiguous
    T,
    N,
    stride_gt,
    stride_gn,
    stride_ut,
    stride_un,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program computes one [BLOCK_T, BLOCK_N] tile."""
    N = multiple(N, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < T)[:, None] & (cols < N)[None, :]
    g = load_tile(gate, rows, cols, multiple(stride_gt, UNIT), stride_gn, mask)
    tile, _ = act_and_slope(g, ACTIVATION)
    if up is not None:
        tile *= load_tile(up, rows, cols, multiple(stride_ut, UNIT), stride_un, mask)
    tile *= load_gain(delta, cols, N)[None, :]
    tl.store(h + rows[:, None] * N + cols[None, :], tile.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def glu_backward_kernel(
    dh,  # [T, N]
    gate,  # [T, N]
    up,  # [T, N] or None
    delta,  # [N]; None when dgate_up is None
    dgate_up,  # [T, 2 N] contiguous, without up [T, N], or None
    partials,  # [chunks, N] fp32
    T,
    N,
    chunk,  # rows of a chunk
    stride_dt,
    stride_dn,
    stride_gt,
    stride_gn,
    stride_ut,
    stride_un,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes a chunk of rows of BLOCK_N columns; neighbours in the grid are neighbours in memory."""
    N = multiple(N, UNIT)
    stride_dt = multiple(stride_dt, UNIT)
    stride_gt = multiple(stride_gt, UNIT)
    stride_ut = multiple(stride_ut, UNIT)
    stride_out = N if up is None else 2 * N
    n_blocks = tl.cdiv(N, BLOCK_N)
    place = (tl.program_id(0) // n_blocks).to(tl.int64)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = cols < N
    running = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if dgate_up is not None:
        gain = load_gain(delta, cols, N)[None, :]
    for start in tl.range(0, chunk, BLOCK_T, num_stages=STAGES):
        rows = place * chunk + start + tl.arange(0, BLOCK_T)
        mask = (rows < T)[:, None] & in_n[None, :]
        d = load_tile(dh, rows, cols, stride_dt, stride_dn, mask)
        g = load_tile(gate, rows, cols, stride_gt, stride_gn, mask)
        act, slope = act_and_slope(g, ACTIVATION)
        through = d * act
        if up is not None:
            u = load_tile(up, rows, cols, stride_ut, stride_un, mask)
            slope *= u
            if dgate_up is not None:
                du = (through * gain).to(dgate_up.dtype.element_ty)
                tl.store(dgate_up + rows[:, None] * stride_out + N + cols[None, :], du, mask=mask)
            running += through * u
        else:
            running += through
        if dgate_up is not None:
            dg = (d * gain * slope).to(dgate_up.dtype.element_ty)
            tl.store(dgate_up + rows[:, None] * stride_out + cols[None, :], dg, mask=mask)
    tl.store(partials + place * N + cols, tl.sum(running, axis=0), mask=in_n)


def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
    """h = act(gate) * up * gain: -> [T, n] contiguous."""
    return launch(gate, up, delta, activation)


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dg and du side by side [T, 2n] (without up: dg [T, n]) and ddelta [n], in one pass."""
    t, n = gate.shape
    dgate_up = gate.new_empty((t, n if up is None else 2 * n))
    return dgate_up, launch_backward(dh, gate, up, delta, dgate_up, activation)


def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """sum_t dh * act(gate) * up [n]; nothing else is written."""
    return launch_backward(dh, gate, up, None, None, activation)


def launch(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str, config: RowsConfig = GLU) -> Tensor:
    """Run the forward pass."""
    h = gate.new_empty(gate.shape)
    t, n = gate.shape
    if h.numel():
        launching.launch(
            glu_kernel,
            cdiv(t, config.block_t) * cdiv(n, config.block_n),
            (gate, up, delta.contiguous(), h),
            t,
            (n, *gate.stride(), *_strides(up)),
            rows_schedule(config, row_unit(gate, gate.stride(0), _strides(up)[0]), False, ("ACTIVATION", activation)),
        )
    return h


def launch_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor | None,
    dgate_up: Tensor | None,
    activation: str,
    config: RowsConfig = GLU,
) -> Tensor:
    """Run the backward pass and its second stage: -> ddelta [n] fp32, and ``dgate_up`` written."""
    t, n = gate.shape
    if t == 0 or n == 0:
        return torch.zeros(n, dtype=torch.float32, device=gate.device)
    chunk = rows_chunk(t, n)
    unit = row_unit(gate, dh.stride(0), gate.stride(0), _strides(up)[0])
    chunks = cdiv(t, chunk)
    partials = gate.new_empty((chunks, n), dtype=torch.float32)
    launching.launch(
        glu_backward_kernel,
        chunks * cdiv(n, config.block_n),
        (dh, gate, up, None if delta is None else delta.contiguous(), dgate_up, partials),
        t,
        (n, chunk, *dh.stride(), *gate.stride(), *_strides(up)),
        rows_schedule(config, unit, True, ("ACTIVATION", activation)),
    )
    return sum_partials(partials)


def _strides(up: Tensor | None) -> tuple[int, int]:
    return (0, 0) if up is None else (up.stride(0), up.stride(1))

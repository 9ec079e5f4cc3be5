"""A GEMM whose epilogue makes an activation gradient and the partial sums of ddelta: the two backward passes from a saved x.

    recompute    acc = x @ W.T     C = dy    writes gain * C      partials of sum_t acc * C    lines (1), (3), (4)
    input side   acc = dy @ W      C = x     writes gain * acc    partials of sum_t acc * C    lines (6), (7)
    ddelta only  either            either    writes nothing       partials of sum_t acc * C    line (4) or (7)

z, or dy @ W, exists in registers alone. Bytes: the GEMM's, C once more, and one row of fp32 partials for each tile row. The
sums of a tile have a fixed order, and partials.py adds the rows in a fixed order: the same bits on every run. The vendor's GEMM
and the pass of rows.py serve operands that operands.fuses refuses.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends.operands import fuses
from gain_ops.kernels import launching, tables
from gain_ops.kernels._common import (
    GEMM_UNIT,
    cdiv,
    gemm_grid,
    gemm_operands,
    gemm_schedule,
    grouped_tile,
    load_gain,
    load_tile,
    matmul_tile,
    multiple,
    split_columns,
    store_tile,
)
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.partials import sum_partials
from gain_ops.kernels.rows import COMPOSED

OPS = {"c": "backward_recompute", "acc": "backward_input", "nothing": "ddelta_recompute"}
"""The op that writes it."""


@triton.jit
def _load_c(c, row, col, M, N, stride_c, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, USE_TMA: tl.constexpr):
    if USE_TMA:
        return c.load([row, col]).to(tl.float32)
    else:
        at_rows = row + tl.arange(0, HEIGHT).to(tl.int64)
        cols = col + tl.arange(0, WIDTH)
        mask = (at_rows < M)[:, None] & (cols < N)[None, :]
        return load_tile(c, at_rows, cols, multiple(stride_c, GEMM_UNIT), 1, mask)


@triton.jit
def _epilogue(
    acc,
    c,
    out,
    delta,
    partials,
    tile_m,
    row,
    col,
    M,
    N,
    stride_c,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITES: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    cols = col + tl.arange(0, WIDTH)
    tile = _load_c(c, row, col, M, N, stride_c, HEIGHT, WIDTH, USE_TMA)
    # rows past M are zero in both factors
    tl.store(partials + tile_m.to(tl.int64) * N + cols, tl.sum(acc * tile, axis=0), mask=cols < N)
    if WRITES == "acc":
        store_tile(out, acc * load_gain(delta, cols, N)[None, :], row, col, M, N, HEIGHT, WIDTH, USE_TMA)
    elif WRITES == "c":
        store_tile(out, tile * load_gain(delta, cols, N)[None, :], row, col, M, N, HEIGHT, WIDTH, USE_TMA)


@triton.jit(do_not_specialize=["M"])
def linear_backward_kernel(
    a,  # [M, K]
    b,  # [N, K], or [K, N] when B_IS_KN
    c,  # [M, N]
    delta,  # [N]; None when WRITES is "nothing"
    out,  # [M, N]; None when WRITES is "nothing"
    partials,  # [m_tiles, N] fp32
    M,
    N,
    K,
    stride_a,
    stride_b,
    stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    WRITES: tl.constexpr,  # "acc", "c" or "nothing"
    USE_TMA: tl.constexpr,
    B_IS_KN: tl.constexpr,
):
    """Persistent over tiles, as linear_kernel."""
    N = multiple(N, GEMM_UNIT)
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, m_tiles, n_tiles, GROUP_M)
        row = tile_m * BLOCK_M
        col = tile_n * BLOCK_N
        acc = matmul_tile(
            a, b, row, col, M, N, K, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, B_IS_KN,
        )  # fmt: skip
        if SUBTILES == 2:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = split_columns(acc, BLOCK_M, BLOCK_N)
            _epilogue(left, c, out, delta, partials, tile_m, row, col, M, N, stride_c, BLOCK_M, HALF, WRITES, USE_TMA)
            _epilogue(
                right, c, out, delta, partials, tile_m, row, col + HALF, M, N, stride_c, BLOCK_M, HALF, WRITES, USE_TMA
            )
        else:
            _epilogue(acc, c, out, delta, partials, tile_m, row, col, M, N, stride_c, BLOCK_M, BLOCK_N, WRITES, USE_TMA)


def backward_recompute(
    dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor]:
    """dz = gain * dy [T, out] and ddelta = sum_t dy * (x @ W.T) [out], from x [T, in], weight [out, in], dy [T, out]."""
    if not fuses(x, weight, dy):
        return COMPOSED.backward_recompute(dy, x, weight, delta)
    dz = dy.new_empty(dy.shape)
    return dz, launch(x, weight, dy, delta, dz, "c", config)


def backward_input(
    dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor]:
    """dx = gain * (dy @ W) [T, in] and ddelta = sum_t (dy @ W) * x [in], from dy [T, out], weight [out, in], x [T, in]."""
    if not fuses(dy, weight.t(), x):
        return COMPOSED.backward_input(dy, x, weight, delta)
    dx = x.new_empty(x.shape)
    return dx, launch(dy, weight.t(), x, delta, dx, "acc", config)


def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor, config: GemmConfig | None = None) -> Tensor:
    """sum_t dy * (x @ W.T) [out]; no activation is written."""
    if not fuses(x, weight, dy):
        return COMPOSED.ddelta_recompute(dy, x, weight)
    return launch(x, weight, dy, None, None, "nothing", config)


def launch(
    a: Tensor,
    weight: Tensor,
    c: Tensor,
    delta: Tensor | None,
    out: Tensor | None,
    writes: str,
    config: GemmConfig | None = None,
) -> Tensor:
    """Run the GEMM and the second stage: a [M, K], weight [N, K], c [M, N] -> ddelta [N] fp32, and ``out`` written."""
    m, n = c.shape
    if config is None:
        config = tables.gemm_config(OPS[writes], a, weight)
    partials = c.new_empty((cdiv(m, config.block_m), n), dtype=torch.float32)
    transposed, operands, numbers = gemm_operands(a, weight)
    launching.launch(
        linear_backward_kernel,
        gemm_grid(a, weight, config),
        (*operands, c, None if delta is None else delta.contiguous(), out, partials),
        m,
        (*numbers, c.stride(0)),
        _schedule(config, transposed, writes),
    )
    return sum_partials(partials)


@functools.cache
def _schedule(config: GemmConfig, transposed: bool, writes: str) -> launching.Schedule:
    return gemm_schedule(config, transposed, "tvtv", WRITES=writes, USE_TMA=config.use_tma)

"""y = gain * (x @ W.T) + b in a GEMM's epilogue, with an optional store of z: lines (1), (2) of reference.py.

Bytes: x, W and y once, and z where it is stored. Flops: 2 T in out. The scale costs one multiply an element in registers, and
the result is rounded once; a separate pass would read and write [T, out] again. The vendor's GEMM and that pass serve operands
that operands.fuses refuses.
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
    gemm_grid,
    gemm_operands,
    gemm_schedule,
    grouped_tile,
    load_gain,
    matmul_tile,
    multiple,
    split_columns,
    store_tile,
)
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.rows import COMPOSED


@triton.jit
def _epilogue(
    acc,
    y,
    z,
    delta,
    bias,
    row,
    col,
    M,
    N,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    cols = col + tl.arange(0, WIDTH)
    out = acc * load_gain(delta, cols, N)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, out, row, col, M, N, HEIGHT, WIDTH, USE_TMA)
    if STORE_Z:
        store_tile(z, acc, row, col, M, N, HEIGHT, WIDTH, USE_TMA)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    a,  # x [M, K]
    b,  # W [N, K], or [K, N] when B_IS_KN
    delta,  # [N]
    bias,  # [N] or None
    y,  # [M, N]
    z,  # [M, N] or None
    M,
    N,
    K,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    USE_TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    B_IS_KN: tl.constexpr,
):
    """Persistent over tiles: a program takes every num_programs-th tile, so one code serves a full grid and a short one."""
    N = multiple(N, GEMM_UNIT)
    HAS_BIAS: tl.constexpr = bias is not None
    STORE_Z: tl.constexpr = z is not None
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = grouped_tile(tile, m_tiles, n_tiles, GROUP_M)
        row = tile_m * BLOCK_M
        col = tile_n * BLOCK_N
        acc = matmul_tile(
            a, b, row, col, M, N, K, stride_a, stride_b, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, B_IS_KN,
        )  # fmt: skip
        if SUBTILES == 2:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = split_columns(acc, BLOCK_M, BLOCK_N)
            _epilogue(left, y, z, delta, bias, row, col, M, N, BLOCK_M, HALF, HAS_BIAS, STORE_Z, USE_TMA)
            _epilogue(right, y, z, delta, bias, row, col + HALF, M, N, BLOCK_M, HALF, HAS_BIAS, STORE_Z, USE_TMA)
        else:
            _epilogue(acc, y, z, delta, bias, row, col, M, N, BLOCK_M, BLOCK_N, HAS_BIAS, STORE_Z, USE_TMA)


def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, config: GemmConfig | None = None) -> Tensor:
    """``gain * (x @ W.T) + b``: x [T, in], weight [out, in], delta [out], bias [out] -> y [T, out]."""
    if not fuses(x, weight):
        return COMPOSED.linear(x, weight, delta, bias)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    launch(x, weight, delta, bias, y, None, config)
    return y


def linear_z(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor]:
    """``linear`` that also stores z = x @ W.T [T, out], from the same accumulators."""
    if not fuses(x, weight):
        return COMPOSED.linear_z(x, weight, delta, bias)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    z = torch.empty_like(y)
    launch(x, weight, delta, bias, y, z, config)
    return y, z


def launch(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    config: GemmConfig | None = None,
) -> None:
    """Run the kernel with a configuration; by default that of a table or the heuristic."""
    if config is None:
        config = tables.gemm_config("linear" if z is None else "linear_z", x, weight)
    transposed, operands, numbers = gemm_operands(x, weight)
    launching.launch(
        linear_kernel,
        gemm_grid(x, weight, config),
        (*operands, delta.contiguous(), None if bias is None else bias.contiguous(), y, z),
        x.shape[0],
        numbers,
        _schedule(config, transposed),
    )


@functools.cache
def _schedule(config: GemmConfig, transposed: bool) -> launching.Schedule:
    return gemm_schedule(config, transposed, "vvtt", USE_TMA=config.use_tma, FLATTEN=config.flatten)

"""The forward with the loop over tiles flattened into the loop over k: linear_forward.py's kernel but for ``flatten``.

The next tile's loads are then in flight under this one's epilogue, where the shipped loop drains and starts cold. Triton found
it slower once (triton-lang/triton#9279), so a GPU decides (benchmarks/NOTES.md). By TMA and persistent alone.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends.operands import fuses
from gain_ops.kernels import launching, linear_forward, tables
from gain_ops.kernels._common import GEMM_UNIT as UNIT
from gain_ops.kernels._common import gemm_grid, gemm_operands, gemm_schedule, grouped_tile, multiple, split_columns
from gain_ops.kernels.aot import Call
from gain_ops.kernels.config import GemmConfig

epilogue = linear_forward._epilogue
STAGES = (3, 4)


@triton.jit(do_not_specialize=["M"])
def flattened_kernel(
    a,  # as linear_kernel, all by descriptors but the vectors
    b,
    delta,
    bias,
    y,
    z,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    B_IS_KN: tl.constexpr,
):
    """Persistent over tiles, as linear_kernel."""
    N = multiple(N, UNIT)
    HAS_BIAS: tl.constexpr = bias is not None
    STORE_Z: tl.constexpr = z is not None
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(tile, m_tiles, n_tiles, GROUP_M)
        row = tile_m * BLOCK_M
        col = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a_tile = a.load([row, k])
            if B_IS_KN:
                b_tile = b.load([k, col])
            else:
                b_tile = b.load([col, k]).T
            acc = tl.dot(a_tile, b_tile, acc)
        if SUBTILES == 2:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = split_columns(acc, BLOCK_M, BLOCK_N)
            epilogue(left, y, z, delta, bias, row, col, M, N, BLOCK_M, HALF, HAS_BIAS, STORE_Z, True)
            epilogue(right, y, z, delta, bias, row, col + HALF, M, N, BLOCK_M, HALF, HAS_BIAS, STORE_Z, True)
        else:
            epilogue(acc, y, z, delta, bias, row, col, M, N, BLOCK_M, BLOCK_N, HAS_BIAS, STORE_Z, True)


def linear(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, stages: int, keep_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``gain * (x @ W.T) + b`` as linear_forward.linear, and z where it is kept, in the heuristic's tile.

    Raises:
        ValueError: operands that do not go by TMA.

    """
    if not serves(x, weight):
        raise ValueError(
            f"the flattened loop reads by TMA: expected operands of 16 bits with aligned rows on sm_90 or later, got "
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} in {x.dtype}"
        )
    config = replace(tables.gemm_config("linear", x, weight), num_stages=stages)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    z = torch.empty_like(y) if keep_z else None
    transposed, operands, numbers = gemm_operands(x, weight)
    launching.launch(
        flattened_kernel,
        gemm_grid(x, weight, config),
        (*operands, delta.contiguous(), None if bias is None else bias.contiguous(), y, z),
        x.shape[0],
        numbers[:2],
        _schedule(config, transposed),
    )
    return y, z


@functools.cache
def _schedule(config: GemmConfig, transposed: bool) -> launching.Schedule:
    return gemm_schedule(config, transposed, "vvtt")


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel runs on these operands."""
    config = tables.gemm_config("linear", x, weight)
    return fuses(x, weight) and config.use_tma and config.persistent


_ARGUMENTS = ("x", "weight", "delta_out", "bias")
CALLS = {
    "flattened, 3 stages": Call(partial(linear, stages=3), _ARGUMENTS, {"bias": None}),
    "flattened, 4 stages": Call(partial(linear, stages=4), _ARGUMENTS, {"bias": None}),
    "flattened, bias and z, 3 stages": Call(partial(linear, stages=3, keep_z=True), _ARGUMENTS),
    "flattened, bias and z, 4 stages": Call(partial(linear, stages=4, keep_z=True), _ARGUMENTS),
}
"""What gain_ops.kernels.aot compiles of it."""

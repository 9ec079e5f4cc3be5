"""dx = (dy * gain) @ W and ddelta = sum_t dy * z in one GEMM: lines (3), (4) of reference.py with no dz in memory.

dy is scaled in registers before the product, or W is scaled already and dy is not. The tiles that read the same rows of dy each
sum their share of the blocks of ``out``: z is read once, and partials.py adds the rows of partials in a fixed order. Bytes: the
GEMM's and z; rows.py and a GEMM move dz twice and dy once more.

No op runs it yet: only a GPU can show what the scaling costs the main loop (benchmarks/NOTES.md).
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gain_ops.backends.operands import fuses
from gain_ops.kernels import launching, rows, tables
from gain_ops.kernels._common import (
    cdiv,
    gemm_grid,
    gemm_operands,
    gemm_schedule,
    grouped_tile,
    load_gain,
    split_columns,
    store_tile,
)
from gain_ops.kernels.aot import Call
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.devices import architecture
from gain_ops.kernels.partials import sum_partials


@triton.jit(do_not_specialize=["M"])
def backward_dx_kernel(
    a,  # dy [M, K], descriptor, as all but the vectors
    b,  # W [K, N], or [N, K] when not B_IS_KN
    z,  # [M, K]
    delta,  # [K], or None where W is scaled already
    dx,  # [M, N]
    partials,  # [m_tiles, K] fp32
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
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, m_tiles, n_tiles, GROUP_M)
        row = tile_m * BLOCK_M
        col = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            dy_tile = a.load([row, k])
            if B_IS_KN:
                w_tile = b.load([k, col])
            else:
                w_tile = b.load([col, k]).T
            factor = dy_tile
            if delta is not None:
                factor = (dy_tile.to(tl.float32) * load_gain(delta, ks, K)[None, :]).to(dy_tile.dtype)
            acc = tl.dot(factor, w_tile, acc)
            # n_tiles programs read this block of dy: one of them sums it. It reads dy again: a tile that fed both a wgmma
            # and a sum had one buffer too few in the pipeline, and was overwritten while in use
            if (k // BLOCK_K) % n_tiles == tile_n:
                sums = tl.sum(a.load([row, k]).to(tl.float32) * z.load([row, k]).to(tl.float32), axis=0)
                tl.store(partials + tile_m.to(tl.int64) * K + ks, sums, mask=ks < K)
        if SUBTILES == 2:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = split_columns(acc, BLOCK_M, BLOCK_N)
            store_tile(dx, left, row, col, M, N, BLOCK_M, HALF, True)
            store_tile(dx, right, row, col + HALF, M, N, BLOCK_M, HALF, True)
        else:
            store_tile(dx, acc, row, col, M, N, BLOCK_M, BLOCK_N, True)


def serves(arch: str, config: GemmConfig) -> bool:
    """Whether the kernel runs: it needs TMA, and on sm_100 its large tile needs more shared memory than there is."""
    return config.use_tma and arch in ("sm_90", "interpreter")


def backward_dx(dy: Tensor, z: Tensor, weight: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx = (dy * gain) @ W [T, in] and ddelta = sum_t dy * z [out], from dy and z [T, out] and weight [out, in].

    Args:
        dy, z: [T, out].
        weight: [out, in]; already ``gain[:, None] * W`` where delta is None.
        delta: [out] or None.

    On other architectures, and where TMA cannot read the operands, the pass of rows.py and the vendor's GEMM do the same.

    """
    if fuses(dy, weight.t(), z):
        config = tables.heuristic(dy.device.index, dy.shape[0], weight.shape[1])
        if delta is None:
            # a product that reads dy from shared memory holds one more tile of it, and 4 stages of the large tile do not fit
            config = replace(config, num_stages=min(config.num_stages, 3))
        if serves(architecture(dy.device.index), config):
            dx = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device)
            return dx, launch(dy, z, weight, delta, dx, config)
    if delta is None:
        return dy @ weight, rows.ddelta(dy, z)
    dz, sums = rows.backward(dy, z, delta)
    return dz @ weight, sums


def launch(dy: Tensor, z: Tensor, weight: Tensor, delta: Tensor | None, dx: Tensor, config: GemmConfig) -> Tensor:
    """Run the kernel and the second stage: -> ddelta [out] fp32, and ``dx`` written. ``config.use_tma`` must be set."""
    partials = dy.new_empty((cdiv(dy.shape[0], config.block_m), dy.shape[1]), dtype=torch.float32)
    transposed, operands, numbers = gemm_operands(dy, weight.t())
    launching.launch(
        backward_dx_kernel,
        gemm_grid(dy, weight.t(), config),
        (*operands, z, None if delta is None else delta.contiguous(), dx, partials),
        dy.shape[0],
        numbers[:2],
        _schedule(config, transposed),
    )
    return sum_partials(partials)


@functools.cache
def _schedule(config: GemmConfig, transposed: bool) -> launching.Schedule:
    return gemm_schedule(config, transposed, "kvtv")


_ARGUMENTS = ("dy", "z", "weight", "delta_out")
CALLS = {
    "backward_dx": Call(backward_dx, _ARGUMENTS),
    "backward_dx, W scaled": Call(backward_dx, _ARGUMENTS, {"delta_out": None}),
}
"""The calls that gain_ops.kernels.aot compiles."""

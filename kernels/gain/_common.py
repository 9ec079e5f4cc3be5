"""Device helpers that the kernels share, and the host's view of a GEMM's operands.

A GEMM operand reaches a kernel either as a tensor descriptor (TMA, where the chip has it) or as a pointer with the stride of
its rows. Out-of-range elements read as zero, so partial tiles need no special case in a sum.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gain_ops.kernels.config import GemmConfig, RmsNormConfig, RowsConfig
from gain_ops.kernels.descriptors import Block
from gain_ops.kernels.devices import persistent_programs
from gain_ops.kernels.launching import Schedule

GEMM_UNIT = tl.constexpr(8)
"""16-bit elements in 16 bytes: the sizes and row strides of a fused GEMM are multiples of it (operands.fuses)."""


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """n, which is a multiple of UNIT, in a form that shows this to the compiler: its own hint is for multiples of 16 alone."""
    return n // UNIT * UNIT


@triton.jit
def grouped_tile(tile, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """Tile number -> (tile_m, tile_n), walking GROUP_M tile rows together so that their W tiles stay in L2."""
    per_group = GROUP_M * n_tiles
    first = (tile // per_group) * GROUP_M
    rows = min(m_tiles - first, GROUP_M)
    within = tile % per_group
    return first + within % rows, within // rows


@triton.jit
def matmul_tile(
    a,  # [M, K] descriptor or pointer
    b,  # [N, K], or [K, N] when B_IS_KN: descriptor or pointer
    row,
    col,
    M,
    N,
    K,
    stride_a,  # of rows; within a row the stride is 1
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    B_IS_KN: tl.constexpr,
):
    """acc[m, n] = sum_k a[row + m, k] * b[col + n, k] in fp32, line (1) of reference.py."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_TMA:
        for k in tl.range(0, K, BLOCK_K):
            a_tile = a.load([row, k])
            if B_IS_KN:
                b_tile = b.load([k, col])
            else:
                b_tile = b.load([col, k]).T
            acc = tl.dot(a_tile, b_tile, acc)
    else:
        K = multiple(K, GEMM_UNIT)
        # 64 bits: a tile row, or a step of BLOCK_K rows, may start past 2^31 elements
        step_a = multiple(stride_a, GEMM_UNIT).to(tl.int64)
        step_b = multiple(stride_b, GEMM_UNIT).to(tl.int64)
        rows = row + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        a_ptrs = a + rows[:, None] * step_a + ks[None, :]
        if B_IS_KN:
            b_ptrs = b + ks[:, None] * step_b + cols[None, :]
        else:
            b_ptrs = b + cols[None, :] * step_b + ks[:, None]
        for k in tl.range(0, K, BLOCK_K):
            in_k = ks < K - k
            a_tile = tl.load(a_ptrs, mask=(rows < M)[:, None] & in_k[None, :], other=0.0)
            b_tile = tl.load(b_ptrs, mask=in_k[:, None] & (cols < N)[None, :], other=0.0)
            acc = tl.dot(a_tile, b_tile, acc)
            a_ptrs += BLOCK_K
            if B_IS_KN:
                b_ptrs += BLOCK_K * step_b
            else:
                b_ptrs += BLOCK_K
    return acc


@triton.jit
def split_columns(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] -> its left and right halves, so that the store stages half as much shared memory."""
    halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    return tl.split(halves)


@triton.jit
def load_gain(delta, cols, N):
    """gain[cols] = 1 + delta[cols] in fp32: the 1 is added here, so no launch forms the gain."""
    return 1.0 + tl.load(delta + cols, mask=cols < N, other=0.0).to(tl.float32)


@triton.jit
def load_tile(t, rows, cols, stride_t, stride_n, mask):
    """t[rows, cols] of a matrix of any strides in fp32, 0 where masked; rows are 64-bit indices."""
    at = t + rows[:, None] * stride_t + cols[None, :].to(tl.int64) * stride_n
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(out, tile, row, col, M, N, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, USE_TMA: tl.constexpr):
    """Write an fp32 tile [HEIGHT, WIDTH] at (row, col) of a contiguous out [M, N], rounded once to its dtype."""
    if USE_TMA:
        out.store([row, col], tile.to(out.dtype))
    else:
        rows = row + tl.arange(0, HEIGHT)
        cols = col + tl.arange(0, WIDTH)
        offsets = rows[:, None].to(tl.int64) * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(out + offsets, tile.to(out.dtype.element_ty), mask=mask)


def gemm_operands(a: Tensor, weight: Tensor) -> tuple[bool, tuple[Tensor, Tensor], tuple[int, int, int, int]]:
    """What a GEMM of a [M, K] and weight [N, K] is launched with: B_IS_KN, a and b, and N, K and the strides of their rows."""
    transposed = weight.stride(1) != 1
    b = weight.t() if transposed else weight
    return transposed, (a, b), (weight.shape[0], a.shape[1], a.stride(0), b.stride(0))


def gemm_grid(a: Tensor, weight: Tensor, config: GemmConfig) -> int:
    """One program for each tile, or one for each multiprocessor, which walks over tiles."""
    tiles = cdiv(a.shape[0], config.block_m) * cdiv(weight.shape[0], config.block_n)
    return min(tiles, persistent_programs(a.device.index)) if config.persistent else tiles


def gemm_schedule(config: GemmConfig, transposed: bool, after: str, **more: Any) -> Schedule:
    """A configuration as a schedule, of which a launcher keeps one for each configuration and orientation of W.

    Args:
        config: the configuration.
        transposed: whether b is [K, N].
        after: of the tensors after a and b, a letter each: t for a [M, N] tile, k for one of a's blocks, v for any vector.
        more: further compile-time arguments.

    """
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SUBTILES": config.subtiles,
        "B_IS_KN": transposed,
        "num_stages": config.num_stages,
        **options(config.num_warps),
        **more,
    }
    if not config.use_tma:
        return Schedule(constants)
    of_a = (config.block_m, config.block_k)
    of_b = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
    of: dict[str, Block | None] = {"t": (config.block_m, config.block_n // config.subtiles), "k": of_a, "v": None}
    return Schedule(constants, (of_a, of_b, *(of[letter] for letter in after)))


@functools.cache
def rows_schedule(config: RowsConfig, unit: int, loops: bool, *more: tuple[str, Any]) -> Schedule:
    """The schedule of a one-pass kernel; ``loops``: over the rows of a chunk."""
    constants = {
        "UNIT": unit,
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        **options(config.num_warps),
        **dict(more),
    }
    if loops:
        # narrower rows cannot be copied asynchronously, and trying costs registers
        constants["STAGES"] = config.num_stages if unit > 1 else 1
    return Schedule(constants)


@functools.cache
def norm_schedule(config: RmsNormConfig, unit: int, chunk: int | None = None) -> Schedule:
    """The schedule of a norm's kernel; ``chunk``: the rows that a program of a backward takes."""
    chunks = {} if chunk is None else {"chunk": chunk}
    return Schedule({"UNIT": unit, "BLOCK_N": config.block_n, **options(config.num_warps), **chunks})


def cdiv(n: int, size: int) -> int:
    """How many blocks of a size cover n; triton.cdiv takes 2 us."""
    return -(-n // size)


def row_unit(like: Tensor, *strides: int) -> int:
    """The unit of which rows are multiples in a one-pass kernel: the elements in 16 bytes if sizes and strides fit, else 1."""
    unit = 16 // like.element_size()
    return unit if all([stride % unit == 0 for stride in (like.shape[1], *strides)]) else 1


def options(num_warps: int) -> dict[str, Any]:
    """Compiler options of every kernel: a multiply and an add may fuse, on every version of Triton."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}

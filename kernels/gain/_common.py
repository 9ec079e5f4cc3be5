"""Device helpers that the kernels share, and the host's view of a GEMM's operands.

A GEMM operand reaches a kernel either as a tensor descriptor (TMA, where the chip has it) or as a pointer with the stride of
its rows. Out-of-range elements read as zero, so partial tiles need no special case in a sum.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.devices import persistent_programs

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


def descriptor(t: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A TMA descriptor of a row-major 2-D tensor whose tiles are ``block``."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def tiled(t: Tensor | None, config: GemmConfig) -> Tensor | TensorDescriptor | None:
    """A [M, N] result, or a tensor that the epilogue reads, in the kernel's form: with tiles of one subtile."""
    if t is None or not config.use_tma:
        return t
    return descriptor(t, (config.block_m, config.block_n // config.subtiles))


def gemm_operands(a: Tensor, weight: Tensor, config: GemmConfig) -> dict[str, Any]:
    """A GEMM kernel's arguments for its main loop: a [M, K], weight [N, K], their rows' strides, the schedule."""
    transposed = weight.stride(1) != 1
    b = weight.t() if transposed else weight
    arguments: dict[str, Any] = {"a": a, "b": b}
    if config.use_tma:
        block = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
        arguments = {"a": descriptor(a, (config.block_m, config.block_k)), "b": descriptor(b, block)}
    return arguments | {
        "M": a.shape[0],
        "N": weight.shape[0],
        "K": a.shape[1],
        "stride_a": a.stride(0),
        "stride_b": b.stride(0),
        "B_IS_KN": transposed,
        **schedule(config),
    }


def schedule(config: GemmConfig) -> dict[str, Any]:
    """A configuration as the kernels' compile-time arguments."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SUBTILES": config.subtiles,
        "USE_TMA": config.use_tma,
        "num_stages": config.num_stages,
        **options(config.num_warps),
    }


def row_unit(like: Tensor, *strides: int) -> int:
    """The unit of which rows are multiples in a one-pass kernel: the elements in 16 bytes if sizes and strides fit, else 1."""
    unit = 16 // like.element_size()
    return unit if all(stride % unit == 0 for stride in (like.shape[1], *strides)) else 1


def options(num_warps: int) -> dict[str, Any]:
    """Compiler options of every kernel: a multiply and an add may fuse, on every version of Triton."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def gemm_grid(a: Tensor, weight: Tensor, config: GemmConfig) -> tuple[int]:
    """One program for each tile, or one for each multiprocessor, which walks over tiles."""
    tiles = triton.cdiv(a.shape[0], config.block_m) * triton.cdiv(weight.shape[0], config.block_n)
    return (min(tiles, persistent_programs(a.device.index)) if config.persistent else tiles,)

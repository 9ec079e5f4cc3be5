"""Launch configurations: frozen dataclasses, and one named heuristic for each kernel, which picks by architecture and shape.

A table (tuning.py) may replace a heuristic's pick; nothing is ever timed during training. ``choices`` lists every
configuration that the heuristics can return, and the ahead-of-time check compiles each of them.

benchmarks/NOTES.md has the reasons for these configurations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmConfig:
    """Tiles and schedule of a GEMM kernel; shared memory grows with num_stages * (block_m + block_n) * block_k."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    subtiles: int = 1
    """1, or 2 to stage and store the tile in two column halves."""
    group_m: int = 8
    persistent: bool = True
    use_tma: bool = True
    flatten: bool = False
    """Of the forward: the loop over tiles flattened into the loop over k, so that loads are in flight under the epilogue."""


@dataclass(frozen=True)
class RowsConfig:
    """Tiles of a one-pass kernel over [T, n], and how many of them are in flight in its loop."""

    block_t: int = 8
    block_n: int = 256
    num_warps: int = 4
    num_stages: int = 3


ROWS = RowsConfig()
GLU = RowsConfig(block_t=4)  # three tiles at once: at 8 rows Triton 3.6 spills on gfx942
COMBINE = RowsConfig(block_t=1, block_n=1024)  # a token's row at once: 16 bytes a thread

NORM_FEATURES = 8192
"""The widest row of an RMSNorm that a program holds in registers: twice as much spills, and needs more than the 1024 threads
that a block of 64-wide wavefronts can have."""


def rows_chunk(t: int, n: int) -> int:
    """Rows of [t, n] that make one row of partial sums in a one-pass kernel: a function of the sizes, not of the device.

    The most that leave 512 programs, about four for each multiprocessor of the large devices, so that partial sums are few;
    at least 16.
    """
    across = -(-n // ROWS.block_n)
    return next((chunk for chunk in (128, 64, 32) if -(-t // chunk) * across >= 512), 16)


def rms_norm_chunk(t: int) -> int:
    """Rows of an RMSNorm that make one row of partial sums: the most of 16, 8 or 4 that leave 256 programs."""
    return next((chunk for chunk in (16, 8) if -(-t // chunk) >= 256), 4)


@dataclass(frozen=True)
class RmsNormConfig:
    """Tiles of an RMSNorm kernel: full rows of block_n >= n columns in registers, or column blocks in turn."""

    block_n: int
    num_warps: int
    whole_row: bool


def rms_norm_config(n: int, rows: int) -> RmsNormConfig:
    """The RMSNorm heuristic: about 16 values a thread for a full row, 8 a thread for blocks of ``rows`` rows at once."""
    if n > NORM_FEATURES:
        return RmsNormConfig(2048 // rows, num_warps=8, whole_row=False)
    block_n = 1 << (n - 1).bit_length()
    return RmsNormConfig(block_n, num_warps=max(block_n // 512, 1), whole_row=True)


# by TMA: Hopper and data-centre Blackwell
_HOPPER_LARGE = GemmConfig(128, 256, 64, num_warps=8, num_stages=4, subtiles=2)
_HOPPER_SMALL = GemmConfig(128, 128, 64, num_warps=8, num_stages=4)
# by pointers and cp.async: everything from sm_80 on that has no TMA and wgmma
_AMPERE_LARGE = GemmConfig(128, 128, 32, num_warps=8, num_stages=4, persistent=False, use_tma=False)
_AMPERE_SMALL = GemmConfig(64, 64, 64, num_warps=4, num_stages=3, persistent=False, use_tma=False)
_CDNA = GemmConfig(128, 128, 64, num_warps=8, num_stages=2, persistent=False, use_tma=False)
_INTERPRETER = GemmConfig(16, 32, 16, num_warps=4, num_stages=2, subtiles=2)


def gemm_config(arch: str, m: int, n: int, multiprocessors: int) -> GemmConfig:
    """The GEMM heuristic: large tiles when they fill the device once, smaller ones otherwise.

    Args:
        arch: one of devices.ARCHITECTURES, or "interpreter".
        m: rows of the result (tokens).
        n: columns of the result.
        multiprocessors: of the device.

    """
    if arch == "interpreter":
        return _INTERPRETER
    if arch == "gfx942":
        return _CDNA
    large, small = (_AMPERE_LARGE, _AMPERE_SMALL) if arch == "sm_80" else (_HOPPER_LARGE, _HOPPER_SMALL)
    return large if _tiles(large, m, n) >= multiprocessors else small


def choices(arch: str) -> tuple[GemmConfig, ...]:
    """Every configuration that ``gemm_config`` can return for an architecture."""
    return tuple(dict.fromkeys(gemm_config(arch, size, size, 132) for size in (1, 1 << 20)))


def _tiles(config: GemmConfig, m: int, n: int) -> int:
    return -(-m // config.block_m) * -(-n // config.block_n)

"""Launch configurations: frozen dataclasses, and one named heuristic a kernel that picks by architecture, dtype and shape.

A tuned table (tuning.py) may replace a heuristic's pick; nothing is ever timed during training. ``choices`` lists all that
the heuristics can return, and the ahead-of-time check compiles every one of them.

Why these: benchmarks/NOTES.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


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


@dataclass(frozen=True)
class RowsConfig:
    """Tiles of a one-pass kernel over [T, n]; ``chunk`` rows make one row of partials, whatever the device."""

    block_t: int = 8
    block_n: int = 256
    num_warps: int = 4
    chunk: int = 128


ROWS = RowsConfig()
GLU = RowsConfig(block_t=4)  # three tiles at once: at 8 rows Triton 3.6 spills on gfx942

NORM_CHUNK = 16
"""Rows of an RMSNorm that make one row of partials, whatever the device."""

NORM_FEATURES = 8192
"""The widest row of an RMSNorm that a program holds in registers: twice that spills, and takes more than the 1024 threads
that a block of 64-wide wavefronts can have."""


@dataclass(frozen=True)
class NormConfig:
    """Tiles of an RMSNorm kernel: whole rows of block_n >= n columns in registers, or column blocks in turn."""

    block_n: int
    num_warps: int
    whole_row: bool


def norm_config(n: int, rows: int) -> NormConfig:
    """The RMSNorm heuristic: some 16 values a thread of a whole row, 8 a thread of blocks that hold ``rows`` rows at once."""
    if n > NORM_FEATURES:
        return NormConfig(2048 // rows, num_warps=8, whole_row=False)
    block_n = 1 << (n - 1).bit_length()
    return NormConfig(block_n, num_warps=max(block_n // 512, 1), whole_row=True)


# bf16 and fp16 by TMA: Hopper and data-centre Blackwell
_HOPPER_LARGE = GemmConfig(128, 256, 64, num_warps=8, num_stages=4, subtiles=2)
_HOPPER_SMALL = GemmConfig(128, 128, 64, num_warps=8, num_stages=4)
_HOPPER_TF32 = GemmConfig(128, 128, 32, num_warps=8, num_stages=3)
# by pointers and cp.async: everything from sm_80 on that is not one of the above
_AMPERE_LARGE = GemmConfig(128, 128, 32, num_warps=8, num_stages=4, persistent=False, use_tma=False)
_AMPERE_SMALL = GemmConfig(64, 64, 64, num_warps=4, num_stages=3, persistent=False, use_tma=False)
_AMPERE_TF32 = GemmConfig(128, 64, 32, num_warps=8, num_stages=3, persistent=False, use_tma=False)
_CDNA = GemmConfig(128, 128, 64, num_warps=8, num_stages=2, persistent=False, use_tma=False)
# rows that are not 16-byte aligned are read element by element: a pointer an element takes registers, so small tiles
_UNALIGNED = GemmConfig(64, 64, 32, num_warps=8, num_stages=2, persistent=False, use_tma=False)
_UNALIGNED_TF32 = GemmConfig(64, 64, 32, num_warps=8, num_stages=2, persistent=False, use_tma=False)
# fp32 without tf32 runs on the FMA units, at 1/15 of the tensor cores' rate at best
_FP32 = GemmConfig(64, 64, 16, num_warps=8, num_stages=2, persistent=False, use_tma=False)
_INTERPRETER = GemmConfig(16, 32, 16, num_warps=4, num_stages=2, subtiles=2)
_INTERPRETER_UNALIGNED = GemmConfig(16, 32, 16, num_warps=4, num_stages=2, use_tma=False)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def gemm_config(
    arch: str, dtype: torch.dtype, precision: str, m: int, n: int, aligned: bool, multiprocessors: int
) -> GemmConfig:
    """The GEMM heuristic: large tiles when they fill the device once, smaller ones otherwise.

    Args:
        arch: one of ARCHITECTURES, or "interpreter".
        dtype: of the operands.
        precision: "ieee" or "tf32", for fp32 operands.
        m: rows of the result (tokens).
        n: columns of the result.
        aligned: whether every operand has unit-stride, 16-byte aligned rows, which TMA and wide loads need.
        multiprocessors: of the device.

    """
    if arch == "interpreter":
        return _INTERPRETER if aligned else _INTERPRETER_UNALIGNED
    if dtype == torch.float32 and precision == "ieee":
        return _FP32
    if not aligned:
        return _UNALIGNED_TF32 if dtype == torch.float32 else _UNALIGNED
    if arch == "gfx942":
        return _CDNA
    if arch == "sm_80":
        if dtype == torch.float32:
            return _AMPERE_TF32
        return _AMPERE_LARGE if _tiles(_AMPERE_LARGE, m, n) >= multiprocessors else _AMPERE_SMALL
    if dtype == torch.float32:
        return _HOPPER_TF32
    return _HOPPER_LARGE if _tiles(_HOPPER_LARGE, m, n) >= multiprocessors else _HOPPER_SMALL


def choices(arch: str, dtype: torch.dtype, precision: str) -> tuple[tuple[GemmConfig, bool], ...]:
    """Every (configuration, aligned) that ``gemm_config`` can return for these arguments."""
    picks = [
        (gemm_config(arch, dtype, precision, m, n, aligned, 132), aligned)
        for aligned in (True, False)
        for m in (1, 1 << 20)
        for n in (1, 1 << 16)
    ]
    return tuple(dict.fromkeys(picks))


def _tiles(config: GemmConfig, m: int, n: int) -> int:
    return -(-m // config.block_m) * -(-n // config.block_n)


@functools.cache
def architecture(index: int | None) -> str:
    """The architecture family of a device: the newest of ARCHITECTURES that it can run, or "interpreter" on a CPU."""
    if index is None:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    # consumer Blackwell (12.x) has no wgmma and 99 KB of shared memory: it runs Ampere's configurations
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")

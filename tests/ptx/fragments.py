"""How a warp holds a matrix: which element lies in which register of which lane (PTX ISA, figures of mma and wgmma)."""

from __future__ import annotations

import numpy as np

from ptx.formats import Array, from_half

LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4 * 2
"""A lane's row of an 8 x 8 matrix of 16 bits, and the first of its two columns."""


def spread_8x8(matrices: Array) -> Array:
    """[..., 8, 8] of 16 bits -> [..., 32] registers of two."""
    low, high = matrices[..., ROW, PAIR], matrices[..., ROW, PAIR + 1]
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def gathered_8x8(registers: Array) -> Array:
    """[..., 32] registers of two -> [..., 8, 8] of 16 bits."""
    matrices = np.zeros((*registers.shape[:-1], 8, 8), np.uint16)
    matrices[..., ROW, PAIR] = registers & np.uint32(0xFFFF)
    matrices[..., ROW, PAIR + 1] = registers >> np.uint32(16)
    return matrices


def matrix_a(registers: list[Array], kind: str) -> Array:
    """Four registers of [warps, 32] -> A [warps, 16, 16] in fp32: rows in two halves, then columns."""
    a, b, c, d = (from_half(gathered_8x8(register), kind) for register in registers)
    return np.concatenate([np.concatenate([a, b], axis=1), np.concatenate([c, d], axis=1)], axis=2)


def matrix_b(registers: list[Array], kind: str) -> Array:
    """Two registers of [warps, 32] -> B [warps, 16, 8] in fp32; a lane's pair goes down a column."""
    parts = [from_half(gathered_8x8(register), kind).swapaxes(1, 2) for register in registers]
    return np.concatenate(parts, axis=1)


def accumulators(values: Array) -> list[Array]:
    """[warps, 16, N] fp32 -> N / 2 registers of [warps, 32]: of every 8 columns two in row ROW, two 8 rows below."""
    registers = []
    for first in range(0, values.shape[2], 8):
        for half in (0, 8):
            registers += [values[:, ROW + half, first + PAIR], values[:, ROW + half, first + PAIR + 1]]
    return registers

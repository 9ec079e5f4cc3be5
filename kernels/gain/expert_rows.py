"""Rows that are sorted by expert, in chunks that lie in one expert's rows each: which rows a program takes.

A grid has ``slots(t, experts, chunk)`` slots, a number of the sizes alone, so no launch waits for the offsets. Chunk j of an
expert e whose rows start at a has slot ``a // chunk + e + j``: no two chunks have one slot, as an expert of n rows has
``ceil(n / chunk) <= n // chunk + 1`` chunks. The rows past the last end are those of an expert more, number E.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rows_of_slot(offsets, slot, T, E, chunk, BLOCK_E: tl.constexpr):
    """Slot -> the expert (E: nobody), and its first row and the end of its rows in this chunk, 64-bit; a free slot has none."""
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets + experts, mask=experts < E, other=0)
    passed = (experts < E) & (ends // chunk + experts + 1 <= slot)
    expert = tl.sum(passed.to(tl.int32), axis=0)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert, mask=expert < E, other=0)
    end = tl.where(expert < E, end, T)
    first = start + (slot - start // chunk - expert) * chunk
    return expert.to(tl.int64), first.to(tl.int64), tl.minimum(first + chunk, end).to(tl.int64)


def slots(t: int, experts: int, chunk: int) -> int:
    """The slots of t rows."""
    return t // chunk + experts + 1


def block_e(offsets: Tensor) -> tuple[str, int]:
    """The compile-time argument of ``rows_of_slot``."""
    return "BLOCK_E", max(16, 1 << (offsets.shape[0] - 1).bit_length())


def contiguous(rows: Tensor | None) -> Tensor | None:
    """A delta or a bias [E, n] as kernels read it."""
    return None if rows is None else rows.contiguous()

"""The second stage of every ddelta: fp32 partial sums [chunks, n], added down the rows in one fixed order.

Bytes: the partial sums once, and n sums. There are no atomics, so every run gives the same bits, on any number of
multiprocessors.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from gain_ops.kernels import launching
from gain_ops.kernels._common import cdiv, multiple, options, row_unit

BLOCK_C = 32
BLOCK_N = 64


@triton.jit(do_not_specialize=["C"])
def sum_partials_kernel(partials, sums, C, N, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums[n] = sum_c partials[c, n]: BLOCK_C running sums, added up at the end."""
    N = multiple(N, UNIT)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    running = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        rows = start + tl.arange(0, BLOCK_C)
        offsets = rows[:, None].to(tl.int64) * N + cols[None, :]
        running += tl.load(partials + offsets, mask=(rows < C)[:, None] & (cols < N)[None, :], other=0.0)
    tl.store(sums + cols, tl.sum(running, axis=0), mask=cols < N)


def sum_partials(partials: Tensor) -> Tensor:
    """partials [chunks, n] fp32, contiguous -> sums [n] fp32."""
    chunks, n = partials.shape
    sums = partials.new_empty(n)
    launching.launch(
        sum_partials_kernel,
        cdiv(n, BLOCK_N),
        (partials, sums),
        chunks,
        (n,),
        _schedule(row_unit(partials)),
    )
    return sums


@triton.jit
def sum_expert_partials_kernel(
    partials, offsets, sums, N, chunk, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """sums[e, n] = sum of partials[slot, n] over the slots of e's chunks (expert_rows.py); zero where there is none."""
    N = multiple(N, UNIT)
    n_blocks = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // n_blocks
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    first = start // chunk + expert
    end = first + tl.cdiv(tl.load(offsets + expert) - start, chunk)
    running = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for slot in tl.range(first, end, BLOCK_C):
        rows = slot + tl.arange(0, BLOCK_C)
        at = partials + rows[:, None].to(tl.int64) * N + cols[None, :]
        running += tl.load(at, mask=(rows < end)[:, None] & (cols < N)[None, :], other=0.0)
    tl.store(sums + expert.to(tl.int64) * N + cols, tl.sum(running, axis=0), mask=cols < N)


def sum_expert_partials(partials: Tensor, offsets: Tensor, chunk: int) -> Tensor:
    """partials [slots, n] fp32, contiguous, of chunks of so many rows -> sums [E, n] fp32."""
    n, experts = partials.shape[1], offsets.shape[0]
    sums = partials.new_empty((experts, n))
    if n:
        launching.launch(
            sum_expert_partials_kernel,
            experts * cdiv(n, BLOCK_N),
            (partials, offsets.contiguous(), sums),
            None,
            (n, chunk),
            _schedule(row_unit(partials)),
        )
    return sums


@functools.cache
def _schedule(unit: int) -> launching.Schedule:
    return launching.Schedule({"UNIT": unit, "BLOCK_C": BLOCK_C, "BLOCK_N": BLOCK_N, **options(4)})

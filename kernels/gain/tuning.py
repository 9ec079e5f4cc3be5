"""Opt-in tuning: every way to run a GEMM op is timed on this machine, and the figures go into a table that ``auto`` reads.

Nothing is timed unless ``tune`` is called; ``gain-ops tune`` calls it. A candidate is held to reference.py by the rule of the
tests before it gets a figure. The table is written after each candidate, and one that it has from this machine is not measured
again. The candidates:

    composed   the vendor's GEMM and Triton's passes
    cuda       csrc's GEMM, where it is built for this card; it picks its tile itself
    triton     by configuration: the heuristic's pick and its neighbours, and of the fastest other orders of tiles, and of
               the forward the flattened loop
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from gain_ops.backends import cuda, extension, machine, operands, tables
from gain_ops.backends.agreement import Judge
from gain_ops.backends.tables import Problem, Row
from gain_ops.kernels import backend
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.tables import family, forget, heuristic
from gain_ops.testing import ARGUMENTS, tensors

LEADERS = 3  # how many of the fastest are tried in other orders of tiles, and flattened
SHARED_MEMORY = 232_448  # the most bytes of a block on chips with TMA
GROUPS = (1, 4, 8, 16)
FORWARDS = ("linear", "linear_z")


@dataclass(frozen=True)
class Candidate:
    """One way to run an op; ``config`` is Triton's."""

    way: str
    config: GemmConfig | None = None

    def call(self, op: str) -> Callable[..., Any]:
        """The function of the op's arguments."""
        if self.config is not None:
            return functools.partial(getattr(backend, op), config=self.config)
        return getattr(backend.COMPOSED if self.way == "composed" else cuda, op)  # type: ignore[no-any-return]

    def row(self, us: float | None, note: str = "") -> Row:
        """Its row in a table."""
        return Row(self.way, us, None if self.config is None else asdict(self.config), note)


def milliseconds(call: Callable[[], object]) -> float:
    """The median of a call, with a cold L2."""
    return float(triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median"))


def tune(op: str, given: dict[str, Any], path: Path | None = None) -> Iterator[Row]:
    """Measure every candidate of an op for one problem: yields each row as it stands in the table.

    Args:
        op: one of interface.GEMMS.
        given: its arguments by the names of testing.ARGUMENTS.
        path: the table; by default the one that ``auto`` reads.

    """
    arguments = [given[name] for name in ARGUMENTS[op]]
    like, weight = arguments[0], given["weight"]
    cards = family(like.device.index)
    path = tables.user_path(cards) if path is None else path
    name = tables.key(op, like.dtype, like.shape[0], *weight.shape)
    where = machine.environment(like.device)
    earlier = tables.read(path, cards, logging.WARNING).get(name)
    known = {_of(row): row for row in earlier.rows} if earlier is not None and earlier.measured == where else {}
    rows: dict[Candidate, Row] = {}
    judge = functools.cache(lambda: Judge(op, arguments))

    def race(found: Sequence[Candidate]) -> Iterator[Row]:
        todo = [one.call(op) for one in found if one not in known and one.config is not None]
        _compile_at_once([functools.partial(run, *arguments) for run in todo])
        for one in found:
            if one not in known:
                wrong = judge().mismatch(one.call(op))
                us = None if wrong else 1e3 * milliseconds(functools.partial(one.call(op), *arguments))
                known[one] = one.row(us, wrong or "")
                problem = Problem(where, tuple(known.values()))
                tables.write(path, cards, tables.read(path, cards, logging.WARNING) | {name: problem})
            rows[one] = known[one]
            yield known[one]

    first = first_config(op, like, weight)
    yield from race(candidates(op, given, first))
    leaders = [one for one in map(_of, tables.fastest([*rows.values()])) if one.config][:LEADERS]
    yield from race([Candidate("triton", v) for one in leaders if one.config for v in variants(op, one.config)])
    forget()


def first_config(op: str, like: Tensor, weight: Tensor) -> GemmConfig:
    """The heuristic's pick for an op's GEMM."""
    return heuristic(like.device.index, like.shape[0], weight.shape[1 if op == "backward_input" else 0])


def candidates(op: str, given: dict[str, Any], first: GemmConfig) -> list[Candidate]:
    """The candidates of the first round."""
    x, weight, dy = given["x"], given["weight"], given["dy"]
    found = [Candidate("composed")]
    fuses = operands.fuses(dy, weight.t(), x) if op == "backward_input" else operands.fuses(x, weight, dy)
    if (
        fuses
        and x.is_cuda
        and op != "ddelta_recompute"
        and not extension.obstacle()
        and cuda.card_fuses(x.device.index)
    ):
        found.append(Candidate("cuda"))
    return found + [Candidate("triton", config) for config in configurations(first) if fuses]


def configurations(first: GemmConfig) -> list[GemmConfig]:
    """The heuristic's pick and its neighbours in tile, stages and subtiles, if they can run.

    A tile of 128 x 256 elements in one piece spills, or does not fit (benchmarks/NOTES.md).
    """
    tiles = {(first.block_m, first.block_n), (128, 256), (128, 128), (256, 128), (64, 256), (64, 128)}
    found = [
        replace(first, block_m=m, block_n=n, num_stages=stages, subtiles=subtiles)
        for m, n in sorted(tiles)
        for stages in sorted({first.num_stages, 3, 4, 5})
        for subtiles in (1, 2)
        if m * n < 128 * 256 or subtiles == 2
    ]
    return list(dict.fromkeys([first, *(config for config in found if _shared_memory(config) <= SHARED_MEMORY)]))


def variants(op: str, config: GemmConfig) -> list[GemmConfig]:
    """A configuration in other orders of tiles, and flattened where the op's kernel can be."""
    found = [replace(config, group_m=group) for group in GROUPS if group != config.group_m]
    if op in FORWARDS and config.use_tma and config.persistent:
        found.append(replace(config, flatten=True))
    return found


def count(op: str, given: dict[str, Any]) -> int:
    """How many candidates ``tune`` measures, if all of them are right."""
    first = first_config(op, given[ARGUMENTS[op][0]], given["weight"])
    found = candidates(op, given, first)
    fused = sum(one.config is not None for one in found)
    return len(found) + min(fused, LEADERS) * len(variants(op, first))


def problem(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Random arguments of every GEMM op of one layer without a bias."""
    return tensors(tokens, in_features, out_features, dtype, device) | {"bias": None}


def _of(row: Row) -> Candidate:
    return Candidate(row.way, None if row.config is None else GemmConfig(**row.config))


def _shared_memory(config: GemmConfig) -> int:
    """Bytes of the stages and of the staged store in 16 bits; the kernels add less than a KiB of barriers."""
    stages = config.num_stages * (config.block_m + config.block_n) * config.block_k
    return 2 * (stages + config.block_m * config.block_n // config.subtiles) + 1024


def _compile_at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Compile all of them in parallel: one by one they would take longer than their timing. Nothing is launched."""
    if triton.knobs.runtime.interpret:
        return
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _launching_nothing(),
    ):
        for call in calls:
            with contextlib.suppress(Exception):  # the judge says why
                call()


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    run = JITFunction.run

    def warm(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    with mock.patch.object(JITFunction, "run", warm):
        yield

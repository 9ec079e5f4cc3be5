"""Does the simulator notice? The PTX of a kernel, broken in one place at a time.

python -m ptx.mutations [PER KIND]      every mutant of the kernels below and what became of it
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gain_ops.kernels import backend

from ptx.cases import Case, arguments, check
from ptx.launch import simulated
from ptx.machine import Settings
from support import parity

KERNELS = {
    "linear_forward.linear_kernel": [
        Case("sm_80", "linear_z", "bf16", (70, 328, 72)),
        Case("sm_90", "linear", "bf16", (70, 328, 520), 4),
    ],
    "glu.glu_backward_kernel": [Case("sm_80", "glu_backward", "bf16", (130, 1, 72))],
    "rms_norm.rms_norm_backward_kernel": [Case("sm_90", "rms_norm_backward", "fp32", (37, 1, 1100))],
}
"""A kernel each of cp.async, ldmatrix and mma.sync; of TMA, mbarriers and wgmma; of a pipelined pass; of reductions."""

RUNS = (
    Settings(timing="late"),
    Settings(timing="early"),
    Settings(timing="random", together=False, seed=1),
    Settings(timing="late", together=False, seed=2),
)
"""A mutant is caught where one of them raises or errs."""

BLIND = tuple(Settings(timing="random", together=False, seed=seed, races=False) for seed in range(10, 13))
"""Orders in which nothing looks for races: what has the same bits in all of them changes nothing that is seen here."""

_GUARD = r"^\s*(?:@!?%?\w+\s+)?"
_FLIPPED = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}
_SYNCHRONISATION = _GUARD + (
    r"(bar\.sync|wgmma\.(wait_group|commit_group)|cp\.async\.(wait_group|commit_group)|cp\.async\.bulk\.(wait|commit)"
    r"|mbarrier\.(arrive|init|inval)|fence\.proxy)"
)
_KINDS = {
    "a dropped synchronisation": _SYNCHRONISATION,
    "a wait that does not wait": r"^\s*mbarrier\.try_wait",
    "a wrong immediate": _GUARD
    + r"(add|shl|or|xor|and|mad|mul|bfe|shr|selp|shfl|cp\.async\.wait_group)\.[\w.:]+\s.*, \d+[;,]",
    "swapped operands": _GUARD + r"(sub|shl|selp|div|setp\.[lg][te])\.[\w.]+\s",
    "a wrong comparison": _GUARD + r"setp\.(lt|le|gt|ge|eq|ne)\.",
    "a dropped access": _GUARD + r"(st\.|ld\.global|ld\.shared|stmatrix|ldmatrix|cp\.async\.c|cp\.async\.bulk\.tensor)",
}
"""Kinds of breakages, and the lines that they can happen to."""


@dataclass(frozen=True)
class Mutant:
    """One line of a PTX text, broken."""

    kernel: str
    kind: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.kernel}, line {self.line}: {self.kind}: {self.before} -> {self.after or 'nothing'}"

    def applied(self, ptx: str) -> str:
        """The text with the broken line."""
        lines = ptx.split("\n")
        lines[self.line - 1] = self.after
        return "\n".join(lines)


def mutants(kernel: str, ptx: str, executed: frozenset[int], seed: int, count: int) -> Iterator[Mutant]:
    """At most ``count`` mutants of each kind, and of each kind of synchronisation, of lines that are executed."""
    chosen = random.Random(seed)
    lines = ptx.split("\n")
    for kind, pattern in _KINDS.items():
        places: dict[str, list[int]] = {}
        for number in sorted(executed):
            found = re.search(pattern, lines[number - 1])
            if found:
                what = found.group(1) if kind == "a dropped synchronisation" else ""
                places.setdefault(what, []).append(number)
        for numbers in places.values():
            for number in sorted(chosen.sample(numbers, min(count, len(numbers)))):
                before = lines[number - 1].split("//")[0].strip()
                after = _broken(kind, before)
                if after != before:
                    yield Mutant(kernel, kind, number, before, after)


def _broken(kind: str, line: str) -> str:
    if kind.startswith("a dropped"):
        return ""
    if kind == "a wait that does not wait":
        return "mov.pred complete, -1;"
    if kind == "a wrong immediate":
        return re.sub(r", (\d+)([;,])(?!.*, \d+[;,])", lambda found: f", {int(found[1]) + 1}{found[2]}", line)
    if kind == "swapped operands":
        return re.sub(r"(\s%?\w+(?:\|%\w+)?,\s*)([^,;]+),\s*([^,;]+)", r"\1\3, \2", line, count=1)
    return re.sub(r"setp\.(\w+)", lambda found: "setp." + _FLIPPED[found[1]], line, count=1)


def results(case: Case, settings: Settings, **options: Any) -> list[torch.Tensor]:
    """The bits of a call's results."""
    given = arguments(case)
    with simulated(case.target, case.multiprocessors, settings, **options):
        return [result.view(torch.int8) for result in parity.run(backend, case.call, given)]


def fate(case: Case, mutant: Mutant, expected: list[torch.Tensor]) -> str:
    """How a mutant is caught; else "equal" where its results have the same bits in every order, and "missed" where not."""

    def broken(kernel: str, text: str) -> str:
        return mutant.applied(text) if kernel == mutant.kernel else text

    for settings in RUNS:
        try:
            check(case, settings, rewrite=broken)
        except Exception as error:
            return f"caught: {str(error).splitlines()[0]}"
    for settings in (RUNS[0], *BLIND):
        found = results(case, settings, rewrite=broken)
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return "missed: other bits, within the tolerance"
    return "equal: the same bits in every order"


def survey(per_kind: int = 2) -> dict[str, str]:
    """The fate of some mutants of every kernel."""
    fates: dict[str, str] = {}
    for kernel, cases in KERNELS.items():
        for case in cases:
            ran = next(run for run in check(case, RUNS[0]) if run.kernel == kernel)
            expected = results(case, RUNS[0])
            for mutant in mutants(kernel, ran.ptx, ran.lines, seed=len(fates), count=per_kind):
                fates[f"{case.name}: {mutant}"] = fate(case, mutant, expected)
    return fates


if __name__ == "__main__":
    for what, became in survey(int(sys.argv[1]) if len(sys.argv) > 1 else 2).items():
        print(f"{became[:110]:110} | {what}", flush=True)

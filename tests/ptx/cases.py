"""Calls of the package's kernels, each run in the simulator and held to the rule of gain_ops.testing.

python -m ptx.cases                    the names of all
python -m ptx.cases NAME [TIMING [SEED]]    one of them: late, early or random, "apart" for each warp by itself
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments import fused_backward
from gain_ops import reference
from gain_ops.kernels import backend
from gain_ops.testing import assert_no_worse_than_torch

from ptx.launch import Run, simulated
from ptx.machine import Settings
from support import parity

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = ("sm_80", "sm_90")
ROW_CALLS = ("scale", "backward", "ddelta", "glu", "glu_backward", "glu_ddelta", "rms_norm", "rms_norm_backward")
# without a bias grouped_mm writes into torch's product, which the simulator takes for an input
EXPERT_CALLS = [
    call for call in parity.CALLS if call.startswith(("grouped", "combine")) and call != "grouped_mm without bias"
]
STREAM_CALLS = [call for call in parity.CALLS if "add" in call.split()[0].split("_")]
GEMM_CALLS = ("linear", "linear without bias", "linear_z", "backward_recompute", "ddelta_recompute", "backward_input")


@dataclass(frozen=True)
class Case:
    """A call of parity.CALLS, or backward_dx, on x [t, i], W [o, i] and dy [t, o] of shape (t, i, o)."""

    target: str
    call: str
    dtype: str
    shape: tuple[int, int, int]
    multiprocessors: int = 132
    """A persistent kernel has so many programs, and a GEMM of fewer tiles takes small ones."""
    layouts: dict[str, str] = field(default_factory=dict)
    """Those of the arguments that are not contiguous."""

    @property
    def name(self) -> str:
        layouts = "".join(f", {argument} {layout}" for argument, layout in self.layouts.items())
        return f"{self.target} {self.call} {self.dtype} {'x'.join(map(str, self.shape))} on {self.multiprocessors}{layouts}"


def _cases() -> list[Case]:
    found = []
    # passes over rows: sizes that are a multiple of nothing, with every activation; 16 bytes a thread; strides
    odd, even = (33, 29, 17), (37, 64, 72)
    activations = [call for call in parity.CALLS if call.startswith("glu") and call not in ROW_CALLS]
    for target, (call, dtype) in product(TARGETS, zip(ROW_CALLS, ("bf16", "fp32", "fp16") * 3, strict=False)):
        found.append(Case(target, call, dtype, even))
    for number, call in enumerate([*activations, *ROW_CALLS]):
        found.append(Case(TARGETS[number % 2], call, ("fp32", "bf16", "fp16")[number % 3], odd))
    strided = (
        ("backward", "transposed"),
        ("glu_backward", "every other"),
        ("rms_norm_backward", "padded"),
        ("scale", "expanded"),
    )
    for number, (call, layout) in enumerate(strided):
        layouts = dict.fromkeys(("x", "dy", "z", "dh"), layout)
        found.append(Case(TARGETS[number % 2], call, ("bf16", "fp32")[number % 2], odd, layouts=layouts))
    # the residual stream: rows of 16 bytes and others, several chunks, strides, and a row in turns
    for target, call, (number, dtype) in product(TARGETS, STREAM_CALLS, enumerate(DTYPES)):
        found.append(Case(target, call, dtype, (even, odd, (5, 1, 520))[number]))
    for target, layout in zip(TARGETS * 2, parity.LAYOUTS[1:], strict=True):
        layouts = dict.fromkeys(("dy", "z", "dh", "h"), layout)
        found += [Case(target, call, "bf16", odd, layouts=layouts) for call in STREAM_CALLS if " " not in call]
    # rows by expert: rows of 16 bytes and others, an expert of several chunks, gathered rows
    for number, call in enumerate(EXPERT_CALLS):
        found.append(Case(TARGETS[number % 2], call, ("bf16", "fp32", "fp16")[number % 3], even))
        found.append(Case(TARGETS[1 - number % 2], call, ("fp32", "fp16", "bf16")[number % 3], (98, 8, 17)))
    # a row in turns, and several partials
    wide = [call for call in parity.CALLS if "norm" in call]
    found += [Case("sm_90", call, "bf16", (3, 1, 8200)) for call in wide]
    found.append(Case("sm_80", "backward", "bf16", (130, 1, 320)))
    # products: small tiles on a large device, large ones on a small one, where a program has several
    transposed = {"weight": "transposed"}
    for target, call in product(TARGETS, GEMM_CALLS):
        layouts = transposed if call in ("linear_z", "ddelta_recompute") else {}
        found.append(Case(target, call, "bf16", (70, 96, 136), 132, layouts))
    for call in ("linear", "backward_recompute", "backward_input"):
        found.append(Case("sm_90", call, "bf16", (140, 328, 264), 1, transposed if call == "linear" else {}))
        found.append(Case("sm_80", call, "fp16", (130, 136, 264), 1, {} if call == "linear" else transposed))
    found.append(Case("sm_90", "linear_z", "fp16", (1, 64, 128), 2))
    # torch's product, and the pass: linear scales in the product's memory, which a launch may not write here
    found.append(Case("sm_90", "linear_z", "fp32", odd))
    found.append(Case("sm_80", "linear_input", "bf16", odd))
    found.append(Case("sm_90", "linear_input", "bf16", (200, 64, 48)))
    # the product with two results that no op runs yet
    for call, layouts in product(("backward_dx", "backward_dx, W scaled"), ({}, transposed)):
        found.append(Case("sm_90", call, "bf16", (140, 264, 136), 1, layouts))
    return found


CASES = {case.name: case for case in _cases()}


def arguments(case: Case) -> dict[str, Any]:
    """The tensors of a call, the same on every run."""
    torch.manual_seed(0)
    given = parity.tensors(*case.shape, DTYPES[case.dtype])
    for name, layout in case.layouts.items():
        given[name] = parity.laid_out(given[name], layout)
    return given


def check(case: Case, settings: Settings, **options: Any) -> list[Run]:
    """Simulate a call and compare its results: -> what ran."""
    given = arguments(case)
    with simulated(case.target, case.multiprocessors, settings, **options) as runs:
        if case.call.startswith("backward_dx"):
            _compare_dx(given, scaled="scaled" in case.call)
        else:
            parity.compare(backend, case.call, given)
    assert runs, "nothing was launched"
    return runs


def _compare_dx(given: dict[str, Any], scaled: bool) -> None:
    """As tests/benchmarks/test_fused_backward.py."""
    dy, z, delta, weight = (given[name] for name in ("dy", "z", "delta_out", "weight"))

    def plain(dy: Tensor, z: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        dz, ddelta = reference.backward(dy, z, delta)
        return dz @ weight, ddelta

    wide = [tensor.double() for tensor in (dy, z, weight, delta)]
    torchs, truth, size = plain(dy, z, weight, delta), plain(*wide), plain(*(tensor.abs() for tensor in wide))
    if scaled:
        weight = ((1 + delta)[:, None] * weight).to(weight.dtype)
        torchs = dy @ weight, reference.ddelta(dy, z)
    results = fused_backward.backward_dx(dy, z, weight, None if scaled else delta)
    for name, result, ours, exact, magnitude in zip(("dx", "ddelta"), results, torchs, truth, size, strict=True):
        assert_no_worse_than_torch(name, result, ours, exact, magnitude)


def names() -> list[str]:
    """Of all cases."""
    return list(CASES)


def run(name: str, **settings: Any) -> list[str]:
    """Check a case: -> the kernels that ran."""
    return [run.kernel for run in check(CASES[name], Settings(**settings))]


def count(name: str) -> dict[str, dict[str, int]]:
    """What the kernels of a case do, by kernel."""
    return {run.kernel: dict(run.counts) for run in check(CASES[name], Settings(count=True))}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("\n".join(CASES))
    else:
        how = sys.argv[2] if len(sys.argv) > 2 else "late"
        seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
        apart = how == "apart"
        chosen = Settings(timing="random" if apart else how, together=not apart, seed=seed, count=True)  # type: ignore[arg-type]
        for one in check(CASES[sys.argv[1]], chosen):
            print(
                one.kernel,
                one.grid,
                *(f"\n    {what}: {number}" for what, number in sorted(one.counts.items())),
                sep="",
            )

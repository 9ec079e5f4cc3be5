"""Every configuration that the heuristics can choose compiles for every architecture, with no GPU, and fits it."""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from gain_ops.kernels import aot

TARGETS = list(aot.TARGETS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Compiled in a process of its own: here the kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = subprocess.run(
        [sys.executable, "-m", "gain_ops.kernels.aot"],
        env=environment,
        cwd=tmp_path_factory.mktemp("aot"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found: dict[str, list[dict[str, Any]]] = {target: [] for target in TARGETS}
    for line in output.splitlines():
        kernel = json.loads(line)
        found[kernel["target"]].append(kernel)
    return found


def _name(kernel: dict[str, Any]) -> str:
    problem = kernel["problem"]
    return f"{problem['kernel']} ({problem['variant']}) {problem['dtype']} {problem['precision']} {problem['config']}"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_everything_compiles(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    assert len(compiled[target]) == len(aot.problems(target))
    kernels = Counter(k["problem"]["kernel"] for k in compiled[target])
    fused_backward = {"backward_dx"} if target == "sm_90" else set()
    assert set(kernels) == {"glu", "rows", "linear", "matmul_reduce", "norm", "partials"} | fused_backward


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    too_large = [_name(k) for k in compiled[target] if k["shared_bytes"] > aot.SHARED_MEMORY_LIMITS[target]]
    assert not too_large


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_block_has_more_than_1024_threads(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    too_many = {_name(k): k["threads"] for k in compiled[target] if k["threads"] > 1024}
    assert not too_many


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    # off sm_90 the compiler may cap registers for a second block a multiprocessor, at the price of a few words
    allowed = 0 if target == "sm_90" else 32
    spilling = {_name(k): k["spilled_bytes"] for k in compiled[target] if k["spilled_bytes"] > allowed}
    assert not spilling


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_half_precision_dot_is_the_matrix_instruction(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    gemms = [
        k
        for k in compiled[target]
        if k["problem"]["kernel"] in ("linear", "matmul_reduce", "backward_dx")
        and (k["problem"]["dtype"] != "float32" or k["problem"]["precision"] == "tf32")
    ]
    assert gemms
    assert [_name(k) for k in gemms if not k["matrix_instructions"]] == []

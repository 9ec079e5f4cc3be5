"""What Triton specialises launches on: few kernels for any number of tokens, hints for aligned rows, 64-bit addresses.

This file, run as a script, records launches with no GPU and prints what it found: in tests the kernels may be interpreted.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

TARGETS = ("sm_80", "sm_90")

# powers of two and their neighbours, multiples of 16, and others
TOKENS = sorted(
    {1 << i for i in range(15)}
    | {(1 << i) + 1 for i in range(15)}
    | {16 * i for i in range(3, 1250, 83)}
    | {1237 * i for i in range(1, 17)}
)

# small tiles of a GEMM and large ones
SIZES = (64, 4096)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_tokens_are_not_specialised_on(target: str, found: dict[str, Any]) -> None:
    """All numbers of tokens launch the kernels that two sizes launch."""
    for call, (all_tokens, two_sizes) in found["kernels"][target].items():
        assert 0 < len(two_sizes) <= 3, call  # two tiles of a product and the partials' sum
        assert all_tokens == two_sizes, call


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tokens", ["1", "16", "17"])
def test_unit_strides_are_constants_and_aligned_rows_have_hints(
    target: str, tokens: str, found: dict[str, Any]
) -> None:
    for kernel, arguments in found["arguments"][target][tokens].items():
        for name, kind in arguments.items():
            if arguments.get(name.removeprefix("stride_")[:-1]) == "absent":
                continue  # the stride of a tensor that is not there
            if name in ("T", "M", "C", "top_k"):
                assert kind == "plain", (kernel, name)
            elif re.fullmatch(r"stride_.*n", name):
                assert kind in (1, "absent"), (kernel, name)
            elif name in ("N", "K") or name.startswith("stride_"):
                assert kind in ("multiple of 16", "absent"), (kernel, name)


@pytest.mark.slow
def test_addresses_have_64_bits(found: dict[str, Any]) -> None:
    """A row's number times its length passes 2^31 at 524 288 tokens of 4096 elements."""
    assert len(found["products"]) == 26
    for kernel, types in found["products"].items():
        assert types, kernel
        assert all(kind.endswith("i64") for kind in types), (kernel, types)


@pytest.mark.slow
def test_a_recording_leaves_nothing_of_its_device(found: dict[str, Any]) -> None:
    assert found["left"] == {"driver": True, "caches": 0}


@pytest.mark.slow
def test_a_launch_that_does_not_fit_is_refused_as_on_the_device(found: dict[str, Any]) -> None:
    assert "out of resource: shared memory" in found["refused"]


def test_interpreted_kernels_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from gain_ops.kernels.recording import recording

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), recording("sm_90"):
        pass
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="architecture='sm_70': expected one of sm_80"), recording("sm_70"):
        pass


def _record() -> dict[str, Any]:
    from dataclasses import replace

    import torch
    from triton.runtime import driver

    from gain_ops.kernels import aot, config, linear_forward, rows
    from gain_ops.kernels.recording import recording
    from gain_ops.testing import ARGUMENTS

    aot.add_calls(["benchmarks.experiments.fused_backward"])

    def launched(target: str, problems: list[aot.Problem], compiles: bool = False) -> list[Any]:
        with recording(target, compile=compiles) as launches:
            for problem in problems:
                aot.call(problem)
        return launches

    def kernels(target: str, call: str, tokens: Sequence[int]) -> list[tuple[str, str]]:
        launches = launched(target, [aot.Problem(call, "bfloat16", t, 4096) for t in tokens])
        return sorted({(launch.kernel, launch.key) for launch in launches})

    def arguments(target: str, t: int) -> dict[str, dict[str, Any]]:
        launches = launched(target, [aot.Problem(call, "bfloat16", t, 4096) for call in ARGUMENTS])
        return {f"{launch.kernel} {launch.key}": _kinds(launch.source) for launch in launches}

    def too_large() -> str:
        a = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
        delta = torch.empty(256, device="meta")
        large = replace(config.choices("sm_90")[0], num_stages=8)
        try:
            with recording("sm_90"):
                linear_forward.launch(a, a, delta, None, a, None, large)
        except Exception as error:
            return str(error)
        return ""

    before = driver._active
    norms = [call for call in ARGUMENTS if "norm" in call]
    experts = ("grouped_backward", "grouped_glu", "grouped_glu_backward", "combine", "combine_backward")
    calls = ("linear_z", "backward_input", "scale", "backward", "glu", "glu_backward", "add", *experts, *norms)
    problems = [aot.Problem(call, "bfloat16", 64, 4104) for call in calls]
    problems += [aot.Problem(call, "bfloat16", 64, 16392) for call in norms]
    return {
        "kernels": {
            target: {call: [kernels(target, call, tokens) for tokens in (TOKENS, SIZES)] for call in aot.CALLS}
            for target in TARGETS
        },
        "arguments": {target: {t: arguments(target, t) for t in (1, 16, 17)} for target in TARGETS},
        "products": {
            launch.kernel: _products(launch.compiled.asm["ttir"]) for launch in launched("sm_80", problems, True)
        },
        "refused": too_large(),
        "left": {"driver": driver._active is before, "caches": len(rows.backward_kernel.device_caches)},
    }


def _kinds(source: Any) -> dict[str, Any]:
    """What the compiler knows of each argument: its value, "absent" for None, "multiple of 16" or "plain"."""
    kinds: dict[str, Any] = {}
    for position, name in enumerate(source.fn.arg_names):
        if (position,) in source.constants:
            value = source.constants[position,]
            kinds[name] = "absent" if value is None else value
        else:
            kinds[name] = "multiple of 16" if source.attrs.get((position,)) else "plain"
    return kinds


def _products(ttir: str) -> list[str]:
    """The types of all products of a row's length, which are a size or a stride, with what is no constant."""
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    lengths = set(re.findall(r"(%(?:N|stride_\w+)): i", ttir))
    types = []
    for name, operation, operands, kind in re.findall(r"(%\w+) = ([\w.]+) (%[\w, %]+).* : (.*?) loc", ttir):
        first, *rest = operands.split(", ")
        passes_on = operation in ("arith.extsi", "tt.splat", "tt.broadcast", "tt.expand_dims")
        if operation in ("arith.muli", "arith.divsi"):
            known = [one for one in (first, *rest) if one in constants]
            passes_on = bool(known)
            if operation == "arith.muli" and not known and lengths & {first, *rest}:
                types.append(kind.rstrip(">"))
        if passes_on and lengths & {first, *rest}:
            lengths.add(name)
    return types


if __name__ == "__main__":
    print(json.dumps(_record()))

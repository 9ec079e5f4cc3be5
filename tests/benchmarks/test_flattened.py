"""The flattened forward: no worse than plain torch, and machine code that fits, without a spill, with no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.experiments import flattened
from gain_ops import reference
from gain_ops.testing import assert_no_worse_than_torch

from support.parity import DEVICE, laid_out, tensors

DTYPES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SHAPES = [(40, 48, 64), (1, 8, 8), (33, 96, 24)]  # the interpreter's tiles are 16 x 32 x 16
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stages", flattened.STAGES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_no_worse_than_plain_torch(
    dtype: torch.dtype, shape: tuple[int, int, int], stages: int, transposed: bool, whole: bool
) -> None:
    t = tensors(*shape, dtype)
    weight = laid_out(t["weight"], "transposed" if transposed else "contiguous")
    given = [t["x"], weight, t["delta_out"], torch.randn(shape[2], device=DEVICE).to(dtype) if whole else None]
    results = flattened.linear(*given, stages, whole)
    double, size = (
        [None if v is None else f(v) for v in given] for f in (torch.Tensor.double, lambda v: v.double().abs())
    )
    for name, result, *of in zip(
        ("y", "z"),
        [r for r in results if r is not None],
        *(reference.linear_z(*arguments) for arguments in (given, double, size)),
        strict=False,
    ):
        assert_no_worse_than_torch(name, result, *of)


def test_what_does_not_go_by_tma_is_refused() -> None:
    t = tensors(5, 7, 9, torch.float16)
    with pytest.raises(ValueError, match="reads by TMA"):
        flattened.linear(t["x"], t["weight"], t["delta_out"], None, 3)


@pytest.mark.slow
def test_it_compiles_and_fits_without_a_spill() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout)
    assert len(found) == len(flattened.CALLS)
    for call, needs in found.items():
        assert needs["matrix_instructions"] > 0, call
        assert (needs["spilled_bytes"], needs["registers"] <= 255) == (0, True), (call, needs)
        assert needs["shared_bytes"] <= 232_448, (call, needs)


def _compiled() -> dict[str, Any]:
    from gain_ops.kernels import aot

    aot.add_calls(["benchmarks.experiments.flattened"])
    found = {}
    for call in flattened.CALLS:
        problem = aot.Problem(call, "bfloat16", 8192, 4096)
        with aot.recording("sm_90") as launches:
            aot.call(problem)
        read = aot._read("sm_90", problem, launches[-1])
        found[call] = {
            name: getattr(read, name) for name in ("registers", "spilled_bytes", "shared_bytes", "matrix_instructions")
        }
    return found


if __name__ == "__main__":
    print(json.dumps(_compiled()))

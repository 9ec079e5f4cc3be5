"""A run on a GPU rehearsed without one: every part reaches its end, with figures, and nothing raises on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import parts, rehearsal

ROOT = Path(__file__).resolve().parents[2]


def rehearse(*arguments: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.rehearsal", "sm_90", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [line for line in run.stdout.splitlines() if not line.startswith("left out: ")]  # the CUDA backend


def test_what_is_not_rehearsed_is_named() -> None:
    names = {part.name for part in parts.PARTS}
    assert set(rehearsal.NOT_REHEARSED) < names
    assert set(rehearsal.REHEARSED) == (names - set(rehearsal.NOT_REHEARSED)) | {rehearsal.SANITIZED}


@pytest.mark.slow
def test_every_part_reaches_its_end() -> None:
    lines = rehearse("--no-compile")
    assert [line.rpartition(": ")[0] for line in lines] == [*rehearsal.REHEARSED], lines
    for line in lines:
        name, _, figures = line.rpartition(": ")
        assert (figures != "0 figures") is (name not in ("environment", rehearsal.SANITIZED)), line


@pytest.mark.slow
def test_no_variant_is_refused_by_the_compiler_or_for_its_shared_memory() -> None:
    """These kernels alone are launched in configurations that test_aot.py does not compile."""
    (line,) = rehearse("--only", "variants 8192")
    assert line.startswith("variants 8192: "), line

"""The proof of the kernels on a GPU: parity tests, then compute-sanitizer over odd shapes."""

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/test_parity.py",
    "tests/kernels",
    "tests/csrc/test_cuda_ops.py",
    "tests/test_dispatch.py",
    "tests/test_functional.py",
)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one step of the proof said: green is None where it could not run, and summary says why."""

    step: str
    green: bool | None
    summary: str
    details: tuple[str, ...] = ()


def steps() -> Iterator[Outcome]:
    """The tests first, then each sanitizer."""
    yield tests()
    for tool in TOOLS:
        yield sanitizer(tool)


def tests() -> Outcome:
    """Every test of the kernels that this machine can run; what failed is in the details."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return Outcome("parity tests", None, "pytest and hypothesis are not both installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    failed = tuple(line for line in lines if line.startswith(("FAILED", "ERROR")))
    return Outcome("parity tests", run.returncode == 0, lines[-1] if lines else run.stderr[-500:], failed)


def sanitizer(tool: str) -> Outcome:
    """One tool of compute-sanitizer over odd_shapes.py."""
    if shutil.which("compute-sanitizer") is None:
        return Outcome(tool, None, "compute-sanitizer is not installed")
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        sys.executable,
        "-m",
        "benchmarks.odd_shapes",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    return Outcome(
        tool, run.returncode == 0, lines[-1] if lines else "", () if run.returncode == 0 else tuple(lines[:40])
    )

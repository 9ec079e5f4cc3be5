"""The proof of the kernels on a GPU: parity tests, and compute-sanitizer over odd shapes, side by side."""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# the tests that run something on the GPU
TESTS = ("tests/backends/test_parity.py", "tests/kernels", "tests/ops/test_dispatch.py::test_auto_is_triton_on_a_gpu")
PARITY = "parity tests"
DRAWN = "parity tests of drawn shapes"  # a step of its own, since nearly each shape is compiled: minutes
_DRAWN = "test_any_shape_and_strides"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = (PARITY, DRAWN, *TOOLS)
# a run that continues makes these again; the other tools may misread TMA and its barriers, so a person judges
REPEATED = (PARITY, DRAWN, "memcheck")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one step of the proof: green is None if it could not run or end, and summary says why."""

    step: str
    green: bool | None
    summary: str
    details: tuple[str, ...] = ()


def steps(limit_s: float, names: Sequence[str]) -> Iterator[Outcome]:
    """The steps of these names, all at once, each returned as it ends; a step that exceeds the limit is stopped."""
    with ThreadPoolExecutor(len(names)) as pool:
        spared = sum(name in TOOLS for name in names)
        running = [
            pool.submit(sanitizer, name, limit_s) if name in TOOLS else pool.submit(tests, name, limit_s, spared)
            for name in names
        ]
        for ended in as_completed(running):
            yield ended.result()


def tests(step: str, limit_s: float, spared_cores: int) -> Outcome:
    """The tests of PARITY or DRAWN that this machine can run, on the remaining cores; the details name the failed ones."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome(step, None, "pytest is not installed")
    # the drawn shapes are slow, and a step of their own
    chosen = ["-k", _DRAWN] if step == DRAWN else ["-k", f"not {_DRAWN}", "-m", "gpu or not slow"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *TESTS]
    if importlib.util.find_spec("hypothesis") is None:
        command += ["-p", "benchmarks.gpu.without_hypothesis"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, (os.cpu_count() or 1) - spared_cores))]
    code, lines = _run(command, limit_s)
    if code is None:
        return Outcome(step, None, f"not finished in {limit_s:.0f} s")
    failed = tuple(line for line in lines if line.startswith(("FAILED", "ERROR")))
    return Outcome(step, code == 0, lines[-1] if lines else "it said nothing", failed)


def sanitizer(tool: str, limit_s: float) -> Outcome:
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
        "benchmarks.gpu.odd_shapes",
    ]
    code, lines = _run(command, limit_s)
    if code is None:
        return Outcome(tool, None, f"not finished in {limit_s:.0f} s")
    return Outcome(tool, code == 0, lines[-1] if lines else "", () if code == 0 else tuple(lines[:40]))


def _run(command: Sequence[str], limit_s: float) -> tuple[int | None, list[str]]:
    """The exit status (None if it had to be stopped, with all its processes), and the lines that it printed."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
            return process.returncode, output.strip().splitlines()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0].strip().splitlines()

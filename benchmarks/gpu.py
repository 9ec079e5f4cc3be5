"""The one command for a GPU machine: proof, ceilings, every op, every layer, memory, tuning, whole steps, in one run.

Each part's rows are flushed to OUT/results.csv as they come and its end is noted in OUT/parts.json, so that a cut leaves what
was measured and ``--resume`` goes on with the next part. What is right comes first: where the tests fail nothing is timed.
"""

import dataclasses
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import ceilings, cublaslt, layers, memory, ops, proof, results, roofline, sites, steps
from benchmarks.results import Row
from gain_ops import extension

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run, and its share of the time that is left when it starts; run(seconds, rows so far)."""

    name: str
    share: float
    run: Callable[[float, list[Row]], Iterator[Row]]


PARTS = (
    Part("environment", 0.02, lambda budget_s, before: _environment()),
    Part("proof", 0.4, lambda budget_s, before: _proof()),
    Part("ceilings", 0.05, lambda budget_s, before: ceilings.rows(DEVICE, budget_s)),
    Part("cublaslt", 0.05, lambda budget_s, before: _cublaslt()),
    Part("ops", 0.3, lambda budget_s, before: _ops(budget_s, before)),
    Part("layers", 0.5, lambda budget_s, before: _layers(budget_s, before)),
    Part("peaks", 0.2, lambda budget_s, before: memory.peak_rows(sites.SITES, 8192, DTYPE, DEVICE)),
    Part("steps", 0.5, lambda budget_s, before: steps.rows(DEVICE, budget_s)),
    Part("tuning", 1.0, lambda budget_s, before: _tuning(budget_s)),
)


def run(out: Path, minutes: float, resume: bool) -> bool:
    """Run the parts, in order, within the time; whether all that ran were green."""
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: `python -m benchmarks run` measures what this machine can")
    prepare()
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    done = _done(out) if resume else []
    if not resume:
        for name in ("results.csv", "parts.json"):
            (out / name).unlink(missing_ok=True)
    for part in PARTS:
        left = deadline - time.monotonic()
        if part.name in done or left <= 0:
            print(f"{part.name}: {'done before' if part.name in done else 'no time left'}", flush=True)
            continue
        started, count = time.monotonic(), 0
        file = out / "results.csv"
        for row in part.run(part.share * left, results.read([file]) if file.exists() else []):
            results.append(file, [row])
            count += 1
            if row.group == "proof" and row.median == 0.0:
                print(f"not right, so nothing is timed: {row.site}: {row.note}", file=sys.stderr)
                return False
            if time.monotonic() > deadline:
                print(f"{part.name}: cut", flush=True)
                return True
        done.append(part.name)
        (out / "parts.json").write_text(json.dumps(done) + "\n", encoding="utf-8")
        print(f"{part.name}: {count} rows in {time.monotonic() - started:.0f} s", flush=True)
    return True


def prepare() -> None:
    """Make gain_ops.kernels importable, and build csrc/ where nothing built was brought along; both without a network."""
    if importlib.util.find_spec("gain_ops.kernels") is None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-e",
            str(ROOT),
        ]
        subprocess.run(["env", "GAIN_OPS_BUILD_CUDA=0", *command], check=True)
        importlib.invalidate_caches()
    if importlib.util.find_spec("gain_ops._C") is None:
        built = subprocess.run([sys.executable, "-m", "gain_ops.build"], capture_output=True, text=True)
        print((built.stdout + built.stderr).strip().splitlines()[-1], flush=True)


def _done(out: Path) -> list[str]:
    path = out / "parts.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def _note(group: str, name: str, value: float | None, note: str) -> Row:
    about = results.environment(DEVICE)
    return Row(group, name, "-", "-", "green", "", "", 0, 0, 0, value, value, value, 1, note=note, **about)


def _environment() -> Iterator[Row]:
    """What a row has no column for."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    found = {
        "python": platform.python_version(),
        "cuda of torch": str(torch.version.cuda),
        "driver, power limit, largest clock": _output(query) if shutil.which("nvidia-smi") else "nvidia-smi not found",
        "cuda kernels": extension.obstacle() or f"built for {extension.architectures()}",
    }
    for name, value in found.items():
        yield _note("environment", name, None, value)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _proof() -> Iterator[Row]:
    for outcome in proof.steps():
        value = None if outcome.green is None else float(outcome.green)
        yield _note("proof", outcome.step, value, " | ".join((outcome.summary, *outcome.details)))


def _cublaslt() -> Iterator[Row]:
    for line in cublaslt.lines():
        yield _note("cublaslt", "pointer modes", None, line)


def _ops(budget_s: float, before: list[Row]) -> Iterator[Row]:
    found = roofline.measured(before)
    yield from ops.rows(sites.SITES, (2048, 8192), DTYPE, DEVICE, budget_s, ceilings=found)


def _layers(budget_s: float, before: list[Row]) -> Iterator[Row]:
    found = roofline.measured(before)
    for tokens in sites.TOKENS:
        yield from layers.rows(sites.SITES, tokens, DTYPE, DEVICE, budget_s / len(sites.TOKENS), ceilings=found)


def _tuning(budget_s: float) -> Iterator[Row]:
    """Opt-in tuning of the Triton GEMMs at the sites' shapes: the table it writes is the result."""
    deadline = time.monotonic() + budget_s
    for site in sites.SITES:
        if time.monotonic() > deadline:
            return
        arguments = [
            "--tokens",
            "8192",
            "--out-features",
            str(site.out_features),
            "--in-features",
            str(site.in_features),
        ]
        tuned = subprocess.run(
            [sys.executable, "-m", "gain_ops.kernels.tuning", *arguments], capture_output=True, text=True, cwd=ROOT
        )
        yield _note("tuning", site.name, None, " | ".join((tuned.stdout or tuned.stderr).strip().splitlines()))

"""The proof of the kernels on a GPU: parity tests, then compute-sanitizer over odd shapes; one JSON file of what was seen.

python benchmarks/gpu_proof.py --out benchmarks/results

Needs torch, triton, pytest, hypothesis and, for the CUDA kernels, gain_ops/_C.abi3.so (python -m gain_ops.build).
"""

import argparse
import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gain_ops import extension

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/test_parity.py",
    "tests/kernels",
    "tests/csrc/test_cuda_ops.py",
    "tests/test_dispatch.py",
    "tests/test_functional.py",
)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def environment() -> dict[str, str]:
    """What the result depends on."""
    versions = {name: _version(name) for name in ("triton", "numpy", "hypothesis")}
    return versions | {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda kernels": extension.obstacle() or f"built for {extension.architectures()}",
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _version(name: str) -> str:
    try:
        return str(__import__(name).__version__)
    except ImportError:
        return "not installed"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} not found"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def parity() -> dict[str, Any]:
    """Run the tests; their last lines are kept whole where one failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    return {"exit": run.returncode, "summary": lines[-1] if lines else "", "failures": _failures(lines)}


def _failures(lines: list[str]) -> list[str]:
    return [line for line in lines if re.match(r"(FAILED|ERROR)", line)]


def sanitize(tool: str) -> dict[str, Any]:
    """Run one tool of compute-sanitizer over odd_shapes.py."""
    if shutil.which("compute-sanitizer") is None:
        return {"exit": None, "summary": "compute-sanitizer not found"}
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        sys.executable,
        "benchmarks/odd_shapes.py",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    return {
        "exit": run.returncode,
        "summary": lines[-1] if lines else "",
        "errors": lines[:40] if run.returncode else [],
    }


def main() -> None:
    """Write what was seen and exit with an error where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU, and this proof is of kernels on one; without a GPU: python -m pytest")
    about = environment()
    seen: dict[str, Any] = {"environment": about, "parity": parity()}
    seen |= {tool: sanitize(tool) for tool in TOOLS}
    out.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"\W+", "-", about["device"]).strip("-").lower()
    path = out / f"proof-{device}-{about['date']}.json"
    path.write_text(json.dumps(seen, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    sys.exit(any(seen[part]["exit"] for part in ("parity", *TOOLS)))


if __name__ == "__main__":
    main()

"""The command for a GPU machine: the parts of parts.py in order, within the time, each in a process of its own.

A part that hangs or breaks the device stops no other part, and its measured rows stay. A row of group ``part`` in
OUT/results.csv says how each part ended, so that this file says where ``--resume`` or ``--resume-from`` continues: with the
parts that were not tried or ran out of time, in order, and then again with the failed ones. A red proof stops nothing, since
each figure has a gate of its own: the run is marked, in a row of group ``mark``, at the top of the report and by the exit
status, 1.
"""

import contextlib
import datetime
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu import proof, warm
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.report import report

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE_S = 45.0  # seconds beyond twice its share until a part counts as hung: imports, compiling, the least rounds
SUMMARY = ("products", "variants", "constants", "targets")
RED = "the proof is red, so judge every figure below by its own gate alone: "
FINISHED, CUT, FAILED = "finished", "cut", "failed"


def run(out: Path, minutes: float, resume: bool, resume_from: Path | None = None, carried: Path | None = None) -> bool:
    """Run the parts within the time and print the targets' verdicts; return whether nothing was red or failed.

    carried: the folder with the kernels that were compiled before (warm.py); OUT, if not given.

    Raises:
        FileNotFoundError: no file at ``resume_from``.

    """
    deadline = time.monotonic() + 60 * minutes
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: `python -m benchmarks run` measures what this machine can")
    file = begin(out, resume, resume_from)
    with prepared():
        print(find_warm(carried or out), flush=True)
        green = _run_parts(out, file, deadline)
    _summarise(out, file)
    return green and not red(results.read([file]) if file.exists() else [])


def _run_parts(out: Path, file: Path, deadline: float) -> bool:
    """Whether no part failed."""
    before = results.read([file]) if file.exists() else []
    green, marked = True, red(before)
    for part in order(before):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{part.name}: no time left", flush=True)
            continue
        ended = _run_part(part, out, left)
        results.append(file, [ended])
        print(f"{part.name}: {ended.metric}, {ended.median:.0f} s{ended.note and ': '}{ended.note}", flush=True)
        green = green and ended.metric != FAILED
        if (found := red(results.read([file]))) != marked:
            marked = found
            results.append(file, [mark(found)])
            print(
                f"{RED if found else 'the proof is green again'}{'; '.join(found)[:1000]}", file=sys.stderr, flush=True
            )
    return green


def begin(out: Path, resume: bool, resume_from: Path | None) -> Path:
    """OUT/results.csv: none, the existing one, or a copy of another run's (with its tuned table)."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.csv"
    if resume_from is not None:
        source = resume_from / "results.csv" if resume_from.is_dir() else resume_from
        results.read([source])
        if source.resolve() != file.resolve():
            shutil.copyfile(source, file)
            tuned = source.parent / "tuned.json"
            if tuned.exists():
                shutil.copyfile(tuned, out / "tuned.json")
    elif not resume:
        for name in ("results.csv", "tuned.json", "report.md", "log.txt"):
            (out / name).unlink(missing_ok=True)
    return file


def order(rows: Sequence[Row]) -> list[Part]:
    """The parts left to run: first those without a row or out of time, then the failed ones; a red proof runs again."""
    ended = {row.site: row.metric for row in rows if row.group == "part"}
    if red(rows, proof.REPEATED):
        ended.pop("proof", None)
    left = [part for part in PARTS if ended.get(part.name) != FINISHED]
    return sorted(left, key=lambda part: ended.get(part.name) == FAILED)


def red(rows: Sequence[Row], steps: Sequence[str] = proof.STEPS) -> list[str]:
    """The steps of the proof that were red when they last ran, with their summaries."""
    said = {row.site: row for row in rows if row.group == "proof" and row.site in steps}
    return [f"{step}: {row.note}" for step, row in said.items() if row.median == 0.0]


def mark(found: Sequence[str]) -> Row:
    """The row that says which steps of the proof are red from here on: none, where all that was red has been mended."""
    now = float(not found)
    return Row(
        "mark", "proof", "-", "-", "green", "", "", 0, 0, 0, now, now, now, 1, note="; ".join(found), date=_today()
    )


@contextlib.contextmanager
def prepared(root: Path = ROOT) -> Iterator[None]:
    """gain_ops.kernels importable, and csrc/ built where nothing built was brought along; both without a network."""
    link = None
    if importlib.util.find_spec("gain_ops.kernels") is None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(root)]
        installed = subprocess.run(
            pip, env=os.environ | {"GAIN_OPS_BUILD_CUDA": "0"}, capture_output=True, text=True, check=False
        )
        if installed.returncode:
            # setuptools before 77 does not read the licence's expression; parts start in this folder, so a link will do
            said = (installed.stdout + installed.stderr).strip().splitlines()
            print(f"not installed ({said[-1] if said else 'pip said nothing'}): gain_ops/kernels is a link", flush=True)
            link = root / "gain_ops" / "kernels"
            link.symlink_to(Path("..") / "kernels" / "gain")
    try:
        if importlib.util.find_spec("gain_ops._C") is None:
            built = subprocess.run([sys.executable, "-m", "gain_ops.build"], capture_output=True, text=True)
            print((built.stdout + built.stderr).strip().splitlines()[-1], flush=True)
        yield
    finally:
        if link is not None:
            link.unlink()


def find_warm(carried: Path) -> str:
    """Have the parts use the kernels that were compiled before, where this device is one they are for; what was found."""
    if importlib.util.find_spec("triton") is None or torch.version.cuda is None:
        return "no Triton for CUDA: no kernels to look for"
    major, minor = torch.cuda.get_device_capability()
    return warm.install(carried, f"sm_{major}{minor}")


def command(part: Part, out: Path, seconds: float) -> list[str]:
    """The command that runs a part."""
    return [sys.executable, "-m", "benchmarks.gpu.parts", part.name, str(out.resolve()), f"{seconds:.1f}"]


def _run_part(part: Part, out: Path, left: float) -> Row:
    """Run a part in a process of its own, and return the row on how it ended."""
    started, share = time.monotonic(), part.share * left
    limit = min(left, 2 * share + GRACE_S)
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        print(f"== {part.name}", file=log, flush=True)
        process = subprocess.Popen(command(part, out, share), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit)
            how, note = (FINISHED, "") if code == 0 else (FAILED, f"exit status {code}, see log.txt")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            how, note = (CUT, "the time was up") if limit == left else (FAILED, f"stopped after {limit:.0f} s")
    spent = time.monotonic() - started
    return Row("part", part.name, "-", "-", how, "s", "", 0, 0, 0, spent, spent, spent, 1, note=note, date=_today())


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def _summarise(out: Path, file: Path) -> None:
    """Write every table to OUT/report.md, and print those that decisions depend on."""
    rows = results.read([file]) if file.exists() else []
    tables = report.tables(rows)
    kernels = [f"Triton, {row.site}: {row.note}" for row in rows if row.group == "triton"]
    said = [f"**{RED}{step[:1000]}**" for step in red(rows)]
    (out / "report.md").write_text("\n\n".join([*said, *tables.values()]) + "\n", encoding="utf-8")
    shown = [*said, *(tables[name] for name in SUMMARY if name in tables), "\n".join(kernels)]
    print("\n\n".join(filter(None, shown)), flush=True)

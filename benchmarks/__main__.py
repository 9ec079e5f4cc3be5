"""python -m benchmarks run | gpu | warm | report: what a machine can, all on a GPU, the kernels for it, or tables."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.harness import results
from benchmarks.harness.results import Row
from gain_ops.utils.files import regular_file

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent
PAGES = {ROOT / "README.md": ("targets", "kept"), ROOT / "docs" / "measured.md": ("layers", "models")}
"""The tables of each page, by the names of their markers."""


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what this machine can, in minutes, and print the tables")
    run.add_argument("--out", type=Path, default=Path("build/bench/results.csv"), help="the results file to replace")
    run.add_argument("--minutes", type=float, default=4.0)
    everything = commands.add_parser("gpu", help="measure everything, on a GPU")
    everything.add_argument(
        "--out", type=Path, required=True, help="the folder for results.csv, report.md and the tuned table"
    )
    everything.add_argument("--minutes", type=float, default=9.0, help="time for everything, building included")
    everything.add_argument("--resume", action="store_true", help="continue with the results of --out")
    everything.add_argument(
        "--resume-from", type=Path, metavar="PATH", help="continue with another run's folder or results file"
    )
    everything.add_argument("--commit", default="", help="the commit for the rows, in a copy without git")
    everything.add_argument(
        "--warm", type=Path, metavar="DIR", help="the folder that `warm` wrote; default: --out's, if it is there"
    )
    before = commands.add_parser("warm", help="compile here, with no GPU, the kernels that `gpu` will launch")
    before.add_argument("--out", type=Path, required=True, help="the folder for triton-cache.zip, which is carried")
    before.add_argument("--architecture", default="sm_90", help="of the GPU")
    report = commands.add_parser("report", help="tables and plots from results files")
    report.add_argument("files", type=Path, nargs="*", help="default: benchmarks/results/*.csv")
    report.add_argument("--plots", type=Path, default=None, help="a folder for the plots")
    report.add_argument("--publish", action="store_true", help="write the tables into README.md and docs/measured.md")
    arguments = parser.parse_args()
    if arguments.command == "run":
        _run(arguments.out, arguments.minutes)
    elif arguments.command == "gpu":
        from benchmarks.gpu import gpu

        if arguments.commit:
            os.environ[results.COMMIT] = arguments.commit
        sys.exit(not gpu.run(arguments.out, arguments.minutes, arguments.resume, arguments.resume_from, arguments.warm))
    elif arguments.command == "warm":
        from benchmarks.gpu import rehearsal

        print(rehearsal.compile_all(arguments.out, arguments.architecture))
    else:
        _report(arguments.files or sorted(RESULTS.glob("*.csv")), arguments.plots, arguments.publish)


def _run(out: Path, minutes: float) -> None:
    if regular_file(out) is not None:
        out.unlink()
    started = time.monotonic()
    for row in _rows(60 * minutes):
        results.append(out, [row])
    print(f"{out} in {time.monotonic() - started:.0f} s\n")
    _report([out], None, False)


def _rows(budget_s: float) -> Iterator[Row]:
    """Times at the sites that this device can measure in the budget, and memory at true size on any device."""
    from benchmarks.contestants import sites
    from benchmarks.harness import roofline
    from benchmarks.suites import ceilings, layers, memory, ops, steps

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    where, tokens = (sites.SITES, [2048, 8192]) if cuda else (sites.SMALL_SITES, sites.SMALL_TOKENS)
    found = list(ceilings.rows(device, 0.05 * budget_s))
    yield from found
    limits = roofline.measured(found)
    for t in tokens:
        yield from layers.rows(where, t, dtype, device, 0.35 * budget_s / len(tokens), ceilings=limits)
    yield from ops.rows(where, tokens, dtype, device, 0.15 * budget_s, ceilings=limits)
    yield from memory.rows()
    yield from steps.rows(device, 0.25 * budget_s)


def _report(files: list[Path], plots_folder: Path | None, publish: bool) -> None:
    from benchmarks.report import report

    rows = results.read(files)
    if publish:
        refuse_red(files)
        for page, tables in published(rows).items():
            report.update_page(page, tables)
    else:
        print("\n\n".join(report.tables(rows).values()))
    if plots_folder is not None:
        from benchmarks.report import plots

        for path in plots.draw(rows, plots_folder):
            print(f"wrote {path}")


def refuse_red(files: Sequence[Path]) -> None:
    """Exit where a file's run had steps of the proof that were red when they last ran: its figures may be of wrong results."""
    from benchmarks.gpu import gpu

    for file in files:
        if found := gpu.red(results.read([file])):
            steps = "; ".join(step.splitlines()[0][:200] for step in found)
            sys.exit(
                f"{file} is of a run whose proof was red: {steps}. "
                "Mend it, run again with --resume until the proof is green, and publish that file."
            )


def published(rows: Sequence[Row]) -> dict[Path, dict[str, str]]:
    """The tables of each page that have figures."""
    from benchmarks.report import report

    tables = report.tables(filter(_decides, rows)) | {"targets": report.tables(rows).get("targets", "")}
    return {page: {name: tables[name] for name in names if tables.get(name)} for page, names in PAGES.items()}


def _decides(row: Row) -> bool:
    """Whether a reader decides by it: the memory of models, and the time of a layer at the longest common length."""
    if row.group == "model":
        return row.site in ("Llama-3-8B", "Llama-3-70B", "SmolLM2-135M", "SmolLM2-135M, checkpointed")
    longest = 1024 if row.device.endswith("threads") else 8192
    return row.group == "layer" and row.metric.startswith("forward+backward") and row.tokens == longest


if __name__ == "__main__":
    main()

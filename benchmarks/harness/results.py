"""The results file: one CSV row a figure, with everything that the figure depends on."""

import csv
import dataclasses
import datetime
import functools
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from benchmarks.contestants.sites import Site
from gain_ops.measure.environment import describe_device
from gain_ops.utils.files import regular_file

VERSION = 1  # of the columns; read() refuses another
FUSED = ("triton", "cuda")  # our backends on a GPU
ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = "GAIN_OPS_BENCHMARKS_COMMIT"  # set by `gpu --commit`


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    group: op | variant | layer | block | model | step | ceiling | proof, the part of the suite that made it; environment,
        cublaslt, tuning and part (how a part of a run on a GPU ended) have their text in the note.
    site: what was measured, for instance ``Llama-3-8B o_proj``.
    contestant: who did it, a name of contestants.py; backend: ``eager``, ``triton``, ``cuda`` or ``-``.
    metric and unit: ``forward`` us, ``forward+backward`` us, ``saved`` B, ``peak`` B, ``throughput`` tokens/s and the like.
    median, q20, q80: quantiles of ``samples`` measurements; equal where the figure is exact.
    floor: the roofline's floor in the same unit, or None; note: what a reader must know, or why there is no figure.
    """

    group: str
    site: str
    contestant: str
    backend: str
    metric: str
    unit: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    median: float | None
    q20: float | None
    q80: float | None
    samples: int
    floor: float | None = None
    note: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


class Environment(TypedDict):
    """The columns that say where a figure comes from."""

    device: str
    torch: str
    triton: str
    commit: str
    date: str


def site_row(group: str, site: Site, tokens: int, dtype: torch.dtype, about: Environment) -> Callable[..., Row]:
    """Makes rows of one site: what is left to say is who, the metric and the figure; about is environment()."""
    return functools.partial(
        Row,
        group=group,
        site=site.name,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        in_features=site.in_features,
        out_features=site.out_features,
        **about,
    )


_KINDS: dict[str, Any] = {"tokens": int, "in_features": int, "out_features": int, "samples": int}
_KINDS |= dict.fromkeys(("median", "q20", "q80", "floor"), float)


def environment(device: torch.device) -> Environment:
    """Of a device, these packages and this checkout."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "triton": version,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """The commit, with ``+`` where the tree has changes; outside a checkout what COMMIT says, or empty."""
    try:
        run = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    except OSError:
        return os.environ.get(COMMIT, "")
    return run.stdout.strip() or os.environ.get(COMMIT, "")


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, made with its header where there is none; flushed, so that a cut leaves what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = regular_file(path) is None
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["version", *(field.name for field in dataclasses.fields(Row))])
        for row in rows:
            writer.writerow([VERSION, *("" if v is None else v for v in dataclasses.astuple(row))])
        file.flush()


def ours(rows: Iterable[Row], group: str, contestant: str, metric: str) -> dict[tuple[str, int], Row]:
    """By site and tokens the row, in bf16, of the better of our fused backends: the larger share, the smaller anything else."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        named = (row.group, row.contestant, row.metric, row.dtype) == (group, contestant, metric, "bfloat16")
        if named and row.backend in FUSED and row.median is not None:
            known = found.setdefault((row.site, row.tokens), row)
            if known.median is not None and (row.median > known.median) == (row.unit == "share"):
                found[row.site, row.tokens] = row
    return found


def read(paths: Sequence[Path]) -> list[Row]:
    """The rows of several files.

    Raises:
        ValueError: a file of another version of the columns, or that is not a results file.

    """
    rows = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if line.pop("version", None) != str(VERSION):
                    raise ValueError(
                        f"{path} is not a results file of version {VERSION}: measure again, or use its commit"
                    )
                rows.append(Row(**{name: _value(name, text) for name, text in line.items()}))
    return rows


def _value(name: str, text: str) -> Any:
    kind = _KINDS.get(name, str)
    return None if kind is float and text == "" else kind(text)

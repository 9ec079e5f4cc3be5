"""Tables of measured GEMMs: which way was fastest, by op, dtype, tokens and features, on a family of cards.

The user's table is GAIN_OPS_TUNED, or gain_ops/<family>.json in the cache folder; what it lacks is looked up in
``tuned/<family>.json`` of this folder, if there is one. ``gain-ops tune`` writes it::

    {"format": 5, "family": "sm_90", "problems": {
        "linear_z bfloat16 T<=8192 in=4096 out=4096": {
            "measured": "NVIDIA H200, driver 13000, torch 2.13.0, triton 3.9.0, gain_ops 0.1.0",
            "rows": [{"way": "composed", "us": 540.0, "config": null, "note": ""}, ...]}}}

A row is one candidate. One that was left out has no figure, and its note says why. A table serves every card of its family and
every version of Triton: the figures carry over better than any guess, and the check at first use finds what does not run.
"""

import functools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gain_ops.backends import machine
from gain_ops.utils.files import replace_file

FORMAT = 5
SHIPPED = Path(__file__).resolve().parent / "tuned"

_log = logging.getLogger("gain_ops")


@dataclass(frozen=True)
class Row:
    """One candidate."""

    way: str
    """ "composed", "triton" or "cuda"."""
    us: float | None
    """Microseconds of a call; None for a candidate that was left out."""
    config: dict[str, Any] | None = None
    """Of Triton: the fields of its GemmConfig."""
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """One op at one size."""

    measured: str
    """Where."""
    rows: tuple[Row, ...]


def fastest(rows: Sequence[Row]) -> list[Row]:
    """The rows with a figure, the fastest first."""
    return sorted((row for row in rows if row.us is not None), key=lambda row: row.us or 0.0)


def key(op: str, dtype: torch.dtype, tokens: int, out_features: int, in_features: int) -> str:
    """The name of a problem: tokens count up to the next power of two."""
    up_to = 1 << max(tokens - 1, 0).bit_length()
    return f"{op} {str(dtype).removeprefix('torch.')} T<={up_to} in={in_features} out={out_features}"


def find(family: str, name: str) -> tuple[Problem, Path] | None:
    """A problem with figures and the table that has it, or None where it was not measured."""
    for path, level in ((user_path(family), logging.WARNING), (SHIPPED / f"{family}.json", logging.DEBUG)):
        problem = read(path, family, level).get(name)
        if problem is not None and fastest(problem.rows):
            return problem, path
    return None


def user_path(family: str) -> Path:
    """The path of the user's table."""
    named = os.environ.get("GAIN_OPS_TUNED")
    return Path(named) if named else machine.cache_folder() / f"{family}.json"


@functools.cache
def read(path: Path, family: str, level: int) -> dict[str, Problem]:
    """The problems of a table; none if it is absent, and a line in the log if it is broken or another family's."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        header = {name: stored.get(name) for name in ("format", "family")}
        if header != {"format": FORMAT, "family": family}:
            _log.log(level, "table %s has %s, this is format %s of %s: not read", path, header, FORMAT, family)
            return {}
        return {
            name: Problem(problem["measured"], tuple(Row(**row) for row in problem["rows"]))
            for name, problem in stored["problems"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.log(level, "table %s cannot be read (%s): delete it and tune again", path, error)
        return {}


def write(path: Path, family: str, problems: dict[str, Problem]) -> None:
    """Write a table, which later reads see."""
    stored = {name: asdict(problem) for name, problem in sorted(problems.items())}
    text = json.dumps({"format": FORMAT, "family": family, "problems": stored}, indent=1)
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    read.cache_clear()

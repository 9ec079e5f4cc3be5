"""The results file of a study: JSON lines, one record a line, written when its trial or stage is done.

A study that was killed goes on after the last complete line. Everything that is shown of a study is made from this file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

from gain_ops.utils import strict_json
from gain_ops.utils.errors import UsageError, file_errors
from gain_ops.utils.files import replace_file

__all__ = [
    "BASE",
    "RESULTS",
    "Base",
    "Curve",
    "Header",
    "Rate",
    "Record",
    "Stage",
    "Study",
    "append",
    "mend",
    "read",
    "replace_header",
]

RESULTS = "results.jsonl"
"""The results file in a study's folder."""

BASE = "base"
"""The name of the unadapted model in lists of methods."""

Perplexities = dict[str, float]
"""By domain, on its validation windows."""


@dataclass(frozen=True)
class Header:
    """What the study depends on; the first record.

    ``settings`` is the study's Settings as JSON. ``orders`` are the domains' names in the order in which they are learned, one
    list an order. ``domains`` has of each, by name: source, sha256 of its windows, train_windows, validation_windows,
    window_tokens. ``tasks`` has of each multiple-choice set: items, choices (of an item), source. ``model_fingerprint`` is
    :func:`gain_ops.gainfiles.fingerprints.digest` of every parameter; it is empty in files from before there was one.
    """

    kind: ClassVar[str] = "header"
    settings: dict[str, Any]
    model: str
    model_parameters: int
    device: str
    environment: dict[str, str]
    date: str
    orders: list[list[str]]
    domains: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    model_fingerprint: str = ""


@dataclass(frozen=True)
class Base:
    """The model before any training: perplexity by domain, accuracy (0 to 1) by task."""

    kind: ClassVar[str] = "base"
    perplexity: Perplexities
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Rate:
    """One learning rate of a method's grid, tried on the first domain of the first order with the first seed.

    ``perplexity`` is of that domain's selection windows, on which nothing else is measured; None where training diverged.
    """

    kind: ClassVar[str] = "rate"
    method: str
    lr: float
    domain: str
    perplexity: float | None


@dataclass(frozen=True)
class Curve:
    """Perplexity by domain after a step of a stage, on the first few validation windows.

    ``step`` 0 is before the stage's first step; the last point is after its last one.
    """

    step: int
    perplexity: Perplexities


@dataclass(frozen=True)
class Stage:
    """A method has learned one more domain: the ``number``-th (from 1) of an order, with a seed.

    ``perplexity`` is of every domain, also of later ones, and ``accuracy`` of every task. ``losses`` are of each step, in nats
    a token. ``trained`` counts the trained numbers. ``seconds`` are of the entire stage, measuring included, and
    ``tokens_per_second`` is of its training steps only. ``saved_bytes`` is what a step saves for backward. ``peak_bytes`` is
    the peak memory of the process (CPU) or the allocator (CUDA) while it trained.
    """

    kind: ClassVar[str] = "stage"
    method: str
    lr: float
    seed: int
    order: int
    number: int
    domain: str
    perplexity: Perplexities
    accuracy: dict[str, float]
    curve: list[Curve]
    losses: list[float]
    trained: int
    seconds: float
    tokens_per_second: float
    saved_bytes: int
    peak_bytes: int


Record = Header | Base | Rate | Stage
_KINDS: dict[str, type] = {kind.kind: kind for kind in (Header, Base, Rate, Stage)}


@dataclass(frozen=True)
class Study:
    """The content of a results file. ``base`` may be None, and the lists incomplete, while the study is not done."""

    header: Header
    base: Base | None
    rates: list[Rate]
    stages: list[Stage]


@file_errors()
def append(path: Path, record: Record) -> None:
    """Append a record and flush it to the disk."""
    line = _line(record)
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


@file_errors()
def replace_header(path: Path, header: Header) -> None:
    """Replace the header of a results file; all other records stay."""
    rest = path.read_bytes().split(b"\n", 1)[1]
    replace_file(path, lambda beside: beside.write_bytes(_line(header) + rest))


def _line(record: Record) -> bytes:
    return json.dumps({"kind": record.kind, **asdict(record)}, allow_nan=False).encode() + b"\n"


@file_errors()
def mend(path: Path) -> None:
    """Cut off an incomplete last line, from a study that was killed while it wrote. Only the process that appends may do so."""
    complete = path.read_bytes().rfind(b"\n") + 1
    if complete < path.stat().st_size:
        os.truncate(path, complete)


@file_errors()
def read(path: Path) -> Study:
    """Read a results file, also of a study that is running or was killed: an incomplete last line does not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not the results of a study.

    """
    records = [_record(line, path) for line in path.read_bytes().split(b"\n")[:-1]]
    if not records or not isinstance(records[0], Header):
        raise UsageError(f"{path} is not the results file of a study: its first line is no header")
    return Study(records[0], next(_of(records, Base), None), list(_of(records, Rate)), list(_of(records, Stage)))


def _of(records: Iterable[Record], kind: type) -> Any:
    return (record for record in records if isinstance(record, kind))


def _record(line: bytes, path: Path) -> Record:
    try:
        values = strict_json.parse(line)
        kind = _KINDS[values.pop("kind")]
        if kind is Stage:
            values["curve"] = [Curve(**point) for point in values["curve"]]
        known = {field.name for field in fields(kind)}
        return cast(Record, kind(**{name: value for name, value in values.items() if name in known}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not the results file of a study: {line[:60]!r} ({error!r})") from None

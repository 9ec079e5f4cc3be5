"""Records of data files (JSON, CSV, Parquet, each also with gzip) and of data sets that the package datasets finds."""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gain_ops.utils import strict_json
from gain_ops.utils.errors import MissingPackageError, UsageError
from gain_ops.utils.wording import size_text

__all__ = ["HUB", "Record", "format_of", "not_text", "read_file", "read_hub"]

HUB = "hf:"
"""How the name of a data set begins that the package datasets is to find."""

_LARGEST = 256 << 20  # bytes of a .json, which is read as a whole, or of one record


@dataclass(frozen=True)
class Record:
    """A record's fields, and where it is: "data.jsonl, line 7"."""

    place: str
    fields: Mapping[str, Any]


def format_of(path: Path) -> str | None:
    """The format of a data file by its name, "jsonl", "json", "csv", "tsv" or "parquet"; None for any other file."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return {".ndjson": "jsonl"}.get(suffix, suffix[1:] if suffix[1:] in _READERS else None)


def not_text(start: bytes) -> str | None:
    """What to say of a file that begins so and is no UTF-8 text; None where it may be."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is UTF-16, not UTF-8 text: convert it (iconv -f UTF-16 -t UTF-8)"
    if b"\0" in start:
        return "is binary, not UTF-8 text"
    return None


def read_file(path: Path) -> Iterator[Record]:
    """The records of a data file, one after the other.

    Raises:
        UsageError: the file is damaged, or something else than its name says; the error names the line where it can.
        MissingPackageError: it is Parquet, and the package datasets is not installed.
        OSError: it cannot be read.
    """
    form = format_of(path)
    assert form is not None
    with path.open("rb") as plain:
        packed = path.name.lower().endswith(".gz")
        with closing(gzip.GzipFile(fileobj=plain) if packed else plain) as file, _named(path):
            start = file.read(512)
            file.seek(0)
            if form != "parquet" and (why := not_text(start)):
                raise UsageError(f"{path} {why}")
            yield from _READERS[form](file, path)  # type: ignore[arg-type]


def read_hub(name: str) -> Iterator[Record]:
    """The records of a data set's part "train", as the package datasets finds it: on the Hub or in a folder.

    Args:
        name: of the data set, "owner/name"; "owner/name:configuration" where it has several.

    Raises:
        UsageError: it is not found, or cannot be read.
        MissingPackageError: the package datasets is not installed.
    """
    _need_datasets("a data set by its name")
    import datasets

    place, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(place, configuration or None, split="train", streaming=True)
        for number, fields in enumerate(found, start=1):
            yield Record(f"{name}, record {number}", fields)
    except Exception as error:  # of every kind: no network, no such name, no such part, damaged files
        raise UsageError(f"datasets cannot read {name}: {error}") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in which file a reader of the standard library met its error."""
    try:
        yield
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: convert it, or give a text file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is no complete gzip file: {error}") from error


def _jsonl(file: IO[bytes], path: Path) -> Iterator[Record]:
    number = 0
    while line := file.readline(_LARGEST + 1):
        number += 1
        if len(line) > _LARGEST:
            raise UsageError(f"{path}: line {number} is longer than {size_text(_LARGEST)}")
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield _record(_parsed(line, path, number), f"{path}, line {number}")


def _json(file: IO[bytes], path: Path) -> Iterator[Record]:
    """A list of records; an object with one list of them; or, as many files of this name have it, one record a line."""
    first = file.readline(_LARGEST).removeprefix(codecs.BOM_UTF8).strip()
    more = file.read(1)
    file.seek(0)
    if first.startswith(b"{") and first.endswith(b"}") and more:
        yield from _jsonl(file, path)
        return
    content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise UsageError(f"{path} is larger than {size_text(_LARGEST)}: give one record a line, as .jsonl")
    if not content.strip():
        return
    value = _parsed(content.removeprefix(codecs.BOM_UTF8), path)
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise UsageError(f"{path} is not a list of records")
    for number, fields in enumerate(value, start=1):
        yield _record(fields, f"{path}, record {number}")


def _parsed(content: bytes, path: Path, line: int | None = None) -> Any:
    try:
        return strict_json.parse(content)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}: line {line or error.lineno} is not JSON: {error.msg} at column {error.colno}"
        ) from error
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise UsageError(f"{path}{'' if line is None else f', line {line}'}: {error}") from error


def _record(fields: object, place: str) -> Record:
    if not isinstance(fields, dict):
        raise UsageError(f'{place} is no object with fields: one was expected, as in {{"text": ...}}')
    return Record(place, fields)


def _csv(file: IO[bytes], path: Path, delimiter: str = ",") -> Iterator[Record]:
    before = csv.field_size_limit(_LARGEST)  # of the process; the default, 128 KiB, is less than many texts have
    try:
        rows = csv.DictReader(
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
        )
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise UsageError(f"{place} has {'more' if None in row else 'fewer'} cells than the first line")
            yield Record(place, row)
    except csv.Error as error:
        raise UsageError(f"{path}: line {rows.line_num} is not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _tsv(file: IO[bytes], path: Path) -> Iterator[Record]:
    return _csv(file, path, "\t")


def _parquet(file: IO[bytes], path: Path) -> Iterator[Record]:
    _need_datasets("Parquet")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path}, record {number}", fields)
    except (ArrowException, OSError) as error:  # OSError for some damage too, with no name in it
        raise UsageError(f"{path} is no complete Parquet file: {error}") from error


def _need_datasets(what: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise MissingPackageError(f'reading {what} needs the package datasets: pip install "gain-ops[data]"')


_READERS: dict[str, Callable[[IO[bytes], Path], Iterator[Record]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}

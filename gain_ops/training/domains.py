"""Text domains found on the machine itself, and their token windows."""

from __future__ import annotations

import codecs
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from gain_ops.measure.marks import predicted
from gain_ops.training.documents import Document, Tokenizer, characters, tokens
from gain_ops.training.fields import documents as documents_of
from gain_ops.training.fields import layout_of
from gain_ops.training.records import HUB, Record, format_of, not_text, read_file, read_hub
from gain_ops.utils.errors import MissingFileError, UsageError
from gain_ops.utils.wording import count_text, first_of

__all__ = [
    "Domain",
    "Tokenizer",
    "cut_windows",
    "from_path",
    "licence_texts",
    "python_source",
    "readme_bodies",
    "split_domain",
    "token_stream",
]

_VALIDATION_SHARE = 0.10  # of a domain's characters
_LARGEST_VALIDATION_SHARE = 0.30
_MAX_BYTES = 64 * 2**20  # read of a user's data by default: far more than a run of the commands can train on
_SHORTEST_README = 200  # characters: below it a description is a sentence, not a text
_BESIDE_DATA = re.compile(r"(readme|licen[cs]e|copying)\b", re.IGNORECASE)
_TEST_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}


@dataclass(frozen=True)
class Domain:
    """Text of one kind: documents to train on and, disjoint from them, documents to measure on.

    ``read`` says what a user's data were read as, in a sentence; it is empty for a domain of the machine itself.
    """

    name: str
    source: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    read: str = ""


def python_source() -> Domain:
    """Python source: the standard library of the running interpreter, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not _TEST_FOLDERS & set(path.relative_to(root).parts)]
    texts = [text for path in files if (text := _read_text(path)) is not None]
    if not texts:
        raise MissingFileError(
            f"no Python source in {root}: this interpreter ships without its standard library's source; "
            "give text of your own instead (from_path, or --data on the command line)"
        )
    return split_domain("python", texts, source=f"standard library of Python {sysconfig.get_python_version()}")


def licence_texts() -> Domain:
    """Licence texts of the installed packages, one of each kind."""
    texts: dict[str, str] = {}
    for distribution in _distributions():
        for file in sorted(distribution.files or (), key=str):
            if "dist-info" in str(file) and re.match(r"licen[cs]e|copying", file.name, re.IGNORECASE):
                text = _read_text(Path(str(file.locate())))
                if text:
                    # Copies of one licence differ in the copyright line at their head; their ends are the same.
                    texts.setdefault("".join(text.split())[-300:].lower(), text)
    return split_domain("licences", texts.values(), source="licence files of the installed packages")


def readme_bodies() -> Domain:
    """README bodies: the long descriptions in the metadata of the installed packages."""
    texts = []
    for distribution in _distributions():
        body = distribution.metadata.get("Description") or distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(body, str) and len(body) >= _SHORTEST_README:
            texts.append(body)
    return split_domain("readmes", texts, source="long descriptions of the installed packages")


def from_path(path: Path, *, limit: int = _MAX_BYTES, text_field: str | None = None) -> Domain:
    """The user's own data: a data file, a text, a folder of either, or the name of a data set.

    A data file (.jsonl, .json, .csv, .tsv, .parquet, each also as .gz) is read by its records' fields, see docs/howto/data.md.
    "hf:owner/name" is read with the package datasets. Of a folder every file is read, except hidden ones: as records where
    it holds data files, as UTF-8 text where it holds anything else.

    Args:
        path: of the file or the folder.
        limit: the most bytes to read of texts, in the order of the paths, and characters of records; 64 Mi by default.
        text_field: the field that has the text, for records with fields of other names.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file is empty, damaged or not UTF-8 text, its records are of no known kind or of several, or the folder
            holds no text file, or data files among texts.
        MissingPackageError: the package datasets is needed and not installed.
    """
    if str(path).startswith(HUB) and not path.exists():
        name = str(path).removeprefix(HUB)
        return _from_records(name.rpartition("/")[2], name, read_hub(name), limit, text_field)
    if path.is_file() and format_of(path):
        name = Path(re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)).stem
        return _from_records(name, str(path), read_file(path), limit, text_field)
    if path.is_dir():
        files = _visible_files(path)
        if data := _data_files(path, files):
            records = chain.from_iterable(map(read_file, data))
            return _from_records(path.resolve().name, f"{path} ({len(data)} data files)", records, limit, text_field)
    elif not path.is_file():
        raise MissingFileError(f"no such file or folder: {path}")
    if text_field is not None:
        raise UsageError(f"{path} is read as text, which has no fields: --text-field is for data files, as .jsonl")
    return _from_folder(path, files, limit) if path.is_dir() else _from_text(path, limit)


def split_domain(name: str, documents: Iterable[Document], *, source: str) -> Domain:
    """Divide documents into a training part and a validation part, about nine to one by characters.

    Repeated documents count once. The split goes by document, in the order of the documents' hashes, so it does not depend on
    file names or their order. Where no choice of complete documents is near the share (one long file), each text is cut at
    a line end, and its tail goes to the validation part. Prompts and conversations are not cut: the shortest is held out.
    """
    unique = sorted({one for one in documents if not isinstance(one, str) or one.strip()}, key=_digest)
    total = sum(map(characters, unique))
    train: list[Document] = []
    validation: list[Document] = []
    held = 0
    for document in unique:
        size = characters(document)
        if held < _VALIDATION_SHARE * total and held + size <= _LARGEST_VALIDATION_SHARE * total:
            validation.append(document)
            held += size
        else:
            train.append(document)
    if held < _VALIDATION_SHARE * total / 2:
        texts = [document for document in unique if isinstance(document, str)]
        if texts == unique:
            cuts = [(text, _line_end(text, round(len(text) * (1 - _VALIDATION_SHARE)))) for text in texts]
            train = [text[:cut] for text, cut in cuts]
            validation = [text[cut:] for text, cut in cuts]
        elif not validation and len(train) > 1:
            validation = [train.pop(train.index(min(train, key=characters)))]
    return Domain(name, source, tuple(train), tuple(validation))


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer, *, limit: int) -> Tensor:
    """The documents' tokens one after the other, an end-of-text token after each.

    A token of a prompt, which is read and not learned, is marked: ``~id`` stands for it (:mod:`gain_ops.measure.marks`).
    Documents are read until there are ``limit`` tokens; the last one is read to its end.

    Returns:
        int64 [tokens].
    """
    found: list[int] = []
    for document in documents:
        if len(found) >= limit:
            break
        found += tokens(document, tokenizer)
    return torch.tensor(found, dtype=torch.int64)


def cut_windows(stream: Tensor, *, length: int, count: int, seed: int) -> Tensor:
    """Cut a token stream into windows that do not overlap, and draw ``count`` of them without replacement.

    A window in which nothing is to be predicted (the middle of a long prompt) is left out.

    Args:
        stream: int64 [tokens].
        length: tokens in a window.
        count: windows asked for; fewer are returned where the stream is shorter.
        seed: of the draw; the same seed gives the same windows in the same order.

    Returns:
        int64 [at most min(count, tokens // length), length].
    """
    whole = stream.numel() // length
    windows = stream[: whole * length].view(whole, length)
    windows = windows[predicted(windows).any(1)]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def _from_records(name: str, source: str, records: Iterator[Record], limit: int, text_field: str | None) -> Domain:
    first = next(records, None)
    if first is None:
        raise UsageError(f"{source} has no records: give a file with data")
    layout = layout_of(first, text_field)
    found: list[Document] = []
    size, whole = 0, True
    for document in documents_of(chain([first], records), layout):
        if size >= limit:
            whole = False
            break
        found.append(document)
        size += characters(document)
    domain = split_domain(name, found, source=source)
    if not domain.train:
        raise UsageError(f"{source} has {len(found):,} records without text in {layout}: give a file with text")
    return replace(domain, read=_said(f"{len(found):,} records, {layout}", size, source, whole=whole))


def _from_text(path: Path, limit: int) -> Domain:
    text = _read_text(path, limit=limit)
    if text is None:
        with path.open("rb") as file:
            why = not_text(file.read(512)) or "is not UTF-8 text: convert it, or give a text file"
        raise UsageError(f"{path} {why}")
    if not text.strip():
        raise UsageError(f"{path} is empty: give a file with text")
    read = _said("one text", len(text), str(path), whole=path.stat().st_size <= limit)
    return replace(split_domain(path.stem, [text], source=str(path)), read=read)


def _from_folder(folder: Path, files: Sequence[Path], limit: int) -> Domain:
    budget = limit
    texts: list[str] = []
    skipped = 0
    for path in files:
        if budget <= 0:
            break
        text = _read_text(path, limit=budget)
        if text is None:
            skipped += 1
            continue
        texts.append(text)
        budget -= len(text.encode())
    if not any(text.strip() for text in texts):
        raise UsageError(
            f"{folder} holds no UTF-8 text: {len(files)} files below it, {skipped} of them not text; "
            "give a folder with text files"
        )
    source = f"{folder} ({len(texts)} text files" + (f", {skipped} others skipped)" if skipped else ")")
    read = _said(f"{len(texts):,} texts", sum(map(len, texts)), source, whole=budget > 0)
    return replace(split_domain(folder.resolve().name, texts, source=source), read=read)


def _said(what: str, size: int, source: str, *, whole: bool) -> str:
    return f"read {what}, {count_text(size)} characters, from {'' if whole else 'the beginning of '}{source}"


def _visible_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _data_files(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The data files of a folder of data; none for a folder of texts, which may hold some .json or .csv, as source code does.

    Raises:
        UsageError: there are texts, and files that can be nothing but data.
    """
    data = [path for path in files if format_of(path)]
    texts = [path for path in files if not format_of(path) and not _BESIDE_DATA.match(path.name)]
    if not texts:
        return data
    certain = [path for path in data if format_of(path) in ("jsonl", "parquet")]
    if certain:
        raise UsageError(
            f"{folder} holds data ({first_of([path.name for path in certain])}) and other files "
            f"({first_of([path.name for path in texts])}): give the data file, or a folder of one kind"
        )
    return []


def _distributions() -> list[metadata.Distribution]:
    # Two installs of one package on the path would otherwise change the order from machine to machine.
    named = {distribution.metadata["Name"]: distribution for distribution in metadata.distributions()}
    return [named[name] for name in sorted(name for name in named if name)]


def _read_text(path: Path, *, limit: int = _MAX_BYTES) -> str | None:
    """The first ``limit`` bytes of a file as text, or None where it is not UTF-8 text or is gone."""
    try:
        with path.open("rb") as file:
            data = file.read(limit)
            whole = not file.read(1)
    except FileNotFoundError:  # listed in a package's record, but not installed
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _digest(document: Document) -> str:
    text = document if isinstance(document, str) else repr(document)
    return hashlib.sha256(text.encode()).hexdigest()


def _line_end(text: str, position: int) -> int:
    """The end of the last line that ends before ``position``, or ``position`` in a text of one line."""
    return text.rfind("\n", 0, position) + 1 or position

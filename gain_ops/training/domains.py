"""Text domains found on the machine itself, and their token windows."""

from __future__ import annotations

import codecs
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gain_ops.utils.errors import MissingFileError, UsageError

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
_TEST_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' own have it."""

    @property
    def eos_token_id(self) -> int | None:
        """The token between two documents, if there is one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of ``text``."""


@dataclass(frozen=True)
class Domain:
    """Text of one kind: documents to train on and, disjoint from them, documents to measure on."""

    name: str
    source: str
    train: tuple[str, ...]
    validation: tuple[str, ...]


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


def from_path(path: Path, *, limit: int = _MAX_BYTES) -> Domain:
    """The user's own text: one UTF-8 file, or every UTF-8 file below a folder (except hidden ones).

    Args:
        path: of the file or the folder.
        limit: the most bytes to read, in the order of the paths; 64 MiB by default.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file is empty or not UTF-8 text, or the folder holds no text file.
    """
    if path.is_file():
        text = _read_text(path, limit=limit)
        if text is None:
            raise UsageError(f"{path} is not UTF-8 text: convert it, or give a text file")
        if not text.strip():
            raise UsageError(f"{path} is empty: give a file with text")
        return split_domain(path.stem, [text], source=str(path))
    if not path.is_dir():
        raise MissingFileError(f"no such file or folder: {path}")
    return _from_folder(path, limit)


def split_domain(name: str, documents: Iterable[str], *, source: str) -> Domain:
    """Divide documents into a training part and a validation part, about nine to one by characters.

    Repeated documents count once. The split goes by document, in the order of the documents' hashes, so it does not depend on
    file names or their order. Where no choice of complete documents is near the share (one long file), each document is cut at
    a line end, and its tail goes to the validation part.
    """
    unique = sorted({text for text in documents if text.strip()}, key=_digest)
    total = sum(map(len, unique))
    train: list[str] = []
    validation: list[str] = []
    held = 0
    for text in unique:
        if held < _VALIDATION_SHARE * total and held + len(text) <= _LARGEST_VALIDATION_SHARE * total:
            validation.append(text)
            held += len(text)
        else:
            train.append(text)
    if held < _VALIDATION_SHARE * total / 2:
        cuts = [(text, _line_end(text, round(len(text) * (1 - _VALIDATION_SHARE)))) for text in unique]
        train = [text[:cut] for text, cut in cuts]
        validation = [text[cut:] for text, cut in cuts]
    return Domain(name, source, tuple(train), tuple(validation))


def token_stream(documents: Sequence[str], tokenizer: Tokenizer, *, limit: int) -> Tensor:
    """The documents' tokens one after the other, an end-of-text token after each.

    Documents are read until there are ``limit`` tokens; the last one is read to its end.

    Returns:
        int64 [tokens].
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in documents:
        if len(tokens) >= limit:
            break
        tokens += tokenizer.encode(text, add_special_tokens=False) + end
    return torch.tensor(tokens, dtype=torch.int64)


def cut_windows(stream: Tensor, *, length: int, count: int, seed: int) -> Tensor:
    """Cut a token stream into windows that do not overlap, and draw ``count`` of them without replacement.

    Args:
        stream: int64 [tokens].
        length: tokens in a window.
        count: windows asked for; fewer are returned where the stream is shorter.
        seed: of the draw; the same seed gives the same windows in the same order.

    Returns:
        int64 [min(count, tokens // length), length].
    """
    whole = stream.numel() // length
    windows = stream[: whole * length].view(whole, length)
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def _from_folder(folder: Path, budget: int) -> Domain:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
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
    return split_domain(folder.resolve().name, texts, source=source)


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _line_end(text: str, position: int) -> int:
    """The end of the last line that ends before ``position``, or ``position`` in a text of one line."""
    return text.rfind("\n", 0, position) + 1 or position

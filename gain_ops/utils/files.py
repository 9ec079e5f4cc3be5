"""Files and folders that are whole or absent: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gain_ops.utils.errors import BusyError

__all__ = ["StagedFolder", "copy_file", "replace_file", "stage_of", "staged_folder"]

_AT_ONCE = 64 << 20  # bytes that the system copies in one call, between two reports of progress
_BUFFER = 4 << 20


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a path beside ``path``, then move what it wrote, once it is on the disk, to ``path``.

    The folder of ``path`` is made where there is none, and of a link the file that it leads to is replaced. An error in
    ``write`` leaves an earlier file at ``path`` as it was.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: it cannot be written.

    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    place = path.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".part-{os.getpid()}-{path.name}")  # the suffix stays: writers choose a format by it
    try:
        write(beside)
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def copy_file(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    """Copy the bytes of a file, sharing its blocks where the file system can; ``advance`` gets the bytes of each step.

    Raises:
        OSError: it cannot be read or written, or became shorter meanwhile.

    """
    with source.open("rb") as reader, target.open("wb") as writer:
        size = left = os.fstat(reader.fileno()).st_size
        for copied in _copied_by_system(reader.fileno(), writer.fileno(), left):
            left -= copied
            advance(copied)
        reader.seek(size - left)  # the system moved the descriptors, of which Python's buffers need not know
        writer.seek(size - left)
        while left:
            block = reader.read(min(left, _BUFFER))
            if not block:
                raise OSError(f"{source} became shorter while it was copied")
            writer.write(block)
            left -= len(block)
            advance(len(block))


class StagedFolder:
    """What staged_folder() gives.

    Attributes:
        folder: where to write.
        finished: the files that are finished there, by name, each with what finish() was told of it.

    """

    def __init__(self, stage: Path, identity: str) -> None:
        self.folder = stage / "files"
        self.finished: dict[str, Any] = {}
        self._identity = identity
        self._journal = stage / "journal.json"
        with suppress(OSError, ValueError, LookupError, TypeError):
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            if journal["identity"] == identity and self.folder.is_dir():
                self.finished = journal["finished"]
        if not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        for path in self.folder.rglob("*"):
            if path.is_file() and str(path.relative_to(self.folder)) not in self.finished:
                path.unlink()

    def finish(self, name: str, note: Any) -> None:
        """Bring the file ``name`` in the folder to the disk, and remember it, with a note that JSON can hold."""
        with (self.folder / name).open("rb+") as written:
            os.fsync(written.fileno())
        self.finished[name] = note
        text = json.dumps({"identity": self._identity, "finished": self.finished})
        replace_file(self._journal, lambda beside: beside.write_text(text, encoding="utf-8"))

    def discard(self) -> None:
        """Let nothing be left of what is here, should the block end with an error."""
        self.finished.clear()


def stage_of(path: Path) -> Path:
    """Where staged_folder() keeps what will take the place of ``path``."""
    path = path.resolve()
    return path.with_name(f".part-{path.name}")


@contextmanager
def staged_folder(path: Path, identity: str) -> Iterator[StagedFolder]:
    """A folder to write into, which takes the place of ``path`` if the block ends without an error.

    It lies beside ``path``, under the same name in every run. A run that is cut, even by a crash, leaves the files that
    it finished: the next one with the same ``identity`` finds them, one with another identity starts anew. An error
    before the first file is finished leaves nothing.

    Raises:
        OSError: another run is writing there, or the folder cannot be made or moved.

    """
    path = path.resolve()
    stage = stage_of(path)
    old = stage / "old"
    stage.mkdir(parents=True, exist_ok=True)
    with _locked(stage, path):
        if old.exists():  # cut while it was moved into place
            shutil.rmtree(old) if path.exists() else old.rename(path)
        staged = StagedFolder(stage, identity)
        try:
            yield staged
            if path.exists():
                path.rename(old)
            try:
                staged.folder.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            _sync_folder(path.parent)
            staged.discard()
        finally:
            if not staged.finished:
                shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _locked(stage: Path, path: Path) -> Iterator[None]:
    with (stage / "lock").open("a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another run is writing {path}: wait for it, or name another folder") from None
        except (ImportError, OSError):  # Windows, and file systems without locks: two runs are not kept apart
            pass
        yield


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _copied_by_system(source: int, target: int, size: int) -> Iterator[int]:
    """Bytes copied, call after call, until all are or the system cannot go on: between some file systems it cannot."""
    with suppress(OSError, AttributeError):  # the latter where there is no such call
        while size and (copied := os.copy_file_range(source, target, min(size, _AT_ONCE))):
            size -= copied
            yield copied

"""Files and folders that are complete or absent: written beside their place, then moved into it."""

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
    """Call ``write`` with a path beside ``path``; once the new file is on the disk, move it to ``path``.

    The folder of ``path`` is made if it is missing. If ``path`` is a link, the file that it leads to is replaced. After an
    error in ``write`` an earlier file at ``path`` is as it was.

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
        reader.seek(size - left)  # the system moved the descriptors, and Python's buffers may not know it
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
        finished: the finished files there, by name, each with the note that finish() got.

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
        """Leave nothing of this folder, if the block ends with an error."""
        self.finished.clear()


def stage_of(path: Path) -> Path:
    """Where staged_folder() puts the folder that will replace ``path``."""
    path = path.resolve()
    return path.with_name(f".part-{path.name}")


@contextmanager
def staged_folder(path: Path, identity: str) -> Iterator[StagedFolder]:
    """A folder to write into, which replaces ``path`` if the block ends without an error.

    It lies beside ``path``, under the same name in every run. An interrupted run, even a crash, leaves the files that it
    finished. The next run with the same ``identity`` finds them; a run with another identity starts again. An error before
    the first file is finished leaves nothing.

    Raises:
        OSError: another run is writing there, or the folder cannot be made or moved.

    """
    path = path.resolve()
    stage = stage_of(path)
    old = stage / "old"
    stage.mkdir(parents=True, exist_ok=True)
    with _locked(stage, path):
        if old.exists():  # interrupted while it was moved into place
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
        except (ImportError, OSError):  # Windows, and file systems without locks: nothing separates two runs
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
    """Bytes copied, call after call, until all are copied or the system stops: between some file systems it cannot copy."""
    with suppress(OSError, AttributeError):  # AttributeError where the system has no such call
        while size and (copied := os.copy_file_range(source, target, min(size, _AT_ONCE))):
            size -= copied
            yield copied

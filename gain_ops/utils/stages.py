"""Folders that are complete or absent: written in a working folder beside their place, then moved into it.

The working folder of ``model`` is ``.part-model``, or ``.part-model-1`` and so on where something of that name is not ours::

    .part-model/made-by-gain-ops.json   the marker: whose working folder it is
                journal.json            which files are finished, each with its size and time
                files/                  what becomes the folder ``model``
                old/                    what was at ``model`` while the two change places

It is ours if this user made it (it appears at once, with its marker, and others cannot write into it) and nothing in these
places is a link. Nothing else is ever written to, or deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from gain_ops.utils import strict_json
from gain_ops.utils.errors import FileError
from gain_ops.utils.files import PART, found_at, lock, naming, replace_file, sync_folder

__all__ = ["StagedFolder", "stage_of", "staged_folder"]

_MARKER, _JOURNAL, _FILES, _OLD = "made-by-gain-ops.json", "journal.json", "files", "old"
_IS = {_MARKER: stat.S_ISREG, _JOURNAL: stat.S_ISREG, _FILES: stat.S_ISDIR, _OLD: stat.S_ISDIR}
_NAMES = 100
_LONGEST = 200  # bytes of a name, so that the working folder's is not too long


class StagedFolder:
    """What staged_folder() gives.

    Attributes:
        folder: where to write.

    """

    def __init__(self, stage: Path, identity: str) -> None:
        self.folder = stage / _FILES
        self._identity = identity
        self._journal = stage / _JOURNAL
        self._entries = self._read_journal()
        self.folder.mkdir(exist_ok=True)
        self._remove_unfinished()

    @property
    def finished(self) -> dict[str, Any]:
        """The finished files in the folder, by name, each with the note that finish() got."""
        return {name: entry["note"] for name, entry in self._entries.items()}

    def finish(self, name: str, note: Any) -> None:
        """Bring the file ``name`` in the folder to the disk, and remember it, with a note that JSON can hold."""
        with naming(self.folder / name), (self.folder / name).open("rb+") as written:
            os.fsync(written.fileno())
        self._entries[name] = {**_stamp(self.folder / name), "note": note}
        text = json.dumps({"identity": self._identity, "finished": self._entries})
        replace_file(self._journal, lambda beside: beside.write_text(text, encoding="utf-8"))

    def discard(self) -> None:
        """Leave nothing of this folder, if the block ends with an error."""
        self._entries.clear()

    def _read_journal(self) -> dict[str, dict[str, Any]]:
        """The entries of files that are as they were when they were finished; none of a journal of other inputs."""
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            journal = strict_json.read(self._journal)
            if journal["identity"] == self._identity:
                entries = {name: dict(entry) for name, entry in journal["finished"].items()}
                return {name: entry for name, entry in entries.items() if self._is_as_finished(name, entry)}
        return {}

    def _is_as_finished(self, name: str, entry: dict[str, Any]) -> bool:
        with suppress(OSError):
            return entry == {**_stamp(self.folder / name), "note": entry["note"]}
        return False

    def _remove_unfinished(self) -> None:
        """Remove all but the finished files; links themselves, never what they lead to."""
        for folder, folders, files in os.walk(self.folder, topdown=False):
            for name in (*files, *folders):
                path = Path(folder) / name
                if path.is_dir() and not path.is_symlink():
                    with suppress(OSError):  # it holds finished files
                        path.rmdir()
                elif str(path.relative_to(self.folder)) not in self._entries:
                    path.unlink()


def stage_of(path: Path) -> Path | None:
    """The working folder that an interrupted run of staged_folder() for ``path`` left, or None."""
    with suppress(OSError):  # of a link that leads to itself
        found_at(path)
        place = path.resolve()
        return next((stage for stage in _names(place) if _is_ours(stage, place)), None)
    return None


@contextmanager
def staged_folder(path: Path, identity: str) -> Iterator[StagedFolder]:
    """A folder to write into, which replaces ``path`` if the block ends without an error.

    An interrupted run, even a crash, leaves the files that it finished. The next run with the same ``identity`` finds them;
    a run with another identity starts again. An error before the first file is finished leaves nothing.

    Raises:
        BusyError: another run is writing there.
        FileError: something else than a folder is at ``path``.
        OSError: the folder cannot be made or moved.

    """
    _refuse_others(path)
    place = path.resolve()
    with ExitStack() as held, naming(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        stage = _take(place, held)
        old = stage / _OLD
        if old.exists():  # interrupted while it was moved into place
            shutil.rmtree(old) if place.exists() else old.rename(place)
        staged = StagedFolder(stage, identity)
        try:
            yield staged
            _refuse_others(path)
            if place.exists():
                place.rename(old)
            try:
                staged.folder.rename(place)
            except OSError:
                if old.exists():
                    old.rename(place)
                raise
            sync_folder(place.parent)
            staged.discard()
        finally:
            if not staged.finished:
                _remove(stage)


def _refuse_others(path: Path) -> None:
    kind = found_at(path)
    if kind not in (None, "a folder"):
        raise FileError(f"{path} is {kind}: name a folder to write into")


def _names(path: Path) -> Iterator[Path]:
    name = PART + os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    yield path.with_name(name)
    yield from (path.with_name(f"{name}-{number}") for number in range(1, _NAMES))


def _is_ours(stage: Path, path: Path) -> bool:
    try:
        made = stage.lstat()
        if not stat.S_ISDIR(made.st_mode) or made.st_uid != _user(made) or not _as_made(stage):
            return False
        return bool(strict_json.read(stage / _MARKER) == _marker(path))
    except (OSError, ValueError):
        return False


def _user(made: os.stat_result) -> int:
    return os.geteuid() if hasattr(os, "geteuid") else made.st_uid  # Windows has no such numbers


def _as_made(stage: Path) -> bool:
    """Whether none of the places in a working folder is a link, or of another kind."""
    return all(
        not os.path.lexists(stage / name) or is_it((stage / name).lstat().st_mode) for name, is_it in _IS.items()
    )


def _marker(path: Path) -> dict[str, str]:
    return {"working folder of": path.name}


def _take(path: Path, held: ExitStack) -> Path:
    """The working folder of an interrupted run or a new one, with its lock."""
    busy = f"another run is writing {path}: wait for it, or name another folder"
    while True:
        stage = stage_of(path)
        if stage is None:
            if (made := _make(path, busy, held)) is not None:
                return made
        else:
            with suppress(FileNotFoundError):  # another run has ended, and removed it
                held.enter_context(lock(stage, busy))
                if _is_ours(stage, path):
                    return stage


def _make(path: Path, busy: str, held: ExitStack) -> Path | None:
    """A new working folder, which appears under its name at once, with marker and lock; None if another run was first."""
    stage = next((stage for stage in _names(path) if not os.path.lexists(stage)), None)
    if stage is None:
        raise FileError(f"{next(_names(path))} and {_NAMES - 1} more names beside {path} are taken: remove them")
    fresh = Path(tempfile.mkdtemp(prefix=PART, dir=path.parent))
    try:
        (fresh / _MARKER).write_text(json.dumps(_marker(path)), encoding="utf-8")
        held.enter_context(lock(fresh, busy))
        fresh.rename(stage)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not os.path.lexists(stage):
            raise
        return None
    if stage_of(path) in (None, stage):  # None on a file system that gives files to users of its own
        return stage
    _remove(stage)
    return None


def _stamp(file: Path) -> dict[str, int]:
    """The size and the time of a regular file; raises for a link."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{file} is not a regular file")
    return {"size": found.st_size, "time": found.st_mtime_ns}


def _remove(stage: Path) -> None:
    """Remove what is ours of a working folder, the marker last; what else somebody put there stays."""
    for name in (_FILES, _OLD):
        shutil.rmtree(stage / name, ignore_errors=True)
    with suppress(OSError):
        for name in (_JOURNAL, _MARKER):
            (stage / name).unlink(missing_ok=True)
        stage.rmdir()

"""Files that are complete or absent: written beside their place, then moved into it. Only regular files are ever replaced."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gain_ops.utils.errors import BusyError, FileError, IsAFolderError

__all__ = [
    "PART",
    "copy_file",
    "found_at",
    "is_unfinished",
    "lock",
    "locked_folder",
    "naming",
    "open_stream",
    "regular_file",
    "replace_file",
    "sync_folder",
]

PART = ".part-"
"""How the names begin of what is not in its place yet."""

_UNFINISHED = re.compile(rf"{re.escape(PART)}[0-9a-f]{{16}}(\.[^.]*)?")

_OPEN_FILES = re.compile(r"/proc/\d+(/task/\d+)?/fd")
_LINKS = 40  # that the system follows

_AT_ONCE = 64 << 20  # bytes that the system copies in one call, between two reports of progress
_BUFFER = 4 << 20

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a new file beside ``path``; once its content is on the disk, move it to ``path``.

    The folder of ``path`` is made if it is missing. If ``path`` is a link, the file that it leads to is replaced. The mode of
    an earlier file stays. After an error in ``write`` an earlier file at ``path`` is as it was.

    Raises:
        IsAFolderError: ``path`` is a folder.
        FileError: it is a device, a pipe or a socket.
        OSError: it cannot be written; the error names ``path``.

    """
    earlier = regular_file(path)
    place = path.resolve()
    with naming(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        # the suffix stays: writers choose a format by it
        beside = place.with_name(f"{PART}{secrets.token_hex(8)}{path.suffix}")
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            write(beside)
            if earlier is not None:
                beside.chmod(stat.S_IMODE(earlier.st_mode))
            with beside.open("rb+") as written:
                os.fsync(written.fileno())
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(place.parent)


def is_unfinished(path: Path) -> bool:
    """Whether this is a file of replace_file() that a killed process left."""
    return _UNFINISHED.fullmatch(path.name) is not None and stat.S_ISREG(path.lstat().st_mode)


def regular_file(path: Path) -> os.stat_result | None:
    """The file at ``path``, links followed, or None where there is nothing yet; an error for what may not be replaced.

    Raises:
        IsAFolderError: a folder.
        FileError: a device, a pipe, a socket, or a name such as /dev/stdout, which stands for what is open.
        OSError: a file that is write-protected, a link that leads to itself, or a path that cannot be looked up.

    """
    kind = found_at(path)
    if kind is None:
        return None
    if kind == "a folder":
        raise IsAFolderError(f"{path} is a folder: name a file in it")
    if open_stream(path) is not None:
        kind = "an open stream"
    if kind != "a file":
        raise FileError(f"{path} is {kind}: name a regular file, or one that does not exist yet")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path.stat()


def open_stream(path: Path) -> int | None:
    """The number of the open file that a name such as /dev/stdout or /dev/fd/3 stands for; None for any other path.

    Such a name leads on to the file itself, so replacing that file would take it from whoever opened it.
    """
    place = str(path)
    for _ in range(_LINKS):
        folder, name = os.path.split(place)
        if name.isdecimal() and _OPEN_FILES.fullmatch(os.path.realpath(folder)):
            return int(name)
        if not os.path.islink(place):
            break
        place = os.path.join(folder, os.readlink(place))
    return None


def found_at(path: Path) -> str | None:
    """What is at ``path``, links followed: a file, a folder, a device, a pipe or a socket; None for nothing.

    Raises:
        OSError: a link that leads to itself, or a path that cannot be looked up.

    """
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "neither a file nor a folder")
    except FileNotFoundError:
        return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the system name ``path``, where it names no file (a full disk), or a file beside its place."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and Path(str(error.filename or PART)).name.startswith(PART):
            error.filename = str(path)
        raise


def copy_file(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    """Copy the bytes of a file, sharing its blocks where the file system can; ``advance`` gets the bytes of each step.

    Raises:
        FileExistsError: something is at ``target``, a link to nothing too.
        OSError: a file cannot be read or written, or became shorter meanwhile.

    """
    with naming(target), source.open("rb") as reader, target.open("xb") as writer:
        size = left = os.fstat(reader.fileno()).st_size
        for copied in _copied_by_system(reader.fileno(), writer.fileno(), left):
            left -= copied
            advance(copied)
        reader.seek(size - left)  # the system moved the descriptors, and Python's buffers may not know it
        writer.seek(size - left)
        while left:
            with naming(source):
                block = reader.read(min(left, _BUFFER))
            if not block:
                raise FileError(f"{source} became shorter while it was copied")
            writer.write(block)
            left -= len(block)
            advance(len(block))


@contextmanager
def locked_folder(folder: Path, who: str) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing. A folder that was made and is left empty is removed.

    Args:
        folder: where this run writes.
        who: what another run is called in the error, "another adaptation".

    Raises:
        BusyError: another run is at work there.
        FileError: something else than a folder is there.
        OSError: the folder cannot be made.

    """
    kind = found_at(folder)
    if kind not in (None, "a folder"):
        raise FileError(f"{folder} is {kind}: name a folder to write into")
    place = folder.resolve()
    made = [path for path in (place, *place.parents) if not path.exists()]
    place.mkdir(parents=True, exist_ok=True)
    try:
        with lock(place, f"{who} is at work in {folder}: wait for it, or name another folder"):
            yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def lock(folder: Path, busy: str) -> Iterator[None]:
    """Hold a folder's lock. It is on the folder itself, no file is touched, and the system frees a killed process's.

    Raises:
        BusyError: another run holds it; with the text ``busy``.

    """
    handle = _locked(folder, busy)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(folder: Path, busy: str) -> int | None:
    """The handle that holds the lock; None on Windows and file systems without locks, where nothing separates two runs."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, PermissionError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BusyError(busy) from None
    except OSError:
        os.close(handle)
        return None
    return handle


def sync_folder(folder: Path) -> None:
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

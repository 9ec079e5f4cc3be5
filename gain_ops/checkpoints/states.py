"""Which bytes were planned for: the state of a file, by which a later one shows that it is another."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_HEAD = 1 << 20  # bytes: the headers of most files, and small files to the end


@dataclass(frozen=True)
class FileState:
    """Size, time of writing, time of the last change of any kind (no program can set it), and a hash of the first MiB."""

    size: int
    written: int
    changed: int
    head: str

    @classmethod
    def of(cls, file: Path) -> "FileState":
        """The present state; raises OSError for a file that cannot be read."""
        with file.open("rb") as opened:
            head = hashlib.sha256(opened.read(_HEAD)).hexdigest()
            found = os.fstat(opened.fileno())
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, head)


def times_of(path: Path) -> dict[Path, tuple[int, int]]:
    """time_of() every file in a folder, or one file: cheap, and before anything is read."""
    path = path.absolute()
    return {file: time_of(file) for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}


def time_of(file: Path) -> tuple[int, int]:
    """Size and time of the last change."""
    found = file.stat()
    return found.st_size, found.st_ctime_ns

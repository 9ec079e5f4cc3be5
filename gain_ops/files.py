"""Files that are whole or absent: written beside their place, then moved into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_file", "replace_folder"]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a path beside ``path``, then move what it wrote, once it is on the disk, to ``path``.

    An error in ``write`` leaves an earlier file at ``path`` as it was.
    """
    beside = path.with_name(f".part-{os.getpid()}-{path.name}")  # the suffix stays: writers choose a format by it
    try:
        write(beside)
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write into; it takes the place of ``path`` if the block ends without an error."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".part-{os.getpid()}-{path.name}")
    old = path.with_name(f".old-{os.getpid()}-{path.name}")
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            path.rename(old)
        try:
            beside.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)

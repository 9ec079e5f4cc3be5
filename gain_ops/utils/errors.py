"""The package's own errors: one base, and each error also derives from the built-in error of its kind.

Messages say what they got, what was expected and what to do. For tensors that do not fit each other, gain_linear and the other
functions on tensors raise plain ValueError and TypeError, as torch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gain_ops.utils.wording import printable

__all__ = [
    "BusyError",
    "DivergedError",
    "FileError",
    "GainOpsError",
    "IsAFolderError",
    "MissingFileError",
    "MissingPackageError",
    "UsageError",
    "file_errors",
]


class GainOpsError(Exception):
    """The base of the package's own errors: the message is for the caller, who can correct what it names.

    What a message quotes may come from a file that anyone wrote, so its control characters are escaped, but line breaks.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))


class UsageError(GainOpsError, ValueError):
    """An argument, an option or a model that does not fit."""


class FileError(GainOpsError, OSError):
    """A file that cannot be read or written."""


class BusyError(FileError, BlockingIOError):
    """A file or folder that another process is writing."""


class IsAFolderError(FileError, IsADirectoryError):
    """A folder where a file is needed."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that is not there."""


class MissingPackageError(GainOpsError, ImportError):
    """A package that is needed and not installed."""


class DivergedError(GainOpsError, FloatingPointError):
    """Numbers that are no longer finite."""


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn an OSError on a file that the caller named into a FileError.

    Raises:
        FileError: in place of any OSError.

    """
    try:
        yield
    except GainOpsError:
        raise
    except OSError as error:
        raise FileError(_said(error)) from error


def _said(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"

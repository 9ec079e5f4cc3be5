"""Standard output and error that outlast their readers and their disk: the work goes on, and the exit status tells."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["lasting_outputs"]


class _Lasting(io.FileIO):
    """A standard stream. What cannot be written is dropped, all that follows it too, and ``error`` says why."""

    error: OSError | None = None

    def write(self, data: object, /) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        if self.error is None:
            try:
                return super().write(view)
            except OSError as error:
                self.error = error
        return view.nbytes


@contextmanager
def lasting_outputs() -> Iterator[None]:
    """Let no print() fail in the block, which ends with SystemExit; if its output was lost, say so and exit as programs do.

    Raises:
        SystemExit: of the block. With status 0 and lost output, 141 for a reader that has gone (as a shell shows SIGPIPE), and
            otherwise 2, as for any file that cannot be written.

    """
    output = _outlast("stdout")
    _outlast("stderr")
    try:
        yield
    except SystemExit as ended:
        if output is None or ended.code:
            raise
        sys.stdout.flush()
        if output.error is None:
            raise
        gone = output.error.errno == errno.EPIPE
        why = "its reader has gone" if gone else os.strerror(output.error.errno or 0)
        print(f"standard output: {why}; the rest of it was lost, and nothing else", file=sys.stderr)
        sys.exit(128 + signal.SIGPIPE if gone else 2)


def _outlast(name: str) -> _Lasting | None:
    """Replace a stream of sys; None for one that is closed, or of no file, and on Windows, whose consoles are no files."""
    stream = getattr(sys, name)
    if os.name != "posix" or not isinstance(stream, io.TextIOWrapper):
        return None
    try:
        raw = _Lasting(stream.fileno(), "w", closefd=False)
    except OSError:
        return None
    lasting = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    setattr(sys, name, lasting)
    return raw

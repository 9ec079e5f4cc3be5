"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP, which comes when the terminal goes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

__all__ = ["Interrupted", "StopRequest", "raised_signals"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end; with its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """While entered, the first signal is ``number`` and calls ``on_request``; the next raises Interrupted.

    For the main thread only, like Python's signal handlers. A signal that the process ignores, as under nohup, stays ignored.
    """

    def __init__(self, on_request: Callable[[], object]) -> None:
        self.number: int | None = None
        self._on_request = on_request

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in _heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._previous.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Interrupted(number)
        self.number = number
        self._on_request()


@contextmanager
def raised_signals() -> Iterator[None]:
    """Let these signals raise Interrupted in the main thread, so that what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _raise) for number in _heeded()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _heeded() -> list[int]:
    """The signals with a handler that Python knows: others' handlers, of a program in C, are left alone."""
    return [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)

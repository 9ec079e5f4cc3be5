"""Ctrl-C as a request to stop after the current step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

__all__ = ["StopRequest"]


class StopRequest:
    """While entered, the first SIGINT sets ``requested`` and calls ``on_request``; the next raises KeyboardInterrupt.

    For the main thread only, like Python's signal handlers.
    """

    def __init__(self, on_request: Callable[[], object]) -> None:
        self.requested = False
        self._on_request = on_request

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True
        self._on_request()

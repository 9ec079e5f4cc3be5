"""Asynchronous operations in groups: what is issued is open until a commit, and a wait leaves the last groups in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ptx.faults import Fault


class Groups:
    """The groups of one warp, warpgroup or thread. An operation is a function that does it, and does it once."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.committed: list[list[Callable[[], None]]] = []
        self.finished = 0
        """Groups that a wait has seen the end of."""

    @property
    def in_flight(self) -> bool:
        return bool(self.open) or any(self.committed)

    @property
    def next_clock(self) -> int:
        """The number of the group that is open."""
        return self.finished + len(self.committed) + 1

    def operations(self) -> Iterator[Callable[[], None]]:
        """What no wait has seen the end of."""
        for group in (*self.committed, self.open):
            yield from group

    def add(self, operation: Callable[[], None]) -> None:
        self.open.append(operation)

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, pending: int) -> int:
        """Let at most the last ``pending`` groups be in flight: -> the groups that are finished since the beginning."""
        while len(self.committed) > pending:
            for operation in self.committed.pop(0):
                operation()
            self.finished += 1
        return self.finished

    def end(self) -> None:
        """A thread ends, and its groups with it."""
        if self.open:
            raise Fault("exits with an operation that no group was committed for")

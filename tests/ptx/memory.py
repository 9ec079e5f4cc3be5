"""Global and shared memory, byte by byte: what belongs to a tensor, what was written, and by which block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.faults import Fault
from ptx.formats import RAW, Array

NOBODY, SEVERAL = -1, -2

SECTOR = 32
"""Bytes that global memory is moved in."""


@dataclass
class Allocation:
    """A piece of global memory: real memory of the host, so that pointers are what they are."""

    name: str
    base: int
    data: Array
    """Its bytes."""
    writable: bool
    written: Array
    """Whether each byte has a value."""

    def __post_init__(self) -> None:
        size = len(self.data)
        self.belongs = np.zeros(size, bool)
        self.writer = np.full(size, NOBODY, np.int32)
        self.reader = np.full(size, NOBODY, np.int32)
        self.views = {width: self.data[: size // width * width].view(kind) for width, kind in RAW.items()}


class GlobalMemory:
    """The allocations that a launch may touch. ``belongs`` of each says which bytes are a tensor argument's."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.bases = np.zeros(0, np.uint64)

    def add(self, name: str, base: int, data: Array, *, writable: bool, written: bool) -> Allocation:
        """Add an allocation whose bytes all have a value, or none."""
        made = Allocation(name, base, data, writable, np.full(len(data), written))
        self.allocations = sorted([*self.allocations, made], key=lambda allocation: allocation.base)
        self.bases = np.array([allocation.base for allocation in self.allocations], np.uint64)
        return made

    def new_launch(self) -> None:
        """Forget which blocks read and wrote, and what belonged to an argument."""
        for allocation in self.allocations:
            allocation.belongs[:] = False
            allocation.writer[:] = allocation.reader[:] = NOBODY

    def find(self, address: int) -> Allocation:
        """The allocation that an address is in."""
        place = int(np.searchsorted(self.bases, np.uint64(address), "right")) - 1
        if place < 0 or address >= self.allocations[place].base + len(self.allocations[place].data):
            raise Fault(f"out of bounds: global address {address:#x} is in no allocation")
        return self.allocations[place]

    def load(self, addresses: Array, width: int, count: int, block: int) -> Array:
        """``count`` elements of ``width`` bytes from each address: -> [count, addresses]."""
        _check_alignment("global", addresses, width * count)
        allocation = self.find(int(addresses[0]))
        offsets = addresses.astype(np.int64) - allocation.base
        if _leaves(offsets, width * count, allocation):
            if len(addresses) == 1:
                raise Fault(f"out of bounds: reads past the end of {allocation.name}")
            parts = [self.load(addresses[i : i + 1], width, count, block) for i in range(len(addresses))]
            return np.concatenate(parts, axis=1)
        self.check_read(allocation, offsets[:, None] + np.arange(width * count), block)
        return allocation.views[width][offsets // width + np.arange(count)[:, None]]

    def store(self, addresses: Array, values: list[Array], block: int) -> None:
        """The elements of each lane to its address."""
        width, count = values[0].dtype.itemsize, len(values)
        _check_alignment("global", addresses, width * count)
        allocation = self.find(int(addresses[0]))
        offsets = addresses.astype(np.int64) - allocation.base
        if _leaves(offsets, width * count, allocation):
            if len(addresses) == 1:
                raise Fault(f"out of bounds: writes past the end of {allocation.name}")
            for i in range(len(addresses)):
                self.store(addresses[i : i + 1], [value[i : i + 1] for value in values], block)
            return
        self.check_write(allocation, offsets[:, None] + np.arange(width * count), block)
        for place, value in enumerate(values):
            allocation.views[width][offsets // width + place] = value
            if (allocation.views[width][offsets // width + place] != value).any():
                raise Fault(f"race: one instruction writes two values to a byte of {allocation.name}")

    def check_read(self, allocation: Allocation, each: Array, block: int) -> None:
        """Note, or refuse, that a block reads bytes."""
        if not allocation.belongs[each].all():
            raise Fault(f"out of bounds: reads bytes of {allocation.name} that belong to no tensor argument")
        if not allocation.written[each].all():
            raise Fault(f"unwritten: reads bytes of {allocation.name} that nothing wrote")
        writer = allocation.writer[each]
        if ((writer != NOBODY) & (writer != block)).any():
            raise Fault(f"race: block {block} reads bytes of {allocation.name} that another block of the launch wrote")
        reader = allocation.reader[each]
        allocation.reader[each] = np.where((reader == NOBODY) | (reader == block), block, SEVERAL)

    def check_write(self, allocation: Allocation, each: Array, block: int) -> None:
        """Note, or refuse, that a block writes bytes."""
        if not allocation.writable:
            raise Fault(f"out of bounds: writes to {allocation.name}, which is an input")
        if not allocation.belongs[each].all():
            raise Fault(f"out of bounds: writes bytes of {allocation.name} that belong to no tensor argument")
        writer, reader = allocation.writer[each], allocation.reader[each]
        if ((writer != NOBODY) & (writer != block)).any():
            other = int(writer[(writer != NOBODY) & (writer != block)][0])
            raise Fault(f"two writers: blocks {other} and {block} write the same bytes of {allocation.name}")
        if ((reader != NOBODY) & (reader != block)).any():
            raise Fault(f"race: block {block} writes bytes of {allocation.name} that another block of the launch read")
        allocation.writer[each] = block
        allocation.written[each] = True


class SharedMemory:
    """A block's shared memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = np.full(-(-size // 16) * 16, 0xA5, np.uint8)
        self.written = np.zeros(len(self.data), bool)
        self.holds_barrier = np.zeros(len(self.data), bool)
        self.views: dict[int, Any] = {width: self.data.view(kind) for width, kind in RAW.items()}

    def check(self, what: str, offsets: Array, nbytes: int, alignment: int | None = None) -> None:
        """Refuse accesses that are misaligned or outside."""
        _check_alignment("shared", offsets, alignment or nbytes)
        if offsets.min() < 0 or offsets.max() + nbytes > self.size:
            worst = int(offsets.max() if offsets.max() + nbytes > self.size else offsets.min())
            raise Fault(f"out of bounds: {what} shared memory at {worst:#x}, of {self.size:#x} bytes")

    def check_written(self, each: Array) -> None:
        """Refuse a read of bytes that nothing wrote."""
        if not self.written[each].all():
            raise Fault(f"unwritten: reads shared memory at {int(each[~self.written[each]][0]):#x} that nothing wrote")

    def mark_written(self, each: Array) -> None:
        """Note a write."""
        if self.holds_barrier[each].any():
            raise Fault(f"writes over an mbarrier at {int(each[self.holds_barrier[each]][0]):#x}")
        self.written[each] = True


class LocalMemory:
    """What each thread of a block has for itself."""

    def __init__(self, threads: int, size: int) -> None:
        self.size = size
        self.data = np.full((threads, size), 0xA5, np.uint8)
        self.written = np.zeros((threads, size), bool)

    def load(self, threads: Array, offsets: Array, width: int, count: int) -> Array:
        """``count`` elements of ``width`` bytes from each thread's offset: -> [count, threads]."""
        each = self._places("reads", threads, offsets, width * count)
        if not self.written[each].all():
            raise Fault("unwritten: reads local memory that nothing wrote")
        return np.ascontiguousarray(self.data[each]).view(RAW[width]).T

    def store(self, threads: Array, offsets: Array, data: Array) -> None:
        """Bytes [threads, n] to each thread's offset."""
        each = self._places("writes", threads, offsets, data.shape[1])
        self.data[each] = data
        self.written[each] = True

    def _places(self, what: str, threads: Array, offsets: Array, nbytes: int) -> tuple[Array, Array]:
        _check_alignment("local", offsets, nbytes)
        if offsets.min() < 0 or offsets.max() + nbytes > self.size:
            raise Fault(f"out of bounds: {what} local memory at {int(offsets.max()):#x}, of {self.size:#x} bytes")
        return threads[:, None], offsets[:, None] + np.arange(nbytes)


def _check_alignment(space: str, addresses: Array, alignment: int) -> None:
    wrong = addresses % addresses.dtype.type(alignment) != 0
    if wrong.any():
        raise Fault(f"misaligned: {space} address {int(addresses[wrong][0]):#x} for {alignment} bytes")


def _leaves(offsets: Array, nbytes: int, allocation: Allocation) -> bool:
    return bool(offsets.min() < 0 or offsets.max() + nbytes > len(allocation.data))

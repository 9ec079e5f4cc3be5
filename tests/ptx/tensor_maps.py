"""Tensor maps: which bytes of global memory a box has, and where they lie in shared memory (PTX ISA, Tensors)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptx.faults import Fault
from ptx.formats import Array

BYTES = 128

_LAYOUT = struct.Struct("<IBBBxQ5I4x4Q5I")
_MAGIC = 0x7A5A11E5

SPANS = {0: 0, 1: 32, 2: 64, 3: 128}
"""Bytes of a swizzled row, by cuTensorMapEncodeTiled's number of the swizzle."""


def swizzled(address: Array, span: int) -> Array:
    """Addresses in shared memory whose 16-byte units are permuted: bits 4.. by those from 7."""
    return address if span == 0 else address ^ (((address >> 7) & (span // 16 - 1)) << 4)


@dataclass(frozen=True)
class TensorMap:
    """A tensor as TMA reads and writes it; the fastest dimension first. Strides are bytes, and the first has none."""

    address: int
    element: int
    extents: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    swizzle: int

    def pack(self) -> bytes:
        """The 128 bytes of a parameter; the driver's own format is not published, this one is the simulator's."""

        def padded(numbers: Sequence[int], length: int) -> list[int]:
            return [*numbers, *[0] * (length - len(numbers))]

        fields = (self.element, len(self.extents), self.swizzle, self.address)
        packed = _LAYOUT.pack(_MAGIC, *fields, *padded(self.extents, 5), *padded(self.strides, 4), *padded(self.box, 5))
        return packed.ljust(BYTES, b"\0")

    @staticmethod
    def unpack(data: bytes) -> TensorMap:
        """The map that was packed, if it is one that the driver would encode."""
        magic, element, rank, swizzle, address, *numbers = _LAYOUT.unpack(data[: _LAYOUT.size])
        if magic != _MAGIC:
            raise Fault("no tensor map at this address")
        extents, strides, box = (
            tuple(numbers[first:last]) for first, last in ((0, rank), (5, 4 + rank), (9, 9 + rank))
        )
        made = TensorMap(address, element, extents, strides, box, swizzle)
        made.check()
        return made

    def check(self) -> None:
        """Refuse what cuTensorMapEncodeTiled refuses."""
        inner, span = self.box[0] * self.element, SPANS[self.swizzle]
        rules = {
            f"the address {self.address:#x} is no multiple of 16": self.address % 16 == 0,
            f"extents {self.extents}": all(0 < extent <= 1 << 32 for extent in self.extents),
            f"strides {self.strides}": all(stride % 16 == 0 and 0 <= stride < 1 << 40 for stride in self.strides),
            f"a box {self.box}": all(0 < size <= 256 for size in self.box),
            f"rows of a box of {inner} bytes": inner % 16 == 0,
            f"rows of a box of {inner} bytes, swizzled in {span}": span == 0 or inner <= span,
        }
        for what, holds in rules.items():
            if not holds:
                raise Fault(f"tensor map: {what}")

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def elements(self, coordinates: Sequence[int]) -> tuple[Array, Array]:
        """Of the box at coordinates, in the order of shared memory: offsets from the address, and which are inside."""
        offsets, inside = np.zeros(1, np.int64), np.ones(1, bool)
        steps = [self.element, *self.strides]
        for axis in reversed(range(len(self.box))):
            at = np.arange(self.box[axis], dtype=np.int64) + coordinates[axis]
            offsets = (offsets[:, None] + at * steps[axis]).ravel()
            inside = (inside[:, None] & (at >= 0) & (at < self.extents[axis])).ravel()
        return offsets, inside

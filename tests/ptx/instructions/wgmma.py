"""wgmma: products of a warpgroup, in flight until a wait (PTX ISA, Asynchronous Warpgroup Level Matrix Instructions)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ptx.faults import Fault
from ptx.formats import Array, from_half
from ptx.fragments import accumulators, matrix_a
from ptx.gang import Gang, Mask
from ptx.machine import Block
from ptx.operands import Operands
from ptx.parse import Instruction
from ptx.program import Step, translates, unknown
from ptx.tensor_maps import swizzled

ROWS, DEPTH, ELEMENT, UNIT = 64, 16, 2, 16
"""Of A; of the sum, at 16 bits an element; bytes of an element; bytes that a descriptor counts in."""

_SPANS = {0: 0, 1: 128, 2: 64, 3: 32}
"""Bytes of a swizzled row, by a matrix descriptor's number of the swizzle."""


class Product:
    """One wgmma of one warpgroup."""

    def __init__(
        self, block: Block, left: Matrix | Array, right: Matrix, added: Sequence[Any] | None, kind: str
    ) -> None:
        self.block, self.left, self.right, self.added, self.kind = block, left, right, added, kind
        self.registers: list[Array] = []
        """Of each accumulator register the 128 lanes, when it is done."""

    @property
    def done(self) -> bool:
        return bool(self.registers)

    def __call__(self) -> None:
        if self.done:
            return
        left = self.left.read(self.block, self.kind) if isinstance(self.left, Matrix) else self.left
        result = left @ self.right.read(self.block, self.kind).T
        registers = [value.reshape(128) for value in accumulators(result.reshape(4, 16, -1))]
        if self.added is not None:
            registers = [old() + new for old, new in zip(self.added, registers, strict=True)]
        self.registers = [register.view(np.uint32) for register in registers]
        self.added = None


class Pending:
    """A register that a wgmma in flight writes: it may be moved or accumulated into, but neither read nor written."""

    __slots__ = ("place", "products")

    def __init__(self, products: list[Product], place: int) -> None:
        self.products, self.place = products, place

    def settled(self) -> Any:
        """The register's value when all its products are done, else what it is."""
        if all(product.done for product in self.products):
            return np.concatenate([product.registers[self.place] for product in self.products])
        return self

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise Fault("a register that a wgmma in flight writes is used: wgmma.wait_group is missing")

    __array__ = __array_ufunc__ = astype = view = reshape = __invert__ = __getitem__ = refuse

    def check_split(self, leaving: Array) -> None:
        groups = leaving.reshape(-1, 4)
        if (groups != groups[:, :1]).any():
            raise Fault("divergent: a warpgroup parts with a wgmma in flight")

    def part(self, warps: Array) -> Pending:
        """Of some warpgroups."""
        return Pending(
            [p for p, stays in zip(self.products, warps.reshape(-1, 4)[:, 0], strict=True) if stays], self.place
        )

    def merged(self, others: Sequence[Pending], order: Array) -> Pending:
        """Of several gangs, whose warps are put in an order."""
        products = [*self.products, *(product for other in others for product in other.products)]
        if any(other.place != self.place for other in others):
            raise Fault("registers of different accumulators meet")
        return Pending([products[warp // 4] for warp in order[::4]], self.place)


@dataclass(frozen=True)
class Matrix:
    """What a matrix descriptor names: [rows, DEPTH] elements, along the sum (K-major) or across it (MN-major)."""

    start: int
    leading: int
    stride: int
    span: int
    rows: int
    across: bool

    @classmethod
    def of(cls, descriptor: int, rows: int, across: bool) -> Matrix:
        """The fields of a descriptor (PTX ISA, Matrix Descriptor Format)."""
        start, leading, stride = (((descriptor >> shift) & 0x3FFF) * UNIT for shift in (0, 16, 32))
        if descriptor >> 49 & 7:
            raise Fault("a matrix descriptor with a base offset")
        return cls(start, leading, stride, _SPANS[descriptor >> 62], rows, across)

    def addresses(self) -> Array:
        """The byte address of each element."""
        row, k = np.arange(self.rows)[:, None], np.arange(DEPTH)[None, :]
        wide = (self.span or UNIT) // ELEMENT
        if self.across and self.span:
            # rows of `wide` along the matrix's rows; 8 of k are one atom
            offset = row % wide * ELEMENT + row // wide * self.leading + k % 8 * self.span + k // 8 * self.stride
        elif self.across:
            offset = row % wide * ELEMENT + row // wide * self.stride + k % 8 * UNIT + k // 8 * self.leading
        elif self.span:
            offset = row % 8 * self.span + row // 8 * self.stride + k * ELEMENT
        else:
            offset = row % 8 * UNIT + row // 8 * self.stride + k % wide * ELEMENT + k // wide * self.leading
        return swizzled(self.start + offset, self.span)

    def check(self, block: Block) -> Array:
        """The elements' addresses, all of which must lie in shared memory."""
        addresses = self.addresses()
        if addresses.max() + ELEMENT > block.shared.size:
            raise Fault(f"out of bounds: a wgmma operand to {int(addresses.max()):#x}, of {block.shared.size:#x} bytes")
        return addresses

    def read(self, block: Block, kind: str) -> Array:
        """The elements in fp32."""
        addresses = self.check(block)
        block.shared.check_written(addresses)
        return from_half(block.shared.views[ELEMENT][addresses // ELEMENT], kind)


@translates("wgmma")
def _wgmma(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[1]
    if kind == "fence":
        return lambda gang, mask: _whole(mask)
    if kind == "commit_group":
        return _commit
    if kind == "wait_group":
        return _wait(int(instruction.operands[0], 0))
    shape = re.match(r"m64n(\d+)k16$", instruction.opcode[4])
    types = instruction.opcode[5:]
    if kind != "mma_async" or shape is None or types not in (("f32", "bf16", "bf16"), ("f32", "f16", "f16")):
        raise unknown(instruction)
    return _mma_async(instruction, operands, int(shape.group(1)), types[1])


def _whole(mask: Mask) -> None:
    if mask is not None:
        raise Fault("divergent: wgmma that part of a warpgroup executes")


def _mma_async(instruction: Instruction, operands: Operands, columns: int, kind: str) -> Step:
    to = [operands.place(name) for name in operands.vector(instruction.operands[0])]
    if len(to) != columns // 2 or columns % 8 or columns > 256:
        raise Fault(f"{len(to)} accumulators of {columns} columns")
    left, right = instruction.operands[1:3]
    in_registers = left.startswith("{")
    parts = [operands.read(name, "b32") for name in operands.vector(left)] if in_registers else []
    descriptors = {name: operands.read(name, "b64") for name in ((right,) if in_registers else (left, right))}
    adds = operands.predicate(instruction.operands[3])
    scales, across = (
        [int(text, 0) for text in texts] for texts in (instruction.operands[4:6], instruction.operands[6:])
    )
    if scales != [1, 1] or len(across) != (1 if in_registers else 2):
        raise Fault(f"negated operands, or {len(across)} transpositions")
    left_across, right_across = across[0] != 0 and not in_registers, across[-1] != 0

    def descriptor(gang: Gang, name: str) -> list[int]:
        groups = np.broadcast_to(descriptors[name](gang), gang.lanes).reshape(-1, 128)
        if (groups != groups[:, :1]).any():
            raise Fault("the lanes of a warpgroup disagree on a matrix descriptor")
        return [int(value) for value in groups[:, 0]]

    def step(gang: Gang, mask: Mask) -> None:
        _whole(mask)
        adding = adds(gang)
        if (adding != adding[0]).any():
            raise Fault("lanes disagree on scale-d")
        rights = [Matrix.of(one, columns, right_across) for one in descriptor(gang, right)]
        if in_registers:
            registers = [np.broadcast_to(part(gang), gang.lanes).reshape(-1, 32) for part in parts]
            lefts: list[Any] = list(matrix_a(registers, kind).reshape(-1, ROWS, DEPTH))
        else:
            lefts = [Matrix.of(one, ROWS, left_across) for one in descriptor(gang, left)]
        products = []
        for group, (one, other) in enumerate(zip(lefts, rights, strict=True)):
            added = [_value(gang, place, group) for place in to] if adding[0] else None
            product = Product(gang.block, one, other, added, kind)
            _issue(gang, group, product)
            products.append(product)
        for place, register in enumerate(to):
            gang.registers[register] = Pending(products, place)
        gang.machine.counts["wgmma"] += len(products)

    return step


def _value(gang: Gang, register: int, group: int) -> Any:
    """How to get an accumulator when the product is made: those before it in its warpgroup are made first."""
    value = gang.registers[register]
    if isinstance(value, Pending):
        product, place = value.products[group], value.place

        def later() -> Array:
            product()
            return product.registers[place].view(np.float32)

        return later
    now = value.reshape(-1, 128)[group].view(np.float32)
    return lambda: now


def _issue(gang: Gang, group: int, product: Product) -> None:
    block, warps = gang.block, gang.warps[4 * group : 4 * group + 4]
    number = int(warps[0]) // 4
    groups = block.products[number]
    if block.races:
        for matrix in (product.left, product.right):
            if isinstance(matrix, Matrix):
                addresses = np.unique(matrix.check(block))
                cells = (addresses[:, None] + np.arange(ELEMENT)).ravel()
                for warp in warps:
                    block.races.read_later(block.races.wgmma + number, groups.next_clock, int(warp), cells)
    if gang.machine.happens_at_once():
        product()
    groups.add(product)


def _numbers(gang: Gang) -> list[int]:
    return [int(warp) // 4 for warp in gang.warps[::4]]


def _commit(gang: Gang, mask: Mask) -> None:
    _whole(mask)
    for number in _numbers(gang):
        gang.block.products[number].commit()


def _wait(pending: int) -> Step:
    def step(gang: Gang, mask: Mask) -> None:
        _whole(mask)
        races = gang.block.races
        for number in _numbers(gang):
            finished = gang.block.products[number].wait(pending)
            if races:
                races.finished(races.wgmma + number, finished, range(4 * number, 4 * number + 4))
        waiting = {id(one) for number in _numbers(gang) for one in gang.block.products[number].operations()}
        for place, value in enumerate(gang.registers):
            # what happened early is still in flight to the kernel, until its wait
            if isinstance(value, Pending) and not any(id(product) in waiting for product in value.products):
                gang.registers[place] = value.settled()

    return step

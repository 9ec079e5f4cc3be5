"""cp.async: bytes from global to shared memory, in groups that a warp waits for (PTX ISA, Asynchronous copy)."""

from __future__ import annotations

import numpy as np

from ptx.faults import Fault
from ptx.formats import Array
from ptx.gang import Gang, Mask
from ptx.instructions import bulk
from ptx.instructions.accesses import locate
from ptx.machine import Block
from ptx.operands import Operands
from ptx.parse import Instruction
from ptx.program import Step, translates, unknown


@translates("cp")
def _cp(instruction: Instruction, operands: Operands) -> Step:
    if instruction.opcode[:3] == ("cp", "async", "bulk"):
        return bulk.translate(instruction, operands)
    if instruction.opcode == ("cp", "async", "commit_group"):
        return _commit
    if instruction.opcode == ("cp", "async", "wait_group"):
        return _wait(int(instruction.operands[0], 0))
    if instruction.opcode == ("cp", "async", "wait_all"):
        wait = _wait(0)

        def commit_and_wait(gang: Gang, mask: Mask) -> None:
            _commit(gang, mask)
            wait(gang, mask)

        return commit_and_wait
    return _copy(instruction, operands)


def _commit(gang: Gang, mask: Mask) -> None:
    for warp in gang.warps[gang.whole_warps(mask, "cp.async.commit_group")]:
        gang.block.copies[warp].commit()


def _wait(pending: int) -> Step:
    def step(gang: Gang, mask: Mask) -> None:
        block = gang.block
        for warp in gang.warps[gang.whole_warps(mask, "cp.async.wait_group")]:
            finished = block.copies[warp].wait(pending)
            if block.races:
                block.races.finished(block.races.cp_async + int(warp), finished, [int(warp)])

    return step


def _copy(instruction: Instruction, operands: Operands) -> Step:
    options = set(instruction.opcode[2:])
    if options - {"ca", "cg", "shared", "shared::cta", "global", "L2::128B", "L2::256B", "L2::64B"}:
        raise unknown(instruction)
    to, source = (operands.address(text) for text in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    used = operands.read(instruction.operands[3] if len(instruction.operands) > 3 else str(size), "u32")
    if size not in (4, 8, 16) or ("cg" in options and size != 16):
        raise unknown(instruction)

    def step(gang: Gang, mask: Mask) -> None:
        lanes = gang.active(mask)
        block, offsets = locate(gang, to(gang)[lanes])
        block.shared.check("cp.async to", offsets, size)
        addresses = source(gang)[lanes].astype(np.uint64)
        lengths = np.broadcast_to(used(gang), gang.lanes)[lanes]
        if (lengths > size).any():
            raise Fault(f"cp.async of {int(lengths.max())} bytes of {size}")
        if gang.machine.settings.count:
            read = lengths == size
            gang.machine.counts.global_access("load", addresses[read], size, gang.warp_of_lane[lanes][read])
            gang.machine.counts.shared_access("cp.async", offsets, size, gang.warp_of_lane[lanes])
        each = offsets[:, None] + np.arange(size)
        for warp in np.unique(gang.warp_of_lane[lanes]):
            own = gang.warp_of_lane[lanes] == warp
            groups = block.copies[warp]
            if block.races:
                clock = groups.next_clock
                block.races.write_later(
                    block.races.cp_async + int(warp), clock, int(warp), each[own].ravel(), through_proxy=False
                )
            copy = _Copy(gang, each[own], addresses[own], lengths[own])
            if gang.machine.happens_at_once():
                copy()
            groups.add(copy)

    return step


class _Copy:
    """The copies of a warp's lanes."""

    def __init__(self, gang: Gang, each: Array, addresses: Array, lengths: Array) -> None:
        self.memory, self.block = gang.machine.memory, gang.block
        self.each, self.addresses, self.lengths = each, addresses, lengths
        self.done = False

    def __call__(self) -> None:
        if self.done:
            return
        self.done = True
        block: Block = self.block
        data = np.zeros(self.each.shape, np.uint8)
        size = self.each.shape[1]
        misaligned = self.addresses % np.uint64(size) != 0
        if (misaligned & (self.lengths > 0)).any():
            raise Fault(f"misaligned: cp.async of {size} bytes from {int(self.addresses[misaligned][0]):#x}")
        for length in np.unique(self.lengths[self.lengths > 0]):
            rows = self.lengths == length
            width = min(int(length) & -int(length), 8)
            values = self.memory.load(self.addresses[rows], width, int(length) // width, block.number)
            data[rows, : int(length)] = np.ascontiguousarray(values.T).view(np.uint8)
        block.shared.mark_written(self.each)
        block.shared.data[self.each] = data

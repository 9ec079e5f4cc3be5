"""mbarriers: objects in shared memory that count arrivals and bytes (PTX ISA, Parallel Synchronization: mbarrier)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.faults import Fault
from ptx.formats import Array
from ptx.gang import Gang, Mask
from ptx.instructions.accesses import locate
from ptx.machine import Block
from ptx.operands import Operands
from ptx.parse import Instruction
from ptx.program import Step, translates, unknown
from ptx.races import Clocks

BARRIER_BYTES = 8


@dataclass
class Mbarrier:
    """An mbarrier's state."""

    count: int
    pending: int
    first_clock: int
    """What the clock of its agent was at its beginning."""
    arriving: Clocks | None
    """What is known to those that arrived."""
    over: Clocks | None
    """What was known to those that arrived in the phases that are complete."""
    transactions: int = 0
    """Bytes that are expected and have not come; below zero where they came first."""
    phase: int = 0
    """Phases that are complete."""

    @property
    def clock(self) -> int:
        """Of the phases that are complete."""
        return self.first_clock + self.phase

    def settle(self) -> None:
        """Complete the phase if nothing is pending."""
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            if self.arriving and self.over:
                self.over.join(0, self.arriving, 0)


def find(gang: Gang, address: int) -> tuple[Block, int, Mbarrier]:
    """The mbarrier at an address."""
    block, offsets = locate(gang, np.array([address]))
    offset = int(offsets[0])
    if offset not in block.mbarriers:
        raise Fault(f"no mbarrier at {offset:#x}")
    return block, offset, block.mbarriers[offset]


def _cells(offset: int) -> Array:
    return np.arange(offset, offset + BARRIER_BYTES)[None]


def touch(gang: Gang, block: Block, offset: int, warps: Array) -> None:
    """Warps use an mbarrier, which must have been made before and not be ended meanwhile."""
    if block.races and block is gang.block:
        block.races.read(warps, np.broadcast_to(_cells(offset), (len(warps), BARRIER_BYTES)))


def _by_lane(value: Array, lane: int) -> int:
    return int(value[lane]) if value.ndim else int(value)


@translates("mbarrier")
def _mbarrier(instruction: Instruction, operands: Operands) -> Step:
    kind, *options, last = instruction.opcode[1:]
    known = {"shared", "shared::cta", "shared::cluster", "release", "acquire", "relaxed", "cta", "cluster"}
    if last != "b64" or set(options) - known - {"expect_tx", "parity", "noComplete"}:
        raise unknown(instruction)
    if kind == "init":
        return _init(instruction, operands)
    if kind == "inval":
        return _inval(instruction, operands)
    if kind == "arrive" and "noComplete" not in options:
        return _arrive(instruction, operands, "expect_tx" in options)
    if kind == "expect_tx":
        return _expect(instruction, operands)
    if kind in ("try_wait", "test_wait") and "parity" in options:
        return _wait(instruction, operands)
    raise unknown(instruction)


def _init(instruction: Instruction, operands: Operands) -> Step:
    address, count = operands.address(instruction.operands[0]), operands.read(instruction.operands[1], "u32")

    def step(gang: Gang, mask: Mask) -> None:
        for lane in gang.active(mask):
            block, offsets = locate(gang, address(gang)[lane : lane + 1])
            offset, number = int(offsets[0]), _by_lane(count(gang), int(lane))
            block.shared.check("an mbarrier in", offsets, BARRIER_BYTES)
            if number < 1:
                raise Fault(f"an mbarrier of {number} arrivals")
            if offset in block.mbarriers:
                raise Fault(f"an mbarrier at {offset:#x}, where there is one: mbarrier.inval ends it")
            arriving = over = None
            if block.races:
                arriving, over = block.races.new_clocks(), block.races.new_clocks()
                if block is gang.block:
                    block.races.write(gang.warp_of_lane[lane : lane + 1], _cells(offset))
            first = block.barrier_clocks.get(offset, 0)
            block.mbarriers[offset] = Mbarrier(number, number, first, arriving, over)
            block.shared.written[offset : offset + BARRIER_BYTES] = True
            block.shared.holds_barrier[offset : offset + BARRIER_BYTES] = True
        gang.machine.events += 1

    return step


def _inval(instruction: Instruction, operands: Operands) -> Step:
    address = operands.address(instruction.operands[0])

    def step(gang: Gang, mask: Mask) -> None:
        for lane in gang.active(mask):
            block, offset, mbarrier = find(gang, int(address(gang)[lane]))
            if mbarrier.transactions:
                raise Fault(f"an mbarrier at {offset:#x} ends that waits for {mbarrier.transactions} bytes")
            if block.races and block is gang.block:
                block.races.write(gang.warp_of_lane[lane : lane + 1], _cells(offset))
            # a later mbarrier here has a later clock than anything that this one counts
            block.barrier_clocks[offset] = mbarrier.clock + 2
            del block.mbarriers[offset]
            block.shared.written[offset : offset + BARRIER_BYTES] = False
            block.shared.holds_barrier[offset : offset + BARRIER_BYTES] = False
        gang.machine.events += 1

    return step


def _arrive(instruction: Instruction, operands: Operands, expects: bool) -> Step:
    texts = list(instruction.operands)
    if not texts[0].startswith("["):
        state = texts.pop(0)
        if state != "_":
            operands.write(state, "b64")  # opaque: what reads it, test_wait without .parity, is not known
    address = operands.address(texts[0])
    amount = operands.read(texts[1] if len(texts) > 1 else "1", "u32")

    def step(gang: Gang, mask: Mask) -> None:
        for lane in gang.active(mask):
            block, offset, mbarrier = find(gang, int(address(gang)[lane]))
            number = _by_lane(amount(gang), int(lane))
            arrivals = 1 if expects else number
            warp = gang.warp_of_lane[lane : lane + 1]
            touch(gang, block, offset, warp)
            if block.races and mbarrier.arriving and block is gang.block:
                block.races.release(mbarrier.arriving, [int(warp[0])])
            mbarrier.transactions += number if expects else 0
            if arrivals > mbarrier.pending:
                raise Fault(f"the mbarrier at {offset:#x} has more arrivals than its count, {mbarrier.count}")
            mbarrier.pending -= arrivals
            mbarrier.settle()
        gang.machine.events += 1

    return step


def _expect(instruction: Instruction, operands: Operands) -> Step:
    address, amount = operands.address(instruction.operands[0]), operands.read(instruction.operands[1], "u32")

    def step(gang: Gang, mask: Mask) -> None:
        for lane in gang.active(mask):
            block, offset, mbarrier = find(gang, int(address(gang)[lane]))
            touch(gang, block, offset, gang.warp_of_lane[lane : lane + 1])
            mbarrier.transactions += _by_lane(amount(gang), int(lane))
        gang.machine.events += 1

    return step


def _wait(instruction: Instruction, operands: Operands) -> Step:
    write, address = operands.write(instruction.operands[0], "pred"), operands.address(instruction.operands[1])
    parity = operands.read(instruction.operands[2], "u32")

    def step(gang: Gang, mask: Mask) -> None:
        lanes, at = gang.active(mask), address(gang)
        parities = np.broadcast_to(parity(gang), gang.lanes) & np.uint32(1)
        complete = np.zeros(gang.lanes, bool)
        for place in np.unique(at[lanes]):
            block, offset, mbarrier = find(gang, int(place))
            here = np.zeros(gang.lanes, bool)
            here[lanes] = at[lanes] == place
            warps = np.unique(gang.warp_of_lane[here])
            touch(gang, block, offset, warps)
            # the phase that runs has the parity of those that are complete; the one before it is over
            over = here & (parities != mbarrier.phase & 1)
            complete |= over
            if block.races and mbarrier.over and block is gang.block:
                knowing = np.unique(gang.warp_of_lane[over])
                block.races.acquire(mbarrier.over, knowing)
                block.races.finished(block.races.barrier_agent(offset), mbarrier.clock, knowing)
        write(gang, mask, complete)
        if not complete[lanes].all():
            gang.spinning = True

    return step

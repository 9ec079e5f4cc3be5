"""What the lanes of a warp do together, fences, and what does nothing here (PTX ISA, shfl.sync, vote.sync, elect.sync)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.faults import Fault
from ptx.formats import Array
from ptx.gang import Gang, Mask
from ptx.operands import Operands, Reader
from ptx.parse import Instruction
from ptx.program import Step, translates, unknown


def _check_members(gang: Gang, mask: Mask, members: Array) -> None:
    """Every lane that the member mask names must execute."""
    if mask is None:
        return
    executing = gang.by_warp(mask)
    first = executing.argmax(1)
    named = np.broadcast_to(members, gang.lanes).reshape(-1, 32)[np.arange(len(first)), first]
    wanted = ((named[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).astype(bool)
    if (wanted & ~executing)[executing.any(1)].any():
        raise Fault("divergent: a lane that the member mask names does not execute")


@translates("shfl")
def _shfl(instruction: Instruction, operands: Operands) -> Step:
    _, sync, mode, kind = instruction.opcode
    if sync != "sync" or kind != "b32":
        raise unknown(instruction)
    names = [name.strip() for name in instruction.operands[0].split("|")]
    write = operands.write(names[0], "b32")
    write_valid = operands.write(names[1], "pred") if len(names) > 1 else None
    source, index, limits, members = (operands.read(text, "u32") for text in instruction.operands[1:5])

    def step(gang: Gang, mask: Mask) -> None:
        _check_members(gang, mask, members(gang))
        lane = gang.lane.astype(np.int64)
        by, limit = index(gang) & np.uint32(31), limits(gang)
        clamp = (limit & np.uint32(31)).astype(np.int64)
        segment = ((limit >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
        highest, lowest = (lane & segment) | (clamp & ~segment), lane & segment
        by = by.astype(np.int64)
        if mode == "up":
            of = lane - by
            valid = of >= highest
        elif mode in ("down", "bfly"):
            of = lane + by if mode == "down" else lane ^ by
            valid = of <= highest
        else:
            of = lowest | (by & ~segment)
            valid = of <= highest
        of = np.where(valid, of, lane)
        write(gang, mask, np.broadcast_to(source(gang), gang.lanes)[np.arange(gang.lanes) // 32 * 32 + of])
        if write_valid:
            write_valid(gang, mask, np.broadcast_to(valid, gang.lanes))

    return step


def _ballot(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)


_VOTES: dict[str, Callable[[Array, Array], Any]] = {
    "ballot": lambda value, executing: _ballot(value & executing),
    "any": lambda value, executing: (value & executing).any(1),
    "all": lambda value, executing: (value | ~executing).all(1),
    "uni": lambda value, executing: (value | ~executing).all(1) | ~(value & executing).any(1),
}


@translates("vote")
def _vote(instruction: Instruction, operands: Operands) -> Step:
    if instruction.opcode[1] != "sync":
        raise unknown(instruction)
    vote, kind = _VOTES[instruction.opcode[2]], instruction.opcode[3]
    write = operands.write(instruction.operands[0], kind)
    value, members = operands.predicate(instruction.operands[1]), operands.read(instruction.operands[2], "u32")

    def step(gang: Gang, mask: Mask) -> None:
        _check_members(gang, mask, members(gang))
        write(gang, mask, np.repeat(vote(gang.by_warp(value(gang)), gang.by_warp(mask)), 32))

    return step


_REDUCTIONS: dict[str, Any] = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


@translates("redux")
def _redux(instruction: Instruction, operands: Operands) -> Step:
    _, sync, name, kind = instruction.opcode
    if sync != "sync":
        raise unknown(instruction)
    write, value = operands.write(instruction.operands[0], kind), operands.read(instruction.operands[1], kind)
    members = operands.read(instruction.operands[2], "u32")

    def step(gang: Gang, mask: Mask) -> None:
        _check_members(gang, mask, members(gang))
        gang.whole_warps(mask, "redux")
        values = np.broadcast_to(value(gang), gang.lanes).reshape(-1, 32)
        write(gang, mask, np.repeat(_REDUCTIONS[name].reduce(values, axis=1).astype(values.dtype), 32))

    return step


@translates("elect")
def _elect(instruction: Instruction, operands: Operands) -> Step:
    name, chosen = (part.strip() for part in instruction.operands[0].split("|"))
    write, write_chosen = operands.write(name, "b32"), operands.write(chosen, "pred")
    members = operands.read(instruction.operands[1], "u32")

    def step(gang: Gang, mask: Mask) -> None:
        _check_members(gang, mask, members(gang))
        first = np.repeat(gang.by_warp(mask).argmax(1), 32)
        write(gang, mask, first.astype(np.uint32))
        write_chosen(gang, mask, gang.lane == first)

    return step


@translates("bar")
def _bar_warp(instruction: Instruction, operands: Operands) -> Step:
    # a barrier of the block ends its basic block (program.py); the lanes of a warp are in lockstep here
    if instruction.opcode != ("bar", "warp", "sync"):
        raise unknown(instruction)
    members: Reader = operands.read(instruction.operands[0], "u32")
    return lambda gang, mask: _check_members(gang, mask, members(gang))


@translates("fence")
def _fence(instruction: Instruction, operands: Operands) -> Step:
    if instruction.opcode[1:3] != ("proxy", "async"):
        return lambda gang, mask: None  # memory here is sequentially consistent; what orders it is barriers

    def step(gang: Gang, mask: Mask) -> None:
        if gang.block.races:
            gang.block.races.fence(gang.warps[gang.executing(mask)])

    return step


@translates("membar", "griddepcontrol", "prefetch", "prefetchu", "nanosleep", "setmaxnreg", "applypriority", "discard")
def _nothing(instruction: Instruction, operands: Operands) -> Step:
    return lambda gang, mask: None


@translates("trap")
def _trap(instruction: Instruction, operands: Operands) -> Step:
    def step(gang: Gang, mask: Mask) -> None:
        raise Fault("trap")

    return step

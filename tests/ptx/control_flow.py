"""Basic blocks of an entry, and where diverged threads meet again: at the immediate post-dominator of the branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ptx.parse import Entry, Instruction

EXIT = -1
"""The block that every exit leads to."""

_WAITS = {("mbarrier", "try_wait"), ("mbarrier", "test_wait")}


@dataclass
class BasicBlock:
    """Instructions that are executed one after the other; the last may be a branch, an exit or a barrier."""

    number: int
    instructions: list[Instruction]
    following: int
    """The block behind it in the text."""
    target: int | None = None
    """The block that its branch jumps to."""
    meeting: int = EXIT
    """The immediate post-dominator."""
    splits: bool = False
    """Something between its branch and the meeting waits for other warps: those that go there go alone."""
    successors: list[int] = field(default_factory=list)

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]

    @property
    def collective(self) -> bool:
        """A warpgroup's four warps execute it together."""
        return any(instruction.opcode[0] == "wgmma" for instruction in self.instructions)


def ends_block(instruction: Instruction) -> bool:
    """Whether control may go elsewhere behind an instruction, or stop."""
    return instruction.opcode[0] in ("bra", "ret", "exit") or is_barrier(instruction)


def is_barrier(instruction: Instruction) -> bool:
    """Whether warps wait for each other at an instruction."""
    return instruction.opcode[0] in ("bar", "barrier") and "warp" not in instruction.opcode


def blocks_of(entry: Entry) -> list[BasicBlock]:
    """The basic blocks of an entry; the first is its beginning."""
    code = entry.code
    leaders = {0, *entry.targets.values()}
    for position, instruction in enumerate(code):
        if ends_block(instruction):
            leaders.add(position + 1)
        if instruction.opcode[:2] == ("wgmma", "fence"):
            leaders.add(position)
    starts = sorted(leader for leader in leaders if leader < len(code))
    numbers = {start: number for number, start in enumerate(starts)}
    numbers[len(code)] = EXIT
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        block = BasicBlock(numbers[start], code[start:end], numbers[end])
        if end - 1 in entry.targets:
            block.target = numbers[entry.targets[end - 1]]
        block.successors = _successors(block)
        blocks.append(block)
    _find_meetings(blocks)
    for block in blocks:
        block.splits = block.last.guard is not None and any(
            _waits(blocks[number]) for number in _between(blocks, block)
        )
    return blocks


def _successors(block: BasicBlock) -> list[int]:
    kind, guarded = block.last.opcode[0], block.last.guard is not None
    if kind in ("ret", "exit"):
        return [block.following, EXIT] if guarded else [EXIT]
    if block.target is not None:
        return [block.target, block.following] if guarded else [block.target]
    return [block.following]


def _find_meetings(blocks: Sequence[BasicBlock]) -> None:
    # sets of post-dominators as bits; bit len(blocks) is EXIT
    everything = (1 << (len(blocks) + 1)) - 1
    end = 1 << len(blocks)
    after = [everything] * len(blocks)
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            common = everything
            for successor in block.successors:
                common &= end if successor == EXIT else after[successor]
            common |= 1 << block.number
            if common != after[block.number]:
                after[block.number], changed = common, True
    for block in blocks:
        rest = after[block.number] & ~(1 << block.number) & ~end
        # the nearest of its post-dominators is post-dominated by all others
        nearest = [n for n in range(len(blocks)) if rest >> n & 1 and after[n] & ~end == rest]
        block.meeting = nearest[0] if nearest else EXIT


def _between(blocks: Sequence[BasicBlock], branch: BasicBlock) -> set[int]:
    """The blocks that a thread may pass from a branch to its meeting."""
    seen: set[int] = set()
    todo = [number for number in branch.successors if number not in (branch.meeting, EXIT)]
    while todo:
        number = todo.pop()
        if number not in seen:
            seen.add(number)
            todo += [after for after in blocks[number].successors if after not in (branch.meeting, EXIT)]
    return seen


def _waits(block: BasicBlock) -> bool:
    return any(
        is_barrier(instruction) or instruction.opcode[0] == "wgmma" or instruction.opcode[:2] in _WAITS
        for instruction in block.instructions
    )

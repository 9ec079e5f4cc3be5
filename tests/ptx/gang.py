"""Warps of a block in lockstep: one numpy vector of all their lanes a register, and a stack of where diverged lanes are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ptx.control_flow import EXIT
from ptx.faults import Fault
from ptx.formats import Array, poison

if TYPE_CHECKING:
    from ptx.machine import Block, Machine
    from ptx.parse import Instruction
    from ptx.program import Code

Mask: TypeAlias = "Array | None"
"""The lanes that execute; None is all of the gang's."""

_NEVER = -2


@dataclass
class Frame:
    """Lanes that execute together, and the block of code where they meet others again."""

    at: int
    until: int
    mask: Mask


class Gang:
    """Some warps of a block, in lockstep."""

    def __init__(self, block: Block, warps: Array, registers: list[Any] | None = None) -> None:
        self.block, self.warps = block, warps
        self.machine: Machine = block.machine
        self.lanes = 32 * len(warps)
        self.lane = np.tile(np.arange(32, dtype=np.uint32), len(warps))
        self.warp_of_lane = np.repeat(warps, 32)
        # arrays of a lane each, or Pending of a wgmma in flight
        self.registers: list[Any] = registers or [
            poison(kind, self.lanes) for kind in self.machine.program.register_types
        ]
        self.frames = [Frame(0, _NEVER, None)]
        self.alive: Mask = None
        self.blocked = False
        self.spinning = False
        self.pause_at: int | None = None
        self.specials: dict[str, Array] = {}
        self.instruction: Instruction | None = None
        self._spun: tuple[int, int] | None = None
        self._kept = np.ones(len(warps), bool)

    # ---- lanes

    def full(self, value: int, kind: np.dtype[Any]) -> Array:
        """A value in every lane."""
        return np.full(self.lanes, value, kind)

    def active(self, mask: Mask) -> Array:
        """The numbers of the lanes that execute."""
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def by_warp(self, mask: Mask) -> Array:
        """[warps, 32] of a mask."""
        return np.ones((len(self.warps), 32), bool) if mask is None else mask.reshape(-1, 32)

    def executing(self, mask: Mask) -> Array:
        """Which warps execute."""
        return np.asarray(self.by_warp(mask).any(1))

    def whole_warps(self, mask: Mask, what: str) -> Array:
        """Which warps execute, of an instruction that all living lanes of a warp must execute."""
        some = self.executing(mask)
        if mask is not None and (self.by_warp(self.alive)[some] & ~self.by_warp(mask)[some]).any():
            raise Fault(f"divergent: {what} that part of a warp executes")
        return some

    def thread(self, lane: int) -> int:
        """The number in its block of a lane's thread."""
        return int(self.warp_of_lane[lane]) * 32 + int(self.lane[lane])

    def special(self, name: str) -> Array:
        """A special register, such as %tid.x."""
        if name not in self.specials:
            self.specials[name] = self.block.special(name, self)
        return self.specials[name]

    # ---- execution

    def run(self) -> bool:
        """Execute until it waits, ends or has had its turn: -> whether anything happened."""
        codes, turn = self.machine.program.codes, self.machine.turn()
        while self.frames and not self.blocked:
            frame = self.frames[-1]
            if frame.at == frame.until:
                self.frames.pop()
                continue
            if frame.at == self.pause_at and len(self.frames) == 1:
                self.pause_at = None
                return True
            if frame.at == EXIT:
                self._exit(frame.mask)
                continue
            code = codes[frame.at]
            if code.collective and not self.machine.gather_warpgroups(self):
                return True
            self._execute(code, frame)
            if self.spinning:
                self.spinning = False
                spin = code.number, self.machine.events
                stuck = spin == self._spun
                self._spun = spin
                return not stuck
            turn -= 1
            if not turn:
                return True
        return True

    def _execute(self, code: Code, frame: Frame) -> None:
        mask = frame.mask
        executing = len(self.warps) if mask is None else int(self.executing(mask).sum())
        self.machine.count_block(code.number, executing)
        try:
            for self.instruction, step in code.steps:
                step(self, mask)
            self.instruction = code.last
            code.finish(self, frame)
        except Fault as fault:
            if "\n" not in str(fault):
                raise Fault(f"{fault}\n  at: {self.instruction}\n  in: {self}") from fault
            raise
        except Exception as error:
            raise Fault(f"{type(error).__name__}: {error}\n  at: {self.instruction}\n  in: {self}") from error

    def __str__(self) -> str:
        return f"{self.machine.program.name}, block {self.block.index}, warps {self.warps.tolist()}"

    def branch(self, code: Code, frame: Frame, taken: Array) -> None:
        """Go where each lane wants to, the others waiting at the meeting."""
        target = code.target
        assert target is not None
        going = taken if frame.mask is None else taken & frame.mask
        staying = ~taken if frame.mask is None else ~taken & frame.mask
        if not staying.any():
            frame.at = target
        elif not going.any():
            frame.at = code.following
        elif code.splits and self._part_from(code, going, staying):
            # the lanes left over agree, or are of warps that diverge
            self.branch(code, self.frames[-1], taken.reshape(-1, 32)[self._kept].ravel())
        else:
            until = code.meeting
            if until != frame.until:
                frame.at = until
                self.frames.append(Frame(code.following, until, staying))
            else:
                frame.at, frame.mask = code.following, staying
            if self.frames[-1].at == until:
                self.frames.pop()
            if target != until:
                self.frames.append(Frame(target, until, going))

    def _part_from(self, code: Code, going: Array, staying: Array) -> bool:
        """Let warps whose lanes all stay go alone, where others go: -> whether there were any."""
        goes, stays = self.executing(going), self.executing(staying)
        alone = stays & ~goes
        target: int | None = code.following
        if not alone.any():
            alone, target = goes & ~stays, code.target
        if not alone.any() or alone.all():
            return False
        other = self.split(alone)
        assert target is not None
        other.frames[-1].at = target
        other.pause_at = self.pause_at = code.meeting if len(self.frames) == 1 else None
        return True

    def split(self, leaving: Array) -> Gang:
        """Let some warps go alone: -> their gang. This one keeps the others."""
        for value in self.registers:
            if not isinstance(value, np.ndarray):
                value.check_split(leaving)
        self._kept = ~leaving
        other, stay = self._part(leaving), self._part(self._kept)
        for name in ("warps", "lanes", "lane", "warp_of_lane", "registers", "frames", "alive", "specials"):
            setattr(self, name, getattr(stay, name))
        self.machine.gangs.append(other)
        return other

    def _part(self, warps: Array) -> Gang:
        """Some of the warps, where they are."""
        registers = [
            value.reshape(-1, 32)[warps].ravel() if isinstance(value, np.ndarray) else value.part(warps)
            for value in self.registers
        ]
        made = Gang(self.block, self.warps[warps], registers)
        made.alive = _of_warps(self.alive, warps)
        made.frames = [Frame(frame.at, frame.until, _of_warps(frame.mask, warps)) for frame in self.frames]
        made.frames = [frame for frame in made.frames if frame.mask is None or frame.mask.any()]
        return made

    def exit(self, code: Code, frame: Frame, leaving: Mask) -> None:
        """Lanes end; those that a guard keeps go on."""
        if leaving is None:
            self._exit(frame.mask)
            return
        frame.at = code.following
        self._exit(leaving if frame.mask is None else leaving & frame.mask)

    def _exit(self, mask: Mask) -> None:
        before = self.executing(self.alive)
        if mask is None:
            self.alive = np.zeros(self.lanes, bool)
        else:
            self.alive = ~mask if self.alive is None else self.alive & ~mask
        for frame in self.frames:
            frame.mask = self.alive.copy() if frame.mask is None else frame.mask & self.alive
        self.frames = [frame for frame in self.frames if frame.mask is not None and frame.mask.any()]
        ended = before & ~self.executing(self.alive)
        self.machine.events += 1
        if ended.any():
            self.block.end_warps(self, self.warps[ended])

    def barrier(self, code: Code, frame: Frame, guard: Mask, meet: Callable[[Gang], None]) -> None:
        """Warps come to a barrier, and go on behind it when it lets them."""
        mask = frame.mask if guard is None else guard if frame.mask is None else guard & frame.mask
        frame.at = code.following
        if mask is not None and not mask.any():
            return
        warps = self.whole_warps(mask, "a barrier")
        meet(self if warps.all() else self.split(warps))


def _of_warps(mask: Mask, warps: Array) -> Mask:
    part = None if mask is None else mask.reshape(-1, 32)[warps].ravel()
    return None if part is None or part.all() else part


def merged(gangs: list[Gang]) -> Gang:
    """Gangs at one place, with all their lanes, as one."""
    warps = np.concatenate([gang.warps for gang in gangs])
    order = np.argsort(warps)
    registers: list[Any] = []
    for values in zip(*(gang.registers for gang in gangs), strict=True):
        if all(isinstance(value, np.ndarray) for value in values):
            registers.append(np.concatenate(values).reshape(-1, 32)[order].ravel())
        else:
            registers.append(_merged_pending(values, order))
    made = Gang(gangs[0].block, warps[order], registers)
    made.frames = [Frame(gangs[0].frames[0].at, _NEVER, None)]
    return made


def _merged_pending(values: tuple[Any, ...], order: Array) -> Any:
    for value in values:
        if isinstance(value, np.ndarray):
            raise Fault("a register that a wgmma in flight writes meets one that none does")
    return values[0].merged(values[1:], order)

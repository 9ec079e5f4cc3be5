"""A kernel made ready to run: each instruction a function on the registers of a gang."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from ptx.control_flow import EXIT, BasicBlock, blocks_of, ends_block, is_barrier
from ptx.faults import Fault
from ptx.gang import Frame, Gang, Mask
from ptx.operands import Operands, Reader
from ptx.parse import Entry, Instruction, Module, Variable, parse

Step: TypeAlias = "Callable[[Gang, Mask], None]"
Translator: TypeAlias = "Callable[[Instruction, Operands], Step]"

_TRANSLATORS: dict[str, Translator] = {}


def translates(*mnemonics: str) -> Callable[[Translator], Translator]:
    """The decorated function makes the step of these instructions."""

    def register(translator: Translator) -> Translator:
        for mnemonic in mnemonics:
            _TRANSLATORS[mnemonic] = translator
        return translator

    return register


def unknown(instruction: Instruction) -> Fault:
    """What is raised for an instruction, or a form of one, that the simulator does not know."""
    return Fault(f"unknown instruction: {instruction}")


class Code:
    """A basic block as steps, and how it ends."""

    def __init__(self, block: BasicBlock, operands: Operands) -> None:
        self.number, self.following, self.target = block.number, block.following, block.target
        self.meeting, self.splits, self.collective = block.meeting, block.splits, block.collective
        self.last, self.instructions = block.last, block.instructions
        ends = ends_block(self.last)
        inner = self.instructions[:-1] if ends else self.instructions
        self.steps = [(instruction, translate(instruction, operands)) for instruction in inner]
        self.finish = self._ending(operands) if ends else self._fall

    def _fall(self, gang: Gang, frame: Frame) -> None:
        frame.at = self.following

    def _ending(self, operands: Operands) -> Callable[[Gang, Frame], None]:
        kind, guard = self.last.opcode[0], operands.guard(self.last)
        if kind == "bra":
            if guard is None:
                return self._jump
            return lambda gang, frame: gang.branch(self, frame, guard(gang))
        if kind in ("ret", "exit"):
            return lambda gang, frame: gang.exit(self, frame, None if guard is None else guard(gang))
        assert is_barrier(self.last)
        return self._barrier(operands, guard)

    def _jump(self, gang: Gang, frame: Frame) -> None:
        assert self.target is not None
        frame.at = self.target

    def _barrier(self, operands: Operands, guard: Reader | None) -> Callable[[Gang, Frame], None]:
        kinds = [kind for kind in self.last.opcode[1:] if kind not in ("aligned", "cta")]
        if kinds[0] == "cluster":
            return self._cluster_barrier(kinds[1], guard)
        if kinds not in (["sync"], ["arrive"]):
            raise unknown(self.last)
        number = operands.agreed(self.last.operands[0], "u32")
        count = operands.agreed(self.last.operands[1], "u32") if len(self.last.operands) > 1 else None

        def finish(gang: Gang, frame: Frame) -> None:
            which, threads = number(gang, frame.mask), None if count is None else count(gang, frame.mask)

            def arrive(warps: Gang) -> None:
                warps.block.arrive(which, threads, warps, waits=kinds == ["sync"])

            gang.barrier(self, frame, guard and guard(gang), arrive)

        return finish

    def _cluster_barrier(self, kind: str, guard: Reader | None) -> Callable[[Gang, Frame], None]:
        if kind not in ("arrive", "wait"):
            raise unknown(self.last)

        def meet(warps: Gang) -> None:
            cluster = warps.block.cluster_barrier
            cluster.arrive(warps) if kind == "arrive" else cluster.wait(warps)

        return lambda gang, frame: gang.barrier(self, frame, guard and guard(gang), meet)


def translate(instruction: Instruction, operands: Operands) -> Step:
    """The step of an instruction, under its guard."""
    translator = _TRANSLATORS.get(instruction.opcode[0])
    if translator is None:
        raise unknown(instruction)
    try:
        step = translator(instruction, operands)
    except Fault as fault:
        raise fault if str(instruction.line) in str(fault) else Fault(f"{fault}: {instruction}") from fault
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise Fault(f"cannot read an instruction ({type(error).__name__} {error}): {instruction}") from error
    guard = operands.guard(instruction)
    if guard is None:
        return step

    def guarded(gang: Gang, mask: Mask) -> None:
        executing = guard(gang) if mask is None else guard(gang) & mask
        if executing.any():
            step(gang, None if executing.all() else executing)

    return guarded


class Program:
    """An entry whose instructions are translated."""

    def __init__(self, module: Module, entry: Entry) -> None:
        # the translators register themselves
        from ptx import instructions  # noqa: F401

        self.name, self.target, self.threads = entry.name, module.target, entry.threads
        self.parameters, self.parameter_bytes = entry.parameters, entry.parameter_bytes
        self.register_types = list(entry.registers.values())
        self.static_shared, symbols = _offsets([*module.shared, *entry.shared])
        self.local_bytes, local_symbols = _offsets(entry.local)
        operands = Operands(entry, symbols | local_symbols)
        self.codes = [Code(block, operands) for block in blocks_of(entry)]
        for code in self.codes:
            assert EXIT <= code.following < len(self.codes)


def _offsets(variables: list[Variable]) -> tuple[int, dict[str, int]]:
    """Bytes of arrays of a state space, and where each begins; one without a length begins behind the others."""
    offsets, size = {}, 0
    for variable in variables:
        if variable.size is not None:
            size = -(-size // variable.alignment) * variable.alignment
            offsets[variable.name] = size
            size += variable.size
    size = -(-size // 16) * 16
    offsets.update({variable.name: size for variable in variables if variable.size is None})
    return size, offsets


@functools.lru_cache(maxsize=16)
def program_of(text: str, entry: str | None = None) -> Program:
    """The program of a PTX text that has one entry, or of the one that is named."""
    module = parse(text)
    if entry is None and len(module.entries) != 1:
        raise Fault(f"entries {sorted(module.entries)}: expected one, or the name of one")
    return Program(module, module.entries[entry or next(iter(module.entries))])

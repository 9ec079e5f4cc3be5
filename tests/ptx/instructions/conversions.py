"""Conversions between types, and between state spaces (PTX ISA, cvt, cvta, mapa)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.formats import (
    HALVES,
    ROUND_TO_INTEGER,
    Array,
    dtype,
    flush,
    from_half,
    pack,
    saturate,
    to_half,
    to_integer,
    to_single,
)
from ptx.instructions.scalar import ROUNDINGS, assign
from ptx.machine import CLUSTER_WINDOW
from ptx.operands import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, Operands
from ptx.parse import SIZES, Instruction
from ptx.program import Step, translates, unknown


def _is_float(kind: str) -> bool:
    return kind in ("f16", "bf16", "f32", "f64")


@translates("cvt")
def _cvt(instruction: Instruction, operands: Operands) -> Step:
    *options, to, source = instruction.opcode[1:]
    rounding = next((option for option in options if option in ROUNDINGS or option in ROUND_TO_INTEGER), None)
    rest = set(options) - {rounding}
    if rest - {"ftz", "sat"}:
        raise unknown(instruction)
    if to in ("f16x2", "bf16x2") and source == "f32" and rounding == "rn" and not rest:
        high, low = (operands.read(text, "f32") for text in instruction.operands[1:])
        one = to.removesuffix("x2")
        return assign(instruction, operands, to, [low, high], lambda a, b: pack(to_half(a, one), to_half(b, one)))
    if to in HALVES[2:] or source in HALVES[2:] or to == "tf32" or len(instruction.operands) != 2:
        raise unknown(instruction)
    read = operands.read(instruction.operands[1], source)
    function = _conversion(instruction, to, source, rounding)
    if rest:
        plain = function

        def function(value: Array) -> Array:
            result = plain(flush(value) if "ftz" in rest and value.dtype.kind == "f" else value)
            if "sat" in rest:
                result = saturate(result)
            return flush(result) if "ftz" in rest and result.dtype.kind == "f" else result

        if "sat" in rest and to != "f32":
            raise unknown(instruction)
    return assign(instruction, operands, to, [read], function)


def _conversion(instruction: Instruction, to: str, source: str, rounding: str | None) -> Callable[[Array], Array]:
    result = dtype(to)
    if not _is_float(source) and not _is_float(to):
        return lambda value: value.astype(result)

    def widened(value: Array) -> Array:
        return from_half(value, source) if source in HALVES else value

    if not _is_float(to):
        if rounding not in ROUND_TO_INTEGER:
            raise unknown(instruction)
        return lambda value: to_integer(widened(value), rounding, result)
    if rounding in ROUND_TO_INTEGER and source == to and to not in HALVES:
        return ROUND_TO_INTEGER[rounding]
    grows = _is_float(source) and SIZES[to] > SIZES[source]
    if rounding is None and not grows and source != to:
        raise unknown(instruction)
    if to in HALVES:
        if rounding not in (None, "rn") or source == "f64":
            raise unknown(instruction)
        return lambda value: to_half(widened(value).astype(np.float32), to)
    if to == "f32" and rounding in ("rz", "rm", "rp"):
        return lambda value: to_single(value.astype(np.float64), rounding)
    return lambda value: widened(value).astype(result)


_WINDOWS = {"shared": SHARED_WINDOW, "param": PARAMETER_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0}


@translates("cvta")
def _cvta(instruction: Instruction, operands: Operands) -> Step:
    inward = instruction.opcode[1] == "to"
    space = instruction.opcode[2 if inward else 1].split("::")[0]
    if space not in _WINDOWS or instruction.opcode[-1] != "u64":
        raise unknown(instruction)
    window = np.uint64(_WINDOWS[space])
    read = operands.read(instruction.operands[1], "u64")
    return assign(instruction, operands, "u64", [read], lambda value: value - window if inward else value + window)


@translates("mapa")
def _mapa(instruction: Instruction, operands: Operands) -> Step:
    if instruction.opcode[1:] != ("shared::cluster", "u32"):
        raise unknown(instruction)
    sources = [operands.read(text, "u32") for text in instruction.operands[1:]]
    window = np.uint32(CLUSTER_WINDOW)
    return assign(instruction, operands, "u32", sources, lambda a, rank: a % window + (rank + np.uint32(1)) * window)

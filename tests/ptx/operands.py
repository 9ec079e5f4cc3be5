"""Operands: text to functions that read them from a gang's registers, or write them there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ptx.faults import Fault
from ptx.formats import RAW, Array, dtype, raw
from ptx.parse import SIZES, Entry, Instruction

if TYPE_CHECKING:
    from ptx.gang import Gang, Mask

Reader: TypeAlias = "Callable[[Gang], Array]"
Writer: TypeAlias = "Callable[[Gang, Mask, Array], None]"
Agreed: TypeAlias = "Callable[[Gang, Mask], int]"

SHARED_WINDOW, PARAMETER_WINDOW, LOCAL_WINDOW = 0x7000_0000_0000, 0x6000_0000_0000, 0x5000_0000_0000
"""Generic addresses of shared memory, of parameters and of a thread's own memory; all others are global."""

_ADDRESS = re.compile(r"\[\s*([%\w$./]+)\s*(?:([+-])\s*(-?\w+))?\s*\]$")
_FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$")


class Operands:
    """The names that an entry's operands may have: registers, parameters, arrays."""

    def __init__(self, entry: Entry, arrays: dict[str, int]) -> None:
        self.types = entry.registers
        self.places = {name: place for place, name in enumerate(entry.registers)}
        self.symbols = arrays | {parameter.name: parameter.offset for parameter in entry.parameters}

    def guard(self, instruction: Instruction) -> Reader | None:
        """The lanes that an instruction's predicate lets execute."""
        if instruction.guard is None:
            return None
        name, negated = instruction.guard
        return self.predicate(f"!{name}" if negated else name)

    def predicate(self, text: str) -> Reader:
        """A predicate, its negation, or a constant."""
        if text.startswith("!"):
            place = self.places[text[1:]]
            return lambda gang: ~gang.registers[place]
        if text in self.places:
            return self.read(text, "pred")
        value = int(text, 0) != 0
        return lambda gang: gang.full(value, np.dtype(bool))

    def read(self, text: str, kind: str) -> Reader:
        """An operand as values of a type. A wider register gives its low bits."""
        to = dtype(kind)
        if text in self.places:
            place, own = self.places[text], self.types[text]
            if (own == "pred") != (kind == "pred"):
                raise Fault(f"{text} is a register of .{own}, read as .{kind}")
            if kind == "pred":
                return lambda gang: gang.registers[place]
            if SIZES[own] < SIZES[kind]:
                raise Fault(f"{text} is a register of .{own}, read as .{kind}")
            if SIZES[own] > SIZES[kind]:
                narrow = RAW[SIZES[kind]]
                return lambda gang: gang.registers[place].astype(narrow).view(to)
            if to.kind == "u":
                return lambda gang: gang.registers[place]
            return lambda gang: gang.registers[place].view(to)
        if text.startswith("%"):
            return lambda gang: gang.special(text).astype(RAW[to.itemsize]).view(to)
        value = self.constant(text, to)
        return lambda gang: value

    def constant(self, text: str, to: np.dtype[Any]) -> Array:
        """An immediate operand, or the address of a name."""
        if _FLOAT.match(text):
            bits = np.array(int(text[2:], 16), RAW[len(text) // 2 - 1])
            if bits.dtype.itemsize != to.itemsize:
                raise Fault(f"the constant {text} as {to}")
            return bits.view(to)
        name, _, offset = text.partition("+")
        if name.strip() in self.symbols:
            number = self.symbols[name.strip()] + (int(offset, 0) if offset else 0)
        elif to.kind == "f" and re.match(r"-?[\d.]+(e[-+]?\d+)?$", text):
            return np.array(float(text), to)
        else:
            number = int(text.rstrip("U"), 0)
        return np.array(number & ((1 << 8 * to.itemsize) - 1), RAW[to.itemsize]).view(to)

    def write(self, text: str, kind: str) -> Writer:
        """A register, for values of a type. In a wider one they are extended, by their sign if they have one."""
        if text == "_":
            return lambda gang, mask, value: None
        place, own = self.places[text], self.types[text]
        if (own == "pred") != (kind == "pred") or SIZES[own] < SIZES[kind]:
            raise Fault(f"{text} is a register of .{own}, written as .{kind}")
        wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{SIZES[own]}") if SIZES[own] > SIZES[kind] else None

        def write(gang: Gang, mask: Mask, value: Array) -> None:
            bits = raw(value)
            if wide is not None:
                bits = raw(value.view(f"{wide.kind}{value.dtype.itemsize}").astype(wide))
            if mask is not None:
                bits = np.where(mask, bits, gang.registers[place])
            elif bits.ndim == 0:
                bits = np.full(gang.lanes, bits)
            gang.registers[place] = bits

        return write

    def place(self, text: str) -> int:
        """A register's number."""
        return self.places[text]

    def address(self, text: str) -> Reader:
        """``[register + offset]`` or ``[name + offset]``, in the width of the register, or 64 bits."""
        found = _ADDRESS.match(text)
        if found is None:
            raise Fault(f"no address: {text}")
        base, sign, offset = found.groups()
        number = int(offset, 0) if offset else 0
        number = -number if sign == "-" else number
        if base not in self.places:
            value = np.array((self.symbols[base] if base in self.symbols else int(base, 0)) + number, np.uint64)
            return lambda gang: np.broadcast_to(value, gang.lanes)
        read = self.read(base, f"u{8 * SIZES[self.types[base]]}")
        if number == 0:
            return read
        step = np.array(number & ((1 << 8 * SIZES[self.types[base]]) - 1), RAW[SIZES[self.types[base]]])
        return lambda gang: read(gang) + step

    def vector(self, text: str) -> list[str]:
        """The operands in braces, or the one without."""
        return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]

    def agreed(self, text: str, kind: str) -> Agreed:
        """An operand in which all lanes that execute must agree."""
        read = self.read(text, kind)

        def value(gang: Gang, mask: Mask) -> int:
            values = read(gang)
            if values.ndim:
                values = values if mask is None else values[mask]
                if (values != values[0]).any():
                    raise Fault(f"lanes disagree on {text}")
                return int(values[0])
            return int(values)

        return value

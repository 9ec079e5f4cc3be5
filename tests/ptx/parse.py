"""The text of a PTX module to entries of instructions. Nothing here knows what an instruction does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.faults import Fault

SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "tf32": 4, "f32": 4, "f64": 8, "b128": 16, "pred": 1},
}
"""Bytes of the fundamental types (PTX ISA, Fundamental Types)."""


@dataclass(frozen=True)
class Instruction:
    """One statement of an entry's body."""

    opcode: tuple[str, ...]
    """The mnemonic and its modifiers."""
    guard: tuple[str, bool] | None
    """The predicate that it is executed under, and whether it is negated."""
    operands: tuple[str, ...]
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.text} (line {self.line})"


@dataclass(frozen=True)
class Variable:
    """A declared array or scalar of a state space."""

    name: str
    size: int | None
    """Bytes; None of an array without a length, which is the dynamic shared memory."""
    alignment: int


@dataclass(frozen=True)
class Parameter:
    """A parameter of an entry, at its offset in the block of parameters."""

    name: str
    type: str
    size: int
    offset: int


@dataclass
class Entry:
    """A kernel."""

    name: str
    parameters: list[Parameter]
    threads: int | None
    """What .reqntid asks for."""
    registers: dict[str, str] = field(default_factory=dict)
    """Type by name; a register of an inner scope has the scope's number behind its name."""
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)
    """The instruction that a branch jumps to, by the branch."""

    @property
    def parameter_bytes(self) -> int:
        last = self.parameters[-1] if self.parameters else None
        return last.offset + last.size if last else 0


@dataclass(frozen=True)
class Module:
    """What one PTX text declares."""

    target: str
    shared: list[Variable]
    entries: dict[str, Entry]


def parse(text: str) -> Module:
    """The module of a PTX text."""
    text = _without_comments(text)
    target = re.search(r"\.target\s+(\w+)", text)
    if target is None:
        raise Fault("the text has no .target: it is no PTX module")
    entries, outside, position = {}, "", 0
    for found in re.finditer(r"\.entry\s+([\w$]+)\s*", text):
        if found.start() < position:
            continue
        outside += text[position : found.start()]
        after_parameters = found.end()
        parameters: list[Parameter] = []
        if text[found.end()] == "(":
            after_parameters = _closing(text, found.end())
            parameters = _parameters(text[found.end() + 1 : after_parameters - 1])
        body = text.index("{", after_parameters)
        position = _closing(text, body)
        asked = re.search(r"\.reqntid\s+([\d, ]+)", text[after_parameters:body])
        threads = None
        if asked:
            threads = 1
            for extent in asked.group(1).split(","):
                threads *= int(extent)
        entry = Entry(found.group(1), parameters, threads)
        _Body(entry, text[body + 1 : position - 1], 1 + text.count("\n", 0, body)).read()
        entries[entry.name] = entry
    outside += text[position:]
    shared = [_variable(declaration) for declaration in re.findall(r"\.shared\s+([^;{}=]*);", outside)]
    return Module(target.group(1), shared, entries)


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


def _without_comments(text: str) -> str:
    """The text with as many lines, less its comments and what a debugger reads."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found.group().count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    return re.sub(r"^[ \t]*\.section[^{]*\{[^}]*\}", lambda found: "\n" * found.group().count("\n"), text, flags=re.M)


def _closing(text: str, opening: int) -> int:
    """The position behind the bracket that closes the one at ``opening``."""
    pair = {"(": ")", "{": "}"}[text[opening]]
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == text[opening]:
            depth += 1
        elif text[position] == pair:
            depth -= 1
            if depth == 0:
                return position + 1
    raise Fault(f"a bracket {text[opening]!r} is never closed")


def _variable(declaration: str) -> Variable:
    found = re.search(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)\s*(\[(\d*)\])?", declaration)
    if found is None:
        raise Fault(f"cannot read the declaration {declaration!r}")
    alignment, kind, name, brackets, length = found.groups()
    size = None if brackets and not length else SIZES[kind] * int(length or 1)
    return Variable(name, size, int(alignment or SIZES[kind]))


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in split_operands(text):
        found = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.(?:ptr|global|shared|const|align\s+\d+))*"
            r"\s+([\w$]+)(?:\[(\d+)\])?$",
            " ".join(declaration.split()),
        )
        if found is None:
            raise Fault(f"cannot read the parameter {declaration!r}")
        alignment, kind, name, length = found.groups()
        size = SIZES[kind] * int(length or 1)
        step = int(alignment or SIZES[kind])
        offset = -(-offset // step) * step
        parameters.append(Parameter(name, kind, size, offset))
        offset += size
    return parameters


@dataclass
class _Scope:
    """A block in braces: its registers under their full names, and its labels."""

    number: int
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


class _Body:
    """Reads the body of an entry, whose braces are scopes."""

    _LABEL = re.compile(r"([\w$%.]+)\s*:(?!:)")
    _STATEMENT = re.compile(r"(?:@(!?)\s*([\w%$]+)\s+)?([\w.:]+)\s*(.*)$")
    _NAME = re.compile(r"[%\w$]+")

    def __init__(self, entry: Entry, text: str, line: int) -> None:
        self.entry, self.text, self.line = entry, text, line
        self.scopes = [_Scope(0)]
        self.branches: list[tuple[int, str, tuple[_Scope, ...]]] = []

    def read(self) -> None:
        position, scopes = 0, 1
        while position < len(self.text):
            character = self.text[position]
            if character == "\n":
                self.line += 1
            if character.isspace() or character == ";":
                position += 1
            elif character == "{":
                self.scopes.append(_Scope(scopes))
                scopes += 1
                position += 1
            elif character == "}":
                self.scopes.pop()
                position += 1
            elif character != "." and (label := self._LABEL.match(self.text, position)):
                self.scopes[-1].labels[label.group(1)] = len(self.entry.code)
                position = label.end()
            else:
                end = self.text.index(";", position)
                statement = self.text[position:end]
                self._statement(" ".join(statement.split()))
                self.line += statement.count("\n")
                position = end + 1
        for branch, label_name, chain in self.branches:
            targets = [scope.labels[label_name] for scope in reversed(chain) if label_name in scope.labels]
            if not targets:
                raise Fault(f"no label {label_name}: {self.entry.code[branch]}")
            self.entry.targets[branch] = targets[0]

    def _statement(self, text: str) -> None:
        if text.startswith("."):
            self._directive(text)
            return
        found = self._STATEMENT.match(text)
        if found is None:
            raise Fault(f"cannot read {text!r} (line {self.line})")
        negated, guard, mnemonic, operands = found.groups()
        if mnemonic.split(".")[0] == "bra":
            self.branches.append((len(self.entry.code), operands.strip(), tuple(self.scopes)))
        else:
            operands = self._full_names(operands)
        self.entry.code.append(
            Instruction(
                tuple(mnemonic.split(".")),
                (self._full_names(guard), bool(negated)) if guard else None,
                split_operands(operands),
                text,
                self.line,
            )
        )

    def _directive(self, text: str) -> None:
        kind, _, rest = text.partition(" ")
        if kind == ".reg":
            type_name, _, names = rest.strip().partition(" ")
            for name in split_operands(names):
                many = re.match(r"([\w$%]+)<(\d+)>$", name)
                for one in [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]:
                    self._declare(one, type_name.removeprefix("."))
        elif kind in (".shared", ".local"):
            variables = self.entry.shared if kind == ".shared" else self.entry.local
            variables.append(_variable(rest))
        elif kind not in (".pragma", ".param"):
            raise Fault(f"unknown directive {text!r} (line {self.line})")

    def _declare(self, name: str, type_name: str) -> None:
        if type_name not in SIZES:
            raise Fault(f"unknown type of a register: {type_name} {name} (line {self.line})")
        if len(self.scopes) > 1:
            full = f"{name}/{self.scopes[-1].number}"
            self.scopes[-1].registers[name] = full
            name = full
        self.entry.registers[name] = type_name

    def _full_names(self, text: str) -> str:
        if len(self.scopes) == 1:
            return text

        def full(found: re.Match[str]) -> str:
            name = found.group()
            return next((scope.registers[name] for scope in reversed(self.scopes) if name in scope.registers), name)

        return self._NAME.sub(full, text)

"""Arithmetic, comparisons, logic and moves: a lane by itself (PTX ISA, Integer Arithmetic to Data Movement)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np

from ptx import integers
from ptx.formats import (
    HALVES,
    Array,
    dtype,
    flush,
    fused_multiply_add,
    in_halves,
    pairs,
    raw,
    saturate,
    to_single,
)
from ptx.gang import Gang, Mask
from ptx.instructions.wgmma import Pending
from ptx.operands import Operands, Reader
from ptx.parse import SIZES, Instruction
from ptx.program import Step, translates, unknown

ROUNDINGS = ("rn", "rz", "rm", "rp")


def assign(
    instruction: Instruction, operands: Operands, kind: str, sources: Sequence[Reader], function: Callable[..., Array]
) -> Step:
    """The first operand becomes a function of values that are read."""
    write = operands.write(instruction.operands[0], kind)
    if len(sources) == 1:
        (one,) = sources
        return lambda gang, mask: write(gang, mask, function(one(gang)))
    if len(sources) == 2:
        a, b = sources
        return lambda gang, mask: write(gang, mask, function(a(gang), b(gang)))
    return lambda gang, mask: write(gang, mask, function(*(source(gang) for source in sources)))


def modifiers(instruction: Instruction, *known: str) -> set[str]:
    """The modifiers between mnemonic and type, all of which must be known."""
    found = set(instruction.opcode[1:-1])
    if found - set(known):
        raise unknown(instruction)
    return found


def _read(instruction: Instruction, operands: Operands, kind: str, first: int = 1) -> list[Reader]:
    return [operands.read(text, kind) for text in instruction.operands[first:]]


def _floating(
    instruction: Instruction, operands: Operands, function: Callable[..., Array], exact: Callable[..., Array] | None
) -> Step:
    """A function of floats: f32 and f64 with .ftz, .sat and a rounding, halves through fp32.

    ``exact`` is the function in fp64, which a directed rounding needs; halves use it too.
    """
    kind = instruction.opcode[-1]
    options = modifiers(instruction, "ftz", "sat", "approx", "full", "NaN", *ROUNDINGS)
    sources = _read(instruction, operands, kind)
    if kind in HALVES:
        if options & {"sat", "rz", "rm", "rp"}:
            raise unknown(instruction)
        return assign(instruction, operands, kind, sources, lambda *values: in_halves(kind, exact or function, *values))
    directed = next((rounding for rounding in ("rz", "rm", "rp") if rounding in options), None)
    if directed and (exact is None or kind != "f32"):
        raise unknown(instruction)

    def apply(*values: Array) -> Array:
        if "ftz" in options:
            values = tuple(flush(value) for value in values)
        if directed and exact is not None:
            result = to_single(exact(*(value.astype(np.float64) for value in values)), directed)
        else:
            result = function(*values)
        if "ftz" in options:
            result = flush(result)
        return saturate(result) if "sat" in options else result

    plain = not directed and not options & {"ftz", "sat"}
    return assign(instruction, operands, kind, sources, function if plain else apply)


def _is_float(kind: str) -> bool:
    return kind[0] == "f" or kind in HALVES


_ARITHMETIC: dict[str, Callable[..., Array]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


@translates("add", "sub", "mul")
def _add_sub_mul(instruction: Instruction, operands: Operands) -> Step:
    kind, mnemonic = instruction.opcode[-1], instruction.opcode[0]
    function = _ARITHMETIC[mnemonic]
    if _is_float(kind):
        return _floating(instruction, operands, function, function)
    sources = _read(instruction, operands, kind)
    options = modifiers(instruction, "lo", "hi", "wide") if mnemonic == "mul" else modifiers(instruction)
    if "hi" in options:
        function = integers.high_product
    elif "wide" in options:
        return assign(instruction, operands, _wide(kind), sources, _wide_product(kind))
    return assign(instruction, operands, kind, sources, function)


def _wide(kind: str) -> str:
    return f"{kind[0]}{16 * SIZES[kind]}"


def _wide_product(kind: str) -> Callable[..., Array]:
    wide = dtype(_wide(kind))
    return lambda a, b: a.astype(wide) * b.astype(wide)


@translates("mad")
def _mad(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    if _is_float(kind):
        return _fma(instruction, operands)
    options = modifiers(instruction, "lo", "wide")
    a, b = (operands.read(text, kind) for text in instruction.operands[1:3])
    if "wide" in options:
        product, c = _wide_product(kind), operands.read(instruction.operands[3], _wide(kind))
        return assign(instruction, operands, _wide(kind), [a, b, c], lambda a, b, c: product(a, b) + c)
    c = operands.read(instruction.operands[3], kind)
    return assign(instruction, operands, kind, [a, b, c], lambda a, b, c: a * b + c)


@translates("fma")
def _fma(instruction: Instruction, operands: Operands) -> Step:
    if instruction.opcode[-1] == "f64":
        raise unknown(instruction)
    return _floating(instruction, operands, lambda a, b, c: to_single(fused_multiply_add(a, b, c), "rn"),
                     fused_multiply_add)  # fmt: skip


@translates("div")
def _div(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    if _is_float(kind):
        return _floating(instruction, operands, operator.truediv, None)
    modifiers(instruction)
    return assign(instruction, operands, kind, _read(instruction, operands, kind), integers.quotient)


@translates("rem")
def _rem(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    return assign(instruction, operands, kind, _read(instruction, operands, kind), integers.remainder)


def _in_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda value: function(value.astype(np.float64)).astype(value.dtype)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "rcp": _in_double(lambda value: 1 / value),
    "sqrt": np.sqrt,
    "rsqrt": _in_double(lambda value: 1 / np.sqrt(value)),
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": _in_double(np.tanh),
}
"""Approximations are computed exactly: PTX bounds their error, and a test's tolerance covers the bound."""


@translates(*_FUNCTIONS)
def _function(instruction: Instruction, operands: Operands) -> Step:
    return _floating(instruction, operands, _FUNCTIONS[instruction.opcode[0]], None)


@translates("neg", "abs")
def _neg_abs(instruction: Instruction, operands: Operands) -> Step:
    kind, negates = instruction.opcode[-1], instruction.opcode[0] == "neg"
    if not _is_float(kind):
        modifiers(instruction)
        sources = _read(instruction, operands, kind)
        return assign(instruction, operands, kind, sources, operator.neg if negates else np.abs)
    flushes = "ftz" in modifiers(instruction, "ftz") and kind == "f32"
    bits = f"b{8 * SIZES[kind]}"
    lanes = 2 if kind.endswith("x2") else 1
    top = 1 << (8 * SIZES[kind] // lanes - 1)
    signs = np.array(top | (top << 16 if lanes == 2 else 0), dtype(bits))

    def apply(value: Array) -> Array:
        value = value ^ signs if negates else value & ~signs
        return raw(flush(value.view(np.float32))) if flushes else value

    return assign(instruction, operands, bits, _read(instruction, operands, bits), apply)


_EXTREMES: dict[tuple[str, bool], Callable[..., Array]] = {
    **{("min", True): np.minimum, ("max", True): np.maximum},
    **{("min", False): np.fmin, ("max", False): np.fmax},
}
"""By whether a NaN comes through: without .NaN the other operand is the result."""


@translates("min", "max")
def _min_max(instruction: Instruction, operands: Operands) -> Step:
    kind, name = instruction.opcode[-1], instruction.opcode[0]
    function = _EXTREMES[name, not _is_float(kind) or "NaN" in instruction.opcode]
    if not _is_float(kind):
        modifiers(instruction)
        return assign(instruction, operands, kind, _read(instruction, operands, kind), function)
    return _floating(instruction, operands, function, None)


@translates("copysign")
def _copysign(instruction: Instruction, operands: Operands) -> Step:
    modifiers(instruction)
    bits = f"b{8 * SIZES[instruction.opcode[-1]]}"
    sign = np.array(1 << (8 * SIZES[bits] - 1), dtype(bits))
    sources = _read(instruction, operands, bits)
    return assign(instruction, operands, bits, sources, lambda a, b: (a & sign) | (b & ~sign))


_LOGIC: dict[str, Callable[..., Array]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@translates(*_LOGIC)
def _logic(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    texts = instruction.operands[1:]
    sources = [operands.predicate(text) if kind == "pred" else operands.read(text, kind) for text in texts]
    return assign(instruction, operands, kind, sources, _LOGIC[instruction.opcode[0]])


@translates("not")
def _not(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    return assign(instruction, operands, kind, _read(instruction, operands, kind), operator.invert)


@translates("shl", "shr")
def _shift(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    function = integers.shift_left if instruction.opcode[0] == "shl" else integers.shift_right
    sources = [operands.read(instruction.operands[1], kind), operands.read(instruction.operands[2], "u32")]
    return assign(instruction, operands, kind, sources, function)


@translates("shf")
def _funnel(instruction: Instruction, operands: Operands) -> Step:
    _, side, mode, _ = instruction.opcode
    sources = _read(instruction, operands, "u32")
    left, wraps = {"l": True, "r": False}[side], {"wrap": True, "clamp": False}[mode]
    return assign(instruction, operands, "u32", sources, lambda a, b, n: integers.funnel(a, b, n, left, wraps))


@translates("bfe")
def _bfe(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    a, *field = instruction.operands[1:]
    sources = [operands.read(a, kind), *(operands.read(text, "u32") for text in field)]
    return assign(instruction, operands, kind, sources, integers.extract_field)


@translates("bfi")
def _bfi(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    a, b, *field = instruction.operands[1:]
    sources = [operands.read(a, kind), operands.read(b, kind), *(operands.read(text, "u32") for text in field)]
    return assign(instruction, operands, kind, sources, integers.insert_field)


@translates("prmt")
def _prmt(instruction: Instruction, operands: Operands) -> Step:
    modifiers(instruction)  # .f4e and the other modes are not known
    return assign(instruction, operands, "b32", _read(instruction, operands, "b32"), integers.permute_bytes)


@translates("lop3")
def _lop3(instruction: Instruction, operands: Operands) -> Step:
    modifiers(instruction)
    table = int(instruction.operands[4], 0)
    sources = [operands.read(text, "b32") for text in instruction.operands[1:4]]
    return assign(instruction, operands, "b32", sources, lambda a, b, c: integers.logic(a, b, c, table))


@translates("popc", "clz", "brev")
def _count_bits(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    sources = _read(instruction, operands, kind)
    if instruction.opcode[0] == "brev":
        return assign(instruction, operands, kind, sources, integers.reversed_bits)
    if instruction.opcode[0] == "clz":
        return assign(instruction, operands, "u32", sources, integers.leading_zeros)
    return assign(instruction, operands, "u32", sources, lambda a: np.bitwise_count(a).astype(np.uint32))


@translates("selp")
def _selp(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    a, b, chooser = instruction.operands[1:]
    sources = [operands.read(a, kind), operands.read(b, kind), operands.predicate(chooser)]
    return assign(instruction, operands, kind, sources, lambda a, b, c: np.asarray(np.where(c, a, b)))


_COMPARISONS: dict[str, Callable[..., Array]] = {
    **{"eq": operator.eq, "ne": operator.ne},
    **{"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge},
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
}


def _comparison(name: str, floats: bool) -> Callable[..., Array]:
    """Comparisons of floats are false where an operand is NaN, those that end in u true."""
    if not floats:
        return _COMPARISONS[name]
    if name in ("num", "nan"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted
    if name[-1] == "u" and name[:-1] in _COMPARISONS:
        function = _COMPARISONS[name[:-1]]
        return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _COMPARISONS[name]


@translates("setp")
def _setp(instruction: Instruction, operands: Operands) -> Step:
    kind, name = instruction.opcode[-1], instruction.opcode[1]
    options = set(instruction.opcode[2:-1])
    join = next((_LOGIC[option] for option in options if option in _LOGIC), None)
    if options - {"ftz", *_LOGIC}:
        raise unknown(instruction)
    compare = _comparison(name, _is_float(kind))
    if "ftz" in options:
        plain = compare
        compare = lambda a, b: plain(flush(a), flush(b))  # noqa: E731
    a, b = (operands.read(text, kind) for text in instruction.operands[1:3])
    also = operands.predicate(instruction.operands[3]) if join else None
    names = [name.strip() for name in instruction.operands[0].split("|")]
    writes = [operands.write(name, "pred") for name in names]
    packed = kind.endswith("x2")
    if kind in HALVES and not packed:
        plain_half = compare
        compare = lambda a, b: plain_half(*(pair[0] for pair in _halves(kind, a, b)))  # noqa: E731

    def step(gang: Gang, mask: Mask) -> None:
        if packed:
            low, high = pairs(kind, a(gang), b(gang))
            results = [compare(*low), compare(*high)]
        else:
            result = np.asarray(compare(a(gang), b(gang)))
            results = [result, ~result]
        more = also(gang) if also else None
        for write, result in zip(writes, results, strict=False):
            write(gang, mask, result if more is None or join is None else join(result, more))

    return step


def _halves(kind: str, a: Array, b: Array) -> tuple[list[Array], list[Array]]:
    from ptx.formats import from_half

    return [from_half(a, kind)], [from_half(b, kind)]


@translates("mov")
def _mov(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.opcode[-1]
    modifiers(instruction)
    to, source = instruction.operands
    if to.startswith("{"):
        return _unpack(operands, operands.vector(to), source, kind)
    if source.startswith("{"):
        return _pack(operands, to, operands.vector(source), kind)
    if kind == "pred":
        return assign(instruction, operands, "pred", [operands.predicate(source)], lambda value: value)
    read, write = operands.read(source, kind), operands.write(to, kind)
    if source not in operands.places or SIZES[operands.types[source]] != SIZES[operands.types[to]]:
        return lambda gang, mask: write(gang, mask, read(gang))
    here, there = operands.place(source), operands.place(to)

    def step(gang: Gang, mask: Mask) -> None:
        value = gang.registers[here]
        if mask is None or isinstance(value, Pending):
            # what a wgmma in flight will write may be moved, and read when it is there
            gang.registers[there] = value if mask is None else value.refuse()
        else:
            write(gang, mask, value)

    return step


def _unpack(operands: Operands, parts: list[str], source: str, kind: str) -> Step:
    bits = 8 * SIZES[kind] // len(parts)
    read = operands.read(source, f"b{8 * SIZES[kind]}")
    writes = [operands.write(part, f"b{bits}") for part in parts]
    narrow = dtype(f"b{bits}")

    def step(gang: Gang, mask: Mask) -> None:
        value = read(gang)
        for place, write in enumerate(writes):
            write(gang, mask, (value >> value.dtype.type(bits * place)).astype(narrow))

    return step


def _pack(operands: Operands, to: str, parts: list[str], kind: str) -> Step:
    bits, wide = 8 * SIZES[kind] // len(parts), dtype(f"b{8 * SIZES[kind]}")
    reads = [operands.read(part, f"b{bits}") for part in parts]
    write = operands.write(to, f"b{8 * SIZES[kind]}")

    def step(gang: Gang, mask: Mask) -> None:
        value = wide.type(0)
        for place, read in enumerate(reads):
            value = value | (read(gang).astype(wide) << wide.type(bits * place))
        write(gang, mask, value)

    return step

"""PTX's types as numpy's, and its roundings. A register holds raw bits: an unsigned integer a lane, a bool of a predicate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptx.parse import SIZES

Array: TypeAlias = NDArray[Any]

RAW: dict[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
"""What a register of so many bytes holds."""

HALVES = ("f16", "bf16", "f16x2", "bf16x2")

_POISON = {1: 0xAD, 2: 0xFFFE, 4: 0xFFC0DEAD, 8: 0xFFF8DEADDEADDEAD}


def dtype(kind: str) -> np.dtype[Any]:
    """What numpy computes a type in; raw bits of those that it lacks."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in HALVES or kind == "tf32" or kind[0] == "b":
        return RAW[SIZES[kind]]
    return np.dtype({"u": "u", "s": "i", "f": "f"}[kind[0]] + str(SIZES[kind]))


def poison(kind: str, lanes: int) -> Array:
    """A register that nothing wrote: NaN as a float, no address as a pointer."""
    if kind == "pred":
        return np.zeros(lanes, bool)
    return np.full(lanes, _POISON[SIZES[kind]], RAW[SIZES[kind]])


def raw(value: Array) -> Array:
    """The bits of values."""
    return value if value.dtype.kind in "ub" else value.view(RAW[value.dtype.itemsize])


def flush(value: Array) -> Array:
    """Subnormal numbers to zero of their sign: .ftz."""
    return np.where(np.abs(value) < np.finfo(value.dtype).tiny, np.copysign(value.dtype.type(0), value), value)


def saturate(value: Array) -> Array:
    """To [0, 1], NaN to 0: .sat."""
    return np.clip(np.where(np.isnan(value), value.dtype.type(0), value), 0, 1).astype(value.dtype)


def from_half(bits: Array, kind: str) -> Array:
    """f16 or bf16 -> fp32, exactly."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def to_half(value: Array, kind: str) -> Array:
    """fp32 -> f16 or bf16, to nearest even; NaN to the canonical one."""
    if kind == "f16":
        return np.where(np.isnan(value), np.uint16(0x7FFF), value.astype(np.float16).view(np.uint16))
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def in_halves(kind: str, function: Callable[..., Array], *operands: Array) -> Array:
    """A function of fp32 values on f16 or bf16, or on pairs of them."""
    one = kind.removesuffix("x2")
    if one == kind:
        return to_half(function(*(from_half(bits, one) for bits in operands)).astype(np.float32), one)
    low, high = (to_half(function(*part).astype(np.float32), one) for part in pairs(kind, *operands))
    return pack(low, high)


def pairs(kind: str, *operands: Array) -> tuple[list[Array], list[Array]]:
    """Packed operands -> fp32 values of their low halves, and of their high halves."""
    one = kind.removesuffix("x2")
    low = [from_half((bits & np.uint32(0xFFFF)).astype(np.uint16), one) for bits in operands]
    high = [from_half((bits >> np.uint32(16)).astype(np.uint16), one) for bits in operands]
    return low, high


def pack(low: Array, high: Array) -> Array:
    """Two of 16 bits -> one of 32."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def to_single(value: Array, rounding: str) -> Array:
    """fp64 -> fp32 in a direction: rn, rz, rm or rp."""
    near = np.asarray(value.astype(np.float32))
    if rounding == "rn":
        return near
    wide, infinity = near.astype(np.float64), np.float32(np.inf)
    if rounding == "rz":
        return np.where(np.abs(wide) > np.abs(value), np.nextafter(near, np.float32(0)), near)
    if rounding == "rm":
        return np.where(wide > value, np.nextafter(near, -infinity), near)
    return np.where(wide < value, np.nextafter(near, infinity), near)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp32 values in fp64, rounded to odd: so rounding it again to fp32 is right in every direction."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    # Knuth's two-sum: what the sum lost
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = total.view(np.uint64)
    fix = np.isfinite(total) & (lost != 0) & ((bits & np.uint64(1)) == 0)
    if not fix.any():
        return total
    toward = np.where(lost > 0, np.inf, -np.inf)
    return np.where(fix, np.nextafter(total, toward), total)


ROUND_TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def to_integer(value: Array, rounding: str, to: np.dtype[Any]) -> Array:
    """Floats to integers, clamped to their range, NaN to 0 (PTX ISA, cvt)."""
    limits = np.iinfo(to)
    rounded = ROUND_TO_INTEGER[rounding](np.where(np.isnan(value), 0, value).astype(np.float64))
    high, low = rounded >= float(limits.max), rounded <= float(limits.min)
    inside = np.where(high | low, 0, rounded).astype(to)
    return np.where(high, to.type(limits.max), np.where(low, to.type(limits.min), inside))

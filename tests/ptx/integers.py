"""What integer instructions compute and no single numpy function does."""

from __future__ import annotations

import numpy as np

from ptx.formats import RAW, Array, raw


def high_product(a: Array, b: Array) -> Array:
    """The upper half of a product: mul.hi."""
    if a.dtype.itemsize == 4:
        wide = np.dtype(f"{a.dtype.kind}8")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(a.dtype)
    if a.dtype.kind == "i":
        product = [(int(x) * int(y)) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
        return np.array(product, np.int64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    cross = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
    other = (a & low) * (b >> half) + (cross & low)
    return (a >> half) * (b >> half) + (cross >> half) + (other >> half)


def quotient(a: Array, b: Array) -> Array:
    """Towards zero; by zero, which PTX leaves open, all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    result = (a - np.fmod(a, safe)) // safe
    return np.where(b == 0, ~a.dtype.type(0), result)


def remainder(a: Array, b: Array) -> Array:
    """Of the sign of a; by zero, which PTX leaves open, a."""
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def shift_left(a: Array, n: Array) -> Array:
    """By more than the width: zero."""
    width = a.dtype.itemsize * 8
    return np.where(n >= width, a.dtype.type(0), a << np.minimum(n, width - 1).astype(a.dtype))


def shift_right(a: Array, n: Array) -> Array:
    """By more than the width: zero, or the sign."""
    width = a.dtype.itemsize * 8
    shifted = a >> np.minimum(n, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n >= width, a.dtype.type(0), shifted)


def funnel(low: Array, high: Array, n: Array, left: bool, wraps: bool) -> Array:
    """Shf: 32 bits of a shifted pair, the upper where it goes left."""
    n = (n & np.uint32(31) if wraps else np.minimum(n, np.uint32(32))).astype(np.uint64)
    pair = (high.astype(np.uint64) << np.uint64(32)) | low
    return ((pair << n) >> np.uint64(32) if left else pair >> n).astype(np.uint32)


def _field(width: int, position: Array, length: Array) -> tuple[Array, Array, Array]:
    kind = RAW[width // 8].type
    position, length = position & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(width))
    ones = shift_left(np.full(np.broadcast(position, length).shape, 1, kind), length) - kind(1)
    return position, length, np.where(length >= width, ~kind(0), ones)


def extract_field(a: Array, position: Array, length: Array) -> Array:
    """Bfe: a field of bits, extended by its sign where a is signed."""
    width, bits = a.dtype.itemsize * 8, raw(a)
    position, length, ones = _field(width, position, length)
    value = shift_right(bits, position) & ones
    if a.dtype.kind != "i":
        return value
    top = np.minimum(position.astype(np.int64) + length.astype(np.int64) - 1, width - 1)
    sign = (length > 0) & ((bits >> np.maximum(top, 0).astype(bits.dtype)) & bits.dtype.type(1)).astype(bool)
    # of a field that goes past the highest bit, what is past it is the sign too
    inside = ones & shift_right(~bits.dtype.type(0) | np.zeros_like(bits), position)
    return np.where(sign, value | ~inside, value).view(a.dtype)


def insert_field(a: Array, b: Array, position: Array, length: Array) -> Array:
    """Bfi: b with a field of it from a."""
    position, _, ones = _field(b.dtype.itemsize * 8, position, length)
    place = shift_left(ones, position)
    return (b & ~place) | (shift_left(a, position) & place)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Prmt in its default mode: four bytes of eight, or their signs."""
    pair = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (pair >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(chosen & np.uint32(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * place)
    return result


def logic(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits, as its table of eight."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def leading_zeros(a: Array) -> Array:
    """Clz: zeros before the highest one."""
    smeared = a.copy()
    for step in (1, 2, 4, 8, 16, 32):
        if step < a.dtype.itemsize * 8:
            smeared |= smeared >> a.dtype.type(step)
    return np.bitwise_count(~smeared).astype(np.uint32)


def reversed_bits(a: Array) -> Array:
    """Brev: the lowest bit the highest."""
    result = np.zeros_like(a)
    width = a.dtype.itemsize * 8
    for bit in range(width):
        result |= ((a >> a.dtype.type(bit)) & a.dtype.type(1)) << a.dtype.type(width - 1 - bit)
    return result

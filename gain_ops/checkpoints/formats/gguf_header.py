"""The header of a GGUF file: its single values, and where each tensor lies, without reading any.

::

    "GGUF"  uint32 version  uint64 tensors  uint64 values
    values:   text key, uint32 type, then the value; an array is uint32 type, uint64 length, then its elements
    tensors:  text name, uint32 n_dims, uint64 dims[n_dims] (the first varies fastest), uint32 type, uint64 offset
    text:     uint64 length, then UTF-8

then zeros up to a multiple of the alignment, and the data, which the offsets count from. Source: docs/gguf.md in
https://github.com/ggml-org/ggml.

The package gguf allocates what a header asks for. Here every count is held against the bytes that are there before anything
is done for it, and arrays (a tokenizer's) are passed over.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.utils.limits import check_name
from gain_ops.utils.wording import named

_LONGEST = 100 << 20  # bytes: the largest vocabularies take 20 million
_MOST_ELEMENTS = 1 << 22  # of all arrays together; the largest vocabularies have a third of it
_MOST_TENSORS = 1 << 18
_MOST_DIMS = 4  # of ggml
_MOST_VALUES = 1 << 16
_LONGEST_TEXT = (1 << 16) - 1  # bytes of a key, as the format says; longer values are passed over
_AT_ONCE = 1 << 20

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_TEXT, _ARRAY = 8, 9

T = TypeVar("T")

Value = int | float | str | None
"""A single value of a header; None stands for an array and for a long text."""


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the header names it: the number of its type, its shape in torch's order, its first byte in the file."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file: its values by their keys, and its tensors."""

    values: Mapping[str, Value]
    tensors: tuple[GGUFTensor, ...]


def read_gguf_header(file: Path) -> GGUFHeader:
    """Read and check a header; whether the tensors' data is there depends on their types, and is not checked.

    Raises:
        CheckpointError: written for the other byte order.
        ValueError: not a header of version 2 or 3, cut, or with counts beyond the limits above.
        OSError: it cannot be read.

    """
    with file.open("rb") as opened:
        reader = _Reader(opened)
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = reader.number(_U32)
        if version and version % 65536 == 0:
            raise CheckpointError(f"{file} has its numbers in the other byte order than this machine: convert it again")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        tensors, values = reader.number(_U64), reader.number(_U64)
        if tensors > _MOST_TENSORS or values > _MOST_VALUES:
            raise ValueError(
                f"{tensors:,} tensors and {values:,} values, of at most {_MOST_TENSORS:,} and {_MOST_VALUES:,}"
            )
        found = dict(_unique("key", _values(reader, values)))
        alignment = found.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        described = dict(_unique("tensor", _tensors(reader, tensors)))
        data = -(-reader.place // alignment) * alignment
    return GGUFHeader(
        found,
        tuple(GGUFTensor(name, kind, shape, data + at) for name, (kind, shape, at) in described.items()),
    )


class _Reader:
    """The first bytes of a file, read as far as they are asked for, and a place among them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._bytes = bytearray()
        self._elements = 0
        self.place = 0

    def take(self, size: int) -> bytes:
        start = self.place
        self.skip(size)
        return bytes(self._bytes[start : self.place])

    def number(self, form: struct.Struct) -> int:
        start = self.place
        self.skip(form.size)
        number: int = form.unpack_from(self._bytes, start)[0]
        return number

    def text(self) -> str | None:
        """None, and passed over, if it is long."""
        size = self.number(_U64)
        if size > _LONGEST_TEXT:
            self.skip(size)
            return None
        return self.take(size).decode(errors="replace")

    def name(self) -> str:
        name = self.text()
        if name is None:
            raise ValueError(f"a name of over {_LONGEST_TEXT:,} bytes")
        return name

    def skip(self, size: int) -> None:
        end = self.place + size
        if end > len(self._bytes):
            self._read_until(end)
        self.place = end

    def count_elements(self, count: int) -> None:
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise ValueError(f"an array of {count:,} elements, where all may have {_MOST_ELEMENTS:,}")

    def _read_until(self, end: int) -> None:
        if end > _LONGEST:
            raise ValueError(f"its header would take {end:,} bytes, of at most {_LONGEST:,}")
        self._bytes += self._file.read(max(end - len(self._bytes), _AT_ONCE))
        if end > len(self._bytes):
            raise ValueError(f"it ends in its header, at byte {len(self._bytes):,}")


def _values(reader: _Reader, count: int) -> Iterator[tuple[str, Value]]:
    for _ in range(count):
        key, kind = reader.name(), reader.number(_U32)
        if kind in _SCALARS:
            yield key, reader.number(_SCALARS[kind])
        elif kind == _TEXT:
            yield key, reader.text()
        elif kind == _ARRAY:
            _skip_array(reader, key)
            yield key, None
        else:
            raise ValueError(f"{named(key)} is of type {kind}")


def _skip_array(reader: _Reader, key: str) -> None:
    kind, count = reader.number(_U32), reader.number(_U64)
    reader.count_elements(count)
    if kind in _SCALARS:
        reader.skip(count * _SCALARS[kind].size)
    elif kind == _TEXT:
        for _ in range(count):
            reader.skip(reader.number(_U64))
    else:  # arrays of arrays, which llama.cpp does not read either
        raise ValueError(f"{named(key)} is an array of type {kind}")


def _tensors(reader: _Reader, count: int) -> Iterator[tuple[str, tuple[int, tuple[int, ...], int]]]:
    for _ in range(count):
        name, dims = reader.name(), reader.number(_U32)
        check_name(name)
        if not 1 <= dims <= _MOST_DIMS:
            raise ValueError(f"{named(name)} has {dims:,} dimensions, expected 1 to {_MOST_DIMS}")
        shape = tuple(reader.number(_U64) for _ in range(dims))[::-1]
        if not 0 < math.prod(shape) < 1 << 63:
            raise ValueError(f"{named(name)} has shape {list(shape)}")
        kind = reader.number(_U32)
        yield name, (kind, shape, reader.number(_U64))


def _unique(what: str, pairs: Iterator[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    seen: set[str] = set()
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"the {what} {named(name)} is there twice")
        seen.add(name)
        yield name, value

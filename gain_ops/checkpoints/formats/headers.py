"""The header of a safetensors file: where each tensor lies, without reading any.

::

    8 bytes, little-endian: n        n bytes of JSON: {"name": {"dtype", "shape", "data_offsets": [from, to]}, ...}
    then the data, which the offsets count from; "__metadata__" maps text to text

Source: https://github.com/huggingface/safetensors, "Format". The library itself gives no offsets.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from gain_ops.checkpoints.edits import CheckpointError, Region, Stored
from gain_ops.utils import strict_json
from gain_ops.utils.kinds import pickled
from gain_ops.utils.limits import check_name
from gain_ops.utils.wording import named

_LONGEST = 100 << 20  # what the library accepts, in bytes
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """A tensor as its header names it: dtype in the format's own words, ``size`` bytes from ``offset`` in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    def stored(self) -> Stored:
        """The same for a scheme.

        Raises:
            CheckpointError: a dtype that torch or this package does not have.

        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.name} has dtype {self.dtype}, which gain_ops does not know")
        rows = self.shape[0] if len(self.shape) > 1 else 1
        region = Region(self.file, self.offset, rows, self.size // rows if rows else 0)
        return Stored(self.name, _DTYPES[self.dtype], self.shape, region)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file; the data must be there to the last byte.

    The library opens the file first, and what it refuses is refused. It takes the last of two equal keys, though, and names of
    any length, so more is checked here.

    Raises:
        CheckpointError: not a safetensors file, a Git LFS pointer, a damaged header, or a truncated file.
        OSError: it cannot be read.

    """
    total = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(_LONGEST, total - 8):
            if why := pickled(file):
                raise CheckpointError(why)
            raise CheckpointError(f"{file} is not a safetensors file, or is cut in its header: fetch it again")
        text = opened.read(length)
    try:
        content = strict_json.parse(text, finite=True, naturals=True)
        metadata = content.pop("__metadata__", None) or {}
        entries = {name: _entry(name, value, file, 8 + length) for name, value in content.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error!r}): fetch it again") from error
    _check_extents(file, total, 8 + length, entries)
    try:
        # it maps the whole file, which a limit on the address space (ulimit -v) may not allow: the checks above stand then
        with contextlib.suppress(MemoryError), safetensors.safe_open(file, framework="np"):
            pass
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} is refused by the safetensors library ({error}): fetch it again") from error
    return Header(metadata, entries)


def _entry(name: str, value: Mapping[str, Any], file: Path, data: int) -> Entry:
    check_name(name)
    dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not all(type(n) is int for n in (*shape, start, end)):
        raise ValueError(f"{named(name)}: {named(str(value))}")
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != end - start:
        raise ValueError(f"{named(name)} takes {end - start} bytes, not those of {dtype} {named(str(shape))}")
    return Entry(name, dtype, tuple(shape), file, data + start, end - start)


def _check_extents(file: Path, total: int, data: int, entries: Mapping[str, Entry]) -> None:
    """Check that the tensors lie one after the other, without overlap or holes, and end where the file ends."""
    end = data
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != end:
            how = "overlaps another tensor" if entry.offset < end else "lies behind a hole"
            raise CheckpointError(f"{file} has a damaged header: {named(entry.name)} {how}: fetch it again")
        end = entry.offset + entry.size
    if total != end:
        how = f"ends {end - total} bytes early: it is cut" if total < end else f"is {total - end} bytes too long"
        raise CheckpointError(f"{file} {how}; fetch it again")

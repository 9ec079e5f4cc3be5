"""The changes of absorbing in the files of a checkpoint: rows of bytes, each rewritten in place to the same number of bytes.

Nothing here knows a format. A container (a folder of safetensors, a GGUF file) says where tensors lie. A scheme (plain
weights, GPTQ, a GGUF block type) says which tensors carry a layer's gain and what their rows become. The engine in absorb.py
copies the files and rewrites these rows, a few at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gain_ops.models.carriers import CannotFold
from gain_ops.utils.errors import GainOpsError


class CheckpointError(GainOpsError, ValueError):
    """A checkpoint that cannot be read, or that cannot take these gains; nothing was changed."""


class InexactError(CheckpointError, CannotFold):
    """A gain that no stored tensor of its layer can take exactly."""


@dataclass(frozen=True)
class Region:
    """Where a tensor lies: ``rows`` rows of ``row_bytes`` bytes from ``offset`` in ``file``, without gaps."""

    file: Path
    offset: int
    rows: int
    row_bytes: int

    def read(self) -> Tensor:
        """The full region, uint8 [rows, row_bytes], a copy."""
        found = np.fromfile(self.file, dtype=np.uint8, count=self.size, offset=self.offset)
        if found.size != self.size:
            raise CheckpointError(f"{self.file} ends {self.size - found.size} bytes early: it is cut")
        return torch.from_numpy(found).view(self.rows, self.row_bytes)

    def blocks(self, size: int) -> Iterator[tuple[int, "Region"]]:
        """The region in pieces of at most ``size`` bytes, but at least one row: (first row, piece)."""
        step = max(1, size // max(1, self.row_bytes))
        for start in range(0, self.rows, step):
            rows = min(step, self.rows - start)
            yield start, Region(self.file, self.offset + start * self.row_bytes, rows, self.row_bytes)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint; a 0-D or 1-D one is one row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    region: Region

    def read(self) -> Tensor:
        """The full tensor, a copy: for scales and other small tensors; weights go by rows."""
        return self.region.read().view(-1).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a checkpoint, and the gain to absorb: [out_features] or [in_features] by ``side``.

    The gain is float32 (float64 beside a float64 weight). ``tensors`` are those below the layer's name, by the rest of
    their names: "weight", "weight_scale", "qweight".
    """

    name: str
    side: str
    gain: Tensor
    tensors: Mapping[str, Stored]


@dataclass(frozen=True)
class Rounding:
    """The largest absolute and relative error of a rewritten value against the exact product."""

    absolute: float = 0.0
    relative: float = 0.0

    def __or__(self, other: "Rounding") -> "Rounding":
        return Rounding(max(self.absolute, other.absolute), max(self.relative, other.relative))


@dataclass(frozen=True)
class Edit:
    """A change of one tensor for one layer.

    ``rewrite(block, start)`` takes the rows from ``start`` on, uint8 [n, row_bytes], and returns the new rows, of the same
    shape, and their rounding. It raises CheckpointError for new values that are not finite. It is called with any number of
    rows at a time, in any order, and more than once. With ``into_up`` the tensor is the up projection's, and the gain is that
    of the down projection's input. ``lost`` gains are too near to 1 for the tensor's dtype. With ``whole`` the layer is a
    module that was trained whole, and has no gain.
    """

    layer: str
    tensor: str
    region: Region
    rewrite: Callable[[Tensor, int], tuple[Tensor, Rounding]]
    into_up: bool = False
    lost: int = 0
    whole: bool = False

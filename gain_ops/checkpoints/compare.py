"""How two checkpoints differ: tensor by tensor, and whether gains explain the change of a weight."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Region
from gain_ops.checkpoints.formats.gguf import read_gguf
from gain_ops.checkpoints.formats.gguf_blocks import decode
from gain_ops.checkpoints.formats.headers import read_header
from gain_ops.utils.kinds import kind_of, pickled

__all__ = ["Difference", "Listed", "compare", "list_tensors"]

_AT_ONCE = 4 << 20  # bytes of a tensor
_EXPLAINED = 0.05  # the share of the change that rounding may leave


@dataclass(frozen=True)
class Listed:
    """A tensor of a checkpoint: its stored form in words, where it lies, and rows of bytes as numbers if they are that."""

    stored: str
    region: Region
    decode: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Difference:
    """A tensor that differs.

    ::

        change = |B - A| / |A|        rest = |B - gains * A| / |B - A|        in Frobenius norms

    Attributes:
        name: the tensor.
        stored: its stored form in A and in B; empty if one of them has no such tensor.
        change: the relative change of its values, or None where they are not comparable numbers.
        side: "output" or "input" if gains on rows or columns explain the change up to rounding, otherwise None.
        gains: the smallest and the largest of these gains.
        rest: the share of the change that the gains of this side do not explain.

    """

    name: str
    stored: tuple[str, str]
    change: float | None = None
    side: str | None = None
    gains: tuple[float, float] | None = None
    rest: float | None = None


def compare(one: Path, other: Path) -> tuple[list[Difference], int]:
    """The tensors in which two checkpoints differ, and the number of those that are equal to the byte.

    Memory is bounded by a few rows of a tensor. The gain of a row (or column) is the one that fits it best,
    ``sum(a * b) / sum(a * a)``; a row is an output feature, except in GPT-2's Conv1D, which stores the transpose.

    Raises:
        CheckpointError: not a checkpoint, or damaged.
        OSError: files that cannot be read.

    """
    first, second = list_tensors(one), list_tensors(other)
    found, equal = [], 0
    for name in first.keys() | second.keys():
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            found.append(Difference(name, (a.stored if a else "", b.stored if b else "")))
        elif (difference := _differ(name, a, b)) is None:
            equal += 1
        else:
            found.append(difference)
    return sorted(found, key=lambda difference: difference.name), equal


def list_tensors(path: Path) -> dict[str, Listed]:
    """The tensors of a folder of safetensors, of a .safetensors or of a .gguf file, by name; none is read.

    Raises:
        CheckpointError: none of these, or damaged.
        OSError: it cannot be read.

    """
    if why := pickled(path):
        raise CheckpointError(why)
    if path.is_file() and kind_of(path) == "gguf":
        return _list_gguf(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if path.is_dir() and not files:
        gguf = sorted(path.glob("*.gguf"))
        if len(gguf) == 1:
            return _list_gguf(gguf[0])
        raise CheckpointError(f"{path} holds {len(gguf)} GGUF files and no safetensors: name one file")
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: give a model folder, a .safetensors or a .gguf file")
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder: give a model on this machine")
    listed: dict[str, Listed] = {}
    for file in files:
        for name, entry in read_header(file).entries.items():
            rows = entry.shape[0] if len(entry.shape) > 1 else 1
            region = Region(file, entry.offset, rows, entry.size // rows if rows else 0)
            stored = entry.stored() if len(entry.shape) == 2 and entry.dtype in ("F16", "BF16", "F32", "F64") else None
            listed[name] = Listed(str(entry), region, None if stored is None else _viewer(stored.dtype))
    return listed


def _list_gguf(path: Path) -> dict[str, Listed]:
    return {
        name: Listed(str(tensor), tensor.region, partial(decode, tensor.kind) if len(tensor.shape) == 2 else None)
        for name, tensor in read_gguf(path)[1].items()
    }


def _viewer(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda block: block.reshape(-1).view(dtype).view(block.shape[0], -1)


def _differ(name: str, a: Listed, b: Listed) -> Difference | None:
    same_form = a.stored == b.stored
    if same_form and all(torch.equal(x, y) for x, y in _blocks(a, b)):
        return None
    same_shape = a.stored.partition(" ")[2] == b.stored.partition(" ")[2]
    if a.decode is None or b.decode is None or not same_shape:
        return Difference(name, (a.stored, b.stored))
    rows, columns = _Fit(), _Fit()
    for x, y in _blocks(a, b):
        left, right = a.decode(x).double(), b.decode(y).double()
        rows.append(left, right)
        columns.add(left, right)
    change = rows.change
    fits = {"output": rows, "input": columns}
    side = min(fits, key=lambda key: fits[key].rest)
    rest = fits[side].rest
    if not rest <= _EXPLAINED * change:
        return Difference(name, (a.stored, b.stored), rows.relative)
    gains = fits[side].gains
    return Difference(
        name,
        (a.stored, b.stored),
        rows.relative,
        side,
        (gains.min().item(), gains.max().item()),
        rest / change if change else 0.0,
    )


def _blocks(a: Listed, b: Listed) -> Iterator[tuple[Tensor, Tensor]]:
    """The same few rows of both, again and again."""
    step = max(1, _AT_ONCE // max(a.region.row_bytes, b.region.row_bytes, 1))
    for start in range(0, a.region.rows, step):
        count = min(step, a.region.rows - start)
        yield _rows(a.region, start, count), _rows(b.region, start, count)


def _rows(region: Region, start: int, count: int) -> Tensor:
    return Region(region.file, region.offset + start * region.row_bytes, count, region.row_bytes).read()


class _Fit:
    """The gains that fit best, one for each row or column, by the three products that show how well they fit."""

    def __init__(self) -> None:
        self._products: list[Tensor] = []

    def append(self, left: Tensor, right: Tensor) -> None:
        """More rows."""
        self._products.append(torch.stack([(left * left).sum(1), (left * right).sum(1), (right * right).sum(1)]))

    def add(self, left: Tensor, right: Tensor) -> None:
        """More of every column."""
        here = torch.stack([(left * left).sum(0), (left * right).sum(0), (right * right).sum(0)])
        self._products = [self._products[0] + here] if self._products else [here]

    @property
    def _sums(self) -> Tensor:
        return torch.cat(self._products, 1)

    @property
    def gains(self) -> Tensor:
        """``sum(a * b) / sum(a * a)``, 1 where a is zero."""
        aa, ab, _ = self._sums
        return torch.where(aa > 0, ab / aa, 1.0)

    @property
    def change(self) -> float:
        """|B - A|."""
        aa, ab, bb = self._sums
        return float((bb - 2 * ab + aa).clamp_min(0).sum().sqrt())

    @property
    def relative(self) -> float:
        """|B - A| / |A|, or |B - A| where A is zero."""
        size = self._sums[0].sum().sqrt().item()
        return self.change / size if size else self.change

    @property
    def rest(self) -> float:
        """|B - gains * A|."""
        aa, ab, bb = self._sums
        return float((bb - torch.where(aa > 0, ab * ab / aa, 0.0)).clamp_min(0).sum().sqrt())

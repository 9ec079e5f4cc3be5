"""New codes and scales, where no scale can take the gain: decode, multiply, encode, and measure the error.

::

    W[i, j] = (code[i, j] - zero[a, b]) * scale[a, b]          a = rows[i], b = columns[j]

A scale grows by as much as its largest code, counted from the zero point, would: the largest code stays the same, and
nothing is clipped. Zero points stay. Where every gain under a scale is 1, the weights stay too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Edit, Layer, Region, Rounding, Stored
from gain_ops.checkpoints.schemes.codes import Coding
from gain_ops.checkpoints.schemes.plain import rounding
from gain_ops.checkpoints.schemes.scales import Scales

_CHUNK = 1 << 20  # codes worked on at a time: bounds the scratch memory at about 50 MB


@dataclass(frozen=True)
class Grid:
    """A quantised weight as it is stored, see this module's docstring.

    Attributes:
        codes: the tensor that holds them.
        coding: the layout of the codes in it.
        scales: [a, b].
        rows: int64, the row of ``scales`` that goes with each row of codes.
        columns: int64, the column of ``scales`` that goes with each column of codes.
        zeros: float64 [a, b], or None for zeros.
        outputs_first: whether rows are outputs and columns inputs, or the other way around.
        top: the largest code that scales are chosen for, None for the largest code used under each scale.

    """

    codes: Stored
    coding: Coding
    scales: Scales
    rows: Tensor
    columns: Tensor
    zeros: Tensor | None = None
    outputs_first: bool = True
    top: float | None = None


def blocks(features: int, groups: int, size: int | None = None) -> Tensor:
    """The group of each feature, int64 [features], in groups of ``size``, or otherwise of equal size.

    If they do not make that many groups, requantized() raises.
    """
    return torch.arange(features) // (size or max(1, features // max(1, groups)))


def requantized(layer: Layer, grid: Grid) -> list[Edit]:
    """The edits of the codes and of the scales. The codes' edit has the rounding, which is that of the weights.

    Reads the codes once, a few rows at a time.

    Raises:
        CheckpointError: scales that overflow, codes that are not finite, or gains that need other zero points.

    """
    by_row = (layer.side == "output") == grid.outputs_first
    gain = layer.gain.double()
    gains = (gain[:, None] if by_row else gain).expand(grid.rows.numel(), grid.columns.numel())
    old = grid.scales.values
    growth, bounds = _growth(layer, grid, gains)
    new, tensors = grid.scales.store(old * growth)

    def rewrite(block: Tensor, start: int) -> tuple[Tensor, Rounding]:
        values, zero, rows = _values(grid, block, start)
        exact = values * gains[rows] * old[grid.rows[rows]][:, grid.columns]
        step = new[grid.rows[rows]][:, grid.columns]
        wanted = torch.where(step == 0, 0.0, exact / step) + zero
        fresh = grid.coding.encode(wanted.clamp(*bounds))
        return fresh, rounding((grid.coding.decode(fresh) - zero) * step, exact)

    codes = Edit(layer.name, grid.codes.name, grid.codes.region, rewrite)
    return [codes, *(_replaced(layer, stored, tensor) for stored, tensor in tensors)]


def _growth(layer: Layer, grid: Grid, gains: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """By how much each scale has to grow, [a, b], and the bounds of new codes."""
    shape = grid.scales.values.shape
    used = int(grid.rows.max()) + 1, int(grid.columns.max()) + 1
    if shape != used or (grid.zeros is not None and grid.zeros.shape != shape):
        raise CheckpointError(f"{layer.name} has scales {list(shape)} where its weight needs {list(used)}")
    if not grid.scales.values.isfinite().all():
        raise CheckpointError(f"{layer.name} has scales that are not finite to begin with")
    peak, high, low = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    lowest, highest = float("inf"), float("-inf")
    for block, start in _chunks(grid):
        values, zero, rows = _values(grid, block, start)
        if not values.isfinite().all():
            raise CheckpointError(f"{grid.codes.name} is not finite to begin with")
        codes = values + zero
        lowest, highest = min(lowest, codes.min().item()), max(highest, codes.max().item())
        gained = values * gains[rows]
        index = (grid.rows[rows][:, None] * shape[1] + grid.columns).flatten()
        peak.view(-1).scatter_reduce_(0, index, values.abs().flatten(), "amax")
        high.view(-1).scatter_reduce_(0, index, gained.flatten(), "amax")
        low.view(-1).scatter_reduce_(0, index, gained.flatten(), "amin")
    bounds = grid.coding.bounds(lowest, highest)
    largest = torch.maximum(high, -low)
    if grid.top is not None:
        growth = largest / grid.top
    else:
        zeros = torch.zeros(()).double() if grid.zeros is None else grid.zeros
        room = torch.maximum(_ratio(high, bounds[1] - zeros), _ratio(low, bounds[0] - zeros))
        growth = torch.maximum(_ratio(largest, peak), room)
    if growth.isinf().any():
        raise CheckpointError(f"{layer.name} would need other zero points: a negative gain leaves the codes no room")
    return torch.where(largest == 0, 1.0, growth), bounds


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, infinite where they have different signs."""
    return torch.where(part == 0, 0.0, torch.where(part * whole > 0, part / whole, float("inf")))


def _values(grid: Grid, block: Tensor, start: int) -> tuple[Tensor, Tensor, slice]:
    """Codes with their zero points, and which rows of codes they are."""
    first = start * grid.coding.rows_per_row
    rows = slice(first, first + len(block) * grid.coding.rows_per_row)
    zero = torch.zeros(()).double() if grid.zeros is None else grid.zeros[grid.rows[rows]][:, grid.columns]
    return grid.coding.decode(block) - zero, zero, rows


def _chunks(grid: Grid) -> Iterator[tuple[Tensor, int]]:
    """The rows of the codes, a few at a time, with the index of the first."""
    region = grid.codes.region
    count = max(1, _CHUNK // max(1, grid.columns.numel() * grid.coding.rows_per_row))
    for start in range(0, region.rows, count):
        rows = min(count, region.rows - start)
        yield Region(region.file, region.offset + start * region.row_bytes, rows, region.row_bytes).read(), start


def _replaced(layer: Layer, stored: Stored, tensor: Tensor) -> Edit:
    rows = tensor.reshape(-1).view(torch.uint8).view(stored.region.rows, stored.region.row_bytes)

    def rewrite(block: Tensor, start: int) -> tuple[Tensor, Rounding]:
        return rows[start : start + len(block)].clone(), Rounding()

    return Edit(layer.name, stored.name, stored.region, rewrite)

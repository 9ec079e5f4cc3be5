"""How rows of bytes hold code values, in both directions."""

from typing import Protocol

import torch
from torch import Tensor

FP4_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Coding(Protocol):
    """The bytes of rows, uint8 [n, row_bytes], and their code values, float64 [n * rows_per_row, columns].

    Attributes:
        rows_per_row: how many rows of values one row of bytes holds.

    """

    rows_per_row: int

    def decode(self, block: Tensor) -> Tensor:
        """The values of rows of bytes."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """The bytes of the nearest codes; values must be within bounds()."""
        ...

    def bounds(self, lowest: float, highest: float) -> tuple[float, float]:
        """The smallest and the largest value that a code may have, where a tensor has these now."""
        ...


class Whole:
    """A number a code, int8 or a float8, in rows of their own."""

    rows_per_row = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def decode(self, block: Tensor) -> Tensor:
        """As in Coding."""
        return block.view(self._dtype).to(torch.float32).double()

    def encode(self, values: Tensor) -> Tensor:
        """As in Coding."""
        values = values if self._dtype.is_floating_point else values.round()
        return values.to(torch.float32).to(self._dtype).view(torch.uint8)

    def bounds(self, lowest: float, highest: float) -> tuple[float, float]:
        """As in Coding; an int8 may hold fewer bits, and stays within the bits that it uses now."""
        if self._dtype.is_floating_point:
            return torch.finfo(self._dtype).min, torch.finfo(self._dtype).max
        half = 1
        while lowest < -half or highest > half - 1:
            half *= 2
        return -half, half - 1


class Fields:
    """Fields of the same number of bits in each word, the lowest bits first, as numbers of a table.

    Args:
        table: the value of each of the 2^bits codes.
        columns: how many values a row has; the rest of its last word is zeros.
        word: torch.uint8 or torch.int32.
        downwards: the fields of a word are below each other, not beside each other.
        order: the index of the value in each field of a word, from the lowest bits; None for their own order.

    """

    def __init__(
        self,
        table: Tensor,
        columns: int,
        *,
        word: torch.dtype = torch.uint8,
        downwards: bool = False,
        order: tuple[int, ...] | None = None,
    ) -> None:
        bits = (table.numel() - 1).bit_length()
        self._table, self._columns, self._word, self._downwards = table.double(), columns, word, downwards
        self._shifts = torch.arange(0, word.itemsize * 8, bits)
        self._order = torch.arange(self._shifts.numel()) if order is None else torch.tensor(order)
        ascending, self._codes = self._table.sort(stable=True)
        self._middles = (ascending[1:] + ascending[:-1]) / 2
        self.rows_per_row = self._shifts.numel() if downwards else 1

    def decode(self, block: Tensor) -> Tensor:
        """As in Coding."""
        words = block.view(self._word).to(torch.int64)
        fields = (words.unsqueeze(-1) >> self._shifts & self._table.numel() - 1)[..., self._order.argsort()]
        if self._downwards:
            return self._table[fields.transpose(1, 2).flatten(0, 1)]
        return self._table[fields.flatten(1)[:, : self._columns]]

    def encode(self, values: Tensor) -> Tensor:
        """As in Coding."""
        fields = self._codes[torch.bucketize(values, self._middles)]
        each = self._shifts.numel()
        if self._downwards:
            fields = fields.unflatten(0, (-1, each)).transpose(1, 2)
        else:
            fields = torch.nn.functional.pad(fields, (0, -self._columns % each)).unflatten(1, (-1, each))
        words: Tensor = (fields[..., self._order] << self._shifts).sum(-1)
        return words.to(self._word).view(torch.uint8)

    def bounds(self, lowest: float, highest: float) -> tuple[float, float]:
        """As in Coding."""
        return self._table.min().item(), self._table.max().item()

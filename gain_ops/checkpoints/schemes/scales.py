"""How quantisation scales are stored, for choosing new ones: their values, and the bytes of the new scales."""

import math
from typing import Protocol

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Stored
from gain_ops.checkpoints.schemes.plain import DTYPES

_LARGEST_E4M3 = 448.0


class Scales(Protocol):
    """The scales of a weight.

    Attributes:
        values: float64 [a, b].

    """

    values: Tensor

    def store(self, wanted: Tensor) -> tuple[Tensor, list[tuple[Stored, Tensor]]]:
        """The nearest storable scales to ``wanted``, float64 [a, b]: their values, and the tensors that hold them.

        Raises:
            CheckpointError: they overflow the stored dtype.

        """
        ...


class FloatScales:
    """Floating numbers of 16 bits or more, each multiplied by ``unit``.

    Raises:
        CheckpointError: numbers of another kind.

    """

    def __init__(self, stored: Stored, *, unit: float = 1.0) -> None:
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{stored.name} is {stored.dtype}, which is no known kind of scale".replace("torch.", "")
            )
        self._stored, self._unit = stored, unit
        self.values = matrix(stored.read()).double() * unit

    def store(self, wanted: Tensor) -> tuple[Tensor, list[tuple[Stored, Tensor]]]:
        """As in Scales."""
        rounded = (wanted / self._unit).to(self._stored.dtype)
        if not rounded.isfinite().all():
            raise CheckpointError(
                f"{self._stored.name} overflows with its gain in {self._stored.dtype}".replace("torch.", "")
            )
        return rounded.double() * self._unit, [(self._stored, rounded)]


class PowerScales:
    """Powers of two, 2^(byte - 127): E8M0. New ones are rounded up."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        exponents = matrix(stored.read()).view(torch.uint8)
        self.values = torch.where(exponents == 255, math.nan, torch.ldexp(torch.ones(()).double(), exponents - 127.0))

    def store(self, wanted: Tensor) -> tuple[Tensor, list[tuple[Stored, Tensor]]]:
        """As in Scales."""
        mantissa, exponent = torch.frexp(wanted)
        exponent = exponent - (mantissa == 0.5).int()
        if (exponent > 127).any():
            raise CheckpointError(f"{self._stored.name} overflows with its gain in E8M0")
        exponent = exponent.clamp_min(-127)
        return torch.ldexp(torch.ones_like(wanted), exponent), [(self._stored, (exponent + 127).to(torch.uint8))]


class TwoLevelScales:
    """float8_e4m3fn over one float32 for the full weight: ``scale / overall``.

    The overall scale is divided by a power of two where the largest scale would overflow. No scale is ever negative, since
    kernels read them as unsigned.
    """

    def __init__(self, stored: Stored, overall: Stored) -> None:
        self._stored, self._overall = stored, overall
        self._divisor = overall.read().double()
        self.values = stored.read().float().double() / self._divisor

    def store(self, wanted: Tensor) -> tuple[Tensor, list[tuple[Stored, Tensor]]]:
        """As in Scales."""
        excess = (wanted * self._divisor).abs().max().item() / _LARGEST_E4M3
        divisor = self._divisor / 2.0 ** max(0, math.ceil(math.log2(excess))) if excess else self._divisor
        rounded = (wanted * divisor).float().to(self._stored.dtype)
        tensors = [(self._stored, rounded)]
        if not torch.equal(divisor, self._divisor):
            tensors.append((self._overall, divisor.to(self._overall.dtype)))
        return rounded.float().double() / divisor, tensors


def matrix(scale: Tensor) -> Tensor:
    """Scales as [a, b]: of one number, or of one for each row, it makes a column."""
    return scale.reshape(-1, 1) if scale.ndim < 2 else scale

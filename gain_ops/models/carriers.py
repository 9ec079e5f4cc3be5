"""The tensors of a layer that take its gain when it is absorbed."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gain_ops.utils.errors import GainOpsError


@dataclass(frozen=True)
class Carrier:
    """A tensor of a layer that takes its gain: dimension ``dim`` runs over the gain's features."""

    tensor: Tensor
    dim: int


@dataclass(frozen=True)
class Foldable:
    """The tensors of a layer to be multiplied by its gain.

    ``prepare`` puts the layer into the state in which it computes from these tensors, and does not change its results.
    """

    carriers: tuple[Carrier, ...]
    prepare: Callable[[], None] | None = None


class CannotFold(GainOpsError, ValueError):
    """Why a gain cannot be folded into the scales of a layer exactly, and what to do about it."""

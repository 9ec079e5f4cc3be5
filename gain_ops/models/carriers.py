"""The tensors that take a layer's gain when it is absorbed, and the rule of which they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from gain_ops.utils.errors import GainOpsError

T = TypeVar("T")


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


def fold_gain(
    side: str,
    own: Callable[[], T],
    up: Callable[[], T],
    requantized: Callable[[], T] | None = None,
    *,
    refusals: tuple[type[GainOpsError], ...] = (CannotFold,),
) -> T:
    """Fold a gain into its layer's own weight exactly, or into the rows of an up projection, or as the third is asked.

    Args:
        side: the gain's. An up projection is tried on the input side alone.
        own: folds it into the layer's own weight, and raises CannotFold where that is not exact.
        up: folds it into the rows of the up projection before the layer (up_rows.py).
        requantized: folds it into the layer's own weight and quantises it again; None where nobody asked for it.
        refusals: what ``up`` raises where it cannot.

    Returns:
        What the one that can returns.

    Raises:
        CannotFold: none can; of the kind that ``own`` raised.

    """
    try:
        return own()
    except CannotFold as error:
        reason = error
    if side == "input":
        try:
            return up()
        except refusals as no_up:
            own_reason = str(reason).removesuffix(".")
            reason = type(reason)(f"{own_reason}. Nor can the rows of an up projection take it: {no_up}")
    if requantized is not None:
        return requantized()
    raise reason


def has_own_gain(up: str) -> CannotFold:
    """The error for an up projection that cannot take the gain of another layer."""
    return CannotFold(f"{up} has a gain of its own, which does the same: leave one of the two without")

"""Which gains a dtype cannot hold."""

from collections.abc import Iterable

import torch
from torch import Tensor


def lost_gains(delta: Tensor, dtype: torch.dtype) -> int:
    """How many gains change no normal number of a dtype: ``delta != 0`` and ``|delta| < eps / 4``.

    The product with such a gain rounds to the original number. The limit is ``2^-9`` for bfloat16 and ``2^-12`` for float16.
    Up to twice the limit it depends on the number.
    """
    return int(((delta != 0) & (delta.abs() < torch.finfo(dtype).eps / 4)).sum())


def moved_gains(deltas: Iterable[Tensor]) -> int:
    """How many gains of these differ from 1."""
    return sum(int(delta.count_nonzero()) for delta in deltas)


def said_of_lost(lost: int, moved: int) -> str:
    """How many gains were lost, of those that differ from 1; with what to do where these are most."""
    said = f"{lost:,} of {moved:,} gains are nearer to 1 than the weights' dtype resolves, and changed nothing"
    advice = "keep the gain file and load it with gain_ops.load_gains(), or absorb into a float32 copy of the weights"
    return f"{said}: {advice}" if 2 * lost > moved else said

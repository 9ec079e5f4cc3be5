"""Marks of the tokens that are read and not predicted, such as a prompt's: ``~id``, below zero, stands for ``id``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["predicted", "unmarked"]


def predicted(windows: Tensor) -> Tensor:
    """Which tokens the loss is on.

    Args:
        windows: int64 [..., tokens], the tokens that are only read marked.

    Returns:
        bool [..., tokens]. The first of a window is never predicted.
    """
    found = windows >= 0
    found[..., :1] = False
    return found


def unmarked(windows: Tensor) -> Tensor:
    """The token ids themselves: ``id`` for ``id`` and for ``~id``.

    Args:
        windows: int64, any shape.
    """
    return torch.where(windows < 0, ~windows, windows)

"""What a layer has of a model's mixed gain sets: a row of delta a set, and the set of each sequence while use_sets() runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gain_ops.utils.errors import UsageError


@dataclass
class Mixed:
    """The gains of several sets on one layer.

    Attributes:
        delta: [N, features], a row a set.
        ids: [B] in int32, the set of each sequence, -1 for the base; None outside use_sets().

    """

    delta: Tensor
    ids: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """The set of each row of x [B, ..., features], of which every sequence has as many: -> [T] in int32.

        Raises:
            ValueError: x does not have a first size of B.

        """
        if self.ids is None:
            raise UsageError("no sets are in use: gain_ops.use_sets() gives each sequence one")
        sequences = self.ids.shape[0]
        if x.dim() < 2 or x.shape[0] != sequences:
            raise UsageError(
                f"use_sets() names the sets of {sequences} sequences, and a layer got x {tuple(x.shape)}: give a name for each "
                "sequence of the batch, and beams= of generate() to use_sets() too"
            )
        each = 1
        for size in x.shape[1:-1]:
            each *= size
        return self.ids[:, None].expand(sequences, each).reshape(-1)


def put(mixed: Mixed, ids: list[int] | None, device: torch.device) -> None:
    """Set the sequences' sets, on the layer's present device; or None: the layer computes with its own delta again."""
    mixed.delta = mixed.delta.to(device)
    mixed.ids = None if ids is None else torch.tensor(ids, dtype=torch.int32, device=device)

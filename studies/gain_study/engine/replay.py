"""Replay: some windows of each batch come from the domains learned before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mix_in"]


def mix_in(batches: Sequence[Tensor], earlier: Sequence[Tensor], *, count: int, seed: int) -> list[Tensor]:
    """Batches with ``count`` windows of earlier domains after their own.

    Domains take turns in a random order. A domain's windows are drawn without replacement until all were used.

    Args:
        batches: int64 [windows, tokens] each.
        earlier: the training windows of each earlier domain, int64 [windows, tokens].
        count: windows added to each batch.
        seed: of the draws.

    Returns:
        Tensors int64 [windows + count, tokens].
    """
    generator = torch.Generator().manual_seed(seed)
    domains = torch.randperm(len(earlier), generator=generator).tolist()
    waiting: list[list[int]] = [[] for _ in earlier]
    mixed = []
    for number, batch in enumerate(batches):
        windows = [batch]
        for turn in range(number * count, (number + 1) * count):
            domain = domains[turn % len(domains)]
            if not waiting[domain]:
                waiting[domain] = torch.randperm(len(earlier[domain]), generator=generator).tolist()
            windows.append(earlier[domain][waiting[domain].pop()][None])
        mixed.append(torch.cat(windows))
    return mixed

"""What a study trains and measures on: the domains' windows, and the orders in which they are learned."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gain_ops.training import domains
from gain_ops.training.documents import Tokenizer
from gain_ops.training.domains import Domain
from gain_ops.training.loop import draw_batches
from gain_ops.utils.errors import UsageError, file_errors
from gain_study.engine.settings import Settings

__all__ = ["Text", "draw_orders", "find_domains", "seed_of", "tokenise"]

_POOL = 16  # windows tokenised for each window that a stage trains on
_VALIDATION_SEED = 0  # not the user's: every seed is measured on the same windows


@dataclass(frozen=True)
class Text:
    """A domain in tokens, int64 [windows, length] each.

    A seed draws its training windows from ``pool``. ``validation`` and ``selection`` are different windows of the domain's
    validation documents. Only the first domain has selection windows.
    """

    domain: Domain
    pool: Tensor
    selection: Tensor
    validation: Tensor

    def windows(self, settings: Settings, seed: int) -> Tensor:
        """The windows that a seed trains on, the same for every method and order."""
        wanted = settings.steps * settings.batch_size
        return domains.cut_windows(
            self.pool.flatten(),
            length=self.pool.shape[1],
            count=wanted,
            seed=seed_of("windows", seed, self.domain.name),
        )

    def batches(self, settings: Settings, seed: int, *, batch_size: int) -> list[Tensor]:
        """The batches of one stage, in a seed's order."""
        shuffle = seed_of("batches", seed, self.domain.name)
        return draw_batches(self.windows(settings, seed), batch_size=batch_size, steps=settings.steps, seed=shuffle)

    def described(self, settings: Settings) -> dict[str, Any]:
        """What a study's header says of it."""
        digest = hashlib.sha256()
        for part in (self.pool, self.selection, self.validation):
            digest.update(part.numpy().tobytes())
        return {
            "source": self.domain.source,
            "sha256": digest.hexdigest(),
            "train_windows": min(len(self.pool), settings.steps * settings.batch_size),
            "selection_windows": len(self.selection),
            "validation_windows": len(self.validation),
            "window_tokens": self.pool.shape[1],
        }


def seed_of(*parts: str | int) -> int:
    """A seed for one purpose, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@file_errors()
def find_domains(names: Sequence[str]) -> list[Domain]:
    """The domains by name or path, see :data:`gain_study.engine.settings.BUILT_IN`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path has no text, or two domains have one name.
    """
    built_in = {
        "python": domains.python_source,
        "licences": domains.licence_texts,
        "readmes": domains.readme_bodies,
    }
    loaded = [built_in[name]() if name in built_in else domains.from_path(Path(name)) for name in names]
    domain_names = [domain.name for domain in loaded]
    for domain in loaded:
        if domain_names.count(domain.name) > 1:
            same = ", ".join(name for name, other in zip(names, loaded, strict=True) if other.name == domain.name)
            raise UsageError(
                f"several domains are called {domain.name!r}: {same}; a domain has the name of its file or folder"
            )
    return loaded


def draw_orders(names: Sequence[str], count: int) -> list[list[str]]:
    """As given, reversed, then other permutations, the same in every study.

    Raises:
        ValueError: there are fewer orders.
    """
    orders = [list(names)]
    shuffler = random.Random(seed_of("orders"))
    order = list(reversed(names))
    while len(orders) < count:
        if order not in orders:
            orders.append(order)
        elif len(names) < 2:
            raise ValueError(f"got {count} orders of {len(names)} domain")
        order = shuffler.sample(list(names), len(names))
    return orders


def tokenise(
    learned: Sequence[Domain], held_out: Sequence[Domain], tokenizer: Tokenizer, settings: Settings
) -> dict[str, Text]:
    """The domains' windows by name. The first also has selection windows, and held-out ones have no training windows.

    Raises:
        ValueError: too little text for a batch, or for a window to measure on.
    """
    texts = {domain.name: _text(domain, tokenizer, settings, first=domain is learned[0]) for domain in learned}
    return texts | {domain.name: _text(domain, tokenizer, settings, trained=False) for domain in held_out}


def _text(
    domain: Domain, tokenizer: Tokenizer, settings: Settings, *, first: bool = False, trained: bool = True
) -> Text:
    length = settings.sequence_length
    batch_size = settings.batch_size if trained else 0
    wanted = _POOL * settings.steps * batch_size
    train = domains.token_stream(domain.train, tokenizer, limit=wanted * length)
    pool = train[: train.numel() // length * length].view(-1, length)
    for_selection = settings.selection_windows if first else 0
    measured = settings.validation_windows + settings.selection_windows
    stream = domains.token_stream(domain.validation, tokenizer, limit=_POOL * measured * length)
    count = settings.validation_windows + for_selection
    windows = domains.cut_windows(stream, length=length, count=count, seed=_VALIDATION_SEED)
    needed = 2 if first else 1
    if len(pool) < batch_size or len(windows) < needed:
        raise UsageError(
            f"too little text in {domain.source}: got {train.numel()} tokens to train on and {stream.numel()} to measure on, "
            f"at least {batch_size * length} and {needed * length} are needed: give more text, or lower --batch-tokens and "
            "--sequence-length"
        )
    # Validation takes the first windows, so that they are the same wherever the domain is in the list.
    validation = windows[: min(settings.validation_windows, len(windows) - min(for_selection, len(windows) // 2))]
    return Text(domain, pool, windows[len(validation) :], validation)

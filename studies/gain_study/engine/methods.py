"""The methods that are compared: how each is put on a model and absorbed, and the learning rates it is tried at."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import gain_ops
from gain_ops.planning import methods
from gain_ops.utils.errors import MissingPackageError

if TYPE_CHECKING:
    from torch import nn


__all__ = ["METHODS", "Adapter", "Method", "check_packages"]

_GAIN_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
"""Of everything that multiplies: some ten times an additive adapter's, as a factor starts at 1 and moves by percents."""

_LORA_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 3e-2)
"""Above the 1e-4 to 5e-4 that LoRA is mostly trained at: a stage is short, and PEFT's alpha of 8 halves it at rank 16."""

_FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4)
"""The usual rates of full fine-tuning: every weight moves, so each by little."""


class Adapter:
    """What was put on a model, until it is absorbed or removed: then the model is plain and frozen."""

    def __init__(self, absorb: Callable[[], object], remove: Callable[[], object]) -> None:
        self._absorb = absorb
        self._remove = remove
        self._there = True

    def absorb(self) -> None:
        """Fold what was learned into the weights."""
        self._absorb()
        self._there = False

    def remove(self) -> None:
        """Drop what was learned, but for what is in the weights themselves; nothing where it is absorbed already."""
        if self._there:
            self._remove()
            self._there = False


@dataclass(frozen=True)
class Method:
    """One way to adapt a model to one domain after another.

    ``way`` adapts a model once. ``rates`` is the grid of learning rates; a method without one takes what was found for the
    method ``rates_of``, from which it does not differ on the first domain. ``replays``: a share of each batch is windows of
    earlier domains. ``anchored``: weights that earlier domains depend on are held by EWC.
    """

    way: methods.Method
    rates: tuple[float, ...] = ()
    rates_of: str | None = None
    replays: bool = False
    anchored: bool = False

    @property
    def weights(self) -> bool:
        """Whether it trains the weights themselves."""
        return self.way.name == methods.FULL

    def put_on(self, model: nn.Module) -> Adapter:
        """Adapt a frozen causal language model: what it trains has a gradient then, and nothing else."""
        adapted = self.way.put(model)
        if self.way.package == "peft":
            return Adapter(adapted.merge_and_unload, adapted.unload)
        if self.weights:
            freeze = partial(model.requires_grad_, False)
            return Adapter(freeze, freeze)
        return Adapter(partial(gain_ops.absorb, model), partial(gain_ops.remove, model))


def check_packages(names: tuple[str, ...]) -> None:
    """Raise ImportError where one of the methods needs PEFT and it is not installed."""
    needing = [name for name in names if METHODS[name].way.package == "peft"]
    if needing and importlib.util.find_spec("peft") is None:
        raise MissingPackageError(
            f'{", ".join(needing)}: PEFT is needed: pip install "gain-ops[peft]", or leave them out (--methods)'
        )


_WAYS = methods.METHODS
_LORA = _WAYS[methods.LORA + methods.ON_PEFTS_LAYERS]

METHODS = {
    "gain": Method(_WAYS["gain"], _GAIN_RATES),
    "gain-ffn": Method(_WAYS["gain-ffn"], _GAIN_RATES),
    "gain-ffn-input": Method(_WAYS["gain-ffn, input side"], _GAIN_RATES),
    "ia3": Method(_WAYS[methods.IA3 + methods.ON_PEFTS_LAYERS], _GAIN_RATES),
    "lora": Method(_LORA, _LORA_RATES),
    "lora-same": Method(_WAYS[methods.LORA], _LORA_RATES),
    "dora": Method(_WAYS[methods.DORA + methods.ON_PEFTS_LAYERS], _LORA_RATES),
    "lora-replay": Method(_LORA, rates_of="lora", replays=True),
    "ewc": Method(_WAYS[methods.FULL], rates_of="full", anchored=True),
    "full": Method(_WAYS[methods.FULL], _FULL_RATES),
}
"""By the name that options have for them, and records: published ones too."""

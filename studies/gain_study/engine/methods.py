"""The methods that are compared: how each is put on a model and absorbed, and the learning rates it is tried at."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gain_ops
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

    ``put_on`` takes a frozen causal language model, and leaves only what it trains with a gradient. ``rates`` is the grid of
    learning rates; a method without one takes what was found for the method ``rates_of``, from which it does not differ on
    the first domain. ``replays``: a share of each batch is windows of earlier domains. ``anchored``: weights that earlier
    domains depend on are held by EWC.
    """

    put_on: Callable[[nn.Module], Adapter]
    rates: tuple[float, ...] = ()
    rates_of: str | None = None
    replays: bool = False
    anchored: bool = False
    weights: bool = False
    """Whether it trains the weights themselves."""


def check_packages(names: tuple[str, ...]) -> None:
    """Raise ImportError where one of the methods needs PEFT and it is not installed."""
    needing = [name for name in names if METHODS[name].put_on in _BY_PEFT]
    if needing and importlib.util.find_spec("peft") is None:
        raise MissingPackageError(
            f'{", ".join(needing)}: PEFT is needed: pip install "gain-ops[peft]", or leave them out (--methods)'
        )


def _gain(targets: str, side: str) -> Callable[[nn.Module], Adapter]:
    def put_on(model: nn.Module) -> Adapter:
        gain_ops.apply(model, targets, side=side)
        return Adapter(lambda: gain_ops.absorb(model), lambda: gain_ops.remove(model))

    return put_on


def _ia3(model: nn.Module) -> Adapter:
    """On PEFT's choice of layers: keys, values and the FFN's down projection."""
    import peft

    return _by_peft(model, peft.IA3Config())


def _lora(model: nn.Module) -> Adapter:
    """On PEFT's choice of layers: queries and values."""
    import peft

    from gain_ops.measure.step_bytes import LORA_RANK

    return _by_peft(model, peft.LoraConfig(r=LORA_RANK))


def _lora_same(model: nn.Module) -> Adapter:
    """On the layers of gain-ffn."""
    import peft

    from gain_ops.measure.step_bytes import LORA_RANK
    from gain_ops.models.sites import preset_sites

    names = [site.name for site in preset_sites(model, ffn=True)]
    return _by_peft(model, peft.LoraConfig(r=LORA_RANK, target_modules=names))


def _dora(model: nn.Module) -> Adapter:
    import peft

    from gain_ops.measure.step_bytes import LORA_RANK

    return _by_peft(model, peft.LoraConfig(r=LORA_RANK, use_dora=True))


def _by_peft(model: nn.Module, config: Any) -> Adapter:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT sets it itself for Conv1D, and says so
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted = peft.get_peft_model(model, config)
    return Adapter(adapted.merge_and_unload, adapted.unload)


def _full(model: nn.Module) -> Adapter:
    def freeze() -> None:
        model.requires_grad_(False)

    model.requires_grad_(True)
    return Adapter(freeze, freeze)


_BY_PEFT = (_ia3, _lora, _lora_same, _dora)

METHODS = {
    "gain": Method(_gain("gain", "output"), _GAIN_RATES),
    "gain-ffn": Method(_gain("gain-ffn", "output"), _GAIN_RATES),
    "gain-ffn-input": Method(_gain("gain-ffn", "input"), _GAIN_RATES),
    "ia3": Method(_ia3, _GAIN_RATES),
    "lora": Method(_lora, _LORA_RATES),
    "lora-same": Method(_lora_same, _LORA_RATES),
    "dora": Method(_dora, _LORA_RATES),
    "lora-replay": Method(_lora, rates_of="lora", replays=True),
    "ewc": Method(_full, rates_of="full", anchored=True, weights=True),
    "full": Method(_full, _FULL_RATES, weights=True),
}
"""By the name that records and options have for them."""

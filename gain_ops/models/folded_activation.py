"""A gain on a down projection's input side, folded into the activation before it: for FFNs that do more than gain_mlp.

The gained FFN ``down(act(gate(x)) * gain)`` of Bloom or BERT has a residual add, a dropout or a norm in the same forward, or
lies in two modules. So that forward stays, and two of its parts change their class: the activation returns the hidden
activation with the gain in it (gain_ops.gain_activation, which saves the gate's output alone), and the projection leaves the
gain out. Names, parameters, state dict and hooks stay. unfold_activations() restores the classes.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from gain_ops.layers.gained import Gained, frozen_bias, frozen_weight
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.ffn_layout import Chain
from gain_ops.models.mixins import Mixin, mixed, unmix
from gain_ops.ops.glu import gain_activation
from gain_ops.utils.errors import UsageError


class FoldedActivation(Mixin):
    """A mixin before the class of an activation: act(x) * gain, with the gain of the projection that reads it."""

    _gain_name: str
    _gain_of: tuple[Gained]  # in a tuple, or nn.Module would register it as a child

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> act(x) * gain [..., n]."""
        (down,) = self._gain_of
        return gain_activation(x, down.delta, activation=self._gain_name, backend=down.backend)


class FoldedDown(Mixin, Gained):
    """A mixin before the class of a gained projection: h, which has the gain in it, through the plain linear map."""

    def forward(self, h: Tensor) -> Tensor:
        """h [..., in_features] -> y [..., out_features]."""
        if self._hooked:
            self.refuse_offloaded()
        if isinstance(self, GainWrapper):
            return self.through_base(h)
        return F.linear(h, frozen_weight(self), frozen_bias(self))


def fold(holder: nn.Module, chain: Chain, name_of: Callable[[nn.Module], str]) -> None:
    """Give the activation and the gained projection of a chain the classes that fold the gain.

    name_of: the name that gain_activation has for an activation module; it raises ValueError for one that it does not know.

    Raises:
        ValueError: another FFN calls the activation too, and would get this gain.

    """
    module, down = holder.get_submodule(chain.activation), cast(Gained, holder.get_submodule(chain.down))
    if isinstance(module, FoldedActivation):
        raise UsageError(
            f"fuse_mlp cannot serve {type(holder).__name__}: several FFNs share one {chain.activation}, and each has a gain "
            "of its own. Leave fuse_mlp off."
        )
    module._gain_name, module._gain_of = name_of(module), (down,)  # type: ignore[assignment]
    module.__class__ = mixed(FoldedActivation, type(module))
    down.__class__ = mixed(FoldedDown, type(down))


def unfold_activations(model: nn.Module) -> None:
    """Give every activation and projection that fold() changed its own class again."""
    for module in model.modules():
        if isinstance(module, FoldedActivation | FoldedDown):
            unmix(module)
            for name in ("_gain_name", "_gain_of"):
                vars(module).pop(name, None)


def folded_activations(model: nn.Module) -> Iterator[FoldedActivation]:
    """The activations of a model that have a gain in them."""
    return (module for module in model.modules() if isinstance(module, FoldedActivation))


def refuse_folded_activations(model: nn.Module, what: str) -> None:
    """Raise ValueError for an activation that reads the delta of a projection elsewhere: a sharded one is not there for it."""
    folded = next(folded_activations(model), None)
    if folded is not None:
        raise UsageError(
            f"{what} cannot serve gains that fuse_mlp folded into an activation of another module ({type(folded).__name__}): "
            "apply() without fuse_mlp"
        )

"""The layer with a gain for any linear map: which class replaces which."""

from typing import cast

from torch import nn

from gain_ops.layers.gained import Gained
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.linears import describe, is_plain_conv1d, is_plain_linear, sizes
from gain_ops.layers.wrapper import GainWrapper


def gain_layer(module: nn.Module, *, side: str = "output", save: str = "auto", backend: str = "auto") -> Gained:
    """The layer with a gain for any linear map: GainLinear, GainConv1D or, for everything else, GainWrapper.

    Raises:
        TypeError: a module without in_features and out_features.
        ValueError: a module already sharded, or options that do not exist.

    """
    if is_plain_linear(module):
        return GainLinear.from_linear(cast(nn.Linear, module), side=side, save=save, backend=backend)
    if is_plain_conv1d(module):
        from gain_ops.layers.conv1d import GainConv1D  # transformers is installed, since the module is its Conv1D

        return GainConv1D.from_conv1d(module, side=side, save=save, backend=backend)
    features = sizes(module)
    if features is None:
        raise TypeError(f"{describe(module)} has no in_features and out_features: wrap it by hand in GainWrapper")
    return GainWrapper(module, *features, side=side, backend=backend)

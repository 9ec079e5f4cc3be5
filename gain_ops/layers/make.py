"""The layer with a gain for any linear map: which class replaces which, and the shape of its gains."""

from typing import cast

from torch import nn

from gain_ops.layers.experts import ExpertsGain, ExpertsLinear, ExpertsSum, ExpertsSumGain
from gain_ops.layers.gained import Gained
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.linears import describe, is_plain_conv1d, is_plain_linear, sizes
from gain_ops.layers.wrapper import GainWrapper


def gain_layer(module: nn.Module, *, side: str = "output", save: str = "auto", backend: str = "auto") -> Gained:
    """The layer with a gain for any linear map: GainLinear, GainConv1D, ExpertsGain or, for everything else, GainWrapper.

    Raises:
        TypeError: a module without in_features and out_features.
        ValueError: a module already sharded, or options that do not exist.

    """
    if isinstance(module, ExpertsLinear):
        kind = ExpertsSumGain if isinstance(module, ExpertsSum) else ExpertsGain
        return kind(module, side=side, backend=backend)
    if is_plain_linear(module):
        return GainLinear.from_linear(cast(nn.Linear, module), side=side, save=save, backend=backend)
    if is_plain_conv1d(module):
        from gain_ops.layers.conv1d import GainConv1D  # transformers is installed, since the module is its Conv1D

        return GainConv1D.from_conv1d(module, side=side, save=save, backend=backend)
    features = sizes(module)
    if features is None:
        raise TypeError(f"{describe(module)} has no in_features and out_features: wrap it by hand in GainWrapper")
    return GainWrapper(module, *features, side=side, backend=backend)


def gain_shape(module: nn.Module, side: str) -> tuple[int, ...]:
    """The shape of the gains of a linear map on one of its sides, or of a layer with gains."""
    if isinstance(module, Gained):
        return module.gain_shape
    if isinstance(module, ExpertsLinear):
        return module.gain_shape(side)
    n_in, n_out = cast(tuple[int, int], sizes(module))
    return (n_out if side == "output" else n_in,)

"""The distribution of the gains of a model or of a gain file, layer by layer and overall, without changing anything.

::

    gain = 1 + delta        rms_from_one = sqrt(mean(delta^2))        largest_from_one = max |delta|
    dead = #(|gain| < dead_below)                                     negative = #(gain < 0)

A dead gain silences its feature, and a negative gain flips it; look at both before the gains are absorbed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gain_ops.gainfiles.file import GainFile
from gain_ops.layers.gained import Gained
from gain_ops.models.record import gained_modules
from gain_ops.utils.dtensors import whole
from gain_ops.utils.errors import UsageError

__all__ = ["DEAD_BELOW", "QUANTILES", "Distribution", "GainStatistics", "LayerGains", "gain_statistics"]

DEAD_BELOW = 1e-3
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Distribution:
    """How some gains are distributed.

    Attributes:
        count: the number of gains.
        minimum: the lowest gain.
        mean: their mean.
        maximum: the highest gain.
        rms_from_one: the root mean square of delta.
        largest_from_one: the largest ``|delta|``.
        dead: how many are closer to 0 than ``dead_below``.
        negative: how many are below 0.
        quantiles: the gains at QUANTILES, linear between two of them.

    """

    count: int
    minimum: float
    mean: float
    maximum: float
    rms_from_one: float
    largest_from_one: float
    dead: int
    negative: int
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class LayerGains:
    """The gains of one layer: its name in the model, the side that they scale, and their distribution.

    ``experts`` has the root mean square of delta of each expert of a mixture, and is empty for another layer.
    """

    name: str
    side: str
    gains: Distribution
    experts: tuple[float, ...] = ()


@dataclass(frozen=True)
class GainStatistics:
    """The gains of a model: of each layer, in the model's order, and of all layers as one."""

    layers: tuple[LayerGains, ...]
    overall: Distribution
    dead_below: float


def gain_statistics(source: nn.Module | GainFile, *, dead_below: float = DEAD_BELOW) -> GainStatistics:
    """The distribution of the gains of each layer, and of all together.

    Under FSDP2 or tensor parallelism every rank must call it, as the deltas are gathered.

    Args:
        source: a model with gains, or a gain file as gain_ops.gainfiles.file.read_gains() returns it.
        dead_below: a gain counts as dead where its absolute value is below this.

    Returns:
        Figures in float64. If a delta is not finite, after training that has diverged, its figures are not finite either.

    Raises:
        ValueError: no gains; a delta on the meta device or partitioned by ZeRO-3; or a dead_below that is not positive.

    """
    if not dead_below > 0:
        raise UsageError(f"dead_below is {dead_below}: give a number above 0, such as {DEAD_BELOW:g}")
    if isinstance(source, GainFile):
        deltas, sides = dict(source.deltas), source.sides
    else:
        layers = gained_modules(source)
        deltas = {name: _delta(name, layer) for name, layer in layers.items()}
        sides = {name: layer.side for name, layer in layers.items()}
    if not deltas:
        raise UsageError(f"{type(source).__name__} has no gains: put them on with gain_ops.apply()")
    return _statistics({name: delta.to("cpu", torch.float64) for name, delta in deltas.items()}, sides, dead_below)


def _statistics(deltas: Mapping[str, Tensor], sides: Mapping[str, str], dead_below: float) -> GainStatistics:
    return GainStatistics(
        layers=tuple(
            LayerGains(name, sides[name], _distribution(delta, dead_below), _by_expert(delta))
            for name, delta in deltas.items()
        ),
        overall=_distribution(torch.cat([delta.flatten() for delta in deltas.values()]), dead_below),
        dead_below=dead_below,
    )


def _distribution(delta: Tensor, dead_below: float) -> Distribution:
    gain = 1 + delta
    with np.errstate(invalid="ignore"):  # between two infinities
        quantiles = np.quantile(gain.numpy(), QUANTILES)  # torch.quantile takes 2^24 values at most
    return Distribution(
        count=gain.numel(),
        minimum=gain.min().item(),
        mean=gain.mean().item(),
        maximum=gain.max().item(),
        rms_from_one=delta.square().mean().sqrt().item(),
        largest_from_one=delta.abs().max().item(),
        dead=int((gain.abs() < dead_below).sum()),
        negative=int((gain < 0).sum()),
        quantiles=tuple(quantiles.tolist()),
    )


def _by_expert(delta: Tensor) -> tuple[float, ...]:
    return tuple(delta.square().mean(1).sqrt().tolist()) if delta.dim() == 2 else ()


def _delta(name: str, layer: Gained) -> Tensor:
    delta = whole(layer.delta.detach())
    if delta.is_meta or delta.numel() != layer.features:
        where = "on the meta device" if delta.is_meta else "partitioned: ask inside deepspeed.zero.GatheredParameters"
        raise UsageError(f"cannot read the gains of {name}: its delta is {where}")
    return delta

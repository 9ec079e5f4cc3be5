"""Fold the gains of a model into its weights: the model is then plain again and computes the same."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gain_ops.gainfiles.rounding import lost_gains, moved_gains, said_of_lost
from gain_ops.layers.experts import ExpertsGain
from gain_ops.layers.gained import Gained
from gain_ops.layers.linears import computes_from_weight, own_tensors, refuse_fsdp, sizes, weight_dim
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.apply import remove
from gain_ops.models.carriers import CannotFold, Carrier, Foldable, fold_gain, has_own_gain
from gain_ops.models.record import gained_modules, refuse_base_active, refuse_lost, refuse_outside, refuse_part
from gain_ops.models.up_rows import up_rows
from gain_ops.utils.dtensors import is_sharded
from gain_ops.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CHUNK = 1 << 22  # weights worked on at a time: bounds the fp64 scratch at 100 MB


@dataclass(frozen=True)
class Absorbed:
    """What absorb() did.

    Attributes:
        layers: the layers whose weights changed, by name: those with a gain, or the up projection for a down projection
            that could not take it.
        max_abs_error: the largest ``|stored - exact|`` over all weights, or scales of quantised weights: the error of the
            one rounding to their dtype.
        max_rel_error: the largest ``|stored - exact| / |exact|``, where exact is not zero.
        where: the layer with the largest relative error.
        lost: how many gains changed nothing, as they are nearer to 1 than a weight's dtype resolves: lost_gains().
        moved: how many gains differ from 1.

    """

    layers: tuple[str, ...]
    max_abs_error: float
    max_rel_error: float
    where: str
    lost: int
    moved: int

    def __repr__(self) -> str:
        lost = f"; {self.lost:,} of {self.moved:,} gains too near to 1 for the dtype were lost" if self.lost else ""
        return (
            f"Absorbed({len(self.layers)} layers; rounding at most {self.max_abs_error:.3g} absolute, "
            f"{self.max_rel_error:.3g} relative, in {self.where}{lost})"
        )


def absorb(model: nn.Module) -> Absorbed:
    """Fold every gain of a model into its weight, in place, and put the plain layers back as remove() does.

    ::

        side="output":  W <- diag(gain) @ W            side="input":  W <- W @ diag(gain)            b unchanged

    The product runs in float32 (float64 for float64) and is rounded once to W's dtype. Every tensor is checked before
    one is written: a refusal changes nothing. A gain of zero is fine. Absorbing cannot be undone: store the base.

    Of a quantised weight the scales are multiplied and the codes stay: exact up to the scales' own rounding. That works on
    the output side where a scale covers weights of one row only; gain_ops.models.quantized lists the layers. A gain
    on the input side of a quantised down projection goes into the up projection, where the FFN is a gated one that is known
    by its forward (gain_ops.models.up_rows)::

        W_up <- diag(gain) @ W_up        b_up <- gain * b_up

    Of a model with named gain sets the active one is folded in and the others are dropped: they belong to the weights
    as they were.

    A transformers model that was unpacked from a GGUF can be saved with save_pretrained() afterwards.

    Returns:
        Absorbed: the layers, the largest rounding errors, and how many gains the weights' dtype has lost.

    Raises:
        ValueError: no gains; gains that were applied to a larger model, that lie outside the part that apply() was called
            on, or that are no longer there; gains or absorbed weights that are not finite (float16 overflows); a quantised
            weight that would have to be quantised again, or another wrapped layer, such as one with forward hooks; a weight
            that something else in the model shares; weights on the meta device or sharded; or named gain sets of which none
            is active.

    Warns:
        UserWarning: most gains are lost, as the weights' dtype cannot hold them.

    """
    refuse_lost(model, "absorb")
    layers = gained_modules(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no gains to absorb")
    refuse_part(model, "absorb")
    refuse_outside(model, "absorb")
    refuse_base_active(model, "absorb")
    refuse_fsdp(model, "absorb")
    folds = [_fold(model, name, layer) for name, layer in layers.items()]
    _refuse_shared(model, folds)
    errors = {fold.into: _rounding(fold) for fold in folds}
    lost = sum(lost_gains(fold.delta, fold.carriers[0].tensor.dtype) for fold in folds)
    moved = moved_gains(fold.layer.delta.detach() for fold in folds)
    with torch.no_grad():
        for fold in folds:
            if fold.prepare is not None:
                fold.prepare()
            for carrier in fold.carriers:
                for block, rounded, _ in _blocks(carrier, fold.delta):
                    block.copy_(rounded)
            fold.layer.delta.zero_()  # with its weight, so an interruption leaves the same map
    remove(model)
    _forget_quantizers(model)
    if 2 * lost > moved:
        warnings.warn(said_of_lost(lost, moved), stacklevel=2)
    where = max(errors, key=lambda name: errors[name][1])
    return Absorbed(
        layers=tuple(errors),
        max_abs_error=max(absolute for absolute, _ in errors.values()),
        max_rel_error=errors[where][1],
        where=where,
        lost=lost,
        moved=moved,
    )


@dataclass(frozen=True)
class _Fold:
    """A gain, and where it goes: ``delta`` [features of the carriers] into the carriers, tensors of ``holder``."""

    name: str
    layer: Gained
    into: str
    holder: nn.Module
    delta: Tensor
    carriers: tuple[Carrier, ...]
    prepare: Callable[[], None] | None = None

    @property
    def whose(self) -> str:
        """Whose tensors change, for an error message that names the layer with the gain."""
        return "its" if self.into == self.name else f"{self.into}'s"


def _fold(model: nn.Module, name: str, layer: Gained) -> _Fold:
    """Where a gain goes; ValueError if that is not all there, or the gain not finite."""
    if isinstance(layer, ExpertsGain):
        carriers = tuple(Carrier(tensor, dim) for tensor, dim in layer.scaled())
        fold = _Fold(name, layer, name, layer.owner, layer.delta.detach(), carriers)
    elif not isinstance(layer, GainWrapper):
        carrier = Carrier(cast(Tensor, layer.weight), layer.gained_dim)
        fold = _Fold(name, layer, name, layer, layer.delta.detach(), (carrier,))
    elif computes_from_weight(layer.base):
        fold = _into_wrapped(name, layer)
    else:
        fold = _into_scales(model, name, layer)
    if any(is_sharded(carrier.tensor) for carrier in fold.carriers):
        raise UsageError(
            f"cannot absorb {name}: {fold.whose} weight is a DTensor. Save the gains, and absorb in an unsharded model."
        )
    if any(carrier.tensor.is_meta for carrier in fold.carriers):
        raise UsageError(f"cannot absorb {name}: {fold.whose} weight is on the meta device. Load the weights first.")
    if _is_partitioned(fold):
        raise UsageError(
            f"cannot absorb {name}: {fold.whose} weight is partitioned. Do it in deepspeed.zero.GatheredParameters."
        )
    if not layer.delta.isfinite().all():
        raise UsageError(
            f"cannot absorb {name}: its gain is not finite. The training has diverged; load earlier gains."
        )
    return fold


def _into_wrapped(name: str, layer: GainWrapper) -> _Fold:
    """Into the plain weight of a wrapped layer: one that accelerate has hooked, or that holds more than weight and bias."""
    base = layer.base
    if base._forward_hooks or base._forward_pre_hooks:
        raise UsageError(
            f"cannot absorb {name}: the {type(base).__name__} in it has forward hooks, which may change what the gain "
            "scales. Remove them first."
        )
    return _Fold(name, layer, name, base, layer.delta.detach(), (_weight(base, layer.side),))


def _weight(module: nn.Module, side: str) -> Carrier:
    return Carrier(cast(Tensor, module.weight), weight_dim(module, side))


def _into_scales(model: nn.Module, name: str, layer: GainWrapper) -> _Fold:
    """Into the scales of a wrapped layer's rows, or if it has to go into columns into the up projection's rows."""
    from gain_ops.models.quantized import foldable

    def own() -> _Fold:
        found = foldable(layer.base, layer.side)
        return _Fold(name, layer, name, layer.base, layer.delta.detach(), found.carriers, found.prepare)

    try:
        return fold_gain(layer.side, own, lambda: _into_up(model, name, layer))  # in memory nothing is requantised
    except CannotFold as error:
        raise UsageError(f"cannot absorb {name}: {error}") from None


def _into_up(model: nn.Module, name: str, layer: Gained) -> _Fold:
    from gain_ops.models.quantized import foldable

    rows = up_rows(model, layer)
    up, into = rows.module, f"{name.rpartition('.')[0]}.{rows.leaf}".lstrip(".")
    if isinstance(up, Gained):
        raise has_own_gain(into)
    found = Foldable((_weight(up, "output"),)) if computes_from_weight(up) else foldable(up, "output")
    bias = () if up.bias is None else (Carrier(cast(Tensor, up.bias), 0),)
    delta = rows.padded(layer.delta.detach(), 0.0)
    return _Fold(name, layer, into, up, delta, (*found.carriers, *bias), found.prepare)


def _is_partitioned(fold: _Fold) -> bool:
    """Whether ZeRO-3 holds the weight elsewhere: what stands for it is empty."""
    weight = fold.carriers[0].tensor
    if not isinstance(weight, nn.Parameter):
        return False
    n_in, n_out = cast(tuple[int, int], sizes(fold.holder))
    return weight.numel() != n_in * n_out


def _refuse_shared(model: nn.Module, folds: Iterable[_Fold]) -> None:
    """Raise ValueError if a weight to be changed lies in memory that another parameter or buffer uses."""
    tensors = {
        (id(module), key): (f"{name}.{key}".lstrip("."), tensor)
        for name, module in model.named_modules()
        for key, tensor in own_tensors(module, recurse=False).items()
        if tensor.numel() and not tensor.is_meta
    }
    for fold in folds:
        changed = {carrier.tensor.data_ptr(): carrier.tensor for carrier in fold.carriers}
        own = {
            key: tensor
            for key, (_, tensor) in tensors.items()
            if key[0] == id(fold.holder) and (_is_weight(key[1]) or tensor.data_ptr() in changed)
        }
        for weight in (*own.values(), *changed.values()):
            for key, (other_name, other) in tensors.items():
                if key not in own and _overlap(weight, other):
                    raise UsageError(
                        f"cannot absorb {fold.name}: {other_name} shares {fold.whose} weight (tied), and would change with "
                        "it. Untie them (give one a clone of the weight), or leave this layer without a gain."
                    )


def _is_weight(name: str) -> bool:
    """Whether a tensor of a layer is its weight, or a part of it where that is a tensor subclass."""
    return name.partition(".")[0] == "weight"


def _overlap(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device:
        return False
    (one_start, one_end), (other_start, other_end) = _extent(one), _extent(other)
    return one_start < other_end and other_start < one_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _rounding(fold: _Fold) -> tuple[float, float]:
    """The largest absolute and relative error of rounding what is absorbed into; ValueError if it is not finite."""
    absolute = relative = 0.0
    for carrier in fold.carriers:
        for block, rounded, scale in _blocks(carrier, fold.delta):
            if not rounded.isfinite().all():
                what = "weight" if isinstance(carrier.tensor, nn.Parameter) else "scale"
                why = "overflows" if block.isfinite().all() else "is not finite to begin with"
                raise UsageError(
                    f"cannot absorb {fold.name}: {fold.whose} {what} {why} in {block.dtype}; nothing was changed"
                )
            exact = block.double() * scale.double()
            error = (rounded.double() - exact).abs()
            absolute = max(absolute, error.max().item())
            relative = max(relative, (error / exact.abs().clamp_min(torch.finfo(torch.float64).tiny)).max().item())
    return absolute, relative


def _blocks(carrier: Carrier, delta: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows of a tensor, a view; these rows absorbed and rounded; the gain that scales them), a few at a time."""
    stored = carrier.tensor.detach()
    accumulation = torch.float64 if stored.dtype == torch.float64 else torch.float32
    gain = 1 + delta.to(accumulation)
    after = (1,) * (stored.dim() - 1 - carrier.dim)
    # two dimensions are a row for each expert, which is the first dimension of three
    scale = (gain.unsqueeze(3 - carrier.dim) if gain.dim() == 2 else gain.view(-1, *after)).expand(stored.shape)
    rows = max(1, _CHUNK // max(1, stored[:1].numel()))
    for start in range(0, stored.shape[0], rows):
        block, block_scale = stored[start : start + rows], scale[start : start + rows]
        yield block, (block.to(accumulation) * block_scale).to(stored.dtype), block_scale


def _forget_quantizers(model: nn.Module) -> None:
    """A model that transformers unpacked from a GGUF calls itself quantised, and then refuses to be saved."""
    for module in model.modules():
        if getattr(module, "hf_quantizer", None) is not None:
            from gain_ops.models.quantized import forget_quantizer  # the model comes from there

            forget_quantizer(cast("PreTrainedModel", module))

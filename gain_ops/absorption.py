"""Fold the gains of a model into its weights: after it the model is plain again and computes the same."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gain_ops.adapt import gained_modules, refuse_base_active, remove
from gain_ops.linears import is_sharded, refuse_fsdp
from gain_ops.modules import Gained, GainWrapper, own_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 22  # weights worked on at a time: bounds the fp64 scratch at 100 MB


@dataclass(frozen=True)
class Absorbed:
    """What absorb() did.

    Attributes:
        layers: the layers whose weights changed, by name.
        max_abs_error: the largest ``|stored - exact|`` over all weights, or scales of quantised weights: the one
            rounding to their dtype.
        max_rel_error: the largest ``|stored - exact| / |exact|``, where exact is not zero.
        where: the layer with the largest relative error.

    """

    layers: tuple[str, ...]
    max_abs_error: float
    max_rel_error: float
    where: str

    def __repr__(self) -> str:
        return (
            f"Absorbed({len(self.layers)} layers; rounding at most {self.max_abs_error:.3g} absolute, "
            f"{self.max_rel_error:.3g} relative, in {self.where})"
        )


@dataclass(frozen=True)
class Carrier:
    """A tensor of a layer that takes its gain: dimension ``dim`` runs over the gain's features."""

    tensor: Tensor
    dim: int


@dataclass(frozen=True)
class Foldable:
    """The tensors of a layer to be multiplied by its gain.

    ``prepare`` puts the layer into the state in which it computes from them, and does not change what it computes.
    """

    carriers: tuple[Carrier, ...]
    prepare: Callable[[], None] | None = None


def absorb(model: nn.Module) -> Absorbed:
    """Fold every gain of a model into its weight, in place, and put the plain layers back as remove() does.

    ::

        side="output":  W <- diag(gain) @ W            side="input":  W <- W @ diag(gain)            b unchanged

    The product runs in float32 (float64 for float64) and is rounded once to W's dtype. Every tensor is checked before
    one is written: a refusal changes nothing. A gain of zero is fine. There is no way back: keep the base.

    Of a quantised weight the scales are multiplied and the codes stay: exact up to the scales' own rounding. That works on
    the output side where a scale covers weights of one row only; gain_ops.integrations.quantized lists the layers.

    Of a model with named gain sets the active one is folded in and the others are dropped: they belong to the weights
    as they were.

    A transformers model that was unpacked from a GGUF can be saved with save_pretrained() afterwards.

    Returns:
        Absorbed: the layers and the largest rounding errors.

    Raises:
        ValueError: no gains; gains or absorbed weights that are not finite (float16 overflows); a quantised weight that
            would have to be quantised anew, or another wrapped layer; a weight that something else in the model shares;
            weights on the meta device or sharded; or named gain sets of which none is active.

    """
    layers = gained_modules(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no gains to absorb")
    refuse_base_active(model, "absorb")
    refuse_fsdp(model, "absorb")
    found = {name: _foldable(name, layer) for name, layer in layers.items()}
    _refuse_shared(model, layers, found)
    errors = {name: _rounding(name, layer, found[name]) for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            if (prepare := found[name].prepare) is not None:
                prepare()
            for block, rounded, _ in _blocks(layer, found[name]):
                block.copy_(rounded)
            layer.delta.zero_()  # with its weight, so an interruption leaves the same map
    remove(model)
    _forget_quantizers(model)
    where = max(errors, key=lambda name: errors[name][1])
    return Absorbed(
        layers=tuple(layers),
        max_abs_error=max(absolute for absolute, _ in errors.values()),
        max_rel_error=errors[where][1],
        where=where,
    )


def _foldable(name: str, layer: Gained) -> Foldable:
    """What to multiply; ValueError if that is not all there, or the gain not finite."""
    if isinstance(layer, GainWrapper):
        found, missing = _scales(name, layer), 0
    else:
        weight = cast(Tensor, layer.weight)
        found = Foldable((Carrier(weight, layer.gained_dim),))
        missing = layer.in_features * layer.out_features - weight.numel()
    if any(is_sharded(carrier.tensor) for carrier in found.carriers):
        raise ValueError(
            f"cannot absorb {name}: its weight is a DTensor. Save the gains, and absorb in an unsharded model."
        )
    if any(carrier.tensor.is_meta for carrier in found.carriers):
        raise ValueError(f"cannot absorb {name}: its weight is on the meta device. Load the weights first.")
    if missing:
        raise ValueError(
            f"cannot absorb {name}: its weight is partitioned. Do it in deepspeed.zero.GatheredParameters."
        )
    if not layer.delta.isfinite().all():
        raise ValueError(
            f"cannot absorb {name}: its gain is not finite. The training has diverged; load earlier gains."
        )
    return found


def _scales(name: str, layer: GainWrapper) -> Foldable:
    from gain_ops.integrations.quantized import CannotFold, foldable

    try:
        return foldable(layer.base, layer.side)
    except CannotFold as error:
        raise ValueError(f"cannot absorb {name}: {error}") from None


def _refuse_shared(model: nn.Module, layers: Mapping[str, Gained], found: Mapping[str, Foldable]) -> None:
    """Raise ValueError if a weight to be changed lies in memory that another parameter or buffer uses."""
    tensors = {
        (id(module), key): (f"{name}.{key}".lstrip("."), tensor)
        for name, module in model.named_modules()
        for key, tensor in own_tensors(module, recurse=False).items()
        if tensor.numel() and not tensor.is_meta
    }
    for name, layer in layers.items():
        holder = layer.base if isinstance(layer, GainWrapper) else layer
        own = {key: tensor for key, (_, tensor) in tensors.items() if key[0] == id(holder) and _is_weight(key[1])}
        for weight in (*own.values(), *(carrier.tensor for carrier in found[name].carriers)):
            for key, (other_name, other) in tensors.items():
                if key not in own and _overlap(weight, other):
                    raise ValueError(
                        f"cannot absorb {name}: {other_name} shares its weight (tied), and would change with it. Untie "
                        "them (give one a clone of the weight), or leave this layer without a gain."
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


def _rounding(name: str, layer: Gained, found: Foldable) -> tuple[float, float]:
    """The largest absolute and relative error of rounding what is absorbed into; ValueError if it is not finite."""
    absolute = relative = 0.0
    for block, rounded, scale in _blocks(layer, found):
        if not rounded.isfinite().all():
            what = "scale" if isinstance(layer, GainWrapper) else "weight"
            why = "overflows" if block.isfinite().all() else "is not finite to begin with"
            raise ValueError(f"cannot absorb {name}: its {what} {why} in {block.dtype}; nothing was changed")
        exact = block.double() * scale.double()
        error = (rounded.double() - exact).abs()
        absolute = max(absolute, error.max().item())
        relative = max(relative, (error / exact.abs().clamp_min(torch.finfo(torch.float64).tiny)).max().item())
    return absolute, relative


def _blocks(layer: Gained, found: Foldable) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows of a tensor, a view; these rows absorbed and rounded; the gain that scales them), a few at a time."""
    for carrier in found.carriers:
        stored = carrier.tensor.detach()
        accumulation = torch.float64 if stored.dtype == torch.float64 else torch.float32
        gain = 1 + layer.delta.detach().to(accumulation)
        scale = gain.view(-1, *(1,) * (stored.dim() - 1 - carrier.dim)).expand(stored.shape)
        rows = max(1, _CHUNK // max(1, stored[:1].numel()))
        for start in range(0, stored.shape[0], rows):
            block, block_scale = stored[start : start + rows], scale[start : start + rows]
            yield block, (block.to(accumulation) * block_scale).to(stored.dtype), block_scale


def _forget_quantizers(model: nn.Module) -> None:
    """A model that transformers unpacked from a GGUF calls itself quantised, and then refuses to be saved."""
    for module in model.modules():
        if getattr(module, "hf_quantizer", None) is not None:
            from gain_ops.integrations.transformers import forget_quantizer  # the model comes from there

            forget_quantizer(cast("PreTrainedModel", module))

"""Fold the gains of a model into its weights: after it the model is plain again and computes the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gain_ops.adapt import gained_modules, remove
from gain_ops.linears import is_sharded, refuse_fsdp
from gain_ops.modules import Gained, GainWrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 22  # weights worked on at a time: bounds the fp64 scratch at 100 MB


@dataclass(frozen=True)
class Absorbed:
    """What absorb() did.

    Attributes:
        layers: the layers whose weights changed, by name.
        max_abs_error: the largest ``|stored - exact|`` over all weights: the one rounding to the weights' dtype.
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


def absorb(model: nn.Module) -> Absorbed:
    """Fold every gain of a model into its weight, in place, and put the plain layers back as remove() does.

    ::

        side="output":  W <- diag(gain) @ W            side="input":  W <- W @ diag(gain)            b unchanged

    The product runs in float32 (float64 for float64) and is rounded once to W's dtype. Every tensor is checked before
    one is written: a refusal changes nothing. A gain of zero is fine. There is no way back: keep the base.

    A transformers model that was unpacked from a GGUF can be saved with save_pretrained() afterwards.

    Returns:
        Absorbed: the layers and the largest rounding errors.

    Raises:
        ValueError: no gains; gains or absorbed weights that are not finite (float16 overflows); a wrapped layer, say a
            quantised one; a weight that something else in the model shares; weights on the meta device or sharded.

    """
    layers = gained_modules(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no gains to absorb")
    refuse_fsdp(model, "absorb")
    for name, layer in layers.items():
        _check_layer(name, layer)
    _refuse_shared(model, layers)
    errors = {name: _rounding(name, layer) for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():
            for block, rounded, _ in _blocks(layer):
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


def _check_layer(name: str, layer: Gained) -> None:
    if isinstance(layer, GainWrapper):
        raise ValueError(
            f"cannot absorb {name}: it wraps a {type(layer.base).__name__}, not a plain linear layer: its weight may "
            "be quantised, and would have to be quantised anew. Load the model with plain weights, load_gains() with "
            "check_base=False, and absorb there."
        )
    weight = _weight(layer)
    if is_sharded(weight):
        raise ValueError(
            f"cannot absorb {name}: its weight is a DTensor. Save the gains, and absorb in an unsharded model."
        )
    if weight.is_meta:
        raise ValueError(f"cannot absorb {name}: its weight is on the meta device. Load the weights first.")
    if weight.numel() != layer.in_features * layer.out_features:
        raise ValueError(
            f"cannot absorb {name}: its weight is partitioned. Do it in deepspeed.zero.GatheredParameters."
        )
    if not layer.delta.isfinite().all():
        raise ValueError(
            f"cannot absorb {name}: its gain is not finite. The training has diverged; load earlier gains."
        )


def _refuse_shared(model: nn.Module, layers: dict[str, Gained]) -> None:
    """Raise ValueError if a weight to be changed lies in memory that another parameter or buffer uses."""
    tensors = {
        (id(module), key): (f"{name}.{key}".lstrip("."), tensor)
        for name, module in model.named_modules()
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.numel() and not tensor.is_meta
    }
    for name, layer in layers.items():
        weight = _weight(layer)
        for key, (other_name, other) in tensors.items():
            if key != (id(layer), "weight") and _overlap(weight, other):
                raise ValueError(
                    f"cannot absorb {name}: {other_name} shares its weight (tied), and would change with it. Untie "
                    "them (give one a clone of the weight), or leave this layer without a gain."
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device:
        return False
    (one_start, one_end), (other_start, other_end) = _extent(one), _extent(other)
    return one_start < other_end and other_start < one_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _rounding(name: str, layer: Gained) -> tuple[float, float]:
    """The largest absolute and relative error of rounding the absorbed weight; ValueError if it is not finite."""
    absolute = relative = 0.0
    for block, rounded, scale in _blocks(layer):
        if not rounded.isfinite().all():
            why = "overflows" if block.isfinite().all() else "is not finite to begin with"
            raise ValueError(f"cannot absorb {name}: its weight {why} in {block.dtype}; nothing was changed")
        exact = block.double() * scale.double()
        error = (rounded.double() - exact).abs()
        absolute = max(absolute, error.max().item())
        relative = max(relative, (error / exact.abs().clamp_min(torch.finfo(torch.float64).tiny)).max().item())
    return absolute, relative


def _blocks(layer: Gained) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows of the weight, a view; these rows absorbed and rounded; the gain that scales them), a few at a time."""
    weight = _weight(layer).detach()
    accumulation = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gain = 1 + layer.delta.detach().to(accumulation)
    scale = (gain[:, None] if layer.gained_dim == 0 else gain).expand(weight.shape)
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block, block_scale = weight[start : start + rows], scale[start : start + rows]
        yield block, (block.to(accumulation) * block_scale).to(weight.dtype), block_scale


def _weight(layer: Gained) -> Tensor:
    return cast(Tensor, layer.weight)


def _forget_quantizers(model: nn.Module) -> None:
    """A model that transformers unpacked from a GGUF calls itself quantised, and then refuses to be saved."""
    for module in model.modules():
        if getattr(module, "hf_quantizer", None) is not None:
            from gain_ops.integrations.transformers import forget_quantizer  # the model comes from there

            forget_quantizer(cast("PreTrainedModel", module))

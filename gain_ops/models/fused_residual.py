"""The gains of a decoder layer's output projections, folded into its residual adds and the norms beside them.

The layer and the projection change by their class alone: names, state dict and the layer's hooks stay. The projection
returns z without its gain and bias, and the layer's forward, in which nothing else is changed, adds them to the stream.
unfuse_residual() restores the classes.
"""

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gain_ops.layers.gained import Gained
from gain_ops.layers.linears import describe
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.decoder_layout import NormForm, folded_forward, folds_of, last_projection, norm_form
from gain_ops.models.fused_mlp import hooked
from gain_ops.models.mixins import Mixin, mixed, unmix
from gain_ops.ops.linear import gain_scale
from gain_ops.ops.residual import gain_add, gain_add_rms_norm, gain_rms_norm_add
from gain_ops.ops.rms_norm import gain_rms_norm
from gain_ops.utils.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where a layer finds what an add of its forward needs: names in the layer, and how its norm computes."""

    projection: str
    norm: str | None
    form: NormForm | None


class WithheldGain(Mixin, Gained):
    """A mixin before the class of a projection whose layer applies the gain: its forward gives z = x @ W.T."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> z [..., out_features]; a wrapped base's bias is taken off again, as GainWrapper does."""
        if not isinstance(self, GainWrapper):
            return F.linear(input, cast(Tensor, self.weight))
        y, bias = self.through_base(input), self.bias
        return y if bias is None else y - bias.to(y.dtype)


class OnePassNorm(Mixin):
    """A mixin before the class of an RMSNorm in such a layer that no gain is folded into: the norm alone, in one pass."""

    _gain_form: NormForm
    _gain_backend: str

    def forward(self, x: Tensor) -> Tensor:
        """rms_norm(x) * weight, rounded once."""
        if _widens(self, self._gain_form, x):
            return cast(Tensor, super().forward(x))
        weight, eps = _weight_and_eps(self, self._gain_form)
        return gain_rms_norm(x, weight, torch.zeros_like(weight), eps, backend=self._gain_backend)


class FusedResidual(nn.Module):
    """A mixin before the class of a decoder layer: what the adds of its rewritten forward call."""

    _gain_places: dict[str, Place]

    def _gain_add(self, part: str, residual: Tensor, z: Tensor) -> Tensor:
        """h = residual + gain * z + b."""
        projection = self._gain_projection(part)
        return gain_add(residual, z, projection.delta, _bias(projection), backend=projection.backend)

    def _gain_add_norm(self, part: str, residual: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """h as above, and the norm of h."""
        projection, (norm, form) = self._gain_projection(part), self._gain_norm(part)
        if _widens(norm, form, residual):
            h = self._gain_add(part, residual, z)
            return h, norm(h)
        weight, eps = _weight_and_eps(norm, form)
        bias = _bias(projection)
        return gain_add_rms_norm(residual, z, projection.delta, weight, eps, bias=bias, backend=projection.backend)

    def _gain_norm_add(self, part: str, residual: Tensor, z: Tensor) -> Tensor:
        """h = residual + norm(gain * z)."""
        projection, (norm, form) = self._gain_projection(part), self._gain_norm(part)
        if _widens(norm, form, residual):
            return residual + cast(Tensor, norm(gain_scale(z, projection.delta, backend=projection.backend)))
        weight, eps = _weight_and_eps(norm, form)
        return gain_rms_norm_add(residual, z, projection.delta, weight, eps, backend=projection.backend)

    def _gain_projection(self, part: str) -> Gained:
        projection = cast(Gained, self.get_submodule(self._gain_places[part].projection))
        if projection._hooked:
            projection.refuse_offloaded()
        return projection

    def _gain_norm(self, part: str) -> tuple[nn.Module, NormForm]:
        place = self._gain_places[part]
        assert place.norm is not None
        assert place.form is not None
        return self.get_submodule(place.norm), place.form

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class: the class made here has no name that pickle could find."""
        return _rebuild_layer, (type(self).__bases__[1], tuple(self._gain_places)), self.__dict__


def fuse_residual(model: nn.Module, *, where_possible: bool = False) -> None:
    """Fold every gain on the output side of a part's last projection into the layer's add.

    Raises:
        ValueError: a layer, an add, a norm or a projection that is not known or that something else looks at; or no gain that
            could be folded. Layers that were fused before stay fused; unfuse_residual() undoes it. With ``where_possible`` a
            gain that cannot be folded stays where it is instead.

    """
    layers: dict[int, tuple[nn.Module, dict[str, Place]]] = {}
    for name, projection in model.named_modules(remove_duplicate=False):
        if not isinstance(projection, Gained) or projection.side != "output":
            continue
        above, _, leaf = name.rpartition(".")
        outer, _, part = above.rpartition(".")
        layer, holder = model.get_submodule(outer), model.get_submodule(above)
        last = last_projection(cast(Any, type(holder)))
        if last is not None and last != leaf:
            continue  # a gain on another projection, such as q_proj, stays where it is
        why = _why_not(layer, part, holder, last, projection)
        if why is not None and where_possible:
            continue
        if why is not None:
            raise UsageError(f"fuse_residual cannot serve {name}: {why}. Leave fuse_residual off.")
        norm = folds_of(type(layer))[part].norm
        form = norm_form(cast(Any, type(layer.get_submodule(norm)))) if norm else None
        _, places = layers.setdefault(id(layer), (layer, {}))
        places[part] = Place(f"{part}.{leaf}", norm, form)
    if not layers and not where_possible:
        raise UsageError(
            "fuse_residual found no attention output or FFN down projection with a gain on its output side: choose other "
            "targets, or leave it off"
        )
    for layer, places in layers.values():
        for place in places.values():
            projection = layer.get_submodule(place.projection)
            if not isinstance(projection, WithheldGain):
                projection.__class__ = mixed(WithheldGain, type(projection))
        _fuse_norms(layer, places)
        layer._gain_places = places  # type: ignore[assignment]
        layer.__class__ = _fused_class(cast(Any, type(layer)), tuple(places))


def unfuse_residual(model: nn.Module) -> None:
    """Give every fused layer of a model and its projections their own classes again."""
    for module in list(model.modules()):
        if isinstance(module, WithheldGain):
            unmix(module)
        elif isinstance(module, OnePassNorm):
            unmix(module)
            del module._gain_form, module._gain_backend
        elif isinstance(module, FusedResidual):
            unmix(module)
            del module._gain_places


def refuse_fused_residual(model: nn.Module, doing: str) -> None:
    """Raise ValueError if a layer reads the gain of a projection, which ``doing`` would shard apart from the layer."""
    if any(isinstance(module, WithheldGain) for module in model.modules()):
        raise UsageError(
            f"{doing} cannot serve a model with fuse_residual=True: the layers read the gains of their projections. Apply the "
            "gains without it."
        )


def _fuse_norms(layer: nn.Module, places: dict[str, Place]) -> None:
    """Run each RMSNorm in a layer that no fold takes in one pass, where its class is known and nothing else looks at it."""
    taken = {id(layer.get_submodule(place.norm)) for place in places.values() if place.norm is not None}
    backend = next(cast(Gained, layer.get_submodule(place.projection)).backend for place in places.values())
    for module in layer.modules():
        form = norm_form(cast(Any, type(module)))
        if form is None or id(module) in taken or "forward" in vars(module) or hooked(module):
            continue
        module._gain_form, module._gain_backend = form, backend  # type: ignore[assignment]
        module.__class__ = mixed(OnePassNorm, type(module))


def _why_not(layer: nn.Module, part: str, holder: nn.Module, last: str | None, projection: Gained) -> str | None:
    """Why a gain cannot go into its layer's add, or None if it can."""
    fold = folds_of(type(layer)).get(part)
    if fold is None:
        return f"the forward of {type(layer).__name__} does not add what {part} returns to the stream in a known way"
    if last is None:
        return f"the forward of {type(holder).__name__} does not end with this projection in a known way"
    norm = layer.get_submodule(fold.norm) if fold.norm else None
    if norm is not None and norm_form(cast(Any, type(norm))) is None:
        return f"{type(norm).__name__} is not a known RMSNorm"
    if hasattr(projection, "nf"):
        return f"{describe(projection)} is not an nn.Linear"
    if fold.order == "norm_add" and projection.bias is not None:
        return "it has a bias, which the norm after it would see"
    for module in (layer, holder, projection, norm):
        if module is not None and "forward" in vars(module):
            return f"{type(module).__name__} has a forward of its own on the instance"
        if module is not None and module is not layer and hooked(module):
            return f"{type(module).__name__} has hooks, which would see values without the gain or not run: remove them"
    return None


def _bias(projection: Gained) -> Tensor | None:
    return cast("Tensor | None", projection.bias)


def _widens(norm: nn.Module, form: NormForm, stream: Tensor) -> bool:
    """Whether the model's norm returns a wider dtype than the stream's, because of its weight; the ops return the stream's."""
    return form.widens and torch.promote_types(cast(Tensor, norm.weight).dtype, stream.dtype) != stream.dtype


def _weight_and_eps(norm: nn.Module, form: NormForm) -> tuple[Tensor, float]:
    weight = cast(Tensor, norm.weight)
    return 1.0 + weight.float() if form.one_plus else weight, getattr(norm, form.eps)


@functools.cache
def _fused_class(kind: Any, parts: tuple[str, ...]) -> type[nn.Module]:
    """Under the layer's own name, by which FSDP's and accelerate's plans find decoder layers."""
    body = {"__module__": __name__, "forward": folded_forward(kind, parts)}
    return type(kind.__name__, (FusedResidual, kind), body)


def _rebuild_layer(kind: type[nn.Module], parts: tuple[str, ...]) -> nn.Module:
    made = _fused_class(cast(Any, kind), parts)
    return made.__new__(made)

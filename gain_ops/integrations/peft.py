"""PEFT: fuse() runs an (IA)^3 PeftModel on the ops of gain_ops, and unfuse() undoes it.

PEFT's own layers change class and nothing else: parameters, names, state dict and saved adapters stay PEFT's.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from gain_ops.layers.linears import is_conv1d, is_plain_conv1d, is_plain_linear
from gain_ops.models.projections import names_attention_output
from gain_ops.ops.dispatch import check_name
from gain_ops.ops.linear import gain_linear, gain_scale
from gain_ops.reference import accumulation_dtype
from gain_ops.utils.errors import MissingPackageError, UsageError

try:
    from peft import PeftModel
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.ia3 import IA3Layer, IA3Model, Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise MissingPackageError("gain_ops.integrations.peft needs PEFT: pip install peft") from error

__all__ = ["Fused", "fuse", "unfuse"]

_log = logging.getLogger("gain_ops")


@dataclass(frozen=True)
class Fused:
    """What fuse() did.

    Attributes:
        layers: the (IA)^3 layers that run on gain_ops, by name.
        left_alone: the layers that stay PEFT's, by name, and why.

    """

    layers: tuple[str, ...]
    left_alone: dict[str, str]

    def __repr__(self) -> str:
        return f"Fused({len(self.layers)} layers, {len(self.left_alone)} left alone)"


def fuse(peft_model: nn.Module, *, memory: str = "fast", backend: str = "auto") -> Fused:
    r"""Run the (IA)^3 layers of a PeftModel on gain_ops, in place: the same results, and less saved for backward.

    ::

        not feedforward:   y = l * (x @ W.T + b)     dx = (dy * l) @ W     dl = sum over tokens of dy * (x @ W.T + b)
        feedforward:       y = (x * l) @ W.T + b     dx = l * (dy @ W)     dl = sum over tokens of (dy @ W) * x

    with l the product of the active adapters' vectors. Where (IA)^3 scales the output it scales the bias as well.

    The layers get a subclass of their PEFT class, with the same parameters. The state dict, save_pretrained, adapters that
    are added (in new layers too), switched, disabled or deleted, merging, modules_to_save and isinstance work as before. A
    copy and a pickle are fused as well. Unpickling needs gain_ops; an adapter saved by PEFT does not.

    What a layer saves for backward at T tokens, beside one vector of l's size in either case::

                            PEFT                                   fused
        not feedforward     z = x @ W.T + b, T x out               x @ W.T, as large; or x, see ``memory``
        feedforward         x in l's dtype: a float32 copy,        x itself
                            T x in, of an x in half precision
        under autocast      W in low precision too, out x in       no copy of W

    Args:
        peft_model: a PeftModel whose method is (IA)^3, with nothing merged.
        memory: "fast" saves x @ W.T in layers that are not feedforward. "lean" saves x at attention output projections,
            where scaled-dot-product attention already holds it, for one more GEMM in the backward, and elsewhere the
            smaller of the two.
        backend: "auto", or a backend by name; see gain_ops.ops.dispatch.

    Returns:
        Fused: the layers that run on gain_ops, and the layers that stay PEFT's: Conv2d, Conv3d, and classes and forwards
        that are not PEFT's own. The latter are logged too.

    nn.Linear and transformers' Conv1D run gain_linear. These are called as PEFT calls them, with gain_scale before or after:
    any other base layer, a base layer with hooks (FSDP, ZeRO-3, tensor parallelism, offloading), and a base layer whose
    weight requires a gradient. So are bitsandbytes' layers, in PEFT's own dtypes: there fuse() saves passes over memory and
    no bytes.

    The gain in use is 1 + (l - 1) in float32: exactly l in [0.5, 2] and at 0, elsewhere off by at most
    2^-22 * max(1, abs(l)), 2^-25 where 0 < l < 0.5. The bias is scaled in float32.

    Where the fused layers differ from PEFT's:

    - unmerge_adapter(), and disable_adapter() while merged, restore the original bits: PEFT divides by the gain. The
      originals are held while merged, one more copy of each merged weight and bias; merge_and_unload() frees each in turn.
      Unmerging drops values that were written to a merged weight meanwhile.
    - Several adapters are merged with one rounding. Two layers that share one weight are refused.
    - ``safe_merge=True`` checks the values that will be stored, after the cast, in all fused layers before one is written.
    - ``adapter_names=`` in a call raises: PEFT ignores it. With the adapters disabled PEFT does not pass it on.

    Raises:
        TypeError: not a PeftModel.
        ValueError: another method than (IA)^3; fused already; adapters merged; no layer that can run on gain_ops; an option
            that does not exist. Nothing is changed then.
        ImportError: on import of this module, without PEFT.

    Source: (IA)^3, arXiv 2205.05638.

    """
    tuner = _ia3_tuner(peft_model, "fuse")
    if memory not in ("fast", "lean"):
        raise UsageError(f"memory={memory!r} is not one of 'fast', 'lean'")
    check_name(backend)
    if isinstance(tuner, FusedIA3Model):
        raise UsageError("the model is fused already: unfuse() it first to change memory or backend")
    _refuse_merged(tuner, "PEFT's unmerge divides by the gain and loses bits. Fuse first and merge after.")
    layers = dict(_ia3_layers(tuner))
    left_alone = {name: why for name, layer in layers.items() if (why := _obstacle(layer))}
    if len(left_alone) == len(layers):
        raise UsageError(f"no (IA)^3 layer here can run on gain_ops: {_listed(left_alone) or 'the model has none'}")
    cast(Any, tuner).__class__ = FusedIA3Model
    fused = cast(FusedIA3Model, tuner)
    fused.gain_memory, fused.gain_backend = memory, backend
    fused.fuse_layers()
    return Fused(tuple(name for name in layers if name not in left_alone), left_alone)


def unfuse(peft_model: nn.Module) -> None:
    """Make every layer PEFT's own again, in place; parameters and adapters stay as they are.

    Raises:
        TypeError: not a PeftModel.
        ValueError: not fused; adapters merged (unmerge_adapter() first); or a layer whose class has changed since fuse(), as
            fully_shard() does. Nothing is changed then.

    """
    tuner = _ia3_tuner(peft_model, "unfuse")
    if not isinstance(tuner, FusedIA3Model):
        raise UsageError("the model is not fused: there is nothing to undo")
    _refuse_merged(tuner, "Its original weights would be lost.")
    layers = {name: layer for name, layer in _ia3_layers(tuner) if isinstance(layer, _FusedLayer)}
    for name, layer in layers.items():
        if "plain" not in vars(type(layer)) or "forward" in vars(layer):
            raise UsageError(
                f"cannot unfuse {name}: its class or forward was replaced after fuse(), such as by fully_shard or "
                "accelerate's hooks. Unfuse before that, or undo it first."
            )
    fused: list[Any] = [*layers.values(), tuner]
    for module in fused:
        for attribute in module.added:
            vars(module).pop(attribute, None)
        module.__class__ = module.plain


class _Original(NamedTuple):
    """What a merged layer holds for unmerge(): the original tensors, and the gain that was merged."""

    weight: Tensor
    bias: Tensor | None
    gain: Tensor


class _FusedLayer(IA3Layer):
    """What the fused layers share; the second of their bases, since Python refuses the change of class otherwise.

    ``added`` are the attributes that fuse() and merge() add to PEFT's.
    """

    plain: ClassVar[type]
    added: ClassVar[tuple[str, ...]] = ("gain_save", "gain_backend", "_original")
    gain_save: str
    gain_backend: str
    _original: _Original | None = None

    def _gain(self, names: list[str]) -> Tensor | None:
        """The product of these adapters' vectors, [features] in float32 (float64), or None if none is in this layer."""
        gain: Tensor | None = None
        for name in names:
            if name in self.ia3_l:
                vector = self.ia3_l[name].flatten()
                vector = vector.to(accumulation_dtype(vector.dtype))
                gain = vector if gain is None else gain * vector
        return gain


class FusedLinear(Linear, _FusedLayer):
    """peft.tuners.ia3.Linear on gain_linear; made by fuse(), not by hand."""

    plain = Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> y [..., out_features]."""
        _refuse_adapter_names(kwargs)
        base: Any = self.base_layer
        if self.disable_adapters and self.merged:
            self.unmerge()
        gain = None if self.disable_adapters or self.merged else self._gain(self.active_adapters)
        if gain is None:
            return cast(Tensor, base(x, *args, **kwargs))
        delta, backend = gain - 1, self.gain_backend
        weight = None if args or kwargs else _usable_weight(base)
        if weight is None:
            if self.is_feedforward:
                return cast(Tensor, base(gain_scale(x, delta, backend=backend), *args, **kwargs))
            return gain_scale(base(x, *args, **kwargs), delta, backend=backend)
        if self.is_feedforward:
            return gain_linear(x, weight, delta, base.bias, side="input", backend=backend)
        bias = None if base.bias is None else gain * base.bias
        return gain_linear(x, weight, delta, bias, save=self.gain_save, backend=backend)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Scale the base weight, and the bias of a layer that is not feedforward, by adapters not merged yet.

        Args:
            safe_merge: refuse values that are not finite in the stored dtype.
            adapter_names: the adapters to merge; None for the active ones.

        Raises:
            ValueError: with safe_merge, merged values that are not finite; nothing is changed.

        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ia3_l]
        if not names:
            return
        original, weight, bias = self._scaled(names, check=safe_merge)
        base: Any = self.get_base_layer()
        self._original = original
        base.weight.data = weight
        if bias is not None:
            base.bias.data = bias
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the bits from before the first merge, on the present device and in the present dtype."""
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        base.weight.data = self._original.weight.to(base.weight)
        if self._original.bias is not None:
            base.bias.data = self._original.bias.to(base.bias)
        self._original = None
        self.merged_adapters.clear()

    def check_merge(self, layer_name: str, adapter_names: list[str] | None) -> None:
        """Raise ValueError if merge(safe_merge=True) would; nothing is changed."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.ia3_l and name not in self.merged_adapters]
        if names:
            self._scaled(names, check=True, where=f" of {layer_name}")

    def _scaled(self, names: list[str], check: bool, where: str = "") -> tuple[_Original, Tensor, Tensor | None]:
        """The base weight and bias with these adapters merged as well, from the original ones and rounded once."""
        base: Any = self.get_base_layer()
        original = self._original
        if original is None:
            bias = None if self.is_feedforward or base.bias is None else base.bias.data
            original = _Original(base.weight.data, bias, torch.ones((), device=base.weight.device))
        with torch.no_grad():
            gain = cast(Tensor, self._gain(names)) * original.gain
            original = original._replace(gain=gain)
            along_rows = self.is_feedforward != self.fan_in_fan_out  # a Conv1D stores its weight [in, out]
            weight = (original.weight.to(gain.device) * (gain if along_rows else gain[:, None])).to(base.weight)
            bias = None if original.bias is None else (original.bias.to(gain.device) * gain).to(base.bias)
        for what, tensor in (("weight", weight), ("bias", bias)):
            if check and tensor is not None and not tensor.isfinite().all():
                raise UsageError(
                    f"merging {', '.join(names)} makes the {what}{where} not finite in {tensor.dtype}: the adapter is "
                    "broken, or the products overflow. Nothing was merged."
                )
        return original, weight, bias


_FUSED: dict[type, type] = {Linear: FusedLinear}

if is_bnb_available():
    from peft.tuners.ia3.bnb import Linear8bitLt

    class FusedLinear8bitLt(Linear8bitLt, _FusedLayer):
        """peft.tuners.ia3's layer around an 8-bit base, with gain_scale; made by fuse(), not by hand."""

        plain = Linear8bitLt

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """x [..., in_features] -> y [..., out_features], in float32 outside autocast as in PEFT."""
            return _quantized_forward(self, super().forward, x, kwargs)

    _FUSED[Linear8bitLt] = FusedLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.ia3.bnb import Linear4bit

    class FusedLinear4bit(Linear4bit, _FusedLayer):
        """peft.tuners.ia3's layer around a 4-bit base, with gain_scale; made by fuse(), not by hand."""

        plain = Linear4bit

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """x [..., in_features] -> y [..., out_features], in float32 outside autocast as in PEFT."""
            return _quantized_forward(self, super().forward, x, kwargs)

    _FUSED[Linear4bit] = FusedLinear4bit


def _quantized_forward(
    layer: _FusedLayer, plain: Callable[[Tensor], Tensor], x: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """bitsandbytes' layers: PEFT's own casts, and gain_scale for the product where that changes no dtype."""
    _refuse_adapter_names(kwargs)
    gain = None if layer.disable_adapters else layer._gain(layer.active_adapters)
    if gain is None:
        return plain(x)

    def times_gain(x: Tensor) -> Tensor:
        if torch.promote_types(x.dtype, gain.dtype) != x.dtype:
            return x * gain  # gain_scale would round to x's dtype, PEFT does not
        return gain_scale(x, gain - 1, backend=layer.gain_backend)

    base: Any = layer.base_layer
    converts = not torch.is_autocast_enabled() and x.dtype != torch.float32
    if converts:
        x = x.float()
    if layer.is_feedforward:
        return cast(Tensor, base(times_gain(x)))
    z: Tensor = base(x)
    y = times_gain(z)
    return y.to(z.dtype) if converts else y


class FusedIA3Model(IA3Model):
    """PEFT's IA3Model while its layers are fused: it fuses layers that are added later, and refuses what PEFT ignores."""

    plain: ClassVar[type] = IA3Model
    added: ClassVar[tuple[str, ...]] = ("gain_memory", "gain_backend")
    gain_memory: str
    gain_backend: str

    def fuse_layers(self) -> None:
        """Fuse every (IA)^3 layer that can be and is not yet; log the others."""
        left_alone = {}
        for name, layer in _ia3_layers(self):
            if isinstance(layer, _FusedLayer):
                continue
            if why := _obstacle(layer):
                left_alone[name] = why
                continue
            cast(Any, layer).__class__ = _FUSED[type(layer)]
            fused = cast(_FusedLayer, layer)
            fused.gain_save, fused.gain_backend = _save(name, layer, self.gain_memory), self.gain_backend
        if left_alone:
            _log.warning("gain_ops does not fuse these (IA)^3 layers: %s", _listed(left_alone))

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, which also makes new layers; these are fused."""
        super().inject_adapter(*args, **kwargs)
        self.fuse_layers()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's, after every layer was checked.

        Raises:
            ValueError: layers that share one weight, which each would scale; with safe_merge, merged values that are not
                finite. Nothing is changed.

        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's, after every layer was checked; raises as merge_adapter() does."""
        self._check_merge(adapter_names, safe_merge)
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe: bool) -> None:
        holders: dict[int, str] = {}
        for name, layer in _ia3_layers(self):
            if not isinstance(layer, FusedLinear):
                continue
            other = holders.setdefault(id(layer.get_base_layer().weight), name)
            if other != name:
                raise UsageError(
                    f"cannot merge: {other} and {name} share one weight, and each would scale it. Untie them."
                )
            if safe:
                layer.check_merge(name, adapter_names)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """The context that PeftModel enters around forward and generate, with their arguments, if it has such a method."""
        if kwargs.get("adapter_names") is not None:
            _refuse_adapter_names(kwargs)
        return nullcontext()


def _ia3_tuner(peft_model: nn.Module, action: str) -> IA3Model:
    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"{action} takes a PeftModel, got {type(peft_model).__name__}. Make one with peft.get_peft_model(model, "
            "IA3Config(...)), and give it before it is compiled or put into another module."
        )
    tuner = peft_model.base_model
    if not isinstance(tuner, IA3Model):
        raise UsageError(f"{action} serves PEFT's (IA)^3, and this PeftModel's method is {peft_model.peft_type}")
    return tuner


def _ia3_layers(tuner: IA3Model) -> Iterator[tuple[str, IA3Layer]]:
    return ((name, module) for name, module in tuner.model.named_modules() if isinstance(module, IA3Layer))


def _refuse_merged(tuner: IA3Model, why: str) -> None:
    merged = {adapter for _, layer in _ia3_layers(tuner) for adapter in layer.merged_adapters}
    if merged:
        raise UsageError(f"adapters are merged ({', '.join(sorted(merged))}): call unmerge_adapter() first. {why}")


def _obstacle(layer: IA3Layer) -> str | None:
    """Why a layer cannot be fused, or None."""
    if type(layer) not in _FUSED:
        return f"{type(layer).__module__}.{type(layer).__qualname__} is no linear layer of PEFT's own"
    return "its forward was replaced (such as by accelerate's hooks)" if "forward" in vars(layer) else None


def _listed(left_alone: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in left_alone.items())


def _save(name: str, layer: IA3Layer, memory: str) -> str:
    """What a layer that is not feedforward saves for backward, by the rule of gain_ops.apply."""
    if memory == "fast":
        return "output"
    return "input" if names_attention_output(name) or layer.out_features > layer.in_features else "output"


def _usable_weight(base: nn.Module) -> Tensor | None:
    """The base layer's weight as [out, in] for gain_linear; None where the layer itself must be called."""
    hooks = base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks
    if hooks or not (is_plain_linear(base) or is_plain_conv1d(base)):
        return None
    weight = cast(Tensor, base.weight)
    if weight.requires_grad:
        return None
    return weight.T if is_conv1d(base) else weight


def _refuse_adapter_names(kwargs: dict[str, Any]) -> None:
    if "adapter_names" in kwargs:
        raise UsageError(
            "adapter_names= asks for one adapter per sample, which (IA)^3 does not have (PEFT ignores it). Run one batch "
            "for each adapter: set_adapter(name), then its samples."
        )

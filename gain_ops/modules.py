"""The layers: a linear map with a frozen weight and a learned gain, in the place of an nn.Linear or round another one.

::

    output side:   y = gain * (x @ W.T) + b         gain [out_features]
    input side:    y = (x * gain) @ W.T + b         gain [in_features]         gain = 1 + delta

``delta`` is the only learned parameter: 1-D, contiguous, zeros at the start, float32 (float64 beside a float64 weight).
It stays float32 when the model is cast to half precision, where small updates would be lost.
"""

from collections.abc import Callable
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from gain_ops.dispatch import check_name
from gain_ops.functional import check_side_and_save, gain_linear, gain_scale
from gain_ops.linears import (
    describe,
    is_plain_conv1d,
    is_plain_linear,
    is_sharded,
    quantises_activations,
    refuse_sharded,
    sizes,
)

_Linear = TypeVar("_Linear", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Gained(nn.Module):
    """What the layers with a gain share: ``delta``, ``gain``, ``side``, and the way back to the plain layer.

    GainLinear, GainWrapper and gain_ops.integrations.transformers.GainConv1D; not built by itself.
    """

    delta: nn.Parameter
    in_features: int
    out_features: int
    side: str
    save: str
    backend: str
    _original: tuple[nn.Module, ...] = ()

    @property
    def gain(self) -> Tensor:
        """``1 + delta``: [out_features] on the output side, [in_features] on the input side."""
        return 1 + self.delta

    @property
    def features(self) -> int:
        """The length of delta, from the layer's sizes and not from the parameter, which ZeRO-3 holds partitioned."""
        return self.out_features if self.side == "output" else self.in_features

    @property
    def gained_dim(self) -> int:
        """The dimension of the stored weight that the gain scales: 0, or 1 if that holds the gain's features."""
        return 0 if self.side == "output" else 1

    @property
    def placed(self) -> bool:
        """Whether gain_ops.apply or load_gains put the layer where it is, so that remove() knows what was there."""
        return bool(self._original)

    def plain(self) -> nn.Module:
        """The layer without its gain, with the present parameters and mode: the very module replaced, if one was."""
        raise NotImplementedError(f"{type(self).__name__} has no plain layer")

    def stand_in_for(self, original: nn.Module) -> None:
        """Remember the module replaced, for plain(), without its parameters.

        They live here meanwhile: a second reference would keep a weight alive that a device move, fully_shard or
        load_state_dict(assign=True) has replaced.
        """
        self._original = (original,)  # in a tuple, or nn.Module would register it as a child
        for name in self._parameters.keys() & original._parameters.keys():
            original._parameters[name] = None

    def _new_delta(self, device: torch.device | None, dtype: torch.dtype) -> nn.Parameter:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.zeros(self.features, dtype=wide, device=device))

    def _take_over(self, linear: nn.Module) -> None:
        """Share linear's weight and bias, now frozen, its hooks and its training mode."""
        refuse_sharded(linear)
        linear.requires_grad_(False)
        weight = cast(nn.Parameter, linear.weight)
        self._parameters.update(weight=weight, bias=linear._parameters["bias"])
        self.delta = self._new_delta(weight.device, weight.dtype)
        self.training = linear.training
        share_hooks(linear, self)

    def _give_back(self, linear: _Linear) -> _Linear:
        """Hand the present parameters and the training mode to linear."""
        for name in linear._parameters:
            linear._parameters[name] = self._parameters[name]
        linear.training = self.training
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = (self.delta, self.delta.grad)

        def keep_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in (torch.bfloat16, torch.float16) and any(tensor is mine for mine in own):
                return tensor.detach().to(result.device)
            return result

        super()._apply(keep_wide, recurse)
        return self


class GainLinear(Gained, nn.Linear):
    """``y = gain * (x @ W.T) + b`` (output side) or ``y = (x * gain) @ W.T + b`` (input side), ``gain = 1 + delta``.

    An nn.Linear with a frozen weight and bias and a learned ``delta``; at delta = 0 it is the plain linear.

    Args:
        in_features: the last size of x.
        out_features: the last size of y.
        bias: whether there is a (frozen) bias. The gain does not scale it.
        side: which features the gain scales, "output" or "input".
        save: what is kept for backward, "auto", "output" or "input"; see gain_ops.gain_linear.
        backend: "auto", "triton", "cuda" or "eager"; see gain_ops.dispatch.
        device: where the parameters are made; "meta" works, with to_empty() and reset_parameters() after it.
        dtype: of weight and bias. delta is float32, or float64 beside a float64 weight.

    Shapes: x [..., in_features] -> y [..., out_features]; weight [out_features, in_features]; bias [out_features];
    delta [out_features] or [in_features].

    Raises:
        ValueError: a side, save or backend that does not exist, or save="output" on the input side.

    Source: GAIN, arXiv 2604.04516.

    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        side: str = "output",
        save: str = "auto",
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(side, save, backend)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.side, self.save, self.backend = side, save, backend
        self.delta = self._new_delta(self.weight.device, self.weight.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, side: str = "output", save: str = "auto", backend: str = "auto") -> Self:
        """A GainLinear round linear's own weight and bias: the same Parameters, now frozen; nothing is copied.

        Training mode and hooks are kept. A linear on the meta device gives a layer on the meta device.

        Raises:
            TypeError: not nn.Linear's own forward on a floating [out, in] weight, or it holds more than weight and bias;
                GainWrapper takes those.
            ValueError: a weight already sharded, or options that do not exist.

        """
        if not is_plain_linear(linear):
            raise TypeError(
                "from_linear takes nn.Linear's own forward on an ordinary floating [out, in] weight and no other tensors, "
                f"got {describe(linear)}. {_instead(linear)}"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            side=side,
            save=save,
            backend=backend,
            device="meta",  # nothing is allocated
        )
        layer._take_over(linear)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]."""
        return gain_linear(
            input, self.weight, self.delta, self.bias, side=self.side, save=self.save, backend=self.backend
        )

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does, set the gain to 1: for a layer made on "meta", after to_empty()."""
        super().reset_parameters()
        if "delta" in self._parameters:  # nn.Linear's __init__ comes here before there is one
            nn.init.zeros_(self.delta)

    def plain(self) -> nn.Linear:
        """The nn.Linear without the gain, on the same Parameters: the very module that was replaced, if one was."""
        if self.placed:
            return self._give_back(cast(nn.Linear, self._original[0]))
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        share_hooks(self, linear)
        return self._give_back(linear)

    def extra_repr(self) -> str:
        """nn.Linear's, with the side and what is kept for backward."""
        return f"{super().extra_repr()}, side={self.side}, save={self.save}"


class GainWrapper(Gained):
    """A gain round a linear map that is not a plain nn.Linear: a quantised one, say, or one with a forward of its own.

    ::

        output side:   y = gain * (base(x) - b) + b  =  base(x) + delta * (base(x) - b)
        input side:    y = base(x * gain)

    with b = base.bias; without one y = gain * base(x). The form on the right is what is computed: it is exactly base(x)
    at delta = 0.

    Args:
        base: the module, linear in x but for ``base.bias``. It is frozen, and keeps its hooks.
        in_features: the last size of x.
        out_features: the last size of base(x).
        side: which features the gain scales, "output" or "input".
        backend: "auto", "triton", "cuda" or "eager"; see gain_ops.dispatch.

    Shapes: x [..., in_features] -> y [..., out_features] in base's output dtype; delta [out_features] or [in_features].
    Besides what base keeps, backward keeps one activation: base(x) - b on the output side, x on the input side. Round
    bitsandbytes' 4-bit linear, which keeps nothing, that is all, where QLoRA keeps x, in float32 by PEFT's default, and
    T x r. Round torchao's weight-only linears there is a copy of the unpacked weight, with a gain or without.

    Raises:
        ValueError: a side or backend that does not exist, or a base already sharded; in a forward on DTensors, a base with a
            bias that gives a sum over ranks.
        RuntimeError: in a forward that is to be differentiated, if base gives its input no gradient: activations that are
            quantised too, or a 4-bit layer that bitsandbytes has repacked for inference on a CPU.

    """

    def __init__(
        self, base: nn.Module, in_features: int, out_features: int, *, side: str = "output", backend: str = "auto"
    ) -> None:
        check_options(side, "auto", backend)
        super().__init__()
        refuse_sharded(base)
        self.in_features, self.out_features = in_features, out_features
        self.base = base.requires_grad_(False)
        self.side, self.save, self.backend = side, "auto", backend
        tensors = list(own_tensors(base).values())
        device = tensors[0].device if tensors else None
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        self.delta = self._new_delta(device, dtype)
        self.training = base.training
        # such a base cuts the gradient in every layer, so that x below needs none: x.requires_grad does not tell
        self._for_inference = quantises_activations(base)

    @property
    def weight(self) -> Any:
        """The base's weight, whatever it is: some models ask a projection for its dtype."""
        return getattr(self.base, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which the gain does not scale."""
        bias = getattr(self.base, "bias", None)
        return bias() if callable(bias) else bias  # a method in torch's own quantised layers

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]."""
        if self.side == "input":
            return self._through_base(gain_scale(input, self.delta, backend=self.backend))
        y = self._through_base(input)
        bias = self.bias
        if bias is None:
            return gain_scale(y, self.delta, backend=self.backend)
        if is_sharded(y) and any(placement.is_partial() for placement in cast(Any, y).placements):
            raise ValueError(
                f"{type(self.base).__name__} gives a sum over ranks that is left open (Partial), and its bias is to be taken "
                "out of it before the gain: let the base reduce its output"
            )
        # gain_scale multiplies by one plus what it gets: this is y + delta * (y - b).
        return y + gain_scale(y - bias.to(y.dtype), self.delta - 1, backend=self.backend)

    def _through_base(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.base(x))
        if torch.is_grad_enabled() and (x.requires_grad or (self._for_inference and self.delta.requires_grad)):
            self._refuse_cut(y)
        return y

    def _refuse_cut(self, y: Tensor) -> None:
        """Raise RuntimeError if base gave y without a gradient to its input: what lies below would train on a wrong one."""
        state = getattr(self.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            why = (
                "bitsandbytes has repacked its weight for inference on this CPU. Load the model anew and train before the "
                "first evaluation, or before that set support_avx512bf16_for_cpu = False on every Linear4bit"
            )
        elif not y.requires_grad:
            why = (
                "it rounds its input, or is for inference otherwise. Train on a base of which only weights are quantised "
                "(torchao's Int8WeightOnlyConfig, say), or evaluate under torch.no_grad()"
            )
        else:
            return
        raise RuntimeError(f"{describe(self.base)} gives its input no gradient: {why}.")

    def plain(self) -> nn.Module:
        """The base."""
        return self.base

    def stand_in_for(self, original: nn.Module) -> None:
        """Remember that the wrapper stands where its base was; the base keeps its parameters."""
        self._original = (original,)

    def extra_repr(self) -> str:
        """Sizes and side."""
        return f"in_features={self.in_features}, out_features={self.out_features}, side={self.side}"


def gain_layer(module: nn.Module, *, side: str = "output", save: str = "auto", backend: str = "auto") -> Gained:
    """The layer with a gain for any linear map: GainLinear, GainConv1D or, for everything else, GainWrapper.

    Raises:
        TypeError: a module without in_features and out_features.
        ValueError: a module already sharded, or options that do not exist.

    """
    if is_plain_linear(module):
        return GainLinear.from_linear(cast(nn.Linear, module), side=side, save=save, backend=backend)
    if is_plain_conv1d(module):
        from gain_ops.integrations.transformers import GainConv1D  # the module comes from there, so it is installed

        return GainConv1D.from_conv1d(module, side=side, save=save, backend=backend)
    features = sizes(module)
    if features is None:
        raise TypeError(f"{describe(module)} has no in_features and out_features: wrap it by hand in GainWrapper")
    return GainWrapper(module, *features, side=side, backend=backend)


def _instead(module: nn.Module) -> str:
    """What to do with a module that from_linear() does not take."""
    if isinstance(module, Gained):
        return "It has a gain already."
    if is_plain_conv1d(module):
        return "Take gain_ops.integrations.transformers.GainConv1D.from_conv1d()."
    return "It is not a linear map." if sizes(module) is None else "Wrap it: gain_ops.modules.GainWrapper."


def check_options(side: str, save: str, backend: str) -> None:
    """Raise ValueError for a side, save or backend that does not exist, or that do not go together."""
    check_side_and_save(side, save)
    check_name(backend)


def raw_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a linear map is frozen with, by name: its own tensors, or of a quantised layer those that use does not change."""
    from gain_ops.integrations.quantized import lasting_tensors  # it builds on this module

    lasting = lasting_tensors(module)
    return own_tensors(module) if lasting is None else lasting


def own_tensors(module: nn.Module, *, recurse: bool = True) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, tensor subclasses taken apart into the plain tensors in them."""
    tensors: dict[str, Tensor] = {}
    pending = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
    for name, tensor in pending:
        if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
            inner, _ = tensor.__tensor_flatten__()
            pending.extend((f"{name}.{part}", getattr(tensor, part)) for part in inner)
        else:
            tensors[name] = tensor
    return tensors


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Target runs source's hooks; the dictionaries are shared, so a handle removes its hook from both."""
    for name in _HOOKS:
        setattr(target, name, getattr(source, name))

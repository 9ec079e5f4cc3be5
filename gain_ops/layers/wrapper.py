"""The layer around a linear map that is not a plain nn.Linear, such as a quantised one."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from gain_ops.layers.gained import Gained, check_options
from gain_ops.layers.linears import describe, own_tensors, quantises_activations, refuse_sharded
from gain_ops.ops.linear import gain_scale
from gain_ops.utils.dtensors import is_sharded


class GainWrapper(Gained):
    """A gain around a linear map that is not a plain nn.Linear, such as a quantised one or one with a forward of its own.

    ::

        output side:   y = gain * (base(x) - b) + b  =  base(x) + delta * (base(x) - b)
        input side:    y = base(x * gain)

    with b = base.bias; without a bias y = gain * base(x). The layer computes the form on the right, which is exactly base(x)
    at delta = 0.

    Args:
        base: the module, linear in x except for ``base.bias``. It is frozen, and its hooks stay.
        in_features: the last size of x.
        out_features: the last size of base(x).
        side: which features the gain scales, "output" or "input".
        backend: "auto", "triton", "cuda" or "eager"; see gain_ops.ops.dispatch.

    Shapes: x [..., in_features] -> y [..., out_features] in base's output dtype; delta [out_features] or [in_features].

    Saved for backward, beside what base saves: one activation, base(x) - b on the output side and x on the input side.
    bitsandbytes' 4-bit linear saves nothing itself; QLoRA saves x there, in float32 by PEFT's default, and T x r. torchao's
    weight-only linears save a copy of the unpacked weight, with a gain or without.

    Raises:
        ValueError: a side or backend that does not exist, or a base already sharded; in a forward on DTensors, a base with a
            bias whose output is a Partial sum over ranks.
        RuntimeError: in a forward that is differentiated, a base that gives its input no gradient: its activations are
            quantised too, or bitsandbytes has repacked a 4-bit layer for inference on a CPU.

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
        # such a base cuts the gradient in every layer, so x in the layers below needs none: x.requires_grad does not show it
        self._for_inference = quantises_activations(base)

    @property
    def weight(self) -> Any:
        """The base's weight, of any kind: some models ask a projection for its dtype."""
        return getattr(self.base, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which the gain does not scale."""
        bias = getattr(self.base, "bias", None)
        return bias() if callable(bias) else bias  # a method in torch's own quantised layers

    def forward(self, input: Tensor, *more: Any, **options: Any) -> Tensor:
        """x [..., in_features] -> y [..., out_features]."""
        if more or options:
            raise TypeError(
                f"{describe(self.base)} is called with {1 + len(more) + len(options)} arguments, and a gain knows of x alone: "
                "leave it out of the targets"
            )
        if self._hooked:
            self.refuse_offloaded()
        if self.side == "input":
            return self.through_base(gain_scale(input, self.delta, backend=self.backend))
        y = self.through_base(input)
        bias = self.bias
        if bias is None:
            return gain_scale(y, self.delta, backend=self.backend)
        if is_sharded(y) and any(placement.is_partial() for placement in cast(Any, y).placements):
            raise ValueError(
                f"{type(self.base).__name__} returns a Partial sum over ranks, and its bias must be subtracted before the "
                "gain: let the base reduce its output"
            )
        # gain_scale multiplies by one plus what it gets: this is y + delta * (y - b).
        return y + gain_scale(y - bias.to(y.dtype), self.delta - 1, backend=self.backend)

    def through_base(self, x: Tensor) -> Tensor:
        """base(x) without the gain; raise for what a gain cannot scale, or where base would cut x's gradient."""
        y = cast(Tensor, self.base(x))
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{describe(self.base)} returns a {type(y).__name__}, and a gain scales a tensor: leave it out of the targets"
            )
        if torch.is_grad_enabled() and (x.requires_grad or (self._for_inference and self.delta.requires_grad)):
            self._refuse_cut(y)
        return y

    def _refuse_cut(self, y: Tensor) -> None:
        """Raise RuntimeError if base gives its input no gradient: the layers below would train on a wrong one."""
        state = getattr(self.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            why = (
                "bitsandbytes has repacked its weight for inference on this CPU. Load the model again and train before the "
                "first evaluation, or before it set support_avx512bf16_for_cpu = False on every Linear4bit"
            )
        elif not y.requires_grad:
            why = (
                "it rounds its input, or is for inference only. Train on a base with quantised weights alone (such as "
                "torchao's Int8WeightOnlyConfig), or evaluate under torch.no_grad()"
            )
        else:
            return
        raise RuntimeError(f"{describe(self.base)} gives its input no gradient: {why}.")

    def plain(self) -> nn.Module:
        """The base."""
        return self.base

    def stand_in_for(self, original: nn.Module) -> None:
        """Remember that the wrapper replaced its base; the base's parameters stay in it."""
        self._original = (original,)

    def extra_repr(self) -> str:
        """Sizes and side."""
        return f"in_features={self.in_features}, out_features={self.out_features}, side={self.side}"

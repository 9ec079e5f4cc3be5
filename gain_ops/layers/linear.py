"""The layer in the place of an nn.Linear: its weight frozen, and a learned gain.

::

    output side:   y = gain * (x @ W.T) + b         gain [out_features]
    input side:    y = (x * gain) @ W.T + b         gain [in_features]         gain = 1 + delta
"""

from typing import Self, cast

import torch
from torch import Tensor, nn

from gain_ops.layers.gained import Gained, check_options, frozen, share_hooks
from gain_ops.layers.linears import describe, is_plain_conv1d, is_plain_linear, sizes
from gain_ops.ops.linear import gain_linear
from gain_ops.ops.mixed import mixed_linear


class GainLinear(Gained, nn.Linear):
    """``y = gain * (x @ W.T) + b`` (output side) or ``y = (x * gain) @ W.T + b`` (input side), ``gain = 1 + delta``.

    An nn.Linear with a frozen weight and bias and a learned ``delta``; at delta = 0 it is the plain linear.

    Args:
        in_features: the last size of x.
        out_features: the last size of y.
        bias: whether there is a (frozen) bias. The gain does not scale it.
        side: which features the gain scales, "output" or "input".
        save: what is saved for backward, "auto", "output" or "input"; see gain_ops.gain_linear.
        backend: "auto", "triton", "cuda" or "eager"; see gain_ops.ops.dispatch.
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
        """A GainLinear around linear's own weight and bias: the same Parameters, now frozen; nothing is copied.

        The layer has linear's training mode and hooks. A linear on the meta device gives a layer on the meta device.

        Raises:
            TypeError: not nn.Linear's own forward on a floating [out, in] weight, or a module that holds more than weight
                and bias; GainWrapper takes these.
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
        if self._hooked:
            self.refuse_offloaded()
        bias = None if self.bias is None else frozen(self.bias)
        if self.mixed is not None and self.mixed.ids is not None:
            index = self.mixed.rows(input)
            return mixed_linear(
                input, frozen(self.weight), self.mixed.delta, index, bias, side=self.side, backend=self.backend
            )
        return gain_linear(
            input, frozen(self.weight), self.delta, bias, side=self.side, save=self.save, backend=self.backend
        )

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does, and set the gain to 1: for a layer made on "meta", after to_empty()."""
        super().reset_parameters()
        if "delta" in self._parameters:  # nn.Linear's __init__ calls this before delta exists
            nn.init.zeros_(self.delta)

    def plain(self) -> nn.Linear:
        """The nn.Linear without the gain, on the same Parameters: the replaced module object, if there was one."""
        if self.placed:
            return self._give_back(cast(nn.Linear, self._original[0]))
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        share_hooks(self, linear)
        return self._give_back(linear)

    def extra_repr(self) -> str:
        """nn.Linear's, with the side and what is saved for backward."""
        return f"{super().extra_repr()}, side={self.side}, save={self.save}"


def _instead(module: nn.Module) -> str:
    """What to do with a module that from_linear() does not take."""
    if isinstance(module, Gained):
        return "It has a gain already."
    if is_plain_conv1d(module):
        return "Take gain_ops.layers.conv1d.GainConv1D.from_conv1d()."
    return "It is not a linear map." if sizes(module) is None else "Wrap it: gain_ops.layers.wrapper.GainWrapper."

"""Hugging Face transformers' Conv1D, GPT-2's linear map, with a gain."""

from typing import Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gain_ops.layers.gained import Gained, check_options, frozen, share_hooks
from gain_ops.layers.linears import describe, is_plain_conv1d
from gain_ops.ops.linear import gain_linear


class GainConv1D(Gained, Conv1D):
    """transformers' Conv1D (GPT-2's linear map, weight [in, out]), weight and bias frozen, with a learned ``delta``.

    ::

        output side:   y = gain * (x @ weight) + b         gain [nf]
        input side:    y = (x * gain) @ weight + b         gain [nx]         gain = 1 + delta

    ``side`` names the features of the linear map, not rows of the stored weight: an output feature is a row of an
    nn.Linear weight [out, in] and a COLUMN of a Conv1D weight [in, out]. GAIN's paper has 46K to 230K parameters. These
    counts fit GPT-2 Large with the rows of Conv1D's weight scaled, which is side="input" here: 36 x 1280 = 46,080 with the
    attention output projections, 36 x (1280 + 5120) = 230,400 with the FFN's as well.

    Args:
        nf: number of output features.
        nx: number of input features.
        side: which features the gain scales, "output" or "input".
        save: what is saved for backward, "auto", "output" or "input"; see gain_ops.gain_linear.
        backend: "auto", "triton", "cuda" or "eager"; see gain_ops.ops.dispatch.

    Shapes: x [..., nx] -> y [..., nf]; weight [nx, nf]; bias [nf]; delta [nf] or [nx], float32 (float64 beside a
    float64 weight). The weight is read through a transposed view, never copied.

    Raises:
        ValueError: a side, save or backend that does not exist, or save="output" on the input side.

    Source: GAIN, arXiv 2604.04516.

    """

    def __init__(self, nf: int, nx: int, *, side: str = "output", save: str = "auto", backend: str = "auto") -> None:
        check_options(side, save, backend)
        super().__init__(nf, nx)
        self.requires_grad_(False)
        self.in_features, self.out_features = nx, nf
        self.side, self.save, self.backend = side, save, backend
        self.delta = self._new_delta(self.weight.device, self.weight.dtype)

    @property
    def gained_dim(self) -> int:
        """The dimension of the stored weight [in, out] that the gain scales."""
        return 1 if self.side == "output" else 0

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module, *, side: str = "output", save: str = "auto", backend: str = "auto") -> Self:
        """A GainConv1D around conv1d's own weight and bias: the same Parameters, now frozen; nothing is copied.

        Raises:
            TypeError: not transformers' Conv1D, a weight that is not an ordinary floating [in, out] Parameter, or a module
                that holds more than weight and bias.
            ValueError: a weight already sharded, or options that do not exist.

        """
        if not is_plain_conv1d(conv1d):
            raise TypeError(
                "from_conv1d takes a transformers Conv1D with an ordinary floating [in, out] weight and no other tensors, got "
                f"{describe(conv1d)}. Wrap it: gain_ops.layers.wrapper.GainWrapper."
            )
        with torch.device("meta"):  # nothing is allocated
            layer = cls(cast(int, conv1d.nf), cast(int, conv1d.nx), side=side, save=save, backend=backend)
        layer._take_over(conv1d)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., nx] -> y [..., nf]."""
        if self._hooked:
            self.refuse_offloaded()
        return gain_linear(
            x,
            frozen(self.weight).T,
            self.delta,
            frozen(self.bias),
            side=self.side,
            save=self.save,
            backend=self.backend,
        )

    def reset_parameters(self) -> None:
        """Draw the weight as Conv1D does, and zero bias and delta: for a layer made on "meta", after to_empty()."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.delta)

    def plain(self) -> Conv1D:
        """The Conv1D without the gain, on the same Parameters: the replaced module object, if there was one."""
        if self.placed:
            return self._give_back(cast(Conv1D, self._original[0]))
        with torch.device("meta"):
            conv1d = Conv1D(self.nf, self.nx)
        share_hooks(self, conv1d)
        return self._give_back(conv1d)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(nf={self.nf}, nx={self.nx}, side={self.side}, save={self.save})"

"""The output side without a GEMM of ours: what a fused GEMM has to beat.

``Composed``      z = x @ W.T by the vendor, y = gain * z by Triton's pass; backward by Triton's pass, then the vendor's dx.
``KeptWeight``    y = x @ W'.T and dx = dy @ W' by the vendor alone, W' = gain * W made once an optimizer step and not timed;
                  ddelta = sum_t dy * y / gain in a pass of two reads. It keeps y, and a gain must not be near 0.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gain_ops import GainLinear
from gain_ops.ops import raw

PASSES = "triton"  # whose passes


class Composed(GainLinear):
    """The layer as two calls."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Composed.apply(input, self.delta, self.weight)
        return y


class _Composed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(x, weight)
        ctx.save_for_backward(z, delta, weight)
        return raw.scale(z, delta, PASSES)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        z, delta, weight = ctx.saved_tensors
        dz, ddelta = raw.backward(dy, z, delta, PASSES)
        return dz @ weight, ddelta.to(delta.dtype), None


class KeptWeight(GainLinear):
    """The layer as one call, of a weight that is kept."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _KeptWeight.apply(input, self.delta, self.scaled_weight())
        return y

    def scaled_weight(self) -> Tensor:
        """W' for the present delta, kept."""
        version = self.delta._version
        if getattr(self, "_made_for", None) != version:
            gain = 1 + self.delta.detach()
            self._kept, self._made_for = (gain[:, None] * self.weight).to(self.weight.dtype), version
        return self._kept


class _KeptWeight(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, scaled: Tensor) -> Tensor:
        y = F.linear(x, scaled)
        ctx.save_for_backward(y, delta, scaled)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        y, delta, scaled = ctx.saved_tensors
        return dy @ scaled, (raw.ddelta(dy, y, PASSES) / (1 + delta)).to(delta.dtype), None

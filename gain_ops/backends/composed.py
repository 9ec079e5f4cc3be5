"""The GEMMs composed: the vendor's product and one pass, which every fused GEMM has to beat."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gain_ops.backends.interface import Gemms


@dataclass(frozen=True)
class Composed(Gemms):
    """The GEMM ops out of a backend's passes: right for every operand, at the price of reading [T, out] again."""

    scale_and_shift: Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]
    """``gain * z + b`` of z [T, n], delta, bias, and whether the result may take z's memory."""
    backward_pass: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """``gain * dy`` and ``sum_t dy * z`` of dy, z [T, n] and delta."""
    ddelta_pass: Callable[[Tensor, Tensor], Tensor]
    """``sum_t dy * z`` of dy and z [T, n]."""

    def linear(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        """Lines (1), (2): -> y [T, out], in z's memory where the pass can."""
        return self.scale_and_shift(F.linear(x, weight), delta, bias, True)

    def linear_z(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Lines (1), (2), and z: -> y [T, out], z [T, out]."""
        z = F.linear(x, weight)
        return self.scale_and_shift(z, delta, bias, False), z

    def backward_recompute(self, dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Lines (1), (3), (4): -> dz [T, out], ddelta [out]."""
        return self.backward_pass(dy, F.linear(x, weight), delta)

    def ddelta_recompute(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Lines (1), (4): -> [out]."""
        return self.ddelta_pass(dy, F.linear(x, weight))

    def backward_input(self, dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Lines (6), (7): -> dx [T, in], ddelta [in], by the pass with dy @ W and x in the places of dy and z."""
        return self.backward_pass(torch.mm(dy, weight), x, delta)

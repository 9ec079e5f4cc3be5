"""A frozen linear and a learned scale, in plain PyTorch, to compare the fused layers with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scaled(nn.Module):
    """The obvious code: the scale in W's dtype, a pass of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.s = nn.Parameter(torch.ones(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight) * self.s

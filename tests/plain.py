"""The gained layer as anybody would write it: what gradients and memory are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainGain(nn.Module):
    """The composite without any of the package's code: F.linear and a multiplication, every parameter its own."""

    def __init__(self, linear: nn.Module, side: str = "output") -> None:
        super().__init__()
        transposed = type(linear).__name__ == "Conv1D"
        weight = linear.weight.detach()
        self.weight = nn.Parameter((weight.T if transposed else weight).clone(), requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.side = side
        features = self.weight.shape[0 if side == "output" else 1]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.delta = nn.Parameter(torch.zeros(features, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        gain = 1 + self.delta
        if self.side == "input":
            return F.linear((x * gain).to(x.dtype), self.weight, self.bias)
        z = F.linear(x, self.weight)
        y = (z * gain).to(z.dtype)
        return y if self.bias is None else (y + self.bias).to(z.dtype)

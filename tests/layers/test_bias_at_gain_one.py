"""Why the bias is added after the gain (decision 8): z as the GEMM gave it, whatever the size of the bias."""

import pytest
import torch
from torch import nn

import gain_ops
from gain_ops.testing import assert_no_worse_than_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.1, 100.0])
def test_a_large_bias_takes_nothing_from_the_gradient(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, dy = torch.randn(64, 48, dtype=dtype), torch.randn(40, 48, dtype=dtype), torch.randn(64, 40, dtype=dtype)
    bias = (size * weight.float().norm(dim=1)).to(dtype)
    delta = nn.Parameter(0.1 * torch.randn(40))
    y = gain_ops.gain_linear(x, weight, delta, bias)
    (ddelta,) = torch.autograd.grad(y, delta, dy)
    z = x.double() @ weight.double().T
    torchs = (dy.float() * torch.nn.functional.linear(x, weight).float()).sum(0)
    assert_no_worse_than_torch("ddelta", ddelta, torchs, (dy.double() * z).sum(0))
    frozen = torch.nn.functional.linear(x, weight, bias)
    at_one = gain_ops.gain_linear(x, weight, torch.zeros(40), bias)
    assert_no_worse_than_torch("y at delta = 0", at_one, frozen, z + bias.double())

"""A sharded model that is cast to half precision: delta, its shard and its gradient stay float32."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from gain_ops.layers.linear import GainLinear

from support.small_training import mesh_of


def _cast(how, dtype):
    """What casting changed of a shard's dtypes and values, and whether it trains on after it."""
    model = nn.Sequential(GainLinear(4, 6))
    nn.init.normal_(model[0].delta, std=1e-3)
    before = model[0].delta.detach().clone()
    if how == "fully_shard":
        fully_shard(model, mesh=mesh_of())
    else:
        model[0].delta = nn.Parameter(distribute_tensor(model[0].delta.detach(), mesh_of(), [Shard(0)]))
    delta = model[0].delta
    delta.grad = delta.detach() / 3
    gradient = delta.grad
    model.to(dtype)
    delta = model[0].delta
    assert (delta.dtype, delta.to_local().dtype) == (torch.float32, torch.float32)
    assert torch.equal(delta.full_tensor(), before)
    assert (delta.grad.dtype, delta.grad.to_local().dtype) == (torch.float32, torch.float32)
    assert torch.equal(delta.grad.full_tensor(), gradient.full_tensor())
    if how == "fully_shard":
        assert model[0].weight.to_local().dtype == dtype
        model.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).float().sum().backward()
        assert delta.grad.to_local().dtype == torch.float32
        torch.optim.SGD([delta], lr=1e-5).step()
        assert not torch.equal(delta.full_tensor(), before)
    assert model.double()[0].delta.to_local().dtype == torch.float64
    assert model.float()[0].delta.to_local().dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fully_shard", "distribute_tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sharded_delta_is_not_rounded(two, how, dtype):
    two(_cast, how, dtype)

"""What a training step sends: counted as it runs, it is what the parameters say, for gains, LoRA and full fine-tuning."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contestants import models
from benchmarks.contestants.sites import Architecture
from benchmarks.suites import traffic
from gain_ops.integrations.tensor_parallel import place_gains
from gain_ops.planning.methods import FROZEN

WORLD = 2
TINY = Architecture("tiny", "llama", 24, 42, 3, 2, 1, 51)  # odd sizes, which FSDP2 pads
EVEN = dataclasses.replace(TINY, kv_heads=2)  # a head is not split
METHODS = ("gain-ffn", "gain-ffn, input side, fused MLP", *traffic.METHODS[1:])


def built(method, architecture=TINY):
    torch.manual_seed(0)
    model = models.build(architecture, "cpu", torch.bfloat16)
    models.adapt(model, method)
    return model


def step(model):
    ids = torch.randint(TINY.vocabulary, (1, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def counted(engine, method):
    """Payloads of the third step: DDP tells the others in the second how it has sorted its buckets."""
    model = built(method)
    if engine == "DDP":
        model = DistributedDataParallel(model)
    else:
        for block in models.blocks(model):
            fully_shard(block)
        fully_shard(model)
    step(model), step(model)
    with traffic.Traffic() as seen:
        step(model)
    return dict(seen.payload)


@pytest.mark.parametrize("method", METHODS)
def test_ddp_sends_the_gradients_of_what_is_trained_and_nothing_else(two, method):
    predicted = traffic.data_parallel(built(method))
    assert two(counted, "DDP", method) == [predicted] * WORLD


@pytest.mark.parametrize("method", METHODS)
def test_fsdp_gathers_the_model_and_scatters_the_gradients_of_what_is_trained(two, method):
    model = built(method)
    predicted = traffic.sharded(model, models.blocks(model), WORLD)
    assert two(counted, "FSDP2", method) == [predicted] * WORLD


def counted_by_tensor(method):
    model = built(method, EVEN)
    styles = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    styles |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
    for block in models.blocks(model):
        parallelize_module(block, init_device_mesh("cpu", (WORLD,)), styles)
    place_gains(model)
    with traffic.Traffic() as seen:
        step(model)
    return dict(seen.payload)


def test_tensor_parallelism_sends_what_the_frozen_model_does_and_the_gradients_of_the_gains(two):
    (frozen, _), (gained, _) = two(counted_by_tensor, FROZEN), two(counted_by_tensor, "gain-ffn")
    # a block's sums: of o_proj and down_proj in the forward; of the inputs of q, k, v, gate and up in the backward
    activation = 8 * EVEN.hidden * torch.bfloat16.itemsize
    assert frozen == {"all_reduce": 7 * EVEN.layers * activation}
    gradients = traffic.data_parallel(built("gain-ffn", EVEN))["all_reduce"]
    assert gained == {"all_reduce": frozen["all_reduce"] + gradients}

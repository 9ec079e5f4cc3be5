"""A Llama small enough to train in a blink, on one process or as one of several: what the tests here compare."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import gain_ops

BATCH = 4
STEPS = 10


def config(**changes: object) -> LlamaConfig:
    """Two layers, and a down projection large enough that its fingerprint is not taken of all values."""
    sizes: dict[str, object] = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 200, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    return LlamaConfig(**{**sizes, **heads, **changes})


def build(
    *,
    side: str = "output",
    memory: str = "fast",
    fuse_mlp: bool = False,
    fuse_residual: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """With gains that have learned something already, the same in every process."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).to(dtype)
    gain_ops.apply(model, "gain-ffn", side=side, memory=memory, fuse_mlp=fuse_mlp, fuse_residual=fuse_residual)
    with torch.no_grad():
        for _, delta in deltas(model):
            delta.normal_(std=0.2)
    return model


def deltas(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on the gains."""
    return torch.optim.AdamW([delta for _, delta in deltas(model)], lr=1e-2)


def batches(first: int = 0, last: int = STEPS) -> Iterator[Tensor]:
    """[BATCH, 12] token ids, a step's the same whenever it is asked for."""
    for step in range(first, last):
        yield torch.randint(0, 50, (BATCH, 12), generator=torch.Generator().manual_seed(step))


def mesh_of() -> DeviceMesh:
    """All processes in a row."""
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: LlamaForCausalLM, mesh: DeviceMesh, **options: object) -> LlamaForCausalLM:
    """fully_shard() every layer, then the rest."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def own_part(ids: Tensor) -> Tensor:
    """The part of a batch that this process works on: all, where there is no group."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else ids


def backward(model: nn.Module, ids: Tensor) -> float:
    """The mean loss of the whole batch; its gradients are in the parameters."""
    part = own_part(ids)
    loss = model(part, labels=part).loss
    loss.backward()
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[Tensor]) -> list[float]:
    """One optimizer step for each batch; the losses."""
    losses = []
    for ids in steps:
        losses.append(backward(model, ids))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A plain copy of each tensor, gathered where it is sharded; every rank must call it."""
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in tensors}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every delta, whole."""
    return whole((name, delta.grad) for name, delta in deltas(model))

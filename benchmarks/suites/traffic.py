"""What processes send each other in a training step: counted, and by a formula that the count confirms.

    python -m benchmarks.suites.traffic            the formula's table for models of true size

``Traffic`` counts every collective of a step while it runs. ``data_parallel`` and ``sharded`` say what it has to be, from
nothing but the model's parameters: under DistributedDataParallel, and under FSDP2 with fully_shard() on every block and then
on the model. A payload is one process's, and what a process sends for it in a ring of n:

    all_reduce        the tensor                            2 (n - 1) / n
    all_gather        the result, the whole tensor          (n - 1) / n
    reduce_scatter    the operand, the whole tensor         (n - 1) / n
    broadcast         the tensor                            (n - 1) / n
"""

import collections
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contestants import models
from benchmarks.contestants.sites import ARCHITECTURES, Architecture
from gain_ops.planning.methods import FULL

METHODS = ("gain-ffn", models.LORA, FULL)

Payload = dict[str, int]
"""Bytes by the kind of collective."""

_KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
}
_SENT = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}  # of (n - 1) / n of the payload


class Traffic(TorchDispatchMode):
    """Within it ``payload`` gets the bytes of every collective that this process takes part in, the backward's too.

    Raises:
        ValueError: in the step, on a collective of a kind that is not listed above.

    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Payload = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # the collectives in it are wanted
        namespace, name = func.namespace, func.overloadpacket.__name__.strip("_")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            found = [kind for prefix, kind in _KINDS.items() if name.startswith(prefix)]
            if not found:
                raise ValueError(f"{namespace}::{name} is a collective whose bytes are not counted")
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.payload[found[0]] += max((t.nbytes for t in tensors), default=0)
            return result
        return func(*args, **(kwargs or {}))


def sent(payload: Payload, world: int) -> int:
    """The bytes that each process sends for it in rings of ``world`` processes."""
    return round(sum(_SENT[kind] * size for kind, size in payload.items()) * (world - 1) / world)


def data_parallel(model: nn.Module) -> Payload:
    """DDP: all gradients are all-reduced, in the parameters' dtypes, and the buffers sent from the first process."""
    return {
        "all_reduce": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "broadcast": sum(b.nbytes for b in model.buffers()),
    }


def sharded(model: nn.Module, blocks: Sequence[nn.Module], world: int) -> Payload:
    """FSDP2: each block is gathered for its forward and again for its backward, the rest once; gradients are scattered.

    A parameter is padded to whole rows for every process. No mixed precision policy.
    """
    inside = {id(p) for block in blocks for p in block.parameters()}
    payload: Payload = collections.Counter()
    for parameter in model.parameters():
        rows = parameter.shape[0]
        padded = parameter.nbytes // rows * -(-rows // world) * world
        payload["all_gather"] += padded * (2 if id(parameter) in inside else 1)
        payload["reduce_scatter"] += padded if parameter.requires_grad else 0
    return payload


def table(architecture: Architecture, world: int) -> str:
    """Markdown: what each of ``world`` processes sends in a step, by the formulas; bf16 weights, on the meta device."""
    lines = [
        f"| {architecture.name}, {world} processes, predicted | trained | DDP | FSDP2, weights | FSDP2, gradients |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in METHODS:
        model = models.build(architecture)
        models.adapt(model, name)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        payload = sharded(model, models.blocks(model), world)
        figures = [
            sent(data_parallel(model), world),
            *(sent({kind: payload[kind]}, world) for kind in ("all_gather", "reduce_scatter")),
        ]
        lines.append(f"| {name} | {trained:,} | {' | '.join(map(_size, figures))} |")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


if __name__ == "__main__":
    print("\n\n".join(table(ARCHITECTURES[name], 8) for name in ("Llama-3-8B", "Llama-3-70B")))

"""What Liger's SwiGLU saves for backward, without Liger, whose kernels need a GPU: counted here, never timed.

Liger's LigerSiLUMulFunction saves gate and up, computes silu again in its backward and writes the gradients over the two
(liger_kernel/ops/swiglu.py, read at commit 06e2af7). SwiGlu does the same with ops that are opaque, as Liger's kernels are:
memory that torch allocates within them on a CPU does not count on meta.
"""

import types
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gain_ops.measure.meta_models import blocks


class SwiGlu(torch.autograd.Function):
    """``h = silu(gate) * up``, which saves gate and up and overwrites both with their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up [..., n] -> h [..., n]."""
        ctx.save_for_backward(gate, up)
        return cast(Tensor, _swiglu(gate, up))

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dh [..., n] -> dgate, dup."""
        gate, up = ctx.saved_tensors
        _swiglu_backward(dh, gate, up)
        return gate, up


def put(model: nn.Module) -> None:
    """Let every FFN of a Llama or Qwen2 compute its hidden activation by SwiGlu, in place; its down projection is called."""
    for block in blocks(model):
        mlp = cast(Any, block).mlp
        mlp.forward = types.MethodType(_forward, mlp)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    return cast(Tensor, mlp.down_proj(SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x))))


@torch.library.custom_op("gain_ops_benchmarks::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("gain_ops_benchmarks::swiglu_backward", mutates_args=("gate", "up"))
def _swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> None:
    share = torch.sigmoid(gate)
    silu = gate * share
    dgate = dh * (silu * (1 - share) + share) * up
    torch.mul(dh, silu, out=up)
    gate.copy_(dgate)


@_swiglu_backward.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor) -> None:
    pass

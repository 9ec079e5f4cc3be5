"""Liger's RMSNorm as the memory sees it: one kernel forward that keeps x and one number a token, one kernel backward.

As liger_swiglu.py: it stands for Liger's kernels where bytes are counted, and is never timed. Beside these it would form the
gradient of the norm's weight, in partial sums a multiprocessor, frozen or not.
"""

import types
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gain_ops.measure.meta_models import blocks
from gain_ops.models.decoder_layout import norm_form


class RmsNorm(Function):
    """y = rms_norm(x) * weight, with the weight frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., n] -> y [..., n]."""
        y: Tensor
        y, r = _rms_norm(x, weight)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """dy [..., n] -> dx, in dy's memory."""
        _rms_norm_backward(dy, *ctx.saved_tensors)
        return dy, None


def put(model: nn.Module) -> None:
    """Let every RMSNorm in the decoder layers run so, in place."""
    for block in blocks(model):
        for module in block.modules():
            if norm_form(cast(Any, type(module))) is not None:
                module.forward = types.MethodType(_forward, module)


def _forward(norm: Any, x: Tensor) -> Tensor:
    return cast(Tensor, RmsNorm.apply(x, norm.weight))


@torch.library.custom_op("gain_ops_benchmarks::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    return (x.float() * r).to(x.dtype) * weight, r


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("gain_ops_benchmarks::rms_norm_backward", mutates_args=("dy",))
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> None:
    n = x.float() * r
    v = dy.float() * weight.float()
    dy.copy_(r * (v - n * (v * n).mean(-1, keepdim=True)))


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> None:
    pass

"""What every public function does to its arguments before autograd: check, flatten, ask whether a transform is active."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gain_ops.utils.dtensors import is_sharded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def flatten(x: Tensor) -> Tensor:
    """[..., n] -> [T, n], before autograd, so that one compiled graph serves every rank."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def unflatten(y: Tensor, like: Tensor) -> Tensor:
    """[T, m] -> [..., m], the leading sizes those of ``like``."""
    return y if like.dim() == 2 else y.view(*like.shape[:-1], y.shape[-1])


def transformed() -> bool:
    """Whether plain torch has to compute: a torch.func transform, forward-mode, torch.jit.trace or an export to ONNX.

    Plain torch supports them all; a Function needs rules, and other runtimes do not have the ops.
    """
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or bool(forward_ad._current_level >= 0)


def check_features(x: Tensor, features: int, delta: Tensor, meaning: str) -> None:
    """Raise ValueError unless delta is [features] on x's device; ``meaning`` says which features."""
    if delta.dim() != 1 or delta.shape[0] != features:
        raise ValueError(f"delta must be [{features}] ({meaning}), got shape {tuple(delta.shape)}")
    check_device(x, delta, "delta")


def check_frozen_map(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> None:
    """Raise unless x [..., in], a frozen weight [out, in] and bias [out] are a linear map on one device, all floating."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., in_features={weight.shape[1]}] for weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, but a gained weight is frozen and dW is never formed. "
            "Call weight.requires_grad_(False) (gain_ops.apply does), or train the full weight with torch.nn.functional.linear."
        )
    if bias is None:
        check_floating(x=x, weight=weight, delta=delta)
    else:
        check_floating(x=x, weight=weight, delta=delta, bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [out_features={weight.shape[0]}] or None, got shape {tuple(bias.shape)}")
        check_device(x, bias, "bias")
    check_device(x, weight, "weight")


def check_offsets(x: Tensor, offsets: Tensor) -> None:
    """Raise unless x is [S, n] and offsets, the end of each expert's rows, are [E] in int32 on x's device."""
    if x.dim() != 2:
        raise ValueError(f"rows that are sorted by expert must be [S, n], got shape {tuple(x.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be [E], the end of each expert's rows, got shape {tuple(offsets.shape)}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, as those of torch.nn.functional.grouped_mm, got {offsets.dtype}")
    check_device(x, offsets, "offsets")


def check_expert_rows(x: Tensor, experts: int, features: int, rows: Tensor, name: str, meaning: str) -> None:
    """Raise ValueError unless ``rows``, a delta or a bias, is [E, features] on x's device; ``meaning`` says which features."""
    if rows.shape != (experts, features):
        raise ValueError(
            f"{name} must be [{experts}, {features}] (a row for each of the offsets, {meaning}), got shape "
            f"{tuple(rows.shape)}"
        )
    check_device(x, rows, name)


def check_device(x: Tensor, other: Tensor, name: str) -> None:
    """Raise ValueError unless both are on one device."""
    if other.device != x.device:
        raise ValueError(f"x is on {x.device} and {name} is on {other.device}: move them to one device")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError for a dtype that no backend computes in."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def any_sharded(*arguments: object) -> bool:
    """Whether one of them is a DTensor."""
    return any(map(is_sharded, arguments))

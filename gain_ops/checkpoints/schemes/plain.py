"""The scheme for weights that are stored as plain floating numbers: each row is scaled and rounded once."""

import math

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Edit, Layer, Rounding
from gain_ops.gainfiles.rounding import lost_gains

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain(layer: Layer) -> bool:
    """Whether it is a floating matrix and at most a bias, and so no quantised layer."""
    weight = layer.tensors.get("weight")
    plain = weight is not None and weight.dtype in DTYPES and len(weight.shape) == 2
    return plain and layer.tensors.keys() <= {"weight", "bias"}


def edits(layer: Layer, *, transposed: bool = False) -> list[Edit]:
    """The edit of a plain weight.

    ::

        side="output":  W <- diag(gain) @ W            side="input":  W <- W @ diag(gain)            b unchanged

    The product runs in float32 (float64 for float64) and is rounded once. gain_ops.absorb() in memory gives the same bits.

    Args:
        layer: with "weight" [out, in] in float64, float32, bfloat16 or float16.
        transposed: the weight is stored as [in, out], which transformers' Conv1D does.

    Raises:
        CheckpointError: no such weight, more in the layer than weight and bias, or a gain of another length.

    """
    if not is_plain(layer):
        found = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in layer.tensors.items())
        raise CheckpointError(f"{layer.name} is not a plain linear layer: it has {found.replace('torch.', '')}")
    weight = layer.tensors["weight"]
    dim = int((layer.side == "output") == transposed)
    if layer.gain.numel() != weight.shape[dim]:
        raise CheckpointError(
            f"{layer.name} takes {weight.shape[dim]} gains on the {layer.side} side, the file has {layer.gain.numel()}"
        )
    gain = layer.gain.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)

    def rewrite(block: Tensor, start: int) -> tuple[Tensor, Rounding]:
        values = block.view(weight.dtype)
        scale = gain if dim == 1 else gain[start : start + len(values), None]
        scaled = (values.to(gain.dtype) * scale).to(weight.dtype)
        errors = rounding(scaled, values.double() * scale.double())
        if not math.isfinite(errors.absolute):
            why = "overflows with its gain" if values.isfinite().all() else "is not finite to begin with"
            raise CheckpointError(f"{layer.name}: its weight {why} in {weight.dtype}")
        return scaled.view(torch.uint8), errors

    return [Edit(layer.name, weight.name, weight.region, rewrite, lost=lost_gains(gain - 1, weight.dtype))]


def rounding(stored: Tensor, exact: Tensor) -> Rounding:
    """The largest errors of ``stored`` against the float64 ``exact``; not finite where a stored value is not."""
    if not exact.numel():
        return Rounding()
    error = (stored.double() - exact).abs_()
    absolute = error.max().item()
    relative = error.div_(exact.abs().clamp_min_(torch.finfo(torch.float64).tiny)).max().item()
    return Rounding(absolute, relative)

"""A stored tensor that takes the gain by itself, rounded once; and the errors of a layer where none does."""

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Edit, InexactError, Layer, Rounding, Stored
from gain_ops.checkpoints.schemes.plain import DTYPES, rounding
from gain_ops.gainfiles.rounding import lost_gains

OTHER_SIDE = "its scales belong to outputs, and the gain to inputs"
REMEDY = "Absorb into the unquantised checkpoint and quantise the result"


def tensor_of(layer: Layer, name: str) -> Stored:
    """The layer's tensor of this name.

    Raises:
        CheckpointError: it has none.

    """
    if name not in layer.tensors:
        raise unknown(layer)
    return layer.tensors[name]


def unknown(layer: Layer) -> CheckpointError:
    """The error for a layer whose tensors are not those of its format."""
    found = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in layer.tensors.items())
    return CheckpointError(f"{layer.name} is stored in an unknown way: {found.replace('torch.', '')}. {REMEDY}")


def refused(layer: Layer, reason: str, *, requantizable: bool = False) -> InexactError:
    """The error for a gain that no stored tensor can take exactly, because of ``reason``."""
    way_out = ", or requantise it, which rounds every weight (--requantize)" if requantizable else ""
    return InexactError(f"{layer.name} cannot take its gain exactly: {reason}. {REMEDY}{way_out}")


def check_gain(layer: Layer, outputs: int, inputs: int) -> None:
    """Check that the layer has one gain for each feature of the side.

    Raises:
        CheckpointError: another number of gains.

    """
    features = outputs if layer.side == "output" else inputs
    if layer.gain.numel() != features:
        raise CheckpointError(
            f"{layer.name} takes {features} gains on the {layer.side} side, the file has {layer.gain.numel()}"
        )


def obstacle(layer: Layer, scale: Stored, outputs: int) -> str | None:
    """Why the scales of rows, [outputs, groups], cannot take the gain; None where they can."""
    if layer.side == "input":
        return OTHER_SIDE
    if scale.dtype not in DTYPES:
        return f"its scales are stored in 8 bits ({scale.dtype})".replace("torch.", "")
    if scale.shape[:1] != (outputs,):
        return "one of its scales serves several rows"
    return None


def scaled(layer: Layer, tensor: Stored, factor: Tensor) -> Edit:
    """The edit ``tensor <- tensor * factor``, ``factor`` broadcast to it, in float32 (or float64) and rounded once.

    ``rewrite`` raises CheckpointError for products that overflow the tensor's dtype.

    Raises:
        CheckpointError: the tensor is of another shape, or does not hold floating numbers of 16 bits or more.

    """
    shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
    fitting = all(own == 1 or own == other for own, other in zip(factor.shape[::-1], shape[::-1], strict=False))
    if tensor.dtype not in DTYPES or not fitting:
        raise unknown(layer)
    accumulation = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    factors = factor.to(accumulation).expand(shape)

    def rewrite(block: Tensor, start: int) -> tuple[Tensor, Rounding]:
        values = block.view(tensor.dtype).view(-1, *shape[1:])
        scale = factors[start : start + len(values)]
        product = (values.to(accumulation) * scale).to(tensor.dtype)
        if not product.isfinite().all():
            why = "overflows with its gain" if values.isfinite().all() else "is not finite to begin with"
            raise CheckpointError(f"{tensor.name} {why} in {tensor.dtype}".replace("torch.", ""))
        return product.view(len(block), -1).view(torch.uint8), rounding(product, values.double() * scale.double())

    return Edit(layer.name, tensor.name, tensor.region, rewrite, lost=lost_gains(factor - 1, tensor.dtype))

"""A stored tensor that is replaced whole: of a module that was trained beside the gains."""

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Edit, Rounding, Stored
from gain_ops.checkpoints.schemes.plain import rounding


def replaced(module: str, tensor: Stored, value: Tensor) -> Edit:
    """The edit ``tensor <- value``, rounded once to the tensor's dtype.

    Raises:
        CheckpointError: another shape, values of another kind, or values that the dtype cannot hold.

    """
    if tensor.shape != tuple(value.shape) or tensor.dtype.is_floating_point != value.is_floating_point():
        raise CheckpointError(
            f"{module} was trained whole with {list(value.shape)} {value.dtype} for {tensor.name}, and the checkpoint has "
            f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")
        )
    stored = value.to(tensor.dtype)
    if not stored.isfinite().all():
        raise CheckpointError(f"{tensor.name} overflows in {tensor.dtype}".replace("torch.", ""))
    rows, region = stored.contiguous().view(-1).view(torch.uint8), tensor.region
    rows = rows.view(region.rows, region.row_bytes)
    errors = rounding(stored, value.double()) if value.is_floating_point() else Rounding()

    def rewrite(block: Tensor, start: int) -> tuple[Tensor, Rounding]:
        return rows[start : start + len(block)], errors

    return Edit(module, tensor.name, region, rewrite, whole=True)

"""DeepSpeed: the gain file of a model that ZeRO-3 partitions.

Training needs nothing from this file, with any stage of ZeRO: put the gains on, then call deepspeed.initialize(). ZeRO-1 and
ZeRO-2 do not partition parameters, so gain_ops.save_gains() on one process works there too.
"""

import os

import torch.distributed as dist
from torch import nn

from gain_ops.gainfiles.file import write_gains
from gain_ops.models.files import collect_gains
from gain_ops.utils.errors import FileError, MissingPackageError

__all__ = ["save_gains"]


def save_gains(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """gain_ops.save_gains() for a model under ZeRO: every process calls it, the first one writes, the others wait for it.

    The layers with a gain are gathered one after the other, with their frozen weights, since the file holds a fingerprint of
    each. A process holds at most one gathered layer beside its part.

    Args:
        model: a model with gains after deepspeed.initialize(), or the engine that it returned.
        path: the file to write; its folder is made.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: the model has no gains, or a delta that is not finite; it has gains outside the module that apply() was
            called on; or it has named gain sets, and none of them is active.
        OSError: the file cannot be written; on every process.

    """
    try:
        import deepspeed
    except ImportError as error:
        raise MissingPackageError("saving gains from ZeRO-3 needs DeepSpeed: pip install deepspeed") from error
    file = collect_gains(model, lambda layer: deepspeed.zero.GatheredParameters(list(layer.parameters())))
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write_gains(file, path)
        except OSError as error:
            failed = [str(error)]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise FileError(f"{path} could not be written by the first process: {failed[0]}")

"""DeepSpeed: the gain file of a model that ZeRO-3 keeps in parts.

Training needs nothing from here, with any stage of ZeRO: put the gains on, then call deepspeed.initialize(). ZeRO-1 and ZeRO-2
leave parameters whole, so there gain_ops.save_gains() on one process does as well.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from gain_ops._version import __version__
from gain_ops.gainfiles.file import GainFile, write_gains
from gain_ops.models.files import base_model_of, fingerprint
from gain_ops.models.record import applied_record, gained_modules, refuse_base_active
from gain_ops.utils.wording import some_of

__all__ = ["save_gains"]


def save_gains(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """gain_ops.save_gains() for a model under ZeRO: every process calls it, the first one writes, the others wait for it.

    The layers with a gain are gathered one after the other, the frozen weight too, as the file holds its fingerprint: one
    layer more than its part is all that a process has to hold.

    Args:
        model: a model with gains after deepspeed.initialize(), or the engine that it returned.
        path: the file to write; its folder is made.

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: the model has no gains, or a delta that is not finite; or it has named gain sets, and none of them is
            active.
        OSError: the file cannot be written; on every process.

    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("saving gains from ZeRO-3 needs DeepSpeed: pip install deepspeed") from error
    layers = gained_modules(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no gains to save: put them on with gain_ops.apply()")
    refuse_base_active(model, "save")
    deltas, fingerprints = {}, {}
    for name, layer in layers.items():
        with deepspeed.zero.GatheredParameters(list(layer.parameters())):
            deltas[name] = layer.delta.detach().to("cpu", torch.float32, copy=True)
            fingerprints[name] = fingerprint(layer)
    bad = [name for name, delta in deltas.items() if not delta.isfinite().all()]
    if bad:
        raise ValueError(f"cannot save gains that are not finite, in {some_of(bad)}; the training has diverged")
    applied = applied_record(model)
    file = GainFile(
        deltas=deltas,
        sides={name: layer.side for name, layer in layers.items()},
        fingerprints=fingerprints,
        targets=tuple(layers) if applied is None else applied.targets,
        base_model=base_model_of(model),
        package=__version__,
    )
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write_gains(file, path)
        except OSError as error:
            failed = [str(error)]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise OSError(f"{path} could not be written by the first process: {failed[0]}")

"""The modules of a checkpoint's model, without its weights, for questions that only a module's forward answers."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gain_ops.checkpoints.edits import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(folder: Path, *, most_layers: int) -> "PreTrainedModel":
    """The model that transformers makes of a config.json, on the meta device: classes and names, and no numbers.

    Args:
        folder: with the config.json. Code of its own, beside it or elsewhere, is not run.
        most_layers: how many layers it may describe at most, as each takes time and memory: as many as there are tensors.

    Raises:
        CheckpointError: no config, of a model that the installed transformers does not have, or of too many layers.

    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError('this needs the package transformers: pip install "gain-ops[cli]"') from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a value of another type ends in errors of every kind there
        raise CheckpointError(f"transformers cannot read {folder / 'config.json'} ({_first_line(error)})") from error
    if (count := _layers(config.to_dict())) > most_layers:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {count:,} layers, and the checkpoint has {most_layers:,} tensors: fetch both "
            "again"
        )
    names = config.architectures or ["no architecture"]
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder / 'config.json'} names {names[0]}, which the installed transformers does not have"
        )
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:
        raise CheckpointError(
            f"transformers makes no model of {folder / 'config.json'} ({_first_line(error)})"
        ) from error


def _layers(config: dict[Any, Any]) -> int:
    """The largest number of layers that a config or one inside it gives."""
    counts = [
        value for key, value in config.items() if isinstance(value, int) and re.search(r"layer|^depth$", str(key))
    ]
    return max([0, *counts, *(_layers(value) for value in config.values() if isinstance(value, dict))])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).partition("\n")[0]

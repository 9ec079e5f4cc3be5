"""The modules of a checkpoint's model, without its weights, for questions that only a module's forward answers."""

from pathlib import Path
from typing import cast

import torch
from torch import nn

from gain_ops.checkpoints.edits import CheckpointError


def skeleton(folder: Path) -> nn.Module:
    """The model that transformers makes of a config.json, on the meta device: classes and names, and no numbers.

    Args:
        folder: with the config.json. Code of its own, beside it or elsewhere, is not run.

    Raises:
        CheckpointError: no config, or of a model that the installed transformers does not have.

    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError('this needs the package transformers: pip install "gain-ops[cli]"') from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a value of another type ends in errors of every kind there
        raise CheckpointError(f"transformers cannot read {folder / 'config.json'} ({_first_line(error)})") from error
    names = config.architectures or ["no architecture"]
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder / 'config.json'} names {names[0]}, which the installed transformers does not have"
        )
    try:
        with torch.device("meta"):
            return cast(nn.Module, kind(config))
    except Exception as error:
        raise CheckpointError(
            f"transformers makes no model of {folder / 'config.json'} ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).partition("\n")[0]

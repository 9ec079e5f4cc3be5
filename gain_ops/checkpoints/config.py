"""What a model's config.json says that its tensors do not."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gain_ops.checkpoints.edits import CheckpointError

# Architectures whose projections of these names are transformers' Conv1D, weight [in, out].
_CONV1D_TYPES = frozenset(["clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "jais", "openai-gpt"])
_CONV1D_LEAVES = frozenset(("c_attn", "c_fc", "c_proj", "q_attn"))


class Config:
    """A config.json, or nothing for a bare file of weights; a multimodal one holds others."""

    def __init__(self, path: Path) -> None:
        """Read it, if it is there.

        Raises:
            CheckpointError: it holds no JSON object.

        """
        self._path = path
        self._parts = tuple(_parts(read_object(path))) if path.is_file() else ()

    def quantization(self) -> Mapping[str, Any] | None:
        """How its weights are quantised, or None."""
        found = (part.get(key) for part in self._parts for key in ("quantization_config", "compression_config"))
        return next((value for value in found if isinstance(value, Mapping)), None)

    def is_conv1d(self, name: str) -> bool:
        """Whether the layer of this name is a Conv1D. Its shape would not say for a square one.

        Raises:
            CheckpointError: it may be one, and there is no config to tell.

        """
        if name.rpartition(".")[2] not in _CONV1D_LEAVES:
            return False
        if not self._parts:
            raise CheckpointError(
                f"{name} may be stored as [in, out] (Conv1D) or as [out, in], and there is no {self._path} to tell: "
                "put the model's config.json there"
            )
        return any(part.get("model_type") in _CONV1D_TYPES for part in self._parts)

    def may_tie(self, name: str, rows: int | None = None) -> bool:
        """Whether the layer, by its name and how many rows it has, may be an output head on the embedding's weight."""
        if any(part.isdecimal() for part in name.split(".")):
            return False
        if any(part.get("tie_word_embeddings") is False for part in self._parts):
            return False
        return rows is None or any(part.get("vocab_size") == rows for part in self._parts)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it holds something else.

    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object: fetch it again")
    return content


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)

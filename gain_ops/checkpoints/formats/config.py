"""What only a model's config.json knows, and not its tensors."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.utils import strict_json
from gain_ops.utils.wording import named

# Architectures whose projections of these names are transformers' Conv1D, weight [in, out].
_CONV1D_TYPES = frozenset(["clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "jais", "openai-gpt"])
_CONV1D_LEAVES = frozenset(("c_attn", "c_fc", "c_proj", "q_attn"))

# Methods of transformers that may store plain weights and quantise them again in every forward; and the entry that shows it.
_IN_THE_FORWARD: Mapping[str, tuple[str, object]] = {
    "bitnet": ("quantization_mode", "online"),
    "fouroversix": ("keep_master_weights", True),
    "fp_quant": ("store_master_weights", True),
}


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

    def names_a_class(self) -> bool:
        """Whether it says which class of transformers the model is."""
        return any(part.get("architectures") for part in self._parts)

    def quantised_by_forward(self, name: str) -> str | None:
        """The method by which the forward of a layer quantises its plain weight, or None."""
        config = self.quantization() or {}
        method = str(config.get("quant_method"))
        if method not in _IN_THE_FORWARD:
            return None
        key, value = _IN_THE_FORWARD[method]
        kept = config.get("modules_to_not_convert")
        again = config.get(key) == value and not _is_among(name, ["lm_head"] if kept is None else kept)
        return method if again else None

    def is_conv1d(self, name: str, *, square: bool) -> bool:
        """Whether the layer of this name is a Conv1D, which the shape of a square weight would not say.

        Raises:
            CheckpointError: it cannot be decided: no config, or a square weight of a model with its own code.

        """
        if name.rpartition(".")[2] not in _CONV1D_LEAVES:
            return False
        if not self._parts:
            raise CheckpointError(
                f"{name} may be stored as [in, out] (Conv1D) or as [out, in], and only {self._path} could decide: put the "
                "model's config.json there"
            )
        if any(str(part.get("model_type")) in _CONV1D_TYPES for part in self._parts):
            return True
        if square and any("auto_map" in part for part in self._parts):
            raise CheckpointError(
                f"{name} is square, and the model has code of its own (auto_map in {self._path}), so nothing shows whether "
                "it is stored as [in, out] (Conv1D) or as [out, in]: absorb in memory with gain_ops.absorb(), where the "
                "layer's class is known"
            )
        return False

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
        content = strict_json.read(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object: fetch it again")
    return content


def _is_among(name: str, patterns: object) -> bool:
    """Whether a module is one of the named ones, as transformers matches them: by start, by end or as a regex.

    Raises:
        CheckpointError: a pattern that is none, or that may take forever.

    """
    if not isinstance(patterns, list) or not all(isinstance(key, str) and _ends_soon(key) for key in patterns):
        raise CheckpointError(f"modules_to_not_convert in config.json is no list of names: {named(repr(patterns))}")
    return any(name.endswith(key) or re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) for key in patterns)


def _ends_soon(pattern: str) -> bool:
    """Whether a regex is valid and repeats little: no group, and at most two things."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return not re.search(r"\)[*+{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 2


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)

"""Small checkpoints and gain files, written without a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gain_ops.gainfiles.file import GainFile, write_gains
from gain_ops.models.files import fingerprint


def save_folder(folder: Path, shards: Sequence[Mapping[str, Tensor]], config: Mapping[str, Any] | None = None) -> Path:
    """A model folder with these shards, an index where there are several, a tokenizer file and a subfolder."""
    folder.mkdir(parents=True)
    names = ["model.safetensors"]
    if len(shards) != 1:
        names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, shard in zip(names, shards, strict=True):
        save_file(dict(shard), folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "chat.jinja").write_text("{{ messages }}")
    return folder


def save_gain_file(
    path: Path,
    deltas: Mapping[str, Tensor],
    *,
    side: str = "output",
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """A gain file; it knows its base where the ``weights`` of the layers are given."""
    prints = {name: fingerprint_of(weight) for name, weight in (weights or {}).items()}
    file = GainFile(
        deltas=dict(deltas),
        sides=dict.fromkeys(deltas, side),
        fingerprints={name: prints.get(name) for name in deltas},
        targets=tuple(deltas),
        base_model="some-base",
        package="0",
    )
    write_gains(file, path)
    return path


def fingerprint_of(weight: Tensor) -> str | None:
    """What a gain file says of a layer with this weight [out, in]."""
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return fingerprint(linear)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def absorbed(weight: Tensor, delta: Tensor, *, dim: int = 0) -> Tensor:
    """The equation: in float32, or float64 for float64, rounded once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gain = 1 + delta.to(wide)
    return (weight.to(wide) * (gain[:, None] if dim == 0 else gain)).to(weight.dtype)

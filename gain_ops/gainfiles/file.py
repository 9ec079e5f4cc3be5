"""Gain files without a model: their contents, written and read.

A gain file is a safetensors file. Its tensors are ``<module name>.delta``, float32, 1-D. Its one metadata key,
"gain_ops", holds JSON::

    {"format": "gain_ops.gains", "version": 1, "package": "0.1.0", "targets": "gain-ffn", "base_model": "SmolLM2-135M",
     "layers": {"model.layers.0.self_attn.o_proj": {"side": "output", "base": "<fingerprint>"}, ...}}

``base`` is the fingerprint of the frozen weight that the gain was trained on, see models/files.py; null where there was
no value to sample. ``base_model`` is null where it is not known.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gain_ops._version import __version__
from gain_ops.reference import SIDES
from gain_ops.utils.errors import GainOpsError, MissingFileError
from gain_ops.utils.files import replace_file
from gain_ops.utils.wording import some_of

FORMAT = "gain_ops.gains"
VERSION = 1

_SUFFIX = ".delta"


class GainFileError(GainOpsError, ValueError):
    """A gain file that cannot be read, or that does not fit the model; nothing was changed."""


@dataclass(frozen=True)
class GainFile:
    """The contents of a gain file: deltas by module name, and the header's entries for them."""

    deltas: dict[str, Tensor]
    sides: dict[str, str]
    fingerprints: dict[str, str | None]
    targets: str | tuple[str, ...]
    base_model: str | None
    package: str


def write_gains(file: GainFile, path: str | os.PathLike[str]) -> None:
    """Write a gain file without a model; read_gains() returns the same.

    The file is written beside ``path`` and moved into place.

    Args:
        file: deltas in float32, 1-D and finite, with the side and the fingerprint of each.
        path: the file to write; its folder is made.

    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "package": file.package,
        "targets": file.targets,
        "base_model": file.base_model,
        "layers": {name: {"side": file.sides[name], "base": file.fingerprints[name]} for name in file.deltas},
    }
    tensors = {f"{name}{_SUFFIX}": delta for name, delta in file.deltas.items()}
    import safetensors.torch  # not at the top: kernels are tested and measured with torch and triton alone

    content = safetensors.torch.save(tensors, metadata={"gain_ops": json.dumps(header)})
    replace_file(Path(path), lambda beside: beside.write_bytes(content))


def read_gains(path: str | os.PathLike[str]) -> GainFile:
    """Read and check a gain file, without a model.

    Raises:
        GainFileError: not a gain file, damaged, of a later version, or with values that are not finite.
        MissingFileError: no such file.

    """
    import safetensors

    if os.path.isdir(path):
        raise GainFileError(
            f"{path} is a folder: name the gain file in it, such as {os.path.join(path, 'gains.safetensors')}"
        )
    if not os.path.exists(path):
        raise MissingFileError(f"no gain file at {path}: give one that gain-ops adapt or gain_ops.save_gains() wrote")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as opened:
            names: list[str] = opened.keys()
            header = (opened.metadata() or {}).get("gain_ops")
            tensors = {} if header is None else {name: opened.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise GainFileError(f"{path} is not a complete safetensors file: {error}") from error
    if header is None:
        raise GainFileError(
            f"{path} is not a gain file: it has no gain_ops header, and holds {some_of(names) or 'nothing'}. Gain "
            "files are written by gain_ops.save_gains()."
        )
    try:
        file = _parse(json.loads(header), tensors, path)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise GainFileError(f"{path} has a damaged gain_ops header: {error!r}") from error
    bad = [name for name, delta in file.deltas.items() if not delta.isfinite().all()]
    if bad:
        raise GainFileError(f"{path} holds gains that are not finite, in {some_of(bad)}")
    return file


def _parse(header: dict[str, Any], tensors: dict[str, Tensor], path: object) -> GainFile:
    if header["format"] != FORMAT:
        raise GainFileError(f"{path} has format {header['format']!r}, expected {FORMAT!r}")
    if header["version"] != VERSION:
        raise GainFileError(
            f"{path} has format version {header['version']!r}, written by gain_ops {header['package']}; gain_ops "
            f"{__version__} reads version {VERSION}: upgrade gain_ops, or save the gains again with this version"
        )
    layers: dict[str, dict[str, Any]] = header["layers"]
    expected = {f"{name}{_SUFFIX}" for name in layers}
    if expected != tensors.keys():
        raise GainFileError(
            f"{path} is damaged: its header and its tensors disagree on {some_of(expected ^ tensors.keys())}"
        )
    deltas = {name: tensors[f"{name}{_SUFFIX}"] for name in layers}
    for name, delta in deltas.items():
        if delta.dtype != torch.float32 or delta.dim() != 1 or layers[name]["side"] not in SIDES:
            raise GainFileError(
                f"{path} is damaged: {name} has a delta of shape {tuple(delta.shape)} and {delta.dtype} on side "
                f"{layers[name]['side']!r}, expected a 1-D float32 tensor on side 'output' or 'input'"
            )
    targets = header["targets"]
    return GainFile(
        deltas=deltas,
        sides={name: layer["side"] for name, layer in layers.items()},
        fingerprints={name: layer["base"] for name, layer in layers.items()},
        targets=targets if isinstance(targets, str) else tuple(targets),
        base_model=header["base_model"],
        package=header["package"],
    )

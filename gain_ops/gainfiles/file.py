"""Gain files without a model: their contents, written and read.

A gain file is a safetensors file. Its tensors are ``<module name>.delta``, float32, [features], or [experts,
features] for the experts of a mixture, under the name of their parameter. Its one metadata key,
"gain_ops", holds JSON::

    {"format": "gain_ops.gains", "version": 1, "package": "0.1.0", "targets": "gain-ffn", "base_model": "SmolLM2-135M",
     "layers": {"model.layers.0.self_attn.o_proj": {"side": "output", "base": "<fingerprint>"}, ...}}

``base`` is the fingerprint of the frozen weight that the gain was trained on, see models/files.py; null where there was
no value to sample. Beside it ``spots`` has some values of a plain weight (fingerprints.py), by which its copy in another
dtype is known; older files have none. ``base_model`` is null where it is not known.

Version 2 holds modules that were trained whole beside the gains, such as a new head: tensors ``<module name>.<tensor name>``
of any dtype and shape, and in the header ``"modules": {"score": ["weight"]}``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gain_ops._version import __version__
from gain_ops.gainfiles.fingerprints import is_spots
from gain_ops.reference import SIDES
from gain_ops.utils import strict_json
from gain_ops.utils.errors import GainOpsError, MissingFileError
from gain_ops.utils.files import replace_file
from gain_ops.utils.kinds import kind_of
from gain_ops.utils.limits import check_name
from gain_ops.utils.wording import named, some_of

FORMAT = "gain_ops.gains"
VERSION = 2  # 1 is written where there are no modules, so that older versions read it

_SUFFIX = ".delta"
_KINDS = {"package": str, "targets": str | list, "base_model": str | None, "layers": dict}


class GainFileError(GainOpsError, ValueError):
    """A gain file that cannot be read, or that does not fit the model; nothing was changed."""


@dataclass(frozen=True)
class GainFile:
    """The contents of a gain file: deltas by module name, and the header's entries for them; spots are those that there are."""

    deltas: dict[str, Tensor]
    sides: dict[str, str]
    fingerprints: dict[str, str | None]
    targets: str | tuple[str, ...]
    base_model: str | None
    package: str
    spots: dict[str, str] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> "GainFile":
        """The same with other names for those layers that are in ``names``."""
        return replace(
            self,
            deltas={names.get(name, name): delta for name, delta in self.deltas.items()},
            sides={names.get(name, name): side for name, side in self.sides.items()},
            fingerprints={names.get(name, name): base for name, base in self.fingerprints.items()},
            spots={names.get(name, name): spots for name, spots in self.spots.items()},
        )


def write_gains(file: GainFile, path: str | os.PathLike[str]) -> None:
    """Write a gain file without a model; read_gains() returns the same.

    The file is written beside ``path`` and moved into place.

    Args:
        file: deltas in float32, 1-D (2-D for experts) and finite, with the side and the fingerprint of each.
        path: the file to write; its folder is made.

    Raises:
        GainFileError: a layer's name that is too long to be read again.

    """
    try:
        for name in (*file.deltas, *file.modules):
            check_name(name)
    except ValueError as error:
        raise GainFileError(f"{path} would not be read again: {error}") from error
    header = {
        "format": FORMAT,
        "version": VERSION if file.modules else 1,
        "package": file.package,
        "targets": file.targets,
        "base_model": file.base_model,
        "layers": {name: _entry(file, name) for name in file.deltas},
    }
    if file.modules:
        header["modules"] = {name: list(tensors) for name, tensors in file.modules.items()}
    tensors = {f"{name}{_SUFFIX}": delta for name, delta in file.deltas.items()}
    tensors |= {f"{name}.{key}": value for name, module in file.modules.items() for key, value in module.items()}
    import safetensors.torch  # not at the top: kernels are tested and measured with torch and triton alone

    content = safetensors.torch.save(tensors, metadata={"gain_ops": json.dumps(header)})
    replace_file(Path(path), lambda beside: beside.write_bytes(content))


def _entry(file: GainFile, name: str) -> dict[str, str | None]:
    spots = {"spots": file.spots[name]} if name in file.spots else {}
    return {"side": file.sides[name], "base": file.fingerprints[name], **spots}


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
    if not os.path.isfile(path):
        raise GainFileError(f"{path} is a device or a pipe: give a file that gain_ops.save_gains() wrote")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as opened:
            header = (opened.metadata() or {}).get("gain_ops")
            if header is None:
                raise GainFileError(
                    f"{path} is not a gain file: it has no gain_ops header, and holds {some_of(opened.keys()) or 'nothing'}. "
                    "Gain files are written by gain_ops.save_gains()."
                )
            file = _parse(strict_json.parse(header, finite=True), opened, path)
    except safetensors.SafetensorError as error:
        if kind_of(Path(path)) == "pickle":
            raise GainFileError(
                f"{path} is a pickle, which can run any code when it is read: give a file that gain_ops.save_gains() wrote"
            ) from error
        raise GainFileError(f"{path} is not a complete safetensors file: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, GainFileError):
            raise
        raise GainFileError(f"{path} has a damaged gain_ops header: {error!r}") from error
    bad = [name for name, delta in file.deltas.items() if not delta.isfinite().all()]
    bad += [name for name, tensors in file.modules.items() if not all(t.isfinite().all() for t in tensors.values())]
    if bad:
        raise GainFileError(f"{path} holds values that are not finite, in {some_of(bad)}")
    return file


def _parse(header: dict[str, Any], tensors: Any, path: object) -> GainFile:
    """The contents by the header; ``tensors`` is the opened file, of which nothing is read that the header does not name."""
    if header["format"] != FORMAT:
        raise GainFileError(f"{path} has format {named(repr(header['format']))}, expected {FORMAT!r}")
    if header["version"] not in (1, VERSION):
        raise GainFileError(
            f"{path} has format version {named(repr(header['version']))}, written by gain_ops "
            f"{named(str(header['package']))}; gain_ops {__version__} reads up to version {VERSION}: upgrade gain_ops, or "
            "save the gains again with this version"
        )
    layers: dict[str, dict[str, Any]] = header["layers"]
    _check_types(header)
    modules: dict[str, list[str]] = header["modules"] if header["version"] == VERSION else {}
    inside = [f"{name}.{key}" for name, keys in modules.items() for key in keys]
    expected = {f"{name}{_SUFFIX}" for name in layers} | set(inside)
    if len(expected) != len(layers) + len(inside):
        raise GainFileError(f"{path} is damaged: its header names a tensor twice")
    if differing := expected.symmetric_difference(tensors.keys()):
        raise GainFileError(f"{path} is damaged: its header and its tensors disagree on {some_of(differing)}")
    for name, layer in layers.items():
        stored = tensors.get_slice(f"{name}{_SUFFIX}")
        dtype, shape = stored.get_dtype(), stored.get_shape()
        if dtype != "F32" or len(shape) not in (1, 2) or 0 in shape or layer["side"] not in SIDES:
            raise GainFileError(
                f"{path} is damaged: {named(name)} has a delta of shape {tuple(shape)} and {dtype} on side "
                f"{named(repr(layer['side']))}, expected a 1-D float32 tensor, or 2-D for experts, on side 'output' or 'input'"
            )
    targets = header["targets"]
    return GainFile(
        deltas={name: tensors.get_tensor(f"{name}{_SUFFIX}") for name in layers},
        sides={name: layer["side"] for name, layer in layers.items()},
        fingerprints={name: layer["base"] for name, layer in layers.items()},
        targets=targets if isinstance(targets, str) else tuple(targets),
        base_model=header["base_model"],
        package=header["package"],
        spots={name: layer["spots"] for name, layer in layers.items() if "spots" in layer},
        modules={name: {key: tensors.get_tensor(f"{name}.{key}") for key in keys} for name, keys in modules.items()},
    )


def _check_types(header: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for a value that write_gains() would not write."""
    if header["version"] is True:  # which equals 1
        raise TypeError("version is True")
    for key, kinds in _KINDS.items():
        if not isinstance(header[key], kinds):
            raise TypeError(f"{key} is {named(repr(header[key]))}")
    if not all(isinstance(target, str) for target in header["targets"]):
        raise TypeError(f"targets are {named(repr(header['targets']))}")
    modules = header["modules"] if header["version"] == VERSION else {}
    if not isinstance(modules, dict) or not all(isinstance(keys, list) for keys in modules.values()):
        raise TypeError(f"modules are {named(repr(modules))}")
    for name in (f"{module}.{key}" for module, keys in modules.items() for key in keys):
        check_name(name)
    for name, layer in header["layers"].items():
        check_name(name)
        known = isinstance(layer["base"], str | None) and ("spots" not in layer or is_spots(layer["spots"]))
        if not isinstance(layer["side"], str) or not known:
            raise TypeError(f"the entry of {named(name)} is {named(repr(layer))}")

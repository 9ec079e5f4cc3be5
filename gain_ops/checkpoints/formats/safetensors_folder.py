"""Checkpoints in safetensors: the folder of a transformers model, sharded or not, or a single file."""

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gain_ops.checkpoints.container import refuse
from gain_ops.checkpoints.edits import CheckpointError, Edit, Layer, Stored
from gain_ops.checkpoints.formats.config import Config, read_object
from gain_ops.checkpoints.formats.conversion import Loaded, loaded
from gain_ops.checkpoints.formats.headers import Entry, read_header
from gain_ops.checkpoints.formats.sampling import fingerprint, sample
from gain_ops.checkpoints.formats.skeleton import skeleton
from gain_ops.checkpoints.schemes import plain
from gain_ops.gainfiles.file import GainFile
from gain_ops.gainfiles.fingerprints import is_copy, spots
from gain_ops.gainfiles.names import find_layers
from gain_ops.models.carriers import CannotFold, fold_gain, has_own_gain
from gain_ops.models.up_rows import up_rows
from gain_ops.utils.kinds import pickled
from gain_ops.utils.wording import some_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_INDEX = ".safetensors.index.json"

# Names of a quantised layer's tensors: "_weight_scale" in a file of torchao's is "weight.scale" in the module, and of
# what bitsandbytes stores a module keeps these.
_TORCHAO = re.compile("^_weight_")
_LASTING = frozenset(["SCB", "bias", "weight", "weight.absmax"])

_ADAPTER = "adapter_config.json"
_SKIPPED_FOLDER = re.compile(r"checkpoint-\d+|__pycache__")

# The weights in other formats, and a trainer's state: a copy would still hold them as they were before the gains.
_NOT_COPIED = frozenset([".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth"])


class SafetensorsCheckpoint:
    """A container (see container.py): a folder with config.json and safetensors, or one safetensors file.

    Args:
        path: the folder or the file. Beside a file config.json is read, where there is one, and not copied.

    Raises:
        CheckpointError: weights that are missing, cut, there twice or in another format.
        OSError: files that cannot be read.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path = path.absolute()
        self.root = path if path.is_dir() else path.parent
        self._config = Config(self.root / "config.json")
        shards, index = _shards(path) if path.is_dir() else ([path], {})
        self._metadata: dict[Path, Mapping[str, str]] = {}
        self._entries: dict[str, Entry] = {}
        for shard in shards:
            header = read_header(shard)
            for name in self._entries.keys() & header.entries.keys():
                raise CheckpointError(
                    f"{name} is in {self._entries[name].file} and in {shard}: remove the file that is not this model's"
                )
            self._entries |= header.entries
            self._metadata[shard] = header.metadata
        here = {name: entry.file.name for name, entry in self._entries.items()}
        if wrong := [name for name, file in index.items() if here.get(name) != file]:
            raise CheckpointError(
                f"the index in {path} is wrong about {some_of(wrong)}: fetch it and the weights again"
            )
        self.files = tuple(sorted(_to_copy(path, shards, bool(index)) if path.is_dir() else shards))

    def edits(self, gains: GainFile, *, requantize: bool, check_base: bool) -> list[Edit]:
        """As in container.py."""
        layers, problems = self._layers(gains)
        gained = {name for _, name in layers}
        edits: list[Edit] = []
        for layer, name in layers:
            try:
                edits += self._edits(layer, name, gained, requantize=requantize)
            except CheckpointError as error:
                problems.append(str(error))
        try:
            edits += self._whole(gains)
        except CheckpointError as error:
            problems.append(str(error))
        if check_base:
            problems += _other_base([layer for layer, _ in layers], gains)
        refuse(f"{self._path} cannot take these gains", problems)
        return edits

    def describe(self, edit: Edit) -> str:
        """As in container.py."""
        return str(self._entries[edit.tensor])

    def _layers(self, gains: GainFile) -> tuple[list[tuple[Layer, str]], list[str]]:
        """The layers that get a gain, each with its name in the checkpoint; and what is wrong with the others."""
        names, problems = self._names(gains.deltas)
        tensors: dict[str, dict[str, Stored]] = {name: {} for name in names.values()}
        for name, entry in self._entries.items():
            for module in _above(name):
                if module in tensors:
                    tensors[module][name.removeprefix(f"{module}.")] = entry.stored()
        layers = []
        for layer, name in names.items():
            delta, weight = gains.deltas[layer], tensors[name].get("weight")
            double = weight is not None and weight.dtype == torch.float64
            gain = 1 + (delta.double() if double else delta)
            layers.append((Layer(layer, gains.sides[layer], gain, tensors[name]), name))
        return layers, problems

    def _names(self, layers: Collection[str]) -> tuple[dict[str, str], list[str]]:
        """For every layer that is stored, its name in the checkpoint; and what is wrong with the others.

        The name is the one that transformers would load as this layer, or else the one that find_layers() takes for it.
        """
        names: dict[str, str] = {}
        problems: list[str] = []
        loads = self._loaded or Loaded({}, {}, {})
        inside = find_layers(layers, loads.modules)
        for layer, module in inside.items():
            if other := loads.tied.get(module):
                problems.append(
                    f"{layer} and {other} have one weight, and a gain on one would change the other: keep the gain file, and "
                    "load it with gain_ops.load_gains()"
                )
            elif tensor := loads.converted.get(module):
                problems.append(
                    f"{layer} is made of {tensor}, and perhaps others, while transformers loads them: absorb in memory with "
                    "gain_ops.absorb(), and save the model with save_pretrained()"
                )
            else:
                names[layer] = loads.stored[module]
        modules = {module for name in self._entries for module in _above(name)}
        names |= find_layers([layer for layer in layers if layer not in inside], modules)
        missing = [layer for layer in layers if layer not in names and layer not in inside]
        if missing:
            head = " (an output head that shares the embedding's weight is not stored)"
            said = head if any(map(self._config.may_tie, missing)) else ""
            problems.insert(0, f"it has no layer {some_of(missing)}{said}")
        return names, problems

    def _whole(self, gains: GainFile) -> list[Edit]:
        """The edits of modules that were trained whole beside the gains.

        Raises:
            CheckpointError: a tensor that is not stored, or is stored in another form.

        """
        if not gains.modules:
            return []
        from gain_ops.checkpoints.schemes.whole import replaced

        names, _ = self._names(gains.modules)
        edits = []
        for module, tensors in gains.modules.items():
            for key, value in tensors.items():
                entry = self._entries.get(f"{names.get(module, module)}.{key}")
                if entry is None:
                    raise CheckpointError(
                        f"it has no {module}.{key}, of a module that was trained whole: write the model that it was trained in "
                        "with save_pretrained() before the gains are put on, and absorb into that, or absorb in memory"
                    )
                edits.append(replaced(module, entry.stored(), value))
        return edits

    def _edits(self, layer: Layer, name: str, gained: Collection[str], *, requantize: bool) -> list[Edit]:
        """Into the layer exactly, or on the input side into the up projection beside it, or else as asked."""
        return fold_gain(
            layer.side,
            lambda: self._own(layer, name, requantize=False),
            lambda: self._into_up(layer, name, gained),
            (lambda: self._own(layer, name, requantize=True)) if requantize else None,
            refusals=(CheckpointError, CannotFold),
        )

    def _own(self, layer: Layer, name: str, *, requantize: bool) -> list[Edit]:
        """The edits of the layer's own weight."""
        quantization = self._config.quantization()
        if plain.is_plain(layer) or quantization is None:
            if method := self._config.quantised_by_forward(name):
                raise CheckpointError(
                    f"{layer.name} is quantised again by its forward ({method}), which would undo a gain in its weight: keep "
                    "the gain file, and load it with gain_ops.load_gains()"
                )
            square = "weight" in layer.tensors and len(set(layer.tensors["weight"].shape)) == 1
            edits = plain.edits(layer, transposed=self._config.is_conv1d(name, square=square))
            if self._config.may_tie(name, layer.tensors["weight"].shape[0]):
                raise CheckpointError(
                    f"{layer.name} may share the embedding's weight, which would change with it: set "
                    '"tie_word_embeddings" to false in config.json if it does not, or leave this layer without a gain'
                )
            return edits
        from gain_ops.checkpoints import schemes

        files = {tensor.region.file for tensor in layer.tensors.values()}
        metadata = {key: value for file in sorted(files) for key, value in self._metadata[file].items()}
        return schemes.edits(quantization, metadata, layer, requantize=requantize)

    def _into_up(self, layer: Layer, name: str, gained: Collection[str]) -> list[Edit]:
        """The edits of the up projection's rows, and of its bias, for a gain on the input of a down projection.

        Raises:
            CheckpointError, CannotFold: why not.

        """
        from gain_ops.checkpoints.schemes.exact import scaled

        modules = dict(self._skeleton.named_modules())
        found = find_layers([layer.name], modules)
        if not found:
            raise CheckpointError(f"config.json describes a model without {layer.name}")
        rows = up_rows(self._skeleton, modules[found[layer.name]])
        up = f"{name.rpartition('.')[0]}.{rows.leaf}".lstrip(".")
        if self._loaded is not None:
            inside = f"{found[layer.name].rpartition('.')[0]}.{rows.leaf}".lstrip(".")
            up = self._loaded.stored.get(inside, up)
        tensors = {
            key.removeprefix(f"{up}."): e.stored() for key, e in self._entries.items() if key.startswith(f"{up}.")
        }
        if not tensors:
            raise CheckpointError(f"there is no {up} in the checkpoint")
        if up in gained:
            raise has_own_gain(up)
        gain = rows.padded(layer.gain, 1.0)
        target = Layer(up, "output", gain, tensors)
        edits = self._own(target, up, requantize=False)
        if "bias" in tensors:
            edits.append(scaled(target, tensors["bias"], gain))
        return [replace(edit, layer=layer.name, into_up=True) for edit in edits]

    @functools.cached_property
    def _skeleton(self) -> "PreTrainedModel":
        return skeleton(self.root, most_layers=len(self._entries))

    @functools.cached_property
    def _loaded(self) -> Loaded | None:
        """The names that transformers gives to what is stored; None for a model that it does not have."""
        if not self._config.names_a_class():
            return None
        try:
            return loaded(self._skeleton, self._entries)
        except CheckpointError:
            return None


def _above(tensor: str) -> Iterable[str]:
    """The modules that a tensor may be of: "a.b" and "a" for "a.b.weight"."""
    while tensor := tensor.rpartition(".")[0]:
        yield tensor


def _other_base(layers: Iterable[Layer], gains: GainFile) -> list[str]:
    """What the fingerprints in the gain file have to say against these weights."""
    differing: list[str] = []
    unknown: list[str] = []
    for layer in layers:
        expected = gains.fingerprints[layer.name]
        if expected is not None and expected not in _fingerprints(layer) and not _is_copy(layer, gains):
            (differing if plain.is_plain(layer) else unknown).append(layer.name)
    problems = []
    if differing:
        problems.append(
            f"its weights are not those that the gains were trained on (base model {gains.base_model or 'unknown'}), "
            f"in {len(differing)} of {len(gains.deltas)} layers, {some_of(differing)}: name the base they were trained "
            "on, or use them anyway with --no-check-base"
        )
    if unknown:
        problems.append(
            f"its quantised weights cannot be recognised as those that the gains were trained on, in {len(unknown)} of "
            f"{len(gains.deltas)} layers, {some_of(unknown)}: if they are, say so with --no-check-base"
        )
    return problems


def _is_copy(layer: Layer, gains: GainFile) -> bool:
    """Whether the layer's weight may be that of the gain file in another dtype."""
    known = gains.spots.get(layer.name)
    return known is not None and plain.is_plain(layer) and is_copy(known, spots(sample(layer.tensors["weight"])))


def _fingerprints(layer: Layer) -> set[str]:
    """What the fingerprint of the layer's module may be: of all that is stored, or without what it was unpacked with."""
    if plain.is_plain(layer):
        return {fingerprint({"weight": layer.tensors["weight"]})}
    tensors = {_TORCHAO.sub("weight.", name): tensor for name, tensor in layer.tensors.items()}
    groups = (sorted(tensors), sorted(tensors.keys() & _LASTING))
    return {fingerprint({name: tensors[name] for name in names}) for names in groups}


def _shards(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files with the weights of a model folder, and its index: which tensor is in which.

    transformers calls them "model", diffusers "diffusion_pytorch_model"; with variants of both an index or a file must be
    the only one.
    """
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    files = sorted(folder.glob("*.safetensors"))
    usual = [folder / name for name in _SINGLE if (folder / name).is_file()]
    if usual and indexes:
        raise CheckpointError(
            f"{folder} holds {usual[0].name} and {indexes[0].name}: remove the one that is not the model, with its files"
        )
    if len(indexes) > 1 or len(usual) > 1:
        raise CheckpointError(
            f"{folder} holds several models, {some_of(path.name for path in indexes or usual)}: remove all but one, or name "
            "one file"
        )
    if indexes:
        return _indexed(indexes[0], read_object(indexes[0]))
    if usual or len(files) == 1:
        return usual or files, {}
    if files:
        raise CheckpointError(
            f"{folder} holds {len(files)} safetensors files and no model{_INDEX} to say which are the model: fetch the "
            "index too, or name one file"
        )
    if why := pickled(folder):
        raise CheckpointError(why)
    raise CheckpointError(f"{folder} holds no weights in safetensors: fetch them, or name another folder")


def _indexed(index: Path, content: Mapping[str, object]) -> tuple[list[Path], Mapping[str, str]]:
    named = content.get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(f, str) and f == Path(f).name for f in named.values()):
        raise CheckpointError(f"{index} has no weight_map to files beside it: fetch it again")
    shards = sorted({index.parent / file for file in named.values()})
    if not shards:
        raise CheckpointError(f"{index} names no files: fetch it again")
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {some_of(missing)}, which its index names: fetch the rest of the model"
        )
    return shards, named


def _to_copy(folder: Path, shards: list[Path], indexed: bool) -> Iterable[Path]:
    """All files of a model folder but hidden ones, other weights than these, a PEFT adapter, and a trainer's checkpoints."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        if any(part.startswith(".") or _SKIPPED_FOLDER.fullmatch(part) for part in inside):
            continue
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link to nothing: fetch the rest of the model")
        if path.name == _ADAPTER:  # its weights are left out, and it would be loaded without them
            continue
        weights = len(inside) == 1 and path.name.endswith((".safetensors", ".index.json"))
        other_model = weights and not (indexed and path.name.endswith(_INDEX))
        if path in shards or (path.is_file() and path.suffix not in _NOT_COPIED and not other_model):
            yield path

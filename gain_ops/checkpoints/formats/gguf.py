"""Checkpoints in GGUF: output gains go into the scales of a row's blocks, and nothing is quantised again.

::

    output side:  a row of the tensor is an output feature      scales <- gain * scales, rounded to float16 (gguf_blocks.py)
    input side:   a block shares a scale over input features    exact only for F32, F16 and BF16; of a down projection's
                                                                input into the up projection's rows; else requantised if asked

llama.cpp's converter names the tensors ("blk.0.ffn_down") and, for some layers of some architectures, reorders rows or
columns. Not those of the attention output and FFN down projections; see _refuse_unknown_order() for the others. Source:
conversion/ in https://github.com/ggml-org/llama.cpp.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gain_ops.checkpoints.container import refuse
from gain_ops.checkpoints.edits import CheckpointError, Edit, InexactError, Layer, Region, Rounding, Stored
from gain_ops.checkpoints.formats.extents import refuse_shared_bytes
from gain_ops.checkpoints.formats.gguf_blocks import (
    BLOCKS,
    block_size,
    can_requantize,
    decode,
    requantize_rows,
    scale_rows,
)
from gain_ops.checkpoints.formats.gguf_header import Value, read_gguf_header
from gain_ops.checkpoints.schemes import plain
from gain_ops.checkpoints.schemes.exact import scaled
from gain_ops.gainfiles.file import GainFile
from gain_ops.gainfiles.fingerprints import digest, is_copy, spots, step
from gain_ops.gainfiles.names import without_shells
from gain_ops.gainfiles.rounding import lost_gains
from gain_ops.models.carriers import CannotFold, fold_gain, has_own_gain
from gain_ops.utils.errors import MissingPackageError
from gain_ops.utils.wording import named, some_of

if TYPE_CHECKING:
    from gguf import TensorNameMap


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Why an output gain cannot go into the scales of a type that has some.
_COARSE = {"MXFP4": "powers of two", "NVFP4": "numbers of four bits' precision"}

# Architectures whose FFN is down(act(gate(x)) * up(x)), and those of them whose ffn_up holds the gate's rows and then up's.
_GATED = frozenset(("gemma", "gemma2", "gemma3", "glm4", "llama", "phi3", "qwen2", "qwen3", "smollm3"))
_PACKED = frozenset(("glm4", "phi3"))

_AS_IN_THE_MODEL = ("attn_output", "ffn_down", "ffn_down_shexp")

# In llama's architecture, from the halves of a head to pairs: the tensor, and where its number of heads is.
_PAIRED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}

_FACTORS = frozenset(("weight", "bias", "scale", "input_scale"))  # tensors of one layer; LoRA's would be terms

_MOST_BLOCKS = 512  # of a model: gguf makes a map of all their names

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file; the shape is torch's, a matrix [out, in]."""

    name: str
    kind: str
    shape: tuple[int, ...]
    region: Region

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)}"


@dataclass(frozen=True)
class _Gained:
    """A layer's gain, in the module's order, and its weight; ``order`` is the module's row of each row, where not the same."""

    layer: str
    side: str
    gain: Tensor
    weight: _Tensor
    order: Tensor | None


@dataclass(frozen=True)
class GGUFCheckpoint:
    """A container (see container.py): one GGUF file, or all files of a split one. Made by open_gguf()."""

    path: Path
    files: tuple[Path, ...]
    architecture: str
    heads: Mapping[str, int]
    tensors: Mapping[str, _Tensor]
    names: "TensorNameMap"

    @property
    def root(self) -> Path:
        """As in container.py."""
        return self.files[0].parent

    def edits(self, gains: GainFile, *, requantize: bool, check_base: bool) -> list[Edit]:
        """As in container.py."""
        names = {layer: name for layer in gains.deltas if (name := self._tensor_name(layer)) is not None}
        problems = self._missing(gains.deltas, names)
        if gains.modules:
            problems.append(
                f"a GGUF takes no modules that were trained whole ({some_of(gains.modules)}): absorb into the model's folder "
                "and convert that"
            )
        edits: list[Edit] = []
        differing: list[str] = []
        for layer, name in names.items():
            if f"{name}.weight" not in self.tensors:
                continue
            try:
                gained = self._gained(layer, name, gains.sides[layer], 1 + gains.deltas[layer])
                expected = gains.fingerprints[layer] if check_base else None
                if expected is None:
                    self._refuse_unknown_order(gained, name)
                elif not _has_fingerprint(gained, expected, gains.spots.get(layer)):
                    differing.append(layer)
                edits += self._edits(gained, name, names.values(), requantize=requantize)
            except CheckpointError as error:
                problems.append(str(error))
        if differing:
            problems.append(
                f"its weights are not those that the gains were trained on (base model {gains.base_model or 'unknown'}), "
                f"in {len(differing)} of {len(gains.deltas)} layers, {some_of(differing)}: name the file they were trained "
                "on, or use them anyway with --no-check-base, say where this is a quantised form of that model"
            )
        refuse(f"{self.path} cannot take these gains", problems)
        return edits

    def describe(self, edit: Edit) -> str:
        """As in container.py."""
        return str(self.tensors[edit.tensor])

    def _tensor_name(self, layer: str) -> str | None:
        """What the file calls a module, without ".weight"; None for a module that its architecture does not have."""
        inner = without_shells(layer)
        names = (self.names.get_name(name) for name in (layer, inner, f"model.{inner}", f"transformer.{inner}"))
        return next((name for name in names if name is not None), None)

    def _missing(self, layers: Iterable[str], names: Mapping[str, str]) -> list[str]:
        """The problem with layers that the file does not have, or nothing."""
        missing = [layer for layer in layers if f"{names.get(layer)}.weight" not in self.tensors]
        if not missing:
            return []
        tied = any(names.get(layer) == "output" for layer in missing)
        why = ": an output head that shares the embedding's weight is not stored" if tied else ""
        return [f"it has no layer {some_of(missing)} (architecture {self.architecture}){why}"]

    def _edits(self, gained: _Gained, name: str, names: Collection[str], *, requantize: bool) -> list[Edit]:
        """Into the layer exactly, or on the input side into the up projection beside it, or else as asked."""
        return fold_gain(
            gained.side,
            lambda: [_edit(gained, requantize=False)],
            lambda: self._into_up(gained, name, names),
            (lambda: [_edit(gained, requantize=True)]) if requantize else None,
            refusals=(CheckpointError, CannotFold),
        )

    def _into_up(self, gained: _Gained, name: str, names: Collection[str]) -> list[Edit]:
        """The edits of the up projection's rows, and of its bias, for a gain on the input of a down projection."""
        block, _, leaf = name.rpartition(".")
        up, packed = f"{block}.ffn_up", self.architecture in _PACKED
        gate = f"{block}.ffn_gate.weight" in self.tensors
        if (
            leaf != "ffn_down"
            or self.architecture not in _GATED
            or gate == packed
            or f"{up}.weight" not in self.tensors
        ):
            raise CheckpointError(f"{name} is not known to be that of a gated FFN (architecture {self.architecture})")
        if up in names:
            raise has_own_gain(up)
        gain = torch.cat([torch.ones_like(gained.gain), gained.gain]) if packed else gained.gain
        edits = [_edit(self._gained(up, up, "output", gain), requantize=False)]
        bias = self.tensors.get(f"{up}.bias")
        if bias is not None:
            dtype = _PLAIN.get(bias.kind, torch.uint8)  # blocks of bytes, which scaled() refuses
            stored = Stored(bias.name, dtype, bias.shape, bias.region)
            edits.append(scaled(Layer(up, "output", gain, {"bias": stored}), stored, gain))
        return [replace(edit, layer=gained.layer, into_up=True) for edit in edits]

    def _gained(self, layer: str, name: str, side: str, gain: Tensor) -> _Gained:
        weight = self.tensors[f"{name}.weight"]
        others = [other for other in self.tensors if other.startswith(f"{name}.")]
        terms = [other for other in others if other.removeprefix(f"{name}.") not in _FACTORS]
        if terms:
            raise CheckpointError(f"{layer} has further terms, which would need the gain as well: {some_of(terms)}")
        if len(weight.shape) != 2:
            raise CheckpointError(f"{layer} is not a linear layer: {weight.name} is {weight}")
        features = weight.shape[side == "input"]
        if gain.numel() != features:
            raise CheckpointError(f"{layer} takes {features} gains on the {side} side, the file has {gain.numel()}")
        return _Gained(layer, side, gain, weight, self._order(name, weight.shape[0]))

    def _order(self, name: str, rows: int) -> Tensor | None:
        leaf = name.rpartition(".")[2]
        if self.architecture != "llama" or leaf not in _PAIRED:
            return None
        heads = self.heads[_PAIRED[leaf]]
        if not heads or rows % (2 * heads):
            raise CheckpointError(
                f"{name}.weight has its rows in an order by heads, and the file does not say how many"
            )
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def _refuse_unknown_order(self, gained: _Gained, name: str) -> None:
        """Raise CheckpointError for a layer whose features may be in another order here than in the model.

        Converters reorder the rows of fused projections, of queries and keys, and the columns that belong to heads. Where
        there is a fingerprint, it shows that the order is the model's.
        """
        leaf = name.rpartition(".")[2]
        shuffled = (self.architecture, leaf, gained.side) == ("plamo", "attn_output", "input")
        if shuffled or not (leaf in _AS_IN_THE_MODEL or gained.order is not None):
            raise CheckpointError(
                f"{gained.layer} may have its features in another order in {name}.weight (architecture "
                f"{self.architecture}): give the very file that the gains were trained on, without --no-check-base, "
                "whose fingerprint shows the order; or absorb into the model's folder and convert that"
            )


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Open a GGUF file, or all files of a split one, whichever of them ``path`` names.

    Raises:
        CheckpointError: not a GGUF file, cut, big-endian, parts of a split one missing, or of an architecture that the
            package gguf does not know.
        ImportError: no package gguf.
        OSError: files that cannot be read.

    """
    shards = _shards(path)
    fields: dict[Path, Mapping[str, Value]] = {}
    tensors: dict[str, _Tensor] = {}
    for shard in shards:
        fields[shard], found = read_gguf(shard)
        if _number(fields[shard], "split.count", 1) != len(shards):
            raise CheckpointError(f"{shard} is a part of a split file under another name: name it as it was")
        for name in tensors.keys() & found.keys():
            raise CheckpointError(f"{name} is in {tensors[name].region.file} and in {shard}: fetch them again")
        tensors |= found
    import gguf

    first = fields[shards[0]]
    architecture = str(first.get("general.architecture") or "")
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = _number(first, f"{architecture}.block_count", 0)
    if blocks > _MOST_BLOCKS:
        raise CheckpointError(f"{path} claims {blocks:,} blocks, and at most {_MOST_BLOCKS:,} are read: fetch it again")
    if architecture not in known or blocks < 1:
        raise CheckpointError(
            f"{path} holds no language model that the installed gguf knows (architecture {named(architecture) or 'unknown'}): "
            "if it does, a later gguf may know it: pip install -U gguf"
        )
    all_heads = _number(first, f"{architecture}.attention.head_count", 0)
    heads = {key: _number(first, f"{architecture}.{key}", all_heads) for key in _PAIRED.values()}
    names = gguf.get_tensor_name_map(known[architecture], blocks)
    return GGUFCheckpoint(path, tuple(shards), architecture, heads, tensors, names)


def _edit(gained: _Gained, *, requantize: bool) -> Edit:
    layer, side, weight, kind = gained.layer, gained.side, gained.weight, gained.weight.kind
    gain = gained.gain[gained.order] if side == "output" and gained.order is not None else gained.gain
    if kind in _PLAIN:
        stored = Stored(weight.name, _PLAIN[kind], weight.shape, weight.region)
        return plain.edits(Layer(layer, side, gain, {"weight": stored}))[0]
    exact = side == "output" and kind in BLOCKS
    if not exact:
        _refuse_requantizing(gained, asked=requantize)
    change = scale_rows if exact else requantize_rows

    def rewrite(block: Tensor, start: int) -> tuple[Tensor, Rounding]:
        try:
            return change(kind, block, gain if side == "input" else gain[start : start + len(block), None])
        except CheckpointError as error:
            raise CheckpointError(f"{layer}: {error}") from error

    lost = lost_gains(gain - 1, torch.float16) if exact else 0
    return Edit(layer, weight.name, weight.region, rewrite, lost=lost)


def _refuse_requantizing(gained: _Gained, *, asked: bool) -> None:
    """Raise InexactError unless requantising was asked for and can be done."""
    kind = gained.weight.kind
    possible = can_requantize(kind)
    if asked and possible:
        return
    if gained.side == "input":
        why = f"a block of {kind} has one scale for {block_size(kind)[0]} input features"
    else:
        why = f"the scales of {kind} are {_COARSE[kind]}" if kind in _COARSE else f"{kind} has no scales"
    how = "requantise with --requantize, or " if possible else f"the package gguf cannot quantise to {kind}: "
    raise InexactError(
        f"{gained.layer} cannot take its gain on the {gained.side} side exactly: {why}; {how}absorb into an F16 or BF16 "
        "file of the model and quantise that"
    )


def _has_fingerprint(gained: _Gained, expected: str, known: str | None) -> bool:
    """Whether the weight is the one the gain was trained on, or a copy: as nn.Linear's [out, in], or Conv1D's [in, out]."""
    shape = gained.weight.shape
    dtype = _PLAIN.get(gained.weight.kind)
    for sizes, transposed in ((shape, False), (shape[::-1], True)):
        values = _sample(gained, transposed=transposed)
        if digest([("weight", sizes, values)]) == expected:
            return True
        if known is not None and dtype is not None and is_copy(known, spots(values.to(dtype))):
            return True
    return False


def _sample(gained: _Gained, *, transposed: bool) -> Tensor:
    """The values of the module's weight that its fingerprint is taken of; only their blocks are read and decoded."""
    weight, region = gained.weight, gained.weight.region
    rows, columns = weight.shape
    places = np.arange(0, rows * columns, step(rows * columns), dtype=np.int64)
    row, column = np.divmod(places, rows)[::-1] if transposed else np.divmod(places, columns)
    if gained.order is not None:
        row = gained.order.argsort().numpy()[row]
    values, size = block_size(weight.kind)
    stored = np.memmap(region.file, np.uint8, "r", region.offset, (region.rows * region.row_bytes,))
    starts = row * region.row_bytes + column // values * size
    blocks = torch.from_numpy(stored[starts[:, None] + np.arange(size)])
    decoded = decode(weight.kind, blocks.view(1, -1)).view(-1, values)
    return decoded[torch.arange(len(places)), torch.from_numpy(column % values)]


def _shards(path: Path) -> list[Path]:
    path = path.absolute()
    split = _SHARD.fullmatch(path.name)
    if split is None:
        return [path]
    stem, count = split.groups()
    shards = [path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{path} is a part of a split file, of which {some_of(missing)} are missing: fetch them too"
        )
    return shards


def read_gguf(file: Path) -> tuple[Mapping[str, Value], dict[str, _Tensor]]:
    """The header of a file: its values, and where its tensors lie; raises as open_gguf()."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError('reading a GGUF file needs the package gguf: pip install "gain-ops[cli]"') from error
    try:
        header = read_gguf_header(file)
        total = file.stat().st_size
        tensors = {}
        for tensor in header.tensors:
            kind = gguf.GGMLQuantizationType(tensor.kind).name
            values, size = block_size(kind)
            row_bytes = tensor.shape[-1] // values * size
            region = Region(file, tensor.offset, math.prod(tensor.shape[:-1]), row_bytes)
            if tensor.shape[-1] % values or region.offset + region.size > total:
                raise ValueError(
                    f"{named(tensor.name)} of {kind} {list(tensor.shape)} at byte {region.offset:,} of {total:,}"
                )
            tensors[tensor.name] = _Tensor(tensor.name, kind, tensor.shape, region)
    except CheckpointError:
        raise
    except (ValueError, LookupError) as error:
        raise CheckpointError(
            f"{file} is not a whole GGUF file, or of a kind that the installed gguf does not know ({error}): fetch it "
            "again, or upgrade gguf (pip install -U gguf)"
        ) from error
    refuse_shared_bytes(file, {name: tensor.region for name, tensor in tensors.items()})
    return header.values, tensors


def _number(values: Mapping[str, Value], key: str, default: int) -> int:
    """A whole number of the header; 0 where there is something else."""
    value = values.get(key, default)
    return value if isinstance(value, int) else 0

"""What absorbing a gain file into a checkpoint will do, with everything checked that can be checked beforehand."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from gain_ops._version import __version__
from gain_ops.checkpoints.container import Container
from gain_ops.checkpoints.edits import CheckpointError, Edit
from gain_ops.checkpoints.formats.safetensors_folder import SafetensorsCheckpoint
from gain_ops.checkpoints.states import FileState, time_of, times_of
from gain_ops.gainfiles.file import GainFile, read_gains
from gain_ops.gainfiles.rounding import moved_gains
from gain_ops.utils.errors import MissingFileError
from gain_ops.utils.kinds import kind_of, pickled
from gain_ops.utils.wording import some_of

__all__ = ["Change", "Plan", "open_checkpoint", "plan"]


@dataclass(frozen=True)
class Change:
    """The change of one tensor: its stored form, its size in bytes, and the smallest and the largest gain, or None if it is
    replaced whole.

    With ``into_up`` the tensor is the up projection's, and the layer is the down projection with the gain.
    """

    layer: str
    tensor: str
    file: str
    stored: str
    size: int
    gains: tuple[float, float] | None
    into_up: bool


@dataclass(frozen=True)
class Plan:
    """A gain file that fits a checkpoint; made by plan().

    Attributes:
        base: the folder or file that was given.
        gain: the gain file.
        files: the files to copy, by their new names.
        states: what they were when they were planned for.
        edits: what is rewritten in the copy, in no particular order.
        changes: the same in readable form.
        left_out: files of the base that are not copied, and links to folders.
        linked: files that are copied from outside the base, as it holds links to them; by the folder of their targets.
        moved: how many gains differ from 1.
        identity: a hash of everything that the result depends on.

    """

    base: Path
    gain: Path
    files: dict[str, Path]
    states: dict[str, FileState]
    edits: tuple[Edit, ...]
    changes: tuple[Change, ...]
    left_out: tuple[str, ...]
    linked: dict[str, tuple[str, ...]]
    moved: int
    identity: str

    @property
    def size(self) -> int:
        """Bytes to copy."""
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def rewritten(self) -> int:
        """Bytes to rewrite in the copy."""
        return sum(edit.region.size for edit in self.edits)

    def check_base(self) -> None:
        """Raise CheckpointError if a file to copy is not the one that was planned for."""
        changed = [
            name for name, file in self.files.items() if not file.is_file() or FileState.of(file) != self.states[name]
        ]
        if changed:
            raise CheckpointError(f"{self.base} has changed since it was planned, in {some_of(changed)}: plan again")


def plan(base: Path, gain: Path, *, requantize: bool = False, check_base: bool = True) -> Plan:
    """Check a gain file against a checkpoint, headers and fingerprints, and plan what absorbing it will change.

    Args:
        base: as in open_checkpoint().
        gain: a file of gain_ops.save_gains().
        requantize: decode, scale and quantise again where no scale of a quantised weight can take the gain exactly.
        check_base: refuse gains that were trained on other weights.

    Raises:
        CheckpointError: everything that cannot be read or does not fit, in one error.
        GainFileError: not a gain file.
        OSError: files that cannot be read.

    """
    if not gain.is_file():
        raise MissingFileError(f"no gain file at {gain}: give one that gain-ops adapt or gain_ops.save_gains wrote")
    gains = read_gains(gain)
    if not gains.deltas:
        raise CheckpointError(f"{gain} holds no gains, so there is nothing to absorb")
    if experts := [name for name, delta in gains.deltas.items() if delta.dim() > 1]:
        raise CheckpointError(
            f"{gain} has gains of experts ({some_of(experts)}), which are not folded into files yet: load the model, and call "
            "gain_ops.load_gains(), gain_ops.absorb() and save_pretrained()"
        )
    before = times_of(base)
    container = open_checkpoint(base)
    files = {str(file.relative_to(container.root)): file for file in container.files}
    states = {name: FileState.of(file) for name, file in files.items()}
    if unsteady := [name for name, file in files.items() if file in before and before[file] != time_of(file)]:
        raise CheckpointError(
            f"{base} changed while it was read, in {some_of(unsteady)}: try again once it is complete"
        )
    edits = container.edits(gains, requantize=requantize, check_base=check_base)
    _refuse_overlap(edits)
    names = {file: name for name, file in files.items()}
    return Plan(
        base=base,
        gain=gain,
        files=files,
        states=states,
        edits=tuple(edits),
        changes=tuple(_change(edit, gains, container, names) for edit in edits),
        left_out=tuple(_left_out(base, files)),
        linked=_linked(container.root, files) if base.is_dir() else {},
        moved=moved_gains(gains.deltas.values()),
        identity=_identity(gains, states, requantize=requantize),
    )


def open_checkpoint(path: Path) -> Container:
    """Open a folder with config.json and safetensors, a safetensors or GGUF file of any name, or a folder with a .gguf file.

    Raises:
        CheckpointError: none of these, or damaged.
        OSError: it cannot be read.

    """
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one of them, for example {files[0]}")
        path = files[0] if files else path
    if why := pickled(path):
        raise CheckpointError(why)
    kind = kind_of(path) if path.is_file() else None
    if kind == "gguf":
        from gain_ops.checkpoints.formats.gguf import open_gguf

        return open_gguf(path)
    if path.is_file() and kind != "safetensors":
        raise CheckpointError(
            f"{path} is neither a safetensors nor a GGUF file: give one, or the folder of a complete model"
        )
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}: give a model folder, a .safetensors or a .gguf file on this machine (models are "
            "read from disk, never downloaded)"
        )
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder: give a model on this machine")
    if (path / "model_index.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a pipeline of diffusers, of several models: name the folder of one, such as {path / 'transformer'}"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json: give the folder of a complete model, or the file of its weights"
        )
    return SafetensorsCheckpoint(path)


def _refuse_overlap(edits: Iterable[Edit]) -> None:
    """Refuse two gains on one tensor: they would need an order, which no gain file has."""
    for one, other in pairwise(sorted(edits, key=lambda edit: (edit.region.file, edit.region.offset))):
        end = one.region.offset + one.region.size
        if one.region.file == other.region.file and other.region.offset < end:
            raise CheckpointError(
                f"{one.layer} and {other.layer} are both stored in {one.tensor} of {one.region.file}: a gain on one "
                "would change the other"
            )


def _change(edit: Edit, gains: GainFile, container: Container, names: Mapping[Path, str]) -> Change:
    gain = None if edit.whole else 1 + gains.deltas[edit.layer]
    return Change(
        layer=edit.layer,
        tensor=edit.tensor,
        file=names[edit.region.file],
        stored=container.describe(edit),
        size=edit.region.size,
        gains=None if gain is None else (gain.min().item(), gain.max().item()),
        into_up=edit.into_up,
    )


def _left_out(base: Path, files: dict[str, Path]) -> Iterable[str]:
    """The files of a base folder that are not copied, and links to folders, which are not followed; without hidden ones."""
    if base.is_dir():
        for path in sorted(base.rglob("*")):
            inside = path.relative_to(base)
            hidden = any(part.startswith((".", "__pycache__")) for part in inside.parts)
            if hidden or str(inside) in files:
                continue
            if path.is_file():
                yield str(inside)
            elif path.is_symlink():
                yield f"{inside} (a link to a folder)"


def _linked(root: Path, files: dict[str, Path]) -> dict[str, tuple[str, ...]]:
    """The files whose bytes lie outside the base, by the folder of their targets."""
    inside = root.resolve()
    found: dict[str, tuple[str, ...]] = {}
    for name, file in files.items():
        target = file.resolve()
        if not target.is_relative_to(inside):
            found[str(target.parent)] = (*found.get(str(target.parent), ()), name)
    return found


def _identity(gains: GainFile, states: Mapping[str, FileState], *, requantize: bool) -> str:
    """A hash of the gains, the base's files (by name, size, time and first bytes), the options and the version."""
    facts = [(name, state.size, state.written, state.head) for name, state in states.items()]
    values = dict(gains.deltas)
    for name, tensors in gains.modules.items():
        values |= {f"{name}.{key} whole": value for key, value in tensors.items()}
    raw = {name: value.contiguous().flatten().view(torch.uint8).numpy() for name, value in values.items()}
    hashed = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in raw.items()}
    text = json.dumps([__version__, requantize, hashed, gains.sides, facts])
    return hashlib.sha256(text.encode()).hexdigest()

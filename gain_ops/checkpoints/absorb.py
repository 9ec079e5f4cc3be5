"""Fold a gain file into a checkpoint on disk: copy its files, and rewrite the rows that change in the copy.

No file is parsed and written again, so everything else equals the base to the byte: headers, index, alignment, metadata.
Rows go through memory a few at a time, so no tensor has to fit.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import BinaryIO

import torch

from gain_ops.checkpoints.edits import CheckpointError, Edit, Region, Rounding
from gain_ops.checkpoints.plan import Plan
from gain_ops.utils.errors import FileError
from gain_ops.utils.files import copy_file, found_at, naming
from gain_ops.utils.stages import StagedFolder, staged_folder
from gain_ops.utils.wording import some_of

__all__ = ["Absorbed", "Progress", "absorb", "check_out", "verify"]

_ROWS_AT_ONCE = 1 << 18  # bytes: a scheme unpacks them, to float64 in places, and this should stay in a cache
_COMPARED_AT_ONCE = 4 << 20

Progress = Callable[[str, int, int], object]
"""Called with the present action, how many of its bytes are done, and their total."""


@dataclass(frozen=True)
class Absorbed:
    """What was done.

    Attributes:
        layers: how many layers' gains were folded in.
        tensors: how many tensors were rewritten for them, and for modules that were trained whole.
        rounding: the largest absolute and the largest relative error of a rewritten value.
        where: the layer with the largest relative error.
        lost: how many gains changed nothing, as they are nearer to 1 than the stored dtype resolves.
        moved: how many gains differ from 1.
        verified: whether the copy was read again and compared with the base.

    """

    layers: int
    tensors: int
    rounding: Rounding
    where: str
    lost: int
    moved: int
    verified: bool


def absorb(
    plan: Plan,
    out: Path,
    *,
    verified: bool = True,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Absorbed:
    """Write the checkpoint, with the gains folded in, to the folder ``out``.

    The result is written beside ``out``, read again there, and moved into place. An interrupted run leaves its finished files
    beside ``out``: the same call continues from there, and a call with other inputs starts again.

    Args:
        plan: from gain_ops.checkpoints.plan.plan().
        out: a folder that does not exist yet, or is empty.
        verified: whether to verify() the result before it is moved into place.
        force: replace what is at ``out``, if it is a model folder or holds only files of these names.
        progress: see Progress.

    Raises:
        CheckpointError: ``out`` cannot be used, the base has changed since it was planned, absorbed weights are not finite,
            or the written files are not as expected; nothing is left then.
        OSError: files that cannot be read or written, a disk that is too full, or another run that writes to ``out``.

    """
    check_out(plan, out, force=force)
    plan.check_base()
    with staged_folder(out, plan.identity) as staged:
        try:
            _check_space(plan, staged)
            roundings = _write(plan, staged, progress)
            done = verify(plan, staged.folder, progress) if verified else _report(plan, roundings, verified=False)
            plan.check_base()
        except CheckpointError:
            staged.discard()
            plan.check_base()  # if it has changed, that is why
            raise
        check_out(plan, out, force=force)  # somebody may have put something there meanwhile; what is finished is kept
        return done


def verify(plan: Plan, folder: Path, progress: Progress = lambda what, done, total: None) -> Absorbed:
    """Compare a folder with the result of absorbing, bit for bit: rewritten rows are computed again from the base.

    Raises:
        CheckpointError: a file too many or too few, a byte that differs, or a base that is not the planned one.
        OSError: files that cannot be read.

    """
    plan.check_base()
    here = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if here != plan.files.keys():
        raise CheckpointError(f"{folder} does not hold the files of {plan.base}: {some_of(here ^ plan.files.keys())}")
    meter = _Meter(progress, "verifying", plan.size)
    roundings: dict[str, Rounding] = {}
    for name, file in plan.files.items():
        _merge(roundings, _compare(file, folder / name, _edits_of(plan, file), meter.advance))
    return _report(plan, roundings, verified=True)


class _Meter:
    """Adds up what is done."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total, self._done = progress, what, total, 0
        self.advance(0)

    def advance(self, done: int) -> None:
        self._done += done
        self._progress(self._what, self._done, self._total)


def check_out(plan: Plan, out: Path, *, force: bool) -> None:
    """Raise CheckpointError for an ``out`` that is in use, or that overlaps the files to read; see absorb()."""
    kind = found_at(out)
    if kind not in (None, "a folder"):
        raise CheckpointError(f"{out} is {kind}: name a folder to write into")
    place = out.resolve()
    if plan.base.is_dir() and place.is_relative_to(plan.base.resolve()):
        raise CheckpointError(f"{out} lies in the base, {plan.base}: name a folder outside it")
    if out.is_mount():
        raise CheckpointError(f"{out} is where a disk is mounted, and cannot be replaced: name a folder in it")
    here = {path.name for path in out.iterdir()} if out.exists() else set()
    if not here:
        return
    if not force:
        raise CheckpointError(f"{out} is not empty: name another folder, or replace it with --force")
    for path in (plan.base, plan.gain, *plan.files.values()):
        if path.resolve().is_relative_to(place):
            raise CheckpointError(f"{out} holds {path}, which has to be read: name another folder")
    if "config.json" not in here and not here <= plan.files.keys():
        raise CheckpointError(f"{out} is not a model folder (no config.json in it), so --force does not replace it")


def _check_space(plan: Plan, staged: StagedFolder) -> None:
    needed = sum(file.stat().st_size for name, file in plan.files.items() if name not in staged.finished)
    free = shutil.disk_usage(staged.folder).free
    if needed > free:
        raise FileError(
            f"{staged.folder} needs {needed:,} bytes more, and its disk has {free:,}: make room, or name a folder "
            "on another disk"
        )


def _write(plan: Plan, staged: StagedFolder, progress: Progress) -> dict[str, Rounding]:
    meter = _Meter(progress, "copying", plan.size + plan.rewritten)
    roundings: dict[str, Rounding] = {}
    for name, file in plan.files.items():
        edits = _edits_of(plan, file)
        if name in staged.finished:
            meter.advance(file.stat().st_size + sum(edit.region.size for edit in edits))
        else:
            target = staged.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, target, meter.advance)
            found = _rewrite(target, edits, meter.advance)
            staged.finish(name, {layer: [rounding.absolute, rounding.relative] for layer, rounding in found.items()})
        _merge(roundings, {layer: Rounding(*errors) for layer, errors in staged.finished[name].items()})
    return roundings


def _rewrite(target: Path, edits: Iterable[Edit], advance: Callable[[int], object]) -> dict[str, Rounding]:
    roundings: dict[str, Rounding] = {}
    with naming(target), target.open("rb+") as file:
        for edit in edits:
            for piece, rows, rounding in _rewritten(edit):
                file.seek(piece.offset)
                file.write(rows)
                _merge(roundings, {edit.layer: rounding})
                advance(piece.size)
    return roundings


def _compare(base: Path, copy: Path, edits: Iterable[Edit], advance: Callable[[int], object]) -> dict[str, Rounding]:
    """Raise CheckpointError unless ``copy`` is ``base`` with the edits."""
    if copy.stat().st_size != base.stat().st_size:
        raise CheckpointError(f"{copy} has {copy.stat().st_size:,} bytes, and {base} has {base.stat().st_size:,}")
    roundings: dict[str, Rounding] = {}
    with base.open("rb") as expected, copy.open("rb") as found:
        for edit in edits:
            _compare_until(edit.region.offset, expected, found, advance)
            for piece, rows, rounding in _rewritten(edit):
                if found.read(piece.size) != rows:
                    raise CheckpointError(
                        f"{copy} does not hold {edit.tensor} of {base} with its gain, at byte {piece.offset} or soon "
                        "after. The disk may be failing; if it is not, please report this"
                    )
                _merge(roundings, {edit.layer: rounding})
                advance(piece.size)
            expected.seek(found.tell())
        _compare_until(base.stat().st_size, expected, found, advance)
    return roundings


def _compare_until(end: int, expected: BinaryIO, found: BinaryIO, advance: Callable[[int], object]) -> None:
    """Raise CheckpointError unless two files have the same bytes from their present positions to ``end``."""
    while (start := expected.tell()) < end:
        size = min(end - start, _COMPARED_AT_ONCE)
        if expected.read(size) != found.read(size):
            raise CheckpointError(
                f"{found.name} differs from {expected.name} at byte {start} or soon after, where no gain goes. The disk may "
                "be failing, or the base was changed meanwhile; if it is neither, please report this"
            )
        advance(size)


def _rewritten(edit: Edit) -> Iterator[tuple[Region, bytes, Rounding]]:
    """The region piece by piece, with its new bytes."""
    for start, piece in edit.region.blocks(_ROWS_AT_ONCE):
        rows, rounding = edit.rewrite(piece.read(), start)
        if rows.dtype != torch.uint8 or rows.shape != (piece.rows, piece.row_bytes):
            raise TypeError(f"{edit.tensor} was rewritten to {rows.dtype} {tuple(rows.shape)}, not rows of its bytes")
        yield piece, rows.numpy().tobytes(), rounding


def _edits_of(plan: Plan, file: Path) -> list[Edit]:
    """The edits of one file, in their order in it."""
    edits = (edit for edit in plan.edits if edit.region.file == file)
    return sorted(edits, key=lambda edit: edit.region.offset)


def _merge(into: dict[str, Rounding], more: Mapping[str, Rounding]) -> None:
    for layer, rounding in more.items():
        into[layer] = into.get(layer, Rounding()) | rounding


def _report(plan: Plan, roundings: Mapping[str, Rounding], *, verified: bool) -> Absorbed:
    lost: dict[str, int] = {}
    for edit in (edit for edit in plan.edits if not edit.whole):
        lost[edit.layer] = max(lost.get(edit.layer, 0), edit.lost)  # its gains go into each of its tensors
    return Absorbed(
        layers=len(lost),
        tensors=len(plan.edits),
        rounding=reduce(or_, roundings.values()),
        where=max((edit.layer for edit in plan.edits), key=lambda layer: roundings[layer].relative),
        lost=sum(lost.values()),
        moved=plan.moved,
        verified=verified,
    )

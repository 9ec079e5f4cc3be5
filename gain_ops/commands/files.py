"""``gain-ops inspect``, ``diff`` and ``merge``: the contents of gain files and checkpoints, and several gain files as one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gain_ops.commands.console import STDOUT, clear_errors, escape, print_pairs, print_table
from gain_ops.utils.errors import UsageError, file_errors
from gain_ops.utils.wording import size_text

if TYPE_CHECKING:
    from torch import Tensor

    from gain_ops.checkpoints.compare import Difference
    from gain_ops.gainfiles.file import GainFile
    from gain_ops.models.statistics import Distribution, GainStatistics


__all__ = ["diff", "inspect", "merge"]

_MOST_MOVED = 5  # experts that inspect names


def inspect(
    file: Annotated[Path, typer.Argument(help="A gain file.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the gains layer by layer, to a .png or .svg file.")] = None,
) -> None:
    """Show the contents of a gain file: its base, and the distribution of each layer's gains."""
    with clear_errors():
        from gain_ops.gainfiles.file import read_gains
        from gain_ops.models.plots import write_gain_plot
        from gain_ops.models.statistics import gain_statistics

        with file_errors():
            found = read_gains(file)
        statistics = gain_statistics(found)
        if plot is not None:
            with file_errors():
                write_gain_plot(statistics, plot, title=file.name)
        print_pairs(None, _about(file, found).items())
        _print_layers(statistics)
        _print_experts(statistics)
    if plot is not None:
        STDOUT.print(f"wrote {escape(str(plot))}", soft_wrap=True)


def diff(
    one: Annotated[
        Path, typer.Argument(metavar="A", help="A gain file, or a checkpoint: folder, .safetensors, .gguf.")
    ],
    other: Annotated[Path, typer.Argument(metavar="B", help="The same kind.")],
) -> None:
    """Show where two gain files or two checkpoints differ, and whether gains on rows or columns explain a weight's change."""
    with clear_errors():
        from gain_ops.checkpoints.compare import compare
        from gain_ops.gainfiles.file import read_gains

        with file_errors():
            gain_files = _is_gain_file(one), _is_gain_file(other)
        if all(gain_files):
            with file_errors():
                files = read_gains(one), read_gains(other)
            _diff_gains(*files)
        elif any(gain_files):
            raise UsageError(f"one of {one} and {other} is a gain file and the other is not: give two of a kind")
        else:
            with file_errors():
                differences, equal = compare(one, other)
            _print_differences(differences, equal)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Gain files.")],
    out: Annotated[Path, typer.Option(help="The gain file to write.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One for each file, in order. Default: 1 each, so that all apply; for mean 1/n each."),
    ] = None,
    how: Annotated[
        str, typer.Option(help="powers: the product of gain^weight. mean: the sum of weight * (gain - 1), plus 1.")
    ] = "powers",
    check_base: Annotated[bool, typer.Option(help="Refuse gains that were trained on different weights.")] = True,
) -> None:
    """Combine several gain files into one; a layer that a file lacks has gain 1 in it."""
    with clear_errors():
        from gain_ops.gainfiles.combining import combine_gains, default_weights
        from gain_ops.gainfiles.file import write_gains

        weights = weight or default_weights(len(files), how)
        with file_errors():
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
        **({"trained whole": ", ".join(found.modules)} if found.modules else {}),
        "written by": f"gain_ops {found.package}",
    }


def _common_part(names: Iterable[str]) -> str:
    """The modules that all these layers lie in: "model.layers"; "" where there are none."""
    above = (name.split(".")[:-1] for name in names)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*above, strict=False)))


def _print_layers(statistics: GainStatistics) -> None:
    """A table for 80 columns, with names as transformers gives them, without the part that all layers share."""
    inside = _common_part(layer.name for layer in statistics.layers)
    mixed = len({layer.side for layer in statistics.layers}) > 1
    alarming = bool(statistics.overall.dead or statistics.overall.negative)
    figures = ("gains", "least", "mean", "largest", "rms", *(("dead", "< 0") if alarming else ()))
    rows = [
        [
            layer.name.removeprefix(f"{inside}."),
            *([layer.side] if mixed else []),
            *_figures(layer.gains)[: len(figures)],
        ]
        for layer in statistics.layers
    ]
    rows.append(["all", *([""] if mixed else []), *_figures(statistics.overall)[: len(figures)]])
    print_table(["layer", *(["side"] if mixed else []), *figures], rows, breaks={len(rows) - 1})
    dead = f"closer to 0 than {statistics.dead_below:g}"
    STDOUT.print(
        "rms: of the distances from 1; " + (f"dead: {dead}" if alarming else f"none is {dead} or below 0"),
        soft_wrap=True,
    )


def _print_experts(statistics: GainStatistics) -> None:
    """Which experts of a mixture moved, and which did not."""
    moved = [
        (rms, f"{layer.name} expert {expert} ({rms:.4f})")
        for layer in statistics.layers
        for expert, rms in enumerate(layer.experts)
    ]
    if moved:
        still = sum(rms == 0 for rms, _ in moved)
        most = [text for _, text in sorted(moved, key=lambda one: one[0], reverse=True)[:_MOST_MOVED]]
        STDOUT.print(
            f"experts: {len(moved) - still} of {len(moved)} moved, most of all (rms) {escape(', '.join(most))}",
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
    rows = []
    equal = 0
    for name in sorted(one.deltas.keys() | other.deltas.keys()):
        a, b = one.deltas.get(name), other.deltas.get(name)
        if a is None or b is None:
            rows.append([name, "only in B" if a is None else "only in A", ""])
        elif one.sides[name] != other.sides[name]:
            rows.append([name, f"{one.sides[name]} side in A, {other.sides[name]} side in B", ""])
        elif a.shape != b.shape:
            rows.append([name, f"{_size(a)} gains in A, {_size(b)} in B", ""])
        elif (a == b).all():
            equal += 1
        else:
            distance = b.double() - a.double()
            rows.append([name, f"{distance.square().mean().sqrt():.2e}", f"{distance.abs().max():.2e}"])
    if rows:
        print_table(["layer", "rms of B - A", "largest"], rows)
    STDOUT.print(f"{len(rows)} layers differ, {equal} are equal")


def _size(delta: Tensor) -> str:
    return " x ".join(map(str, delta.shape))


def _print_differences(found: list[Difference], equal: int) -> None:
    rows = []
    for difference in found:
        a, b = difference.stored
        stored = a if a == b else f"{a or 'not in A'} -> {b or 'not in B'}"
        change = "" if difference.change is None else f"{difference.change:.2e}"
        rows.append([difference.name, stored, change, _explanation(difference)])
    if rows:
        print_table(["tensor", "stored", "change", "explained by"], rows, left=4)
    STDOUT.print(f"{len(found)} tensors differ, {equal} are equal to the byte")


def _explanation(difference: Difference) -> str:
    if difference.side is None or difference.gains is None or difference.rest is None:
        return ""
    lines = "rows" if difference.side == "output" else "columns"
    least, largest = difference.gains
    return f"gains on its {lines}, {least:.4f} to {largest:.4f} (rest {difference.rest:.1e} of the change)"

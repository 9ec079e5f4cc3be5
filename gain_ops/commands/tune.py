"""``gain-ops tune``: every way to run a GEMM with a gain, timed on this GPU, into the table that ``auto`` goes by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gain_ops.commands.console import STDOUT, clear_errors, escape, print_table
from gain_ops.utils.errors import UsageError, file_errors

if TYPE_CHECKING:
    import torch

    from gain_ops.backends.tables import Row

__all__ = ["DTYPES", "Shapes", "Tokens", "sizes_of", "tune"]

DTYPES = ("bfloat16", "float16")

Shapes = Annotated[
    list[str], typer.Option("--shape", help="A layer's features, INxOUT, such as 4096x14336. May be repeated.")
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of a step on this GPU.")]


def tune(
    shape: Shapes,
    tokens: Tokens = 8192,
    dtype: Annotated[str, typer.Option(help=f"What the layers compute in: {' or '.join(DTYPES)}.")] = DTYPES[0],
    out: Annotated[Path | None, typer.Option(help="The table. Default: the one that gain_ops reads.")] = None,
) -> None:
    """Time every way to run the GEMMs of layers on this GPU, and keep the figures: later runs take the fastest.

    A way has to be right before it is timed. After an interruption the same command goes on where it stopped.
    """
    with clear_errors(lambda: "What was measured is in the table; the same command goes on."):
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}: others are always composed")
        sizes = [sizes_of(text) for text in shape]
        import torch

        device = _device()
        from gain_ops.backends import tables
        from gain_ops.backends.interface import GEMMS
        from gain_ops.kernels import tuning
        from gain_ops.kernels.tables import family
        from gain_ops.ops import dispatch

        path = out or tables.user_path(family(device.index))
        found: list[tuple[str, str, list[Row]]] = []
        with _bar() as bar, file_errors():
            for in_features, out_features in sizes:
                given = tuning.problem(tokens, out_features, in_features, getattr(torch, dtype), device)
                for op in GEMMS:
                    label = f"{op} {in_features}x{out_features}"
                    task = bar.add_task(label, total=tuning.count(op, given))
                    rows = []
                    for row in tuning.tune(op, given, path):
                        rows.append(row)
                        bar.advance(task)
                    bar.update(task, total=len(rows))
                    found.append((f"{in_features}x{out_features}", op, rows))
        dispatch.forget()
    _print(found)
    STDOUT.print(f"wrote {escape(str(path))}", soft_wrap=True)


def sizes_of(text: str) -> tuple[int, int]:
    """In and out features of INxOUT."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--shape {text!r}: expected INxOUT, such as 4096x14336")
    return int(parts[0]), int(parts[1])


def _device() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("gain-ops tune times kernels on a GPU, and torch sees none here")
    return torch.device("cuda", torch.cuda.current_device())


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=STDOUT)


def _print(found: list[tuple[str, str, list[Row]]]) -> None:
    """The fastest of each op, over composing."""
    from gain_ops.backends.tables import fastest

    lines = []
    for shape, op, rows in found:
        timed = fastest(rows)
        if not timed:
            lines.append((shape, op, "nothing was right", "", "", str(len(rows))))
            continue
        way, us = timed[0].way, timed[0].us or 0.0
        composed = next((row.us for row in timed if row.way == "composed"), None)
        over = "" if composed is None else f"{us / composed:.3f}"
        lines.append((shape, op, way, f"{us:.1f}", over, str(len(rows) - len(timed))))
    print_table(("layer", "op", "fastest", "us", "over composed", "left out"), lines, left=3)

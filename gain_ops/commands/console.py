"""What the commands of ``gain-ops`` share: their output, tables, and how errors and signals end them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich import box, markup
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gain_ops.commands.interrupts import Interrupted, raised_signals
from gain_ops.utils.errors import GainOpsError
from gain_ops.utils.wording import printable

__all__ = [
    "STDERR",
    "STDOUT",
    "clear_errors",
    "escape",
    "print_pairs",
    "print_table",
    "quiet_libraries",
    "show_tracebacks",
]

STDOUT = Console()
STDERR = Console(stderr=True)

_WIDEST = 10_000  # columns, beyond any table
_GAP = 2  # blanks between a name and its value

_TALKATIVE = {
    "bitsandbytes": "its CPU kernels are missing",
    "torch.utils._pytree": "torchao registers its enums in an old way",
    "torchao": "its CUDA libraries do not load",
}
"""Loggers whose warnings no user of a command can act on, and the meaning of each warning."""

_SWITCHES = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Variables that huggingface_hub, tqdm and transformers read when they are imported, unless they are set already."""

_tracebacks = False


def show_tracebacks(asked: bool) -> None:
    """Whether errors that the user can correct show their traceback too: ``gain-ops --debug``."""
    global _tracebacks
    _tracebacks = asked


def escape(text: str) -> str:
    """A text for print() as it is: without effect on the terminal, and without meaning as markup."""
    return markup.escape(printable(text))


@contextmanager
def clear_errors(kept: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """A GainOpsError becomes one red line and exit code 2; any other error is a bug and shows its traceback.

    Ctrl-C, SIGTERM and SIGHUP become a line with the text of ``kept``, and exit code 128 and the signal's number.
    """
    try:
        with raised_signals():
            yield
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        STDOUT.print(f"[yellow]Stopped by {name}.[/] {kept()}", soft_wrap=True)
        raise typer.Exit(128 + number) from None
    except GainOpsError as error:
        if _tracebacks:
            STDERR.print("\n".join(map(escape, traceback.format_exc().split("\n"))), soft_wrap=True, highlight=False)
        STDERR.print(f"[red]{escape(' '.join(str(error).split()))}[/]", soft_wrap=True)
        raise typer.Exit(2) from None


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    left: int = 1,
    breaks: Container[int] = (),
    dim: Container[int] = (),
) -> None:
    """A table if it fits the console, and otherwise a block for each row; no heading and no cell is ever cut.

    Args:
        headings: of the columns.
        rows: their cells, plain text.
        title: a line above.
        left: how many columns, from the first, are aligned left; the others are figures.
        breaks: numbers of the rows with a line above them.
        dim: numbers of the less important rows.

    """
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if number < left else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if number in breaks:
            table.add_section()
        table.add_row(*map(escape, row), style="dim" if number in dim else None)
    if title is not None:
        STDOUT.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
    if Measurement.get(STDOUT, STDOUT.options.update(max_width=_WIDEST), table).maximum <= STDOUT.width:
        STDOUT.print(table)
        return
    for number, row in enumerate(rows):
        STDOUT.print()
        _print_lines(zip(headings, row, strict=True), dim=number in dim)
    STDOUT.print()


def print_pairs(title: str | None, pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, a line each, under a title."""
    if title is not None:
        STDOUT.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
    _print_lines(pairs)


def quiet_libraries() -> None:
    """Hide the bars and warnings of other packages, which would mix with our lines; called before they are imported."""
    for variable, value in _SWITCHES.items():
        os.environ.setdefault(variable, value)
    if (transformers := sys.modules.get("transformers")) is not None:  # it has read the variables already
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")


def _print_lines(pairs: Iterable[tuple[str, str]], *, dim: bool = False) -> None:
    """Values in a column of their own; a value that is too long continues below, and a long word is not split."""
    pairs = [(printable(name), printable(value)) for name, value in pairs]
    indent = max((cell_len(name) for name, _ in pairs), default=0) + _GAP
    for name, value in pairs:
        width = max(STDOUT.width - indent, 1)
        lines = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False) or [""]
        for line, start in zip(lines, [name, *[""] * (len(lines) - 1)], strict=True):
            text = f"{start}{' ' * (indent - cell_len(start))}{line}".rstrip()
            STDOUT.print(escape(text), soft_wrap=True, style="dim" if dim else None)

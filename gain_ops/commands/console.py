"""What the commands of ``gain-ops`` share: where they print, tables, and how errors and Ctrl-C end them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gain_ops.ops import dispatch

__all__ = ["STDERR", "STDOUT", "clear_errors", "print_pairs", "quiet_libraries"]

STDOUT = Console()
STDERR = Console(stderr=True)


@contextmanager
def clear_errors(kept: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """Errors that the caller can mend become one red line and exit code 2; others are bugs and keep their traceback.

    Ctrl-C becomes a line with what ``kept`` says, and exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        STDOUT.print(f"[yellow]Stopped by Ctrl-C.[/] {kept()}", soft_wrap=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, FloatingPointError, dispatch.BackendUnavailable) as error:
        STDERR.print(f"[red]{escape(' '.join(str(error).split()))}[/]", soft_wrap=True)
        raise typer.Exit(2) from None


def print_pairs(title: str | None, pairs: Mapping[str, str]) -> None:
    """A table of two columns, under a title."""
    if title is not None:
        STDOUT.print(f"[bold]{title}[/]")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for pair in pairs.items():
        table.add_row(*(escape(text) for text in pair))
    STDOUT.print(table)


def quiet_libraries() -> None:
    """Progress bars and warnings of transformers and PEFT would stand between our own lines."""
    import transformers

    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")

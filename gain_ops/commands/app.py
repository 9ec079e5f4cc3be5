"""The commands of ``gain-ops`` as one program: options in, progress and tables out; the work is in the folders below.

What imports torch is imported by the command that needs it, so that --help and refusals of options do not wait for it.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from gain_ops._version import __version__
from gain_ops.commands.absorb import absorb
from gain_ops.commands.adapt import adapt
from gain_ops.commands.console import STDOUT, quiet_libraries, show_tracebacks
from gain_ops.commands.files import diff, inspect, merge
from gain_ops.commands.info import info
from gain_ops.commands.plan import plan
from gain_ops.commands.tune import tune

__all__ = ["app"]

app = typer.Typer(
    name="gain-ops",
    help="Adapt a frozen language model by a learned diagonal gain on its projections.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        STDOUT.print(f"gain_ops {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    show_tracebacks(debug)
    quiet_libraries()


for _command in (adapt, absorb, inspect, diff, merge, plan):
    app.command()(_command)
# other distributions' commands, such as `study` of gain-study
for _plugin in entry_points(group="gain_ops.commands"):
    app.command(name=_plugin.name)(_plugin.load())
app.command()(tune)
app.command()(info)

"""The entry of the command ``gain-ops``: says what to install if something is missing, and starts the commands."""

import importlib.util
import io
import os
import sys

from gain_ops.commands.outputs import lasting_outputs

__all__ = ["main"]

_NEEDED = ("typer", "rich", "transformers")


def main() -> None:
    """Run the command line; the entry point ``gain-ops``.

    The commands are in :mod:`gain_ops.commands.app`. Exit codes: 0 done, 1 an extra is missing or a bug, 2
    something in the call does not fit or a file cannot be written, 128 and a signal's number: stopped by it (130 Ctrl-C,
    143 SIGTERM), or 141 the output's reader has gone.
    """
    missing = [name for name in _NEEDED if not _installed(name)]
    if missing:
        sys.exit(f'gain-ops needs {", ".join(missing)}, not installed here: pip install "gain-ops[cli]"')
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in ASCII shows the rest escaped, and ends nothing
            stream.reconfigure(errors="backslashreplace")
    # huggingface_hub reads it when it is imported: this command never needs the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from gain_ops.commands.app import app
    except KeyboardInterrupt:  # before there is a command to handle it
        sys.exit(130)
    with lasting_outputs():
        app()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # blocked, or replaced by None in sys.modules
        return False

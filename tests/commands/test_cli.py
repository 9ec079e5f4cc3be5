"""The door of the command: what is imported, and what is said where an extra is missing."""

import os
import resource
import subprocess
import sys

import pytest

import gain_ops

_BLOCKED = """
import sys
import importlib.abc

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
from gain_ops.commands.cli import main
sys.argv = ["gain-ops", *{arguments!r}]
main()
"""


def _python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program; a variable given as "" is unset."""
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value}
    call = [sys.executable, "-c", program]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.parametrize(
    ("blocked", "named"),
    [
        (["typer"], "typer"),
        (["typer", "rich", "transformers"], "typer, rich, transformers"),
    ],
)
def test_a_missing_extra_gives_one_line_with_the_command_to_install_it(blocked, named):
    done = _python(_BLOCKED.format(blocked=blocked, arguments=["info"]))
    assert done.returncode == 1
    assert done.stderr == f'gain-ops needs {named}, not installed here: pip install "gain-ops[cli]"\n'
    assert done.stdout == ""


def test_importing_the_package_loads_none_of_the_extras():
    heavy = "typer", "rich", "transformers", "matplotlib", "peft", "gguf"
    done = _python(
        f"import sys, gain_ops, gain_ops.commands.cli; print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_the_command_keeps_off_the_network_unless_told_otherwise():
    program = (
        "import sys; sys.argv = ['gain-ops', 'info']\n"
        "from gain_ops.commands.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    import huggingface_hub.constants as hub; print('offline', hub.HF_HUB_OFFLINE)"
    )
    assert "offline True" in _python(program, HF_HUB_OFFLINE="").stdout
    assert "offline False" in _python(program, HF_HUB_OFFLINE="0").stdout


def test_the_version():
    done = _python("import sys; sys.argv = ['gain-ops', '--version']; from gain_ops.commands.cli import main; main()")
    assert (done.returncode, done.stdout) == (0, f"gain_ops {gain_ops.__version__}\n")


def test_no_command_gives_the_help():
    done = _python("import sys; sys.argv = ['gain-ops']; from gain_ops.commands.cli import main; main()")
    assert "inspect" in done.stdout + done.stderr


def test_a_call_that_does_not_parse_ends_with_two_and_no_traceback():
    done = _python("import sys; sys.argv = ['gain-ops', 'dance']; from gain_ops.commands.cli import main; main()")
    assert done.returncode == 2
    assert "dance" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["--help"], 0.5), pytest.param(["plan", "--model", "llama-3-8b"], 10, marks=pytest.mark.slow)],
)
def test_the_command_takes_less_than(arguments, seconds):
    """Of a processor, so that a busy machine does not matter; at the second try no Python file is left to compile."""
    took = []
    while len(took) < 3 and min(took, default=seconds) >= seconds:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = _python(
            f"import sys; sys.argv = {['gain-ops', *arguments]}; from gain_ops.commands.cli import main; main()"
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < seconds, took

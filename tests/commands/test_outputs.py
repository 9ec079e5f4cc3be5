"""Output that nobody reads, or that finds a full disk: the work is done, one line says it, and the exit status is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gain_ops.commands import outputs

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")

_MAIN = "import sys; from gain_ops.commands.cli import main; sys.argv = ['gain-ops', *{}]; main()"

_WORK = """
import sys
from pathlib import Path
from runpy import run_path

lasting_outputs = run_path({source!r})["lasting_outputs"]  # alone, since the package loads torch
with lasting_outputs():
    for number in range({lines}):
        print(number, "x" * 100, flush={flush})
        print("a note", file=sys.stderr)
    Path(sys.argv[1]).write_text("done")
    sys.exit({status})
"""

FULL = "standard output: No space left on device; the rest of it was lost, and nothing else\n"
GONE = "standard output: its reader has gone; the rest of it was lost, and nothing else\n"


def _work(*, lines: int = 1000, flush: bool = True, status: int = 0) -> str:
    return _WORK.format(source=outputs.__file__, lines=lines, flush=flush, status=status)


def _run(
    program: str, *arguments: object, stdout: int, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(call, stdout=stdout, stderr=stderr, text=True, timeout=60, check=False)
    for handle in {stdout, stderr} - {subprocess.PIPE}:
        os.close(handle)
    return done


def _full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def _gone() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


LOST = pytest.mark.parametrize(("lost", "status", "line"), [(_full, 2, FULL), (_gone, 141, GONE)])


@LOST
@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("lines", [1, 1000])
def test_the_work_is_done_and_its_lost_output_is_told(
    tmp_path: Path, lost, status: int, line: str, lines: int, flush: bool
):
    done = _run(_work(lines=lines, flush=flush), tmp_path / "result", stdout=lost())
    assert (tmp_path / "result").read_text() == "done"
    assert done.returncode == status
    assert done.stderr == "a note\n" * lines + line


@LOST
def test_another_status_stays(tmp_path: Path, lost, status: int, line: str):
    done = _run(_work(status=130), tmp_path / "result", stdout=lost())
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_lost_errors_change_nothing(tmp_path: Path):
    done = _run(_work(), tmp_path / "result", stdout=subprocess.PIPE, stderr=_full())
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1000


@pytest.mark.parametrize(
    ("lost", "status", "line", "option"), [(_full, 2, FULL, "--version"), (_gone, 141, GONE, "--help")]
)
def test_the_programs_own_texts_too(lost, status: int, line: str, option: str):
    done = _run(_MAIN.format([option]), stdout=lost())
    assert (done.returncode, done.stderr) == (status, line)


@pytest.mark.slow
def test_an_adaptation_whose_output_has_no_reader_is_finished(tiny_model: Path, code_folder: Path, tmp_path: Path):
    call = ["adapt", "--model", tiny_model, "--data", code_folder, "--out", tmp_path / "out", "--steps", 2]
    call += ["--batch-tokens", 128, "--sequence-length", 32]
    done = _run(_MAIN.format([*map(str, call)]), stdout=_gone())
    assert done.returncode == 141
    assert done.stderr.endswith(GONE)
    assert len(list((tmp_path / "out").iterdir())) == 4

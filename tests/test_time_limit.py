"""What tests/conftest.py and support/time_limit.py do for the suite: a long test says so, and what is left out is counted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

SAMPLE = """
import time, pytest

@pytest.fixture
def long(): busy(0.3)

@pytest.fixture(scope="session")
def shared(): busy(0.6)

def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass

def test_short(shared): pass
def test_long(): busy(0.5)
def test_long_by_its_fixture(long): busy(0.2)
def test_waits(): time.sleep(0.4)
def test_waits_long(): time.sleep(1.1)

@pytest.mark.slow
def test_marked(): busy(0.5)

@pytest.mark.gpu
def test_gpu(): pass
"""


def _run(folder: Path, *options: str, **environment: str) -> str:
    """Run SAMPLE in a folder `tests` with the suite's conftest, where it lies below pytest's root as it does here."""
    tests = folder / "tests"
    tests.mkdir()
    (tests / "test_sample.py").write_text(SAMPLE)
    shorter = "from support import time_limit\ntime_limit.LIMIT_S = 0.4\ntime_limit.PATIENCE_S = 1.0\ntime_limit.SHARED = ()\n"
    (tests / "conftest.py").write_text((TESTS / "conftest.py").read_text() + shorter)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: long\n    gpu: on a GPU\n")
    command = [sys.executable, "-m", "pytest", "-q", *options]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("CI", "PYTEST_"))}
    run = subprocess.run(
        command, cwd=folder, env=clean | {"PYTHONPATH": str(TESTS)} | environment, capture_output=True, text=True
    )
    return run.stdout


@pytest.mark.slow
def test_a_long_test_without_the_marker_fails_in_ci_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    said = _run(tmp_path, "-m", "not slow", CI="1")
    assert "3 failed, 2 passed, 1 skipped, 1 deselected" in said, said
    for name in ("long", "long_by_its_fixture", "waits_long"):
        assert re.search(rf"test_{name} took .* of 0.4 \(1\): make it faster, or mark it slow", said), said
    assert "left out, marked slow: 1 tests" in said
    assert "left out, marked gpu: 1 tests" in said


@pytest.mark.slow
def test_elsewhere_it_passes(tmp_path: Path) -> None:
    assert "6 passed, 1 skipped" in _run(tmp_path)


@pytest.mark.slow
def test_workers_count_once(tmp_path: Path) -> None:
    said = _run(tmp_path, "-m", "not slow", "-k", "not short", "-n", "2")
    assert "left out, marked slow: 1 tests" in said, said
    assert "left out, marked gpu: 1 tests" in said

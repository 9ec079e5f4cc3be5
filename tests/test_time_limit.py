"""What tests/conftest.py does for the suite: a long test says so, and what is left out is counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

SAMPLE = """
import time, pytest

@pytest.fixture
def long():
    time.sleep(0.3)

@pytest.fixture(scope="session")
def shared():
    time.sleep(0.5)

def test_short(shared): pass
def test_long():
    end = time.process_time() + 0.4
    while time.process_time() < end: pass

def test_waits(): time.sleep(0.4)
def test_long_by_its_fixture(long): time.sleep(0.4)

@pytest.mark.slow
def test_marked(): time.sleep(0.4)

@pytest.mark.gpu
def test_gpu(): pass
"""


def _run(folder: Path, *options: str, **environment: str) -> str:
    (folder / "test_sample.py").write_text(SAMPLE)
    markers = ("-o", "markers=slow: long\ngpu: on a GPU")
    plugin = folder / "limited.py"  # the suite's conftest, with a shorter limit
    plugin.write_text("import conftest\nconftest.LIMIT_S = 0.3\nfrom conftest import *\n")
    paths = os.pathsep.join([str(TESTS), str(folder)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "limited", *markers, *options, "test_sample.py"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("CI", "PYTEST_"))}
    run = subprocess.run(
        command, cwd=folder, env=clean | {"PYTHONPATH": paths} | environment, capture_output=True, text=True
    )
    return run.stdout


@pytest.mark.slow
def test_a_long_test_without_the_marker_fails_in_ci_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    said = _run(tmp_path, "-m", "not slow", CI="1")
    assert "2 failed, 2 passed, 1 skipped, 1 deselected" in said, said
    assert "test_long took 0.4 s of 0.3: make it faster, or mark it slow" in said
    assert "test_long_by_its_fixture took 0.7 s of 0.3" in said
    assert "left out, marked slow: 1 tests" in said
    assert "left out, marked gpu: 1 tests" in said


@pytest.mark.slow
def test_elsewhere_it_passes(tmp_path: Path) -> None:
    assert "5 passed, 1 skipped" in _run(tmp_path)


@pytest.mark.slow
def test_workers_count_once(tmp_path: Path) -> None:
    said = _run(tmp_path, "-m", "not slow", "-k", "not short", "-n", "2")
    assert "left out, marked slow: 1 tests" in said, said
    assert "left out, marked gpu: 1 tests" in said

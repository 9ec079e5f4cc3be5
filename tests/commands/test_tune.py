"""gain-ops tune and info --shape: the whole path with a clock that stands in, and what is said without a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from gain_ops.backends import tables
from gain_ops.backends.interface import GEMMS
from gain_ops.commands import tune
from gain_ops.commands.app import app
from gain_ops.kernels import config, tuning

HERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be tuned")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    result = _run("tune", "--shape", "64x64", "--out", tmp_path / "table.json")
    assert result.exit_code == 2
    assert result.output.splitlines() == ["gain-ops tune times kernels on a GPU, and torch sees none here"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--shape", "64"), ("--shape", "0x8"), ("--shape", "8x8", "--dtype", "float64")])
def test_options_that_do_not_fit_are_refused(arguments: tuple[str, ...]) -> None:
    result = _run("tune", *arguments)
    assert result.exit_code == 2
    assert "expected INxOUT" in result.output or "float64" in result.output


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call takes a millisecond, and a fused one half; what was timed."""
    timed: list[Any] = []

    def clock(call: Any) -> float:
        timed.append(call)
        if len(timed) == 7:
            raise KeyboardInterrupt
        return 0.5 if "config" in call.keywords else 1.0

    monkeypatch.setattr(tuning, "milliseconds", clock)
    monkeypatch.setattr(tuning, "configurations", lambda first: [config._INTERPRETER])
    monkeypatch.setattr(tune, "_device", lambda: HERE)
    return timed


def test_the_whole_path_and_an_interruption(tmp_path: Path, clocked: list[Any]) -> None:
    call = ("tune", "--shape", "32x48", "--tokens", 16, "--dtype", "float16", "--out", tmp_path / "table.json")
    stopped = _run(*call)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.output
    result = _run(*call)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "table.json").read_text())
    assert sorted(stored["problems"]) == sorted(f"{op} float16 T<=16 in=32 out=48" for op in GEMMS)
    assert len(clocked) == sum(len(problem["rows"]) for problem in stored["problems"].values()) + 1
    for op in GEMMS:
        (line,) = (line for line in result.output.splitlines() if f" {op} " in line and "triton" in line)
        assert "500.0" in line
        assert "0.500" in line
        assert tables.find(stored["family"], f"{op} float16 T<=16 in=32 out=48") is None, "--out is a table of its own"


def test_info_says_by_what_a_shape_would_run() -> None:
    result = _run("info", "--shape", "4096x14336", "--tokens", 2048)
    assert result.exit_code == 0, result.output
    assert "need a GPU" in " ".join(result.output.split()) or torch.cuda.is_available()
    assert "expected INxOUT" in _run("info", "--shape", "4096").output

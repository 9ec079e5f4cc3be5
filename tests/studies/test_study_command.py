"""``gain-ops study`` from end to end: what it writes and says, how it is stopped, what it refuses."""

import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gain_ops.commands import console
from gain_ops.commands.app import app
from gain_ops.training.loop import Step
from gain_study import command
from gain_study.engine import records
from gain_study.engine.records import RESULTS

SMALL = [
    *("--seeds", "0", "--orders", "1", "--methods", "gain,lora", "--rates", "gain=1e-2,3e-2", "--rates", "lora=2e-3"),
    *("--steps", "3", "--batch-tokens", "128", "--sequence-length", "32", "--curve-points", "0"),
    *("--validation-windows", "3", "--selection-windows", "2", "--no-tasks", "--device", "cpu"),
]


def _study(model: object, domains: list[str], out: Path, *more: object) -> Result:
    named = [part for domain in domains for part in ("--domain", domain)]
    call = ["study", "--model", model, *named, "--out", out, *SMALL, *more]
    return CliRunner().invoke(app, [str(argument) for argument in call])


def _one_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line


def _stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    steps = iter(range(1, step))

    def interrupt(self: object, done: Step) -> None:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(command._ConsoleWatcher, "step", interrupt)


@pytest.mark.slow
def test_a_study_is_stopped_goes_on_and_ends_in_a_report(
    tiny_model: Path, domain_folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        _stop_at(patch, 11)  # two trials and a stage are nine steps
        result = _study(tiny_model, domain_folders, out)
    assert result.exit_code == 130, result.output
    assert (
        f"2 learning rates and 1 stages are in {out / RESULTS}: the same command goes on from there." in result.output
    )
    assert (out / "report.html").exists()

    result = _study(tiny_model, domain_folders, out)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any(line.startswith("gain, seed 0, order 0: 2/3 sums (3 of 9 done, ") for line in lines)
    assert any(line.startswith("lora, seed 0, order 0: 3/3 code: perplexity ") for line in lines)
    assert "gain: learning rate" not in result.output  # tried before
    assert f"  {out / 'report.html'}" in lines
    assert len(records.read(out / RESULTS).stages) == 6
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_options_in_the_same_folder_are_refused(
    tiny_model: Path, domain_folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        _stop_at(patch, 1)
        assert _study(tiny_model, domain_folders, tmp_path / "out").exit_code == 130
    line = _one_line(_study(tiny_model, domain_folders, tmp_path / "out", "--keep-adapters"))
    assert "is of a study with other settings: keep_adapters was False, is True" in line


def test_the_toy_model_is_made_on_the_spot_and_kept(
    domain_folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gain_study.engine import running

    made = []

    def small(folder: Path, mixture: list[object]) -> None:
        made.append(folder)
        running_toy(folder, mixture, steps=2, width=16)

    running_toy = running.save_toy_model
    monkeypatch.setattr(running, "save_toy_model", small)
    for _ in range(2):
        with monkeypatch.context() as patch:
            _stop_at(patch, 1)
            assert _study("toy", domain_folders, tmp_path / "out").exit_code == 130
    assert made == [tmp_path / "out" / "toy-model"]


def test_on_a_terminal_a_bar_shows_the_step_and_the_time_left(
    tiny_model: Path, domain_folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from rich.console import Console

    seen = Console(force_terminal=True, width=200, record=True, file=(tmp_path / "terminal").open("w"))
    for module in (console, command):
        monkeypatch.setattr(module, "STDOUT", seen)
    assert _study(tiny_model, domain_folders[:2], tmp_path / "out", "--methods", "gain").exit_code == 0
    text = seen.export_text()
    assert "gain, seed 0, order 0: 2/2 sums, step 3, loss " in text
    assert "0 min left" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "steps is 0: at least 1"),
        (["--methods", "gain,lore"], "method 'lore' is unknown"),
        (["--methods", ""], "got no methods"),
        (["--seeds", "0,x"], "--seeds: got 'x'"),
        (["--seeds", "-1"], "--seeds: got '-1'"),
        (["--rates", "lora"], "rates for lora: got []"),
        (["--rates", "lora=fast"], "--rates: got 'lora=fast'"),
        (["--domain", "nowhere"], "no such file or folder: nowhere"),
        (["--model", "nowhere"], "no model at nowhere"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    tiny_model: Path, domain_folders: list[str], tmp_path: Path, options, message
):
    assert message in _one_line(_study(tiny_model, domain_folders, tmp_path / "out", *options))
    assert not (tmp_path / "out" / RESULTS).exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(29, "0 min"), (31, "1 min"), (3599, "1 h 00 min"), (5432, "1 h 31 min")]
)
def test_times_are_in_hours_and_minutes(seconds, text):
    assert command._time_text(seconds) == text

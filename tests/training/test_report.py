"""The report says its figures the same way everywhere, and says so where one is missing."""

import json
from pathlib import Path

import pytest

from gain_ops.training.report import (
    AbsorbFigures,
    BackwardBytes,
    DomainFigures,
    GainFigures,
    Report,
    TrainingFigures,
    to_markdown,
    write_json,
    write_plot,
    written_here,
)
from gain_ops.utils.wording import size_text, time_text


def _report(**changes: object) -> Report:
    fields = {
        "date": "2026-01-02",
        "model": "some-model",
        "device": "some processor",
        "arguments": {"targets": "gain", "side": "output", "lr": 0.01, "dtype": "float32", "seed": 0},
        "environment": {"gain_ops": "1", "python": "2", "torch": "3", "transformers": "4"},
        "domains": [
            DomainFigures("python", "the library", 8, 4, 256, "ab", before=10.0, after=8.0),
            DomainFigures("readmes", "packages", 0, 4, 256, "cd", before=20.0, after=21.0),
        ],
        "training": TrainingFigures(False, 1024, 90.0, [2.5, 2.25, 2.0]),
        "gains": GainFigures(["a", "b"], 1_000, 4_000_000, 4_500),
        "backward": BackwardBytes(1024, 2**20, 3 * 2**19),
        "absorbing": AbsorbFigures(1e-9, 2e-5, 31.4),
        "seconds": {"total": 125.0},
        "finished": True,
    }
    return Report(**(fields | changes))


def test_the_markdown_holds_every_figure():
    text = to_markdown(_report())
    for part in (
        "some-model on python: 3 steps of 1024 tokens, gain gains on the output side, lr 0.01, float32, seed 0.",
        "perplexity (4 windows of 256 tokens)",
        "| python (adapted to) | 10.00 | 8.00 | -20.0 % |",
        "| readmes (held out) | 20.00 | 21.00 | +5.0 % |",
        "| trained parameters | 1,000 of 4,000,000 (0.025 %) |",
        "| gain file | 4.4 KiB |",
        "| saved for backward by a step of 1024 tokens | 1.0 MiB |",
        "| the same with LoRA r=16 on the same 2 layers | 1.5 MiB (512.0 KiB more) |",
        "| largest logit difference after absorbing | 2.0e-05 (logits up to 31) |",
        "| time | 2 min 05 s, training 1 min 30 s |",
        "some processor",
        "2026-01-02",
    ):
        assert part in text


def test_lora_may_keep_less_and_may_be_missing():
    rows = dict(_report(backward=BackwardBytes(8, 2048, 1024)).figure_rows())
    assert rows["the same with LoRA r=16 on the same 2 layers"] == "1.0 KiB (1.0 KiB less)"
    rows = dict(_report(backward=BackwardBytes(8, 2048, None)).figure_rows())
    assert "peft is not installed" in rows["the same with LoRA r=16 on the same 2 layers"]


def test_what_was_not_measured_is_not_shown_as_measured():
    report = _report(
        domains=[DomainFigures("python", "the library", 8, 4, 256, "ab", before=10.0)], backward=None, absorbing=None
    )
    assert report.perplexity_rows() == [("python (adapted to)", "10.00", "not measured", "")]
    assert [what for what, _ in report.figure_rows()] == ["trained parameters", "gain file", "time"]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_sizes(nbytes, text):
    assert size_text(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (187, "3 min 07 s")])
def test_times(seconds, text):
    assert time_text(seconds) == text


def test_json_holds_all_and_is_known_again(tmp_path: Path):
    path = tmp_path / "report.json"
    write_json(_report(), path)
    found = json.loads(path.read_text())
    assert found["domains"][1]["after"] == 21.0
    assert found["training"]["losses"] == [2.5, 2.25, 2.0]
    assert written_here(path)


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"written_by": "someone"}'])
def test_a_report_of_something_else_is_not_taken_for_ours(tmp_path: Path, text):
    path = tmp_path / "report.json"
    assert not written_here(path)
    path.write_text(text)
    assert not written_here(path)


def test_the_plot_is_a_picture_whatever_the_figures(tmp_path: Path):
    for name, domains in {
        "near": [DomainFigures("one", "s", 8, 4, 256, "ab", before=10.0, after=10.0)],
        "far": [DomainFigures("one", "s", 8, 4, 256, "ab", before=1.2, after=90_000.0)],
    }.items():
        path = tmp_path / f"{name}.png"
        write_plot(_report(domains=domains), path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000

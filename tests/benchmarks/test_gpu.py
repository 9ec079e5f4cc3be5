"""The one command for a GPU: order, resuming, cutting, and that nothing is timed on a red proof."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, proof, results
from benchmarks.results import Row

ROW = Row("op", "site", "-", "eager", "time", "us", "float32", 1, 1, 1, 2.0, 1.0, 3.0, 5)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the parts; each leaves its name here and gives two rows."""
    names: list[str] = []

    def part(name: str) -> gpu.Part:
        def run(budget_s: float, before: list[Row]) -> Iterator[Row]:
            names.append(name)
            for _ in range(2):
                yield dataclasses.replace(ROW, group=name, median=1.0)

        return gpu.Part(name, 0.5, run)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "prepare", lambda: None)
    monkeypatch.setattr(gpu, "PARTS", tuple(part(name) for name in ("proof", "ceilings", "ops")))
    return names


def test_every_part_in_order_each_flushed(ran: list[str], tmp_path: Path) -> None:
    assert gpu.run(tmp_path, 1.0, resume=False)
    assert ran == ["proof", "ceilings", "ops"]
    assert json.loads((tmp_path / "parts.json").read_text()) == ran
    assert [row.group for row in results.read([tmp_path / "results.csv"])] == [name for name in ran for _ in range(2)]


def test_resume_goes_on_after_the_finished_parts(ran: list[str], tmp_path: Path) -> None:
    gpu.run(tmp_path, 1.0, resume=False)
    (tmp_path / "parts.json").write_text('["proof", "ceilings"]')
    ran.clear()
    assert gpu.run(tmp_path, 1.0, resume=True)
    assert ran == ["ops"]
    assert len(results.read([tmp_path / "results.csv"])) == 8
    ran.clear()
    gpu.run(tmp_path, 1.0, resume=False)
    assert ran == ["proof", "ceilings", "ops"]
    assert len(results.read([tmp_path / "results.csv"])) == 6


def test_a_cut_leaves_what_was_measured_and_no_finished_part(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 0.0, 0.0, 100.0, *[100.0] * 9))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert gpu.run(tmp_path, 1.0, resume=False)
    assert ran == ["proof"]
    assert len(results.read([tmp_path / "results.csv"])) == 1
    assert not (tmp_path / "parts.json").exists()


def test_nothing_is_timed_where_the_proof_is_red(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proof, "steps", lambda: iter([proof.Outcome("memcheck", False, "1 error", ("at 0x0",))]))
    parts = (gpu.Part("proof", 0.5, lambda budget_s, before: gpu._proof()), *gpu.PARTS[1:])
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(results, "environment", lambda device: {"device": "a card"})
    assert not gpu.run(tmp_path, 1.0, resume=False)
    assert ran == []
    assert "nothing is timed: memcheck: 1 error | at 0x0" in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="python -m benchmarks run"):
        gpu.run(tmp_path, 1.0, resume=False)


def test_a_tool_that_is_missing_is_neither_red_nor_green(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof.shutil, "which", lambda name: None)
    assert proof.sanitizer("memcheck") == proof.Outcome("memcheck", None, "compute-sanitizer is not installed")

"""Tuning is opt-in, keeps the fastest right candidate, and survives a table that is broken or of another machine."""

import json
import logging
from pathlib import Path

import pytest
import torch

from gain_ops.kernels import linear_forward, tuning
from gain_ops.kernels.config import GemmConfig


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAIN_OPS_TUNED", str(tmp_path / "tables" / "device.json"))
    tuning._table.cache_clear()
    return tmp_path / "tables" / "device.json"


def _tune(candidates: list[GemmConfig], monkeypatch: pytest.MonkeyPatch) -> GemmConfig:
    monkeypatch.setattr(tuning, "candidates", lambda first: candidates)
    x, weight, delta, y = torch.randn(32, 32), torch.randn(48, 32), torch.randn(48), torch.empty(32, 48)

    def run(config: GemmConfig) -> torch.Tensor:
        if config.num_stages == 9:
            raise RuntimeError("out of resource: shared memory")
        linear_forward.launch(x, weight, delta, None, y, None, config)
        return y + 1 if config.group_m == 99 else y

    def timer(call) -> float:
        return 1.0 / call.args[0].block_n

    return tuning.tune("linear", run, x, weight, aligned=True, timer=timer)


def _config(block_n: int, **changes: int) -> GemmConfig:
    return GemmConfig(**{"block_m": 16, "block_n": block_n, "block_k": 16, "num_warps": 4, "num_stages": 2} | changes)


def test_the_fastest_right_candidate_wins(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, too_large = _config(256, group_m=99), _config(128, num_stages=9)
    winner = _tune([_config(16), wrong, _config(32), too_large], monkeypatch)
    assert winner == _config(32)
    stored = json.loads(table.read_text())
    assert list(stored["configs"]) == ["linear float32 ieee aligned m<=32 n=48 k=32"]
    assert GemmConfig(**stored["configs"]["linear float32 ieee aligned m<=32 n=48 k=32"]) == winner


def test_the_table_is_read_again_and_added_to(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tune([_config(16)], monkeypatch)
    entries = tuning._table(table, None)
    key = tuning._key("linear", torch.float32, "ieee", True, 20, 48, 32)
    assert entries[key] == _config(16), "20 tokens fall under the same power of two as 32"
    assert tuning._key("linear", torch.float32, "ieee", True, 33, 48, 32) not in entries


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"configs": {}}', '{"format": 1, "configs": 3}'])
def test_a_broken_table_is_named_and_left_out(table: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    table.parent.mkdir()
    table.write_text(text)
    with caplog.at_level(logging.WARNING, "gain_ops"):
        assert tuning._table(table, None) == {}
    assert str(table) in caplog.text


def test_a_table_of_another_version_is_not_read(
    table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _tune([_config(16)], monkeypatch)
    table.write_text(table.read_text().replace('"format": 1', '"format": 0'))
    tuning._table.cache_clear()
    with caplog.at_level(logging.WARNING, "gain_ops"):
        assert tuning._table(table, None) == {}
    assert "not read" in caplog.text


def test_candidates_begin_with_the_heuristics_pick_and_do_not_repeat() -> None:
    first = _config(64)
    found = tuning.candidates(first)
    assert found[0] == first
    assert len(set(found)) == len(found) > 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be tuned")
def test_the_command_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tuning.main(["--tokens", "8", "--out-features", "8", "--in-features", "8"])
    assert stop.value.code == 2
    assert "GPU" in capsys.readouterr().err


def test_a_tuned_entry_is_picked_for_its_device_at_once(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of index 0, whose name, architecture and size are given here."""
    monkeypatch.setattr(tuning, "_device_name", lambda index: "a device")
    monkeypatch.setattr(tuning.heuristics, "architecture", lambda index: "sm_90")
    monkeypatch.setattr(tuning, "multiprocessors", lambda index: 132)
    tuning._pick.cache_clear()
    problem = ("linear", 0, torch.bfloat16, "ieee", True, 8192, 4096, 4096)
    by_heuristic = tuning._pick(*problem)
    tuned = _config(64, num_stages=5)
    tuning._write(table, 0, {tuning._key("linear", torch.bfloat16, "ieee", True, 8000, 4096, 4096): tuned})
    assert tuning._pick(*problem) == tuned != by_heuristic
    assert tuning._pick(*problem[:4], False, *problem[5:]) != tuned, "an entry is for aligned operands or for others"
    tuning._pick.cache_clear()

"""Tuning is opt-in, keeps the fastest right candidate, and survives a table that is broken or of another machine."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gain_ops.kernels import config, linear_forward, tables, tuning
from gain_ops.kernels.config import GemmConfig

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HERE = tables.Device.of(torch.empty(0, device=DEVICE))
HOPPER = tables.Device("sm_90", 132)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAIN_OPS_TUNED", str(tmp_path / "tables" / "device.json"))
    tables.read_table.cache_clear()
    return tmp_path / "tables" / "device.json"


def _tune(candidates: list[GemmConfig], monkeypatch: pytest.MonkeyPatch) -> GemmConfig:
    monkeypatch.setattr(tuning, "candidates", lambda first: candidates)
    x, weight, y = (torch.randn(shape, device=DEVICE).half() for shape in ((32, 32), (48, 32), (32, 48)))
    delta = torch.randn(48, device=DEVICE)

    def run(config: GemmConfig) -> torch.Tensor:
        if config.num_stages == 9:
            raise RuntimeError("out of resource: shared memory")
        linear_forward.launch(x, weight, delta, None, y, None, config)
        return y + 1 if config.group_m == 99 else y

    def timer(call) -> float:
        return 1.0 / (call.args[0].block_n + call.args[0].group_m)

    return tuning.tune("linear", run, x, weight, timer=timer)


def _config(block_n: int, **changes: int) -> GemmConfig:
    return GemmConfig(**{"block_m": 16, "block_n": block_n, "block_k": 16, "num_warps": 4, "num_stages": 2} | changes)


def test_the_fastest_right_candidate_wins(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, too_large = _config(256, group_m=99), _config(128, num_stages=9)
    winner = _tune([_config(16), wrong, _config(32), too_large], monkeypatch)
    assert winner == _config(32, group_m=16), "the fastest is tried in other orders of tiles"
    stored = json.loads(table.read_text())
    assert list(stored["configs"]) == ["linear float16 m<=32 n=48 k=32"]
    assert GemmConfig(**stored["configs"]["linear float16 m<=32 n=48 k=32"]) == winner


def test_the_table_is_read_again_and_added_to(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winner = _tune([_config(16)], monkeypatch)
    entries = tables.read_table(table, HERE, logging.WARNING)
    key = tables.entry_key("linear", torch.float16, 20, 48, 32)
    assert entries[key] == winner, "20 tokens fall under the same power of two as 32"
    assert tables.entry_key("linear", torch.float16, 33, 48, 32) not in entries


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"configs": {}}', '{"format": 1, "configs": 3}'])
def test_a_broken_table_is_named_and_left_out(table: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    table.parent.mkdir()
    table.write_text(text)
    with caplog.at_level(logging.WARNING, "gain_ops"):
        assert tables.read_table(table, HERE, logging.WARNING) == {}
    assert str(table) in caplog.text


def test_a_table_of_another_version_is_not_read(
    table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _tune([_config(16)], monkeypatch)
    table.write_text(table.read_text().replace(f'"format": {tables.FORMAT}', '"format": 0'))
    tables.read_table.cache_clear()
    with caplog.at_level(logging.WARNING, "gain_ops"):
        assert tables.read_table(table, HERE, logging.WARNING) == {}
    assert "not read" in caplog.text


def test_candidates_begin_with_the_heuristics_pick_and_do_not_repeat() -> None:
    first = _config(64)
    found = tuning.candidates(first)
    assert found[0] == first
    assert len(set(found)) == len(found) > 20


def test_candidates_fit_and_do_not_spill() -> None:
    first = config.gemm_config("sm_90", 8192, 4096, 132)
    assert tuning._shared_memory(first) <= tuning.SHARED_MEMORY
    for one in tuning.candidates(first):
        assert tuning._shared_memory(one) <= tuning.SHARED_MEMORY
        assert one.subtiles == 2 or one.block_m * one.block_n < 128 * 256
    # what Triton 3.6 and 3.9 ask for, by python -m gain_ops.kernels.aot
    large, whole = (
        _config(256, block_m=128, block_k=64, num_stages=4, subtiles=2),
        _config(256, block_m=128, block_k=64),
    )
    assert 229_408 <= tuning._shared_memory(large) <= 229_408 + 1024
    assert 163_864 <= tuning._shared_memory(whole) <= 163_864 + 1024


@pytest.mark.slow
def test_candidates_are_compiled_side_by_side_and_nothing_is_launched() -> None:
    """In a process of its own, where the kernels are compiled for an sm_90 that is not there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", _COMPILED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2"]


_COMPILED = """
import torch
from gain_ops.kernels import linear_forward, tuning
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.recording import recording

x, w, y = (torch.empty(256, 256, dtype=torch.bfloat16, device="meta") for _ in range(3))
delta = torch.empty(256, device="meta")
configs = [GemmConfig(64, 64, 64, 4, stages) for stages in (2, 3)] + [GemmConfig(63, 64, 64, 4, 2)]
with recording("sm_90") as launches:
    tuning._compile_at_once(lambda config: linear_forward.launch(x, w, delta, None, y, None, config), configs)
    assert not launches
    print(*(len(kernels) for kernels, *_ in linear_forward.linear_kernel.device_caches.values()))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be tuned")
def test_the_command_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tuning.main(["--tokens", "8", "--out-features", "8", "--in-features", "8"])
    assert stop.value.code == 2
    assert "GPU" in capsys.readouterr().err


@pytest.fixture
def forgotten():
    """No pick and no table is remembered, before and after."""
    for cached in (tables._pick, tables.read_table):
        cached.cache_clear()
    yield
    for cached in (tables._pick, tables.read_table):
        cached.cache_clear()


def _hopper(m: int) -> GemmConfig:
    return tables._pick("linear", HOPPER, torch.bfloat16, m, 4096, 4096)


def test_a_tuned_entry_is_picked_for_its_device_at_once(table: Path, forgotten: None) -> None:
    by_heuristic = _hopper(8192)
    tuned = _config(64, num_stages=5)
    tables.write_table(table, HOPPER, {tables.entry_key("linear", torch.bfloat16, 8000, 4096, 4096): tuned})
    assert _hopper(8192) == tuned != by_heuristic


def test_the_package_s_own_table_is_read_after_the_user_s(
    table: Path, forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    shipped = tables.shipped_path(HOPPER)
    assert shipped == tmp_path / "shipped" / "sm_90-132.json"
    mine, yours = _config(64, num_stages=5), _config(32, num_stages=5)
    keys = [tables.entry_key("linear", torch.bfloat16, m, 4096, 4096) for m in (8192, 512)]
    tables.write_table(shipped, HOPPER, dict.fromkeys(keys, mine))
    tables.write_table(table, HOPPER, {keys[0]: yours})
    assert [_hopper(m) for m in (8192, 512)] == [yours, mine]
    monkeypatch.setattr(tables.triton, "__version__", "0.0")
    tables._pick.cache_clear()
    tables.read_table.cache_clear()
    with caplog.at_level(logging.WARNING, "gain_ops"):
        _hopper(512)
    assert str(table) in caplog.text
    assert str(shipped) not in caplog.text, "a table that came with the package is no business of the user's"


def test_a_table_serves_every_device_of_its_architecture_and_size(
    table: Path, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H100 and an H200 have 132 multiprocessors of sm_90: what one tuned serves the other, and no H100 PCIe of 114."""
    monkeypatch.delenv("GAIN_OPS_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(table.parent))
    tuned = _config(64, num_stages=5)
    tables.write_table(
        tables.table_path(HOPPER), HOPPER, {tables.entry_key("linear", torch.bfloat16, 8192, 4096, 4096): tuned}
    )
    assert _hopper(8192) == tuned
    smaller = tables.Device("sm_90", 114)
    assert tables._pick("linear", smaller, torch.bfloat16, 8192, 4096, 4096) != tuned


def test_a_patch_release_of_triton_keeps_the_table(
    table: Path, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables.triton, "__version__", "3.9.0")
    tuned = _config(64, num_stages=5)
    tables.write_table(table, HOPPER, {tables.entry_key("linear", torch.bfloat16, 8192, 4096, 4096): tuned})
    monkeypatch.setattr(tables.triton, "__version__", "3.9.1")
    tables.read_table.cache_clear()
    tables._pick.cache_clear()
    assert _hopper(8192) == tuned

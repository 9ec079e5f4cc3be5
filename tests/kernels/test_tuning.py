"""Tuning is opt-in, keeps the figures of right candidates, and goes on where it stopped."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gain_ops.backends import tables
from gain_ops.backends.interface import GEMMS
from gain_ops.backends.tables import Problem, Row
from gain_ops.kernels import backend, config, tuning
from gain_ops.kernels import tables as picks
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.tuning import Candidate

from support.parity import DEVICE


@pytest.fixture(autouse=True)
def _forgotten():
    """No pick is remembered, before and after."""
    picks.forget()
    yield
    picks.forget()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAIN_OPS_TUNED", str(tmp_path / "tables" / "device.json"))
    tables.read.cache_clear()
    return tmp_path / "tables" / "device.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """A clock that stands in, on which wide tiles and long walks are fast; and what it was asked to time."""
    asked: list[Candidate] = []

    def clock(call: Any) -> float:
        used = call.keywords.get("config")
        asked.append(Candidate("composed") if used is None else Candidate("triton", used))
        return 1.0 if used is None else 1.0 / (used.block_n + used.group_m + 100 * used.flatten)

    monkeypatch.setattr(tuning, "milliseconds", clock)
    return asked


def _config(block_n: int, **changes: int) -> GemmConfig:
    return GemmConfig(**{"block_m": 16, "block_n": block_n, "block_k": 16, "num_warps": 4, "num_stages": 2} | changes)


def _given(tokens: int = 32) -> dict[str, Any]:
    return tuning.problem(tokens, 48, 32, torch.float16, torch.device(DEVICE))


def _tune(op: str, configs: list[GemmConfig], monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setattr(tuning, "configurations", lambda first: configs)
    return list(tuning.tune(op, _given()))


@pytest.mark.usefixtures("timed")
def test_the_fastest_right_candidate_is_picked(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, too_large = _config(128, group_m=99), _config(64, num_stages=9)
    ships = backend.linear

    def linear(*arguments: Any, config: GemmConfig) -> torch.Tensor:
        if config.num_stages == 9:
            raise RuntimeError("out of resource: shared memory")
        y = ships(*arguments, config=config)
        return y * 1.01 if config.group_m == 99 else y

    monkeypatch.setattr(backend, "linear", linear)
    rows = _tune("linear", [_config(16), wrong, _config(32), too_large], monkeypatch)
    by_config = {json.dumps(row.config): row for row in rows}
    assert "relative error" in by_config[json.dumps(asdict(wrong))].note
    assert "shared memory" in by_config[json.dumps(asdict(too_large))].note
    assert by_config["null"].us == 1000.0
    best = min((row for row in rows if row.us is not None), key=lambda row: row.us)
    winner = _config(32, flatten=True)
    assert best.config == asdict(winner), "the fastest is tried in other orders of tiles, and flattened"
    picks.forget()
    like, weight = torch.empty(20, 32, dtype=torch.float16), torch.empty(48, 32)
    assert picks.gemm_config("linear", like, weight) == winner, "20 tokens fall under the same power of two as 32"
    assert (
        picks.gemm_config("linear_z", like, weight) == config.gemm_config("interpreter", 20, 48, 4) or DEVICE != "cpu"
    )


@pytest.mark.parametrize("op", GEMMS)
def test_every_op_is_tuned_and_picked_by_its_own_sizes(
    op: str, table: Path, timed: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _tune(op, [_config(16)], monkeypatch)
    assert len(rows) == len(timed) == tuning.count(op, _given())
    assert all(row.us for row in rows), rows
    (name,) = json.loads(table.read_text())["problems"]
    assert name == f"{op} float16 T<=32 in=32 out=48"
    a, weight = (48, (32, 48)) if op == "backward_input" else (32, (48, 32))
    like = torch.empty(32, a, dtype=torch.float16, device=DEVICE)
    assert picks.gemm_config(op, like, torch.empty(weight)).block_n == 16


def test_an_interrupted_tuning_goes_on(table: Path, timed: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "configurations", lambda first: [_config(16), _config(32)])
    for _ in zip(range(2), tuning.tune("linear", _given()), strict=False):
        pass
    begun = [*timed]
    assert begun[0] == Candidate("composed"), "what every fused GEMM has to beat comes first"
    rows = list(tuning.tune("linear", _given()))
    assert len(timed) == len(set(timed)) == len(rows), "nothing is measured twice"
    (cards,) = {json.loads(table.read_text())["family"]}
    stored = tables.read(table, cards, 0)
    (name,) = stored
    tables.write(table, cards, {name: Problem("another machine", stored[name].rows)})
    timed.clear()
    list(tuning.tune("linear", _given()))
    assert len(timed) == len(rows), "another machine's figures are no figures of this one"


def test_a_pick_is_that_of_the_driver_at_hand(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.empty(8192, 64, dtype=torch.float16, device="meta")
    found = []
    for arch in ("sm_90", "sm_80"):
        monkeypatch.setattr(picks, "architecture", lambda index, arch=arch: arch)
        found.append(picks.gemm_config("linear", like, torch.empty(4096, 64, device="meta")))
    assert [one.use_tma for one in found] == [True, False]


def test_what_no_fused_gemm_serves_is_composed(table: Path, timed: list[Candidate]) -> None:
    given = tuning.problem(8, 12, 12, torch.float16, torch.device(DEVICE))
    assert [row.way for row in tuning.tune("linear", given)] == ["composed"]


def test_configurations_begin_with_the_heuristics_pick_and_do_not_repeat() -> None:
    first = _config(64)
    found = tuning.configurations(first)
    assert found[0] == first
    assert len(set(found)) == len(found) > 20


def test_configurations_fit_and_do_not_spill() -> None:
    first = config.gemm_config("sm_90", 8192, 4096, 132)
    assert tuning._shared_memory(first) <= tuning.SHARED_MEMORY
    for one in tuning.configurations(first):
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
def test_candidates_are_compiled_side_by_side_and_launched_in_turn() -> None:
    """In a process of its own, over Triton's real launcher, for an sm_90 that is not there: the whole path of a tuning."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", _COMPILED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2", "0", "True", "sm_90", "composed", "triton", "triton"]


_COMPILED = """
import functools, tempfile, torch
from pathlib import Path
from unittest import mock
from gain_ops.backends import agreement, tables
from gain_ops.kernels import backend, linear_forward, tuning
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.recording import recording

configs = [GemmConfig(64, 64, 64, 4, stages) for stages in (2, 3)] + [GemmConfig(63, 64, 64, 4, 2)]
with (
    recording("sm_90") as launches,
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(agreement, "assert_no_worse_than_torch"),
    mock.patch.object(tuning, "milliseconds", lambda call: call() is not None),
    mock.patch.object(tuning, "configurations", lambda first: configs),
    mock.patch.object(tuning, "variants", lambda op, config: []),
):
    given = tuning.problem(256, 256, 256, torch.bfloat16, torch.device("meta"))
    arguments = [given[name] for name in ("x", "weight", "delta_out", "bias")]
    tuning._compile_at_once([functools.partial(backend.linear, *arguments, config=one) for one in configs])
    print(*(len(kernels) for kernels, *_ in linear_forward.linear_kernel.device_caches.values()), len(launches))
    table = Path(folder) / "table.json"
    rows = list(tuning.tune("linear", given, table))
    print(len(launches) > 0, *(family for family in ("sm_90",) if tables.read(table, family, 0)))
    print(*(row.way for row in rows if row.us is not None))
"""

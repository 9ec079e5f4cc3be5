"""Whole steps on a tiny model: what is reported, what the gate refuses, and that the time is kept."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable

import pytest
import torch

import gain_ops
from benchmarks.contestants import models
from benchmarks.contestants.models import METHODS, Method
from benchmarks.contestants.sites import ARCHITECTURES, Architecture
from benchmarks.harness.results import Row
from benchmarks.suites import memory, steps
from gain_ops.layers.gained import Gained

TINY = Architecture("Tiny", "llama", 32, 64, 2, 2, 1, 64)
SETTING = steps.Setting(TINY, 2, 64, 16, torch.float32, torch.device("cpu"), warm_up=1, timed=2)
FROZEN, GAIN = METHODS["frozen"], METHODS["gain-ffn"]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


def _measure(*methods: Method, setting: steps.Setting = SETTING, seconds: float = 0.0) -> dict[tuple[str, str], Row]:
    """One round where no time is given for more."""
    now = time.monotonic()
    rows = steps.setting_rows(setting, now + seconds, now + 60, methods or tuple(METHODS.values()))
    return {(row.contestant, row.metric): row for row in rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
@needs_peft
def test_every_method_starts_as_the_frozen_model_trains_and_is_timed(dtype: torch.dtype, checkpointed: bool) -> None:
    setting = dataclasses.replace(SETTING, dtype=dtype, checkpointed=checkpointed)
    rows = _measure(setting=setting)
    start = rows["frozen", "first loss"].median
    for name in METHODS:
        row = rows[name, "throughput"]
        assert row.median is not None, row.note
        assert 0 < row.q20 <= row.median <= row.q80
        assert (row.group, row.unit, row.samples) == ("step", "tokens/s", 2)
        assert row.site == "Tiny, 2 layers" + (", checkpointed" if checkpointed else "")
        assert row.backend == ("eager" if name.startswith("gain") else "-")
        assert rows[name, "first loss"].median == pytest.approx(start, abs=4 * torch.finfo(dtype).eps * start)
        last = rows[name, "last loss"].median
        assert last == start if name == "frozen" else last != rows[name, "first loss"].median
        if name != "frozen":
            assert rows[name, "throughput / frozen"].unit == "x"
            assert rows[name, "throughput / frozen"].samples == 2
        assert (name, "peak") not in rows
    assert ("frozen", "throughput / frozen") not in rows


def test_what_is_kept_is_what_meta_says() -> None:
    rows = _measure(FROZEN, GAIN)
    for method in (FROZEN, GAIN):
        model = models.build(TINY, dtype=torch.float32)
        models.adapt(model, method.name)
        kept = memory.model_saved(model, models.tokens_of(TINY, 16, 64, "meta")).new
        assert rows[method.name, "saved"].median == kept


def test_rounds_go_on_while_there_is_time_and_ratios_are_taken_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "ROUNDS", 3)
    rows = _measure(FROZEN, GAIN, seconds=60)
    own, frozen = rows["gain-ffn", "throughput"], rows["frozen", "throughput"]
    assert own.samples == frozen.samples == rows["gain-ffn", "throughput / frozen"].samples == 6


def _way(name: str, put: Callable[..., object]) -> Method:
    return dataclasses.replace(GAIN, name=name, way=dataclasses.replace(GAIN.way, put=put))


def _off(model: torch.nn.Module, backend: str) -> None:
    gain_ops.apply(model, "gain-ffn")
    for module in model.modules():
        if isinstance(module, Gained):
            torch.nn.init.constant_(module.delta, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_method_that_does_not_start_as_the_frozen_model_has_no_figure(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far_off(model: torch.nn.Module, backend: str) -> None:
        _off(model, backend)
        for module in model.modules():
            if isinstance(module, Gained):
                torch.nn.init.constant_(module.delta, 3.0)

    wrong = _way("wrong", _off if dtype == torch.float32 else far_off)
    monkeypatch.setitem(METHODS, "wrong", wrong)
    rows = _measure(FROZEN, wrong, GAIN, setting=dataclasses.replace(SETTING, dtype=dtype))
    assert rows["wrong", "throughput"].median is None
    assert "does not start as the frozen model" in rows["wrong", "throughput"].note
    assert ("wrong", "saved") not in rows
    assert rows["gain-ffn", "throughput"].median is not None, "the others go on"


def test_a_method_that_does_not_train_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = dataclasses.replace(GAIN, name="idle", rate=0.0)
    monkeypatch.setitem(METHODS, "idle", idle)
    assert "it does not train" in _measure(FROZEN, idle)["idle", "throughput"].note


def test_an_error_of_one_method_is_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(model: torch.nn.Module, backend: str) -> None:
        raise torch.OutOfMemoryError("too large\nsecond line")

    monkeypatch.setitem(METHODS, "large", _way("large", put))
    rows = _measure(FROZEN, METHODS["large"])
    assert rows["large", "throughput"].note == "OutOfMemoryError: too large"
    assert rows["large", "throughput"].samples == 0


def test_a_missing_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    lora = METHODS["PEFT LoRA r=16 on q and v"]
    row = _measure(FROZEN, lora)[lora.name, "throughput"]
    assert (row.median, row.note) == (None, "peft not installed")


def test_the_time_is_kept_and_what_it_was_too_short_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = [dataclasses.replace(SETTING, checkpointed=checkpointed) for checkpointed in (False, True)]
    monkeypatch.setattr(steps, "settings", lambda device: pending)
    rows = list(steps.rows(torch.device("cpu"), 0.0))
    assert {row.site for row in rows} == {"Tiny, 2 layers", "Tiny, 2 layers, checkpointed"}
    measured = {row.contestant for row in rows if row.median is not None}
    assert measured == {"frozen"}
    assert all(row.note == steps.NO_TIME for row in rows if row.median is None)
    assert len([row for row in rows if row.median is None]) == 2 * len(METHODS) - 1


def test_the_frozen_model_comes_first() -> None:
    with pytest.raises(ValueError, match="methods must begin with 'frozen', got \\['gain-ffn'\\]"):
        list(steps.setting_rows(SETTING, 0.0, 0.0, (GAIN,)))


def test_a_cpu_trains_the_small_model_without_and_with_checkpointing() -> None:
    small, checkpointed = steps.settings(torch.device("cpu"))
    assert (small.architecture.name, small.checkpointed, checkpointed.checkpointed) == ("SmolLM2-135M", False, True)


@needs_peft
def test_peaks_are_asked_of_the_frozen_model_the_lean_gains_and_lora() -> None:
    rows = list(steps.peak_rows(torch.device("cpu"), [dataclasses.replace(SETTING, timed=1)]))
    measured = [row for row in rows if row.metric == "throughput"]
    assert [row.contestant for row in measured] == ["frozen", steps.LEAN, *steps.LORA_PEERS]
    assert [row.samples for row in measured] == [1] * 4, "one turn, and one timed step in it"


def test_as_many_layers_as_fit_and_one_at_least() -> None:
    setting = steps.Setting(ARCHITECTURES["Llama-3-8B"], 8, 16384, 8192, torch.bfloat16, torch.device("cuda"))
    block = steps.block_bytes(setting.architecture, setting.tokens, setting.dtype)
    full = 4 * 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    assert block > full, "full fine-tuning takes this and what it keeps"
    beside = 2 * 4 * 2 * 16384 * 4096 + 10 * 8192 * 16384
    assert steps.layers_that_fit(setting, beside + 3 * block) == 3
    assert steps.layers_that_fit(setting, beside + 3 * block - 1) == 2
    assert steps.layers_that_fit(setting, 1000 * block) == 8
    assert steps.layers_that_fit(setting, 0) == 1


@pytest.mark.gpu
def test_on_a_gpu_there_is_a_peak() -> None:
    setting = dataclasses.replace(SETTING, device=torch.device("cuda"), dtype=torch.bfloat16, tokens=128)
    rows = _measure(FROZEN, GAIN, setting=setting)
    assert rows["gain-ffn", "peak"].median >= rows["gain-ffn", "saved"].median
    assert rows["gain-ffn", "throughput"].backend in ("triton", "cuda")

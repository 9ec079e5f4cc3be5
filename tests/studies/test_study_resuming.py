"""A study that is killed, whenever, comes to the numbers of one that was not."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gain_study.engine import records, running, weights
from gain_study.engine.records import RESULTS, Rate, Stage, Study
from gain_study.engine.running import Stopped, study
from gain_study.engine.settings import Settings

from support.small_studies import Watcher

METHODS = (
    "gain-ffn",
    "lora-replay",
    "ewc",
)  # that keep least, that look back at texts, and that keep Fisher information
RATES = {"gain-ffn": (1e-2,), "lora": (1e-3,), "full": (1e-4,)}


Kill = Callable[[pytest.MonkeyPatch], object]
"""Arranges for the process to be killed at some point."""


def _numbers(done: Study) -> tuple[object, list[Rate], list[Stage]]:
    """All of a results file but what a clock and the system's memory say."""
    stages = [replace(stage, seconds=0.0, tokens_per_second=0.0, peak_bytes=0) for stage in done.stages]
    return done.base, done.rates, stages


def _die(*arguments: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_step(number: int) -> Kill:
    """When the process has made so many steps, and this is the last."""
    steps = iter(range(1, number))
    return lambda patch: patch.setattr(Watcher, "step", lambda self, step: next(steps, None) or _die())


def _before_record(patch: pytest.MonkeyPatch) -> None:
    """When a state is saved that no record tells of."""
    save = weights.save_state
    patch.setattr(running, "save_state", lambda state, path: (save(state, path), _die()))


def _within_record(patch: pytest.MonkeyPatch) -> None:
    append = records.append

    def cut(path: Path, record: records.Record) -> None:
        before = path.stat().st_size
        append(path, record)
        if isinstance(record, Stage):
            os.truncate(path, (before + path.stat().st_size) // 2)
            _die()

    patch.setattr(records, "append", cut)


def _after_record(patch: pytest.MonkeyPatch) -> None:
    """When the state of the stage before is still there."""
    append = records.append

    def last(path: Path, record: records.Record) -> None:
        append(path, record)
        if isinstance(record, Stage):
            _die()

    patch.setattr(records, "append", last)


def _within_state(patch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def half(tensors: object, path: Path) -> None:
        path.write_bytes(b"half a state")
        _die()

    patch.setattr(safetensors.torch, "save_file", half)


def _kill(settings: Settings, prepare: Kill) -> None:
    """Run the study in a process of its own, which kills itself."""

    def target() -> None:
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch)
            study(settings, Watcher())

    process = multiprocessing.get_context("fork").Process(
        target=target
    )  # forked: importing torch would take most of the time
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_study_killed_again_and_again_has_the_numbers_of_one_that_was_not(small, tmp_path: Path):
    call = {"methods": METHODS, "rates": RATES}
    whole = study(small(tmp_path / "whole", **call), Watcher())
    settings = small(tmp_path / "killed", **call)
    kills: list[tuple[Kill, int]] = [  # and the stages that are done then, of nine
        (_in_step(2), 0),  # of the trial of gain-ffn's learning rate
        (_in_step(5), 0),  # of its first stage
        (_before_record, 0),
        (_within_record, 0),
        (_after_record, 1),
        (_in_step(2), 1),
        (_after_record, 2),
        (_in_step(5), 3),  # of LoRA's trial
        (_within_state, 3),
        (_after_record, 4),
        (_after_record, 5),
        (_within_record, 5),
        (_in_step(5), 6),  # of the trial of full fine-tuning
        (_before_record, 6),
        (_in_step(5), 7),
        (_within_state, 7),
        (_after_record, 8),
        (_in_step(1), 8),
    ]
    for number, (kill, stages) in enumerate(kills):
        _kill(settings, kill)
        assert len(records.read(settings.out / RESULTS).stages) == stages, f"kill {number}"
    assert _numbers(study(settings, Watcher())) == _numbers(whole)
    assert sorted(path.name for path in settings.out.iterdir()) == [RESULTS, "states"]
    assert list((settings.out / "states").iterdir()) == []


@pytest.mark.slow
def test_so_has_one_that_keeps_its_adapters(small, tmp_path: Path):
    call = {"methods": ("lora-replay",), "rates": RATES, "keep_adapters": True}
    whole = study(small(tmp_path / "whole", **call), Watcher())
    settings = small(tmp_path / "killed", **call)
    for kill in (_before_record, _after_record, _in_step(2), _after_record, _in_step(1)):
        _kill(settings, kill)
    assert _numbers(study(settings, Watcher())) == _numbers(whole)


def test_a_study_that_is_done_trains_nothing(small, tmp_path: Path):
    settings = small(tmp_path / "out", methods=("gain",), rates={"gain": (1e-2,)})
    study(settings, Watcher())
    before = (settings.out / RESULTS).read_bytes()
    again = Watcher()
    study(settings, again)
    assert again.steps == []
    assert (settings.out / RESULTS).read_bytes() == before


@pytest.mark.slow
def test_a_stopped_study_has_what_was_done_and_goes_on_to_the_same_numbers(small, tmp_path: Path):
    call = {"methods": ("gain",), "rates": {"gain": (1e-2,)}}
    whole = study(small(tmp_path / "whole", **call), Watcher())
    settings = small(tmp_path / "stopped", **call)
    for steps, stages in ((2, 0), (3, 0), (4, 1), (3, 2), (2, 2)):
        watcher = Watcher(stop_after=steps)
        with pytest.raises(Stopped):
            study(settings, watcher)
        assert len(watcher.steps) == steps
        assert len(records.read(settings.out / RESULTS).stages) == stages
    assert _numbers(study(settings, Watcher())) == _numbers(whole)


@pytest.mark.slow
def test_methods_seeds_and_orders_may_be_added(small, tmp_path: Path):
    rates = {"gain": (1e-2, 3e-2), "lora": (1e-3, 1e-2)}
    all_of_it = {"methods": ("gain", "lora"), "seeds": (0, 1), "orders": 2, "rates": rates}
    whole = study(small(tmp_path / "whole", **all_of_it), Watcher())
    out = tmp_path / "parts"
    for part in (
        {"methods": ("gain",), "seeds": (0,), "orders": 1, "rates": {"gain": rates["gain"]}},
        {"methods": ("lora",), "seeds": (1,), "orders": 1, "rates": {"lora": rates["lora"]}},
        {"methods": ("gain",), "seeds": (0,), "orders": 2, "rates": {"gain": rates["gain"]}},
    ):
        watcher = Watcher()
        study(small(out, **part), watcher)
        assert [unit.done for unit in watcher.units] == sorted({unit.done for unit in watcher.units})
    with pytest.raises(Stopped):
        study(small(out, **all_of_it), Watcher(stop_after=1))
    header = records.read(out / RESULTS).header
    assert header.settings == whole.header.settings
    assert header.orders == whole.header.orders
    base, tried, stages = _numbers(study(small(out, **all_of_it), Watcher()))
    assert base == whole.base
    for there, expected in ((tried, whole.rates), (stages, _numbers(whole)[2])):
        assert sorted(map(repr, there)) == sorted(map(repr, expected))


def test_the_rates_of_a_method_that_takes_anothers_are_fixed_too(small, tmp_path: Path):
    settings = small(tmp_path, methods=("lora-replay",), rates={"lora": (1e-3,)})
    with pytest.raises(Stopped):
        study(settings, Watcher(stop_after=1))
    with pytest.raises(ValueError, match="other settings: rates was"):
        study(small(tmp_path, methods=("lora",), rates={"lora": (2e-3,)}), Watcher())


def test_rates_that_no_method_takes_yet_may_be_others(small, tmp_path: Path):
    for methods, lora in ((("gain",), 1e-3), (("lora",), 2e-3), (("gain", "lora"), 2e-3)):
        with pytest.raises(Stopped):
            study(small(tmp_path, methods=methods, rates={"gain": (1e-2,), "lora": (lora,)}), Watcher(stop_after=1))
    assert records.read(tmp_path / RESULTS).header.settings["rates"] == {"gain": [1e-2], "lora": [2e-3]}


def test_two_at_work_in_one_folder_are_refused(small, tmp_path: Path):
    settings = small(tmp_path / "out", methods=("gain",))

    class Second(Watcher):
        def phase(self, text: str) -> None:
            super().phase(text)
            if text.startswith("measuring"):
                with pytest.raises(BlockingIOError, match="another study is at work"):
                    study(settings, Watcher())
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(settings, Second())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 4}, "other settings: steps was 3, is 4"),
        ({"ewc_lambda": 1.0}, "other settings: ewc_lambda was 50.0, is 1.0"),
        ({"rates": {"gain": (2e-2,)}}, "other settings: rates was"),
        ({"methods": ("gain", "lora"), "rates": {}}, "other settings: rates was"),
    ],
)
def test_another_study_in_the_folder_is_refused_with_what_differs(small, tmp_path: Path, changes, said):
    call = {"methods": ("gain",), "rates": {"gain": (1e-2,)}, "ewc_lambda": 50.0}
    with pytest.raises(Stopped):
        study(small(tmp_path / "out", **call), Watcher(stop_after=1))
    before = (tmp_path / "out" / RESULTS).read_bytes()
    with pytest.raises(ValueError, match=said):
        study(small(tmp_path / "out", **call | changes), Watcher())
    assert (tmp_path / "out" / RESULTS).read_bytes() == before


def test_a_text_that_changed_is_refused(small, domain_folders, tmp_path: Path):
    folders = [shutil.copytree(folder, tmp_path / Path(folder).name) for folder in domain_folders]
    call = {"domains": tuple(map(str, folders)), "methods": ("gain",), "rates": {"gain": (1e-2,)}}
    with pytest.raises(Stopped):
        study(small(tmp_path / "out", **call), Watcher(stop_after=1))
    (tmp_path / "sums" / "0.txt").write_text("32 + 32 = 64\n" * 30)
    with pytest.raises(ValueError, match="other domains: sums was"):
        study(small(tmp_path / "out", **call), Watcher())


def test_a_model_of_the_same_name_with_other_weights_is_refused(small, tiny_model: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    call = {"model": model, "methods": ("gain",), "rates": {"gain": (1e-2,)}}
    with pytest.raises(Stopped):
        study(small(tmp_path / "out", **call), Watcher(stop_after=1))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="other model: weights was"):
        study(small(tmp_path / "out", **call), Watcher())


@pytest.mark.slow
def test_a_study_that_was_begun_without_a_fingerprint_goes_on(small, tmp_path: Path):
    settings = small(tmp_path, methods=("gain",), rates={"gain": (1e-2,)})
    with pytest.raises(Stopped):
        study(settings, Watcher(stop_after=1))
    path = tmp_path / RESULTS
    header, *rest = path.read_bytes().splitlines(keepends=True)
    old = json.loads(header)
    del old["model_fingerprint"]
    path.write_bytes(json.dumps(old).encode() + b"\n" + b"".join(rest))
    assert study(settings, Watcher()).stages

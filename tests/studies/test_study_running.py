"""A whole study of a tiny model: what is trained from where, what is measured, and what the records say of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gain_ops.measure.perplexity import perplexity
from gain_ops.training.loading import load_model
from gain_ops.training.loop import History, train
from gain_ops.utils.errors import DivergedError
from gain_study.engine import chosen_rates, downstream, records, running
from gain_study.engine.methods import METHODS
from gain_study.engine.records import RESULTS, Stage, Study
from gain_study.engine.running import study
from gain_study.engine.settings import Settings
from gain_study.engine.texts import find_domains, tokenise

from support.small_studies import LINES, Watcher, small_settings, write_domains

SOME = ("gain", "gain-ffn", "lora", "lora-replay", "ewc", "full")  # test_study_methods.py has what the others do
_USUAL = {"lora": 2e-3, "lora-same": 2e-3, "dora": 2e-3, "full": 1e-4}
ONE_RATE = {name: (_USUAL.get(name, 3e-2),) for name, method in METHODS.items() if method.rates}


@pytest.fixture(scope="module")
def done(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Watcher, Study]:
    """Two domains, a third held out; two learning rates for gains, and for LoRA one that diverges."""
    root = tmp_path_factory.mktemp("done")
    *domains, held_out = write_domains(root)
    settings = small_settings(
        root / "out",
        tiny_model,
        domains,
        held_out=(held_out,),
        methods=SOME,
        orders=2,
        rates=ONE_RATE | {"gain": (1e-4, 3e-2), "lora": (2e-3, 1.0)},
        curve_points=2,
    )
    watcher = Watcher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "train", _diverging)
        return settings, watcher, study(settings, watcher)


def _diverging(*arguments: Any, lr: float, **options: Any) -> History:
    """Training that diverges at a learning rate of 1: that of a model with norms rarely does by itself."""
    if lr == 1.0:
        raise DivergedError("step 2: loss nan")
    return train(*arguments, lr=lr, **options)


def _run(found: Study, method: str, order: int = 0, seed: int = 0) -> list[Stage]:
    return [stage for stage in found.stages if (stage.method, stage.order, stage.seed) == (method, order, seed)]


@pytest.mark.slow
def test_every_method_learns_every_domain_in_both_orders(done):
    _, _, found = done
    assert found.header.orders == [["fox", "sums"], ["sums", "fox"]]
    for method in SOME:
        for order, names in enumerate(found.header.orders):
            assert [(stage.number, stage.domain) for stage in _run(found, method, order)] == [*enumerate(names, 1)]
    for stage in found.stages:
        before = found.base.perplexity if stage.number == 1 else _run(found, stage.method, stage.order)[0].perplexity
        assert stage.perplexity[stage.domain] < before[stage.domain], stage


@pytest.mark.slow
def test_perplexities_are_of_every_domain_on_the_same_windows(done):
    settings, _, found = done
    loaded = load_model(settings.model, dtype=torch.float32, device=torch.device("cpu"))
    domains = find_domains([*settings.domains, *settings.held_out])
    texts = tokenise(domains[:2], domains[2:], loaded.tokenizer, settings)
    assert found.base.perplexity == {name: perplexity(loaded.model, text.validation) for name, text in texts.items()}
    assert all(list(stage.perplexity) == list(LINES) for stage in found.stages)


@pytest.mark.slow
def test_the_header_says_what_the_study_depends_on(done):
    settings, _, found = done
    assert found.header.settings == settings.as_json()
    assert found.header.model == "tiny-llama"
    assert found.header.domains["fox"] | {"sha256": "", "source": ""} == {
        "source": "",
        "sha256": "",
        "train_windows": 12,
        "selection_windows": 2,
        "validation_windows": 3,
        "window_tokens": 32,
    }
    assert found.header.domains["sums"]["selection_windows"] == found.header.domains["code"]["train_windows"] == 0
    assert len({domain["sha256"] for domain in found.header.domains.values()}) == 3


@pytest.mark.slow
def test_the_learning_rate_is_chosen_from_the_grid_on_the_first_domain(done):
    settings, watcher, found = done
    rates = {(rate.method, rate.lr): rate.perplexity for rate in found.rates}
    assert rates.keys() == {(name, lr) for name in SOME for lr in settings.grid(name)}
    assert {rate.domain for rate in found.rates} == {"fox"}
    assert rates["gain", 3e-2] < rates["gain", 1e-4] / (1 + chosen_rates.MARGIN)
    assert rates["lora", 1.0] is None  # it diverged
    chosen = {stage.method: stage.lr for stage in found.stages}
    assert chosen == {name: (ONE_RATE.get(name) or ONE_RATE[METHODS[name].rates_of])[0] for name in SOME}
    assert "gain: the chosen learning rate, 0.03, is the highest of its grid (--rates widens it)" in watcher.notices
    assert "lora: the chosen learning rate, 0.002, is the lowest of its grid (--rates widens it)" in watcher.notices


@pytest.mark.slow
def test_a_trial_is_the_first_stage_measured_on_other_windows(done):
    settings, _, found = done
    loaded = load_model(settings.model, dtype=torch.float32, device=torch.device("cpu"))
    texts = tokenise(find_domains(settings.domains), [], loaded.tokenizer, settings)
    history = train(loaded.model, texts["fox"].batches(settings, 0, batch_size=4), lr=ONE_RATE["full"][0])
    (rate,) = (rate for rate in found.rates if rate.method == "full")
    first, _ = _run(found, "full")
    assert rate.perplexity == perplexity(loaded.model, texts["fox"].selection)
    assert first.perplexity["fox"] == perplexity(loaded.model, texts["fox"].validation)
    assert first.losses == history.losses


@pytest.mark.slow
@pytest.mark.parametrize(("method", "like"), [("lora-replay", "lora"), ("ewc", "full")])
def test_what_looks_back_starts_alike_and_then_differs(done, method, like):
    _, _, found = done
    (first, second), (first_like, second_like) = _run(found, method), _run(found, like)
    assert first.perplexity == first_like.perplexity
    assert second.perplexity != second_like.perplexity
    assert second.perplexity["fox"] < second_like.perplexity["fox"]


@pytest.mark.slow
def test_a_run_does_not_depend_on_those_before_it(done, tmp_path: Path):
    settings, _, found = done
    alone = Settings(**vars(settings) | {"out": tmp_path, "methods": ("gain-ffn",)})
    for stage in study(alone, Watcher()).stages:
        among = _run(found, "gain-ffn", stage.order)[stage.number - 1]
        assert (stage.perplexity, stage.losses) == (among.perplexity, among.losses)


@pytest.mark.slow
def test_curves_are_measured_at_the_end_the_half_and_so_on(done):
    settings, _, found = done
    for stage in found.stages:
        assert [point.step for point in stage.curve] == [0, 1, 3]
    for steps, points, expected in ((100, 4, {0, 12, 25, 50, 100}), (16, 1, {0, 16}), (3, 3, {0, 1, 3}), (9, 0, set())):
        assert replace(settings, steps=steps, curve_points=points).curve_steps == expected
    first, second = _run(found, "full")
    assert list(first.curve[0].perplexity) == list(LINES)
    assert first.curve[0].perplexity != found.base.perplexity  # fewer windows
    # Absorbed or not, the model at the end of a stage is that at the beginning of the next.
    assert second.curve[0].perplexity == first.curve[-1].perplexity


@pytest.mark.slow
def test_costs_are_there(done):
    _, _, found = done
    for stage in found.stages:
        assert len(stage.losses) == 3
        assert stage.seconds > 0
        assert stage.tokens_per_second > 3 * 128 / stage.seconds  # the steps are a part of the stage
        assert stage.saved_bytes > 100_000
        assert stage.peak_bytes > stage.saved_bytes
    trained = {stage.method: stage.trained for stage in found.stages}
    assert (trained["gain"], trained["gain-ffn"]) == (2 * 64, 4 * 64)
    assert trained["full"] == trained["ewc"] == found.header.model_parameters
    saved = {stage.method: stage.saved_bytes for stage in found.stages}
    assert saved["gain"] < saved["gain-ffn"] < saved["lora"] < saved["full"]


@pytest.mark.slow
def test_progress_counts_trials_and_stages(done):
    _, watcher, found = done
    total = len(found.rates) + len(found.stages)
    assert [unit.done for unit in watcher.units] == list(range(total))
    assert {unit.total for unit in watcher.units} == {total}
    assert watcher.units[0].seconds_left is None
    last = watcher.units[-1]
    assert last.text == "full, seed 0, order 1: 2/2 fox"
    taken = [stage.seconds for stage in found.stages if stage.method == "full"][:-1]
    assert last.seconds_left == pytest.approx(sum(taken) / len(taken))


@pytest.mark.slow
def test_seeds_change_what_is_trained_on_and_nothing_that_is_measured(small: Callable[..., Settings], tmp_path: Path):
    found = study(small(tmp_path, methods=("lora",), rates=ONE_RATE, seeds=(3, 4)), Watcher())
    one, other = _run(found, "lora", seed=3), _run(found, "lora", seed=4)
    assert one[0].losses != other[0].losses
    assert one[0].curve[0].perplexity == other[0].curve[0].perplexity
    assert len(found.rates) == 1


@pytest.mark.slow
def test_kept_adapters_go_on_and_absorbed_ones_start_anew(done, small: Callable[..., Settings], tmp_path: Path):
    _, _, absorbed = done
    changes = {"methods": ("lora", "full"), "rates": ONE_RATE, "keep_adapters": True}
    kept = study(small(tmp_path, **changes), Watcher())
    lora, full = _run(kept, "lora"), _run(kept, "full")
    first, second = _run(absorbed, "lora")
    assert lora[0].perplexity == pytest.approx(first.perplexity, rel=1e-4)  # merging rounds
    assert lora[1].perplexity != pytest.approx(second.perplexity, rel=1e-4)
    assert [stage.perplexity for stage in full[:2]] == [stage.perplexity for stage in _run(absorbed, "full")]
    assert {stage.trained for stage in lora} == {first.trained}


def test_accuracies_are_measured_where_tasks_are_asked_for(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    task = downstream.Task("one", "a test", (downstream.Item("The quick brown", (" fox", " sum"), 0),) * 4)
    monkeypatch.setattr(downstream, "tasks", lambda: [task])
    found = study(small(tmp_path, methods=("gain",), rates=ONE_RATE, tasks=True), Watcher())
    assert found.header.tasks == {"one": {"items": 4, "choices": 2, "source": "a test"}}
    assert found.base.accuracy == {"one": 1.0}
    assert {*map(tuple, (stage.accuracy for stage in found.stages))} == {("one",)}


def test_a_method_of_which_every_rate_diverges_is_left_out(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    watcher = Watcher()
    monkeypatch.setattr(running, "train", _diverging)
    rates = ONE_RATE | {"full": (1.0,)}
    found = study(small(tmp_path, methods=("ewc", "gain"), rates=rates), watcher)
    assert {stage.method for stage in found.stages} == {"gain"}
    assert "ewc is left out: every learning rate of full diverged; give lower ones (--rates)" in watcher.notices


@pytest.mark.slow
def test_a_run_that_diverges_is_left_and_not_begun_again(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = iter(range(1, 100))

    def diverge(*arguments: object, **options: object) -> object:
        if next(calls) == 3:  # after the trial, in the second stage
            raise DivergedError("step 1: loss nan")
        return train(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "train", diverge)
    settings = small(tmp_path, methods=("lora", "gain"), rates=ONE_RATE)
    for expected in (True, False):
        watcher = Watcher()
        found = study(settings, watcher)
        assert bool(watcher.steps) == expected
        (notice,) = (notice for notice in watcher.notices if not notice.startswith("read 30 texts"))
        assert notice == "lora, seed 0, order 0 diverged, and its remaining stages are left out: step 1: loss nan"
    assert len(_run(found, "lora")) == 1
    assert len(_run(found, "gain")) == 3


def test_an_error_in_the_middle_leaves_what_was_done(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = small(tmp_path, methods=("gain",), rates=ONE_RATE)
    with monkeypatch.context() as patch:
        patch.setattr(running, "save_state", lambda state, path: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            study(settings, Watcher())
    assert len(records.read(tmp_path / RESULTS).rates) == 1
    assert len(study(settings, Watcher()).stages) == 3


def test_a_window_that_the_model_cannot_take_is_refused(small: Callable[..., Settings], tmp_path: Path):
    with pytest.raises(ValueError, match="sequence length is 512: this model takes at most 256"):
        study(small(tmp_path, sequence_length=512, batch_tokens=1024, methods=("gain",)), Watcher())


def test_short_texts_are_told_of(small: Callable[..., Settings], tmp_path: Path):
    watcher = Watcher()
    settings = small(tmp_path, methods=("gain",), rates=ONE_RATE, steps=200, validation_windows=400, curve_points=0)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(watcher, "should_stop", lambda: True)
        with pytest.raises(running.Stopped):
            study(settings, watcher)
    assert any("is measured on" in notice and "instead of 402" in notice for notice in watcher.notices)
    assert any("training windows: a stage goes through them" in notice for notice in watcher.notices)
    assert math.isfinite(records.read(tmp_path / RESULTS).base.perplexity["fox"])

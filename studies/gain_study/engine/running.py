"""Adapts one model to domains in turn with several methods, and measures what each learns and forgets: ``gain-ops study``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gain_ops.gainfiles.fingerprints import digest, sample
from gain_ops.measure import environment
from gain_ops.measure.marks import unmarked
from gain_ops.measure.perplexity import perplexity
from gain_ops.measure.step_bytes import backward_bytes
from gain_ops.training.domains import Domain
from gain_ops.training.loading import (
    LoadedModel,
    bundled_model,
    check_length,
    load_model,
    resolve_device,
    resolve_dtype,
)
from gain_ops.training.loop import History, Step, train
from gain_ops.utils.errors import DivergedError, UsageError, file_errors
from gain_ops.utils.files import PART, is_unfinished, locked_folder, regular_file, replace_file
from gain_study.engine import chosen_rates, downstream, ewc, records, replay
from gain_study.engine.methods import METHODS, Adapter, check_packages
from gain_study.engine.peak import Peak
from gain_study.engine.records import RESULTS, Curve, Header, Rate, Stage, Study
from gain_study.engine.settings import TOY, Settings
from gain_study.engine.texts import Text, draw_orders, find_domains, seed_of, tokenise
from gain_study.engine.toy import save_toy_model
from gain_study.engine.weights import Base, State, load_state, put, save_state

__all__ = ["RESULTS", "Stopped", "Unit", "Watcher", "study"]

_LISTS = ("methods", "seeds")
"""The settings that may grow or shrink when a study goes on; the number of orders may as well."""

_STATES = "states"
_TOY_FOLDER = "toy-model"


class Stopped(Exception):
    """The watcher asked to stop. The results file has what is done, and the same call goes on from there."""


@dataclass(frozen=True)
class Unit:
    """A trial of a learning rate or a stage that is about to begin, with how much is done and left.

    ``seconds_left`` is estimated from the finished stages; None before the first.
    """

    text: str
    done: int
    total: int
    seconds_left: float | None


class Watcher(Protocol):
    """Follows the progress of a study, and may stop it."""

    def phase(self, text: str) -> None:
        """A phase begins."""

    def notice(self, text: str) -> None:
        """Something that a reader of the figures should know."""

    def unit(self, unit: Unit) -> None:
        """A trial or a stage begins."""

    def step(self, step: Step) -> None:
        """A training step is done."""

    def result(self, text: str) -> None:
        """The result of a trial or a stage."""

    def should_stop(self) -> bool:
        """Whether to stop; called after each step, and between trials and stages."""


def study(settings: Settings, watcher: Watcher) -> Study:
    """Run a study, or what is left of it: learning rates on the first domain, then every run of every method.

    ``settings.out / RESULTS`` has all that is finished. After a stop or a kill at any point, the same call goes on and reaches
    the same numbers as an uninterrupted one: all randomness is seeded by stage. A call with other methods, seeds or orders
    adds them to the existing ones.

    Returns:
        The complete results file.

    Raises:
        Stopped: ``watcher`` asked for it.
        ValueError: settings or text do not fit, or the folder has a study of other settings, text or another model.
        OSError: a file cannot be read or written, or another process is at work in the folder.
        ImportError: a package that a method or the model needs is missing.
    """
    check_packages(tuple(settings.methods))
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    watcher.phase("reading the text")
    domains = find_domains([*settings.domains, *settings.held_out])
    for domain in domains:
        if domain.read:
            watcher.notice(domain.read)
    learned, held_out = domains[: len(settings.domains)], domains[len(settings.domains) :]
    orders = draw_orders([domain.name for domain in learned], settings.orders)
    with ExitStack() as held:
        with file_errors():
            held.enter_context(locked_folder(settings.out, "another study"))
            regular_file(settings.out / RESULTS)
        _tidy(settings.out)
        source = _model_source(settings, learned, watcher)
        watcher.phase(f"loading {source.name}")
        loaded = load_model(source, dtype=dtype, device=device, trust_remote_code=settings.trust_remote_code)
        check_length(loaded.model, settings.sequence_length)
        texts = tokenise(learned, held_out, loaded.tokenizer, settings)
        tasks = downstream.tasks() if settings.tasks else []
        header = _header(settings, loaded, device, texts, orders, tasks)
        path = settings.out / RESULTS
        _open(path, header, watcher)
        _tell_of_short_texts(texts, settings, watcher)
        _Running(settings, watcher, loaded, device, texts, orders, tasks, path).run()
        return records.read(path)


class _Running:
    """The state of a study at work.

    Between runs the model is plain and frozen, and its weights are arbitrary: a run begins by restoring them.
    """

    def __init__(
        self,
        settings: Settings,
        watcher: Watcher,
        loaded: LoadedModel,
        device: torch.device,
        texts: Mapping[str, Text],
        orders: list[list[str]],
        tasks: list[downstream.Task],
        path: Path,
    ) -> None:
        self._settings = settings
        self._watcher = watcher
        self._loaded = loaded
        self._model = loaded.model.requires_grad_(False)
        self._device = device
        self._texts = texts
        self._orders = orders
        self._tasks = tasks
        self._path = path
        self._states = path.parent / _STATES
        self._study = records.read(path)
        self._base = Base(self._model)
        self._before: dict[str, float] = {}
        self._peak_told = False

    def run(self) -> None:
        """Do all that has no record yet, seed by seed and order by order, so that a part of a study compares all methods."""
        base = self._study.base
        if base is None:
            self._watcher.phase("measuring the model as it is")
            base = records.Base(self._perplexities(), self._accuracies())
            self._add(base)
        self._before = base.perplexity
        for seed in self._settings.seeds:
            for order in range(len(self._orders)):
                for method in self._settings.methods:
                    self._run(method, seed, order)

    def _run(self, method: str, seed: int, order: int) -> None:
        """One method on one order of the domains, from where the records end."""
        done = len(self._stages(method, seed, order))
        if done == len(self._orders[order]):
            return
        diverged = self._states / f"{_file_name(method, seed, order)}-diverged.txt"
        if not diverged.exists():
            rate = self._rate(method)
            if rate is None:
                return
            try:
                self._go_on(method, rate, seed, order, done)
                return
            except DivergedError as error:
                text = f"{_run_text(method, seed, order)} diverged, and its remaining stages are left out: {error}"
                self._states.mkdir(exist_ok=True)
                replace_file(diverged, lambda beside: beside.write_text(text, encoding="utf-8"))
        self._watcher.notice(diverged.read_text(encoding="utf-8"))

    def _rate(self, method: str) -> float | None:
        """The learning rate chosen from the method's grid, tried in the study's first stage; None if all diverged."""
        owner = METHODS[method].rates_of or method
        grid = self._settings.grid(owner)
        known = {rate.lr for rate in self._study.rates if rate.method == owner}
        for lr in grid:
            if lr not in known:
                self._add(self._try(owner, lr))
        tried = [rate for rate in self._study.rates if rate.method == owner]
        good = {rate.lr: rate.perplexity for rate in tried if rate.perplexity is not None}
        if not good:
            self._watcher.notice(
                f"{method} is left out: every learning rate of {owner} diverged; give lower ones (--rates)"
            )
            return None
        rate = chosen_rates.choose(good)
        if len(known) < len(grid) > 1 and rate in (grid[0], grid[-1]):
            edge = "lowest" if rate == grid[0] else "highest"
            self._watcher.notice(
                f"{owner}: the chosen learning rate, {rate:g}, is the {edge} of its grid (--rates widens it)"
            )
        return rate

    def _try(self, method: str, lr: float) -> Rate:
        seed, number = self._study.header.settings["seeds"][0], 1
        domain = self._orders[0][0]
        self._unit(method, f"{method}: learning rate {lr:g} on {domain}")
        self._base.restore(self._model)
        adapter = self._put_on(method, seed, 0, number)
        measured: float | None
        try:
            self._train(method, lr, seed, 0, number, {})
            measured = perplexity(self._model, self._texts[domain].selection)
        except DivergedError:
            measured = None
        finally:
            adapter.remove()
        result = "diverged" if measured is None else f"perplexity {measured:.2f}"
        self._watcher.result(f"{method}: learning rate {lr:g} on {domain}: {result}")
        return Rate(method, lr, domain, measured)

    def _go_on(self, method: str, lr: float, seed: int, order: int, done: int) -> None:
        self._drop_states(method, seed, order, but=done)
        self._base.restore(self._model)
        carried_over = self._settings.keep_adapters
        adapter = self._put_on(method, seed, order, 1) if carried_over else None
        fisher: dict[str, Tensor] = {}
        if done:
            state = load_state(self._state_path(method, seed, order, done))
            put(self._model, state.parameters)
            fisher = state.fisher
        try:
            for number in range(done + 1, len(self._orders[order]) + 1):
                adapter = adapter or self._put_on(method, seed, order, number)
                stage, fisher = self._stage(method, lr, seed, order, number, adapter, fisher)
                if not carried_over:
                    adapter = None
                self._add(stage)
                self._drop_states(method, seed, order, but=number)
        finally:
            if adapter is not None:
                adapter.remove()

    def _stage(
        self, method: str, lr: float, seed: int, order: int, number: int, adapter: Adapter, fisher: dict[str, Tensor]
    ) -> tuple[Stage, dict[str, Tensor]]:
        """Learn one domain, absorb the adapter unless it is carried over, measure, and save what the next stage needs."""
        began = time.perf_counter()
        name = self._orders[order][number - 1]
        last = number == len(self._orders[order])
        text = f"{_run_text(method, seed, order)}: {number}/{len(self._orders[order])} {name}"
        self._unit(method, text)
        saved = self._saved_bytes(method, seed, name)
        trained = sum(parameter.numel() for parameter in self._trained().values())
        peak = Peak(self._device)
        curve = _Curve(self._settings, self._model, self._texts)
        history = self._train(method, lr, seed, order, number, fisher, curve)
        peak_bytes = peak.bytes()
        self._tell_of_peak(peak)
        if METHODS[method].anchored and not last:
            windows = self._texts[name].windows(self._settings, seed)[: self._settings.fisher_windows]
            fisher = ewc.add_fisher(self._model, windows, fisher)
        if not self._settings.keep_adapters:
            adapter.absorb()
        perplexities, accuracies = self._perplexities(), self._accuracies()
        if not last:
            learned = self._trained() if self._settings.keep_adapters else self._base.changed(self._model)
            self._states.mkdir(exist_ok=True)
            save_state(State(learned, fisher), self._state_path(method, seed, order, number))
        stage = Stage(
            method=method,
            lr=lr,
            seed=seed,
            order=order,
            number=number,
            domain=name,
            perplexity=perplexities,
            accuracy=accuracies,
            curve=curve.points,
            losses=history.losses,
            trained=trained,
            seconds=round(time.perf_counter() - began, 2),
            tokens_per_second=self._settings.steps
            * self._settings.batch_tokens
            / sum(step.seconds for step in history.steps),
            saved_bytes=saved,
            peak_bytes=peak_bytes,
        )
        self._watcher.result(f"{text}: perplexity {perplexities[name]:.2f}, of the base model {self._before[name]:.2f}")
        return stage, fisher

    def _train(
        self,
        method: str,
        lr: float,
        seed: int,
        order: int,
        number: int,
        fisher: Mapping[str, Tensor],
        curve: _Curve | None = None,
    ) -> History:
        """The steps of one stage.

        Raises:
            Stopped: the watcher asked for it.
            FloatingPointError: it diverged.
        """
        anchor = ewc.Anchor(self._model, fisher, self._settings.ewc_lambda) if fisher else None

        def on_step(step: Step) -> None:
            self._watcher.step(step)
            if curve is not None:
                curve.after(step.number)

        if curve is not None:
            curve.after(0)
        torch.manual_seed(seed_of("dropout", seed, order, number))
        history = train(
            self._model,
            self._batches(method, seed, order, number),
            lr=lr,
            after_backward=anchor.add_gradient if anchor is not None else None,
            on_step=on_step,
            should_stop=self._watcher.should_stop,
        )
        if history.stopped and len(history.steps) < self._settings.steps:
            raise Stopped
        return history

    def _batches(self, method: str, seed: int, order: int, number: int) -> list[Tensor]:
        settings = self._settings
        *earlier, name = self._orders[order][:number]
        replayed = settings.replayed if METHODS[method].replays and earlier else 0
        batches = self._texts[name].batches(settings, seed, batch_size=settings.batch_size - replayed)
        if replayed:
            pools = [self._texts[other].windows(settings, seed) for other in earlier]
            batches = replay.mix_in(batches, pools, count=replayed, seed=seed_of("replay", seed, order, number))
        return batches

    def _put_on(self, method: str, seed: int, order: int, number: int) -> Adapter:
        torch.manual_seed(seed_of("adapter", seed, order, number))
        return METHODS[method].put_on(self._model)

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def _saved_bytes(self, method: str, seed: int, domain: str) -> int:
        """Measured in a method's first stage."""
        for stage in self._study.stages:
            if stage.method == method:
                return stage.saved_bytes
        windows = self._texts[domain].windows(self._settings, seed)[: self._settings.batch_size]
        return backward_bytes(self._model, unmarked(windows))

    def _perplexities(self) -> dict[str, float]:
        return {name: perplexity(self._model, text.validation) for name, text in self._texts.items()}

    def _accuracies(self) -> dict[str, float]:
        return {task.name: downstream.accuracy(self._model, self._loaded.tokenizer, task) for task in self._tasks}

    def _stages(self, method: str, seed: int, order: int) -> list[Stage]:
        run = (method, seed, order)
        return [stage for stage in self._study.stages if (stage.method, stage.seed, stage.order) == run]

    def _add(self, record: records.Record) -> None:
        records.append(self._path, record)
        self._study = records.read(self._path)
        if self._watcher.should_stop():
            raise Stopped

    def _state_path(self, method: str, seed: int, order: int, number: int) -> Path:
        return self._states / f"{_file_name(method, seed, order)}-stage{number}.safetensors"

    def _drop_states(self, method: str, seed: int, order: int, *, but: int) -> None:
        """Delete the states of a run's other stages; called when the record of stage ``but`` is on the disk."""
        for path in self._states.glob(f"{_file_name(method, seed, order)}-stage*"):
            if path != self._state_path(method, seed, order, but):
                path.unlink()

    def _unit(self, method: str, text: str) -> None:
        owners = {METHODS[name].rates_of or name for name in self._settings.methods}
        trials = {(owner, lr) for owner in owners for lr in self._settings.grid(owner)}
        runs = len(self._settings.seeds) * len(self._orders)
        stages = {name: runs * len(self._settings.domains) for name in self._settings.methods}
        left = {name: count - self._done(name) for name, count in stages.items()}
        for owner, _ in trials - {(rate.method, rate.lr) for rate in self._study.rates}:
            left[owner] = left.get(owner, 0) + 1
        total = len(trials) + sum(stages.values())
        self._watcher.unit(Unit(text, total - sum(left.values()), total, self._seconds(left)))

    def _done(self, method: str) -> int:
        """How many of a method's stages that the settings ask for have a record."""
        seeds, orders = self._settings.seeds, range(len(self._orders))
        return sum(len(self._stages(method, seed, order)) for seed in seeds for order in orders)

    def _seconds(self, stages: Mapping[str, int]) -> float | None:
        """How long so many stages of each method take, estimated from the finished ones."""
        timed: dict[str, list[float]] = {}
        for stage in self._study.stages:
            timed.setdefault(stage.method, []).append(stage.seconds)
        if not timed:
            return None
        means = {method: sum(seconds) / len(seconds) for method, seconds in timed.items()}
        usual = sum(means.values()) / len(means)
        return sum(count * means.get(method, usual) for method, count in stages.items())

    def _tell_of_peak(self, peak: Peak) -> None:
        if not peak.exact and not self._peak_told:
            self._watcher.notice("peak memory is that of the process since it started: this system cannot reset it")
            self._peak_told = True


class _Curve:
    """Perplexities within a stage."""

    def __init__(self, settings: Settings, model: nn.Module, texts: Mapping[str, Text]) -> None:
        self.points: list[Curve] = []
        self._model = model
        self._windows = {name: text.validation[: settings.curve_windows] for name, text in texts.items()}
        self._steps = settings.curve_steps

    def after(self, step: int) -> None:
        """Measure if the step is one of the curve's."""
        if step in self._steps:
            perplexities = {name: perplexity(self._model, windows) for name, windows in self._windows.items()}
            self.points.append(Curve(step, perplexities))


def _run_text(method: str, seed: int, order: int) -> str:
    return f"{method}, seed {seed}, order {order}"


def _file_name(method: str, seed: int, order: int) -> str:
    return f"{method}-seed{seed}-order{order}"


def _model_source(settings: Settings, mixture: list[Domain], watcher: Watcher) -> Path:
    if settings.model != TOY:
        return settings.model or bundled_model()
    folder = settings.out / _TOY_FOLDER
    if not folder.exists():
        watcher.phase("training a toy model")
        save_toy_model(folder, mixture)
    return folder


def _tell_of_short_texts(texts: Mapping[str, Text], settings: Settings, watcher: Watcher) -> None:
    for name, text in texts.items():
        wanted = settings.validation_windows + (settings.selection_windows if len(text.selection) else 0)
        measured = len(text.validation) + len(text.selection)
        if measured < wanted:
            watcher.notice(f"{name} is measured on {measured} windows instead of {wanted}: it has no more text")
        epochs = settings.steps * settings.batch_size / len(text.pool) if len(text.pool) else 0.0
        if epochs > 1:
            watcher.notice(
                f"{name} has {len(text.pool)} training windows: a stage goes through them {epochs:.1f} times"
            )


def _header(
    settings: Settings,
    loaded: LoadedModel,
    device: torch.device,
    texts: Mapping[str, Text],
    orders: list[list[str]],
    tasks: list[downstream.Task],
) -> Header:
    return Header(
        settings=settings.as_json(),
        model=loaded.name,
        model_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        device=environment.describe_device(device),
        environment=environment.versions(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        orders=orders,
        domains={name: text.described(settings) for name, text in texts.items()},
        tasks={task.name: _described(task) for task in tasks},
        model_fingerprint=digest((name, value.shape, sample(value)) for name, value in loaded.model.named_parameters()),
    )


def _described(task: downstream.Task) -> dict[str, object]:
    return {"items": len(task.items), "choices": len(task.items[0].choices), "source": task.source}


@file_errors()
def _open(path: Path, header: Header, watcher: Watcher) -> None:
    """Begin a results file, or check that the existing one is of this study and add to its header what this call adds."""
    if not path.exists():
        replace_file(path, lambda beside: records.append(beside, header))
        return
    records.mend(path)
    recorded = records.read(path).header
    if not recorded.model_fingerprint:  # the file is from before there was one, so it cannot be checked
        recorded = replace(recorded, model_fingerprint=header.model_fingerprint)
    header = replace(
        header, **json.loads(json.dumps({name: getattr(header, name) for name in ("settings", "domains", "tasks")}))
    )
    shared = _owners(recorded.settings) & _owners(header.settings)
    for what, old, new in (
        ("settings", _fixed(recorded.settings, shared), _fixed(header.settings, shared)),
        ("model", _model_of(recorded), _model_of(header)),
        ("domains", recorded.domains, header.domains),
        ("tasks", recorded.tasks, header.tasks),
    ):
        differing = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if differing:
            shown = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in differing)
            raise UsageError(f"{path} is of a study with other {what}: {shown}. Name another folder (--out)")
    for what, before, now in (
        ("device", {"device": recorded.device}, {"device": header.device}),
        ("versions", recorded.environment, header.environment),
    ):
        if before != now:
            watcher.notice(
                f"this study began with other {what}, so its numbers may differ in the last digits: {before}"
            )
    if (grown := _grown(recorded, header.settings, header.orders)) != recorded:
        records.replace_header(path, grown)


def _owners(settings: Mapping[str, Any]) -> set[str]:
    """The methods whose learning rates the methods of these settings use."""
    return {METHODS[method].rates_of or method for method in settings["methods"]}


def _fixed(settings: Mapping[str, Any], owners: Set[str]) -> dict[str, Any]:
    """What may not change: all but the methods, seeds and orders, because a stage's numbers do not depend on other runs."""
    rates = {name: grid for name, grid in settings["rates"].items() if name in owners}
    return {name: value for name, value in settings.items() if name not in (*_LISTS, "orders")} | {"rates": rates}


def _grown(header: Header, settings: Mapping[str, Any], orders: list[list[str]]) -> Header:
    """The header with the methods, seeds and orders that it lacks after its own."""
    old = header.settings
    lists = {name: list(dict.fromkeys([*old[name], *settings[name]])) for name in _LISTS}
    used = {name: grid for name, grid in old["rates"].items() if name in _owners(old)}
    orders = max(header.orders, orders, key=len)
    return replace(
        header,
        settings=old | lists | {"orders": len(orders), "rates": old["rates"] | settings["rates"] | used},
        orders=orders,
    )


def _model_of(header: Header) -> dict[str, object]:
    return {"name": header.model, "parameters": header.model_parameters, "weights": header.model_fingerprint}


@file_errors()
def _tidy(folder: Path) -> None:
    """Remove the unfinished files of a killed process."""
    for path in [*folder.glob(f"{PART}*"), *(folder / _STATES).glob(f"{PART}*")]:
        if is_unfinished(path):
            path.unlink()

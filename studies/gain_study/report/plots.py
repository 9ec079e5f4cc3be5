"""The plots of a study: matplotlib figures, without pyplot, of what the study has so far.

Ratios of perplexities are on a log scale and are labelled in percent. Each method has a marker of its own, and a colour that
colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from gain_ops.utils.errors import MissingPackageError
from gain_ops.utils.files import replace_file
from gain_study.engine import chosen_rates
from gain_study.engine.records import Study
from gain_study.report import matched, metrics
from gain_study.report.matched import Match
from gain_study.report.metrics import Run, Spread
from gain_study.report.plot_parts import (
    ALARM,
    DARK,
    LIGHT,
    Look,
    bar_ends,
    bars,
    diverging,
    grid,
    hide,
    looks_of,
    nats,
    percent_axis,
    percent_ticks,
    perplexity_axis,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["Plot", "draw_curves", "draw_forgetting", "draw_rates", "draw_trade_off", "write_plots"]

_DPI = 130
_STRONGEST = math.log(2)  # the ratio of the darkest colours, at most


class Plot(NamedTuple):
    """A file, what it shows in a few words, and how it is read."""

    path: Path
    title: str
    caption: str


def write_plots(study: Study, folder: Path) -> list[Plot]:
    """Write the plots that the study has figures for; each file is whole or absent.

    Raises:
        ImportError: matplotlib is not installed.

    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingPackageError('plotting a study needs matplotlib: pip install "gain-ops[cli]"') from error
    drawn: list[tuple[str, str, str, Figure | None]] = [
        (
            "trade-off",
            "Learning against forgetting",
            "Left: one point a method, with the spread over seeds and orders as bars. Down and to the left is better. The "
            "line joins the methods that no other method beats in both. Right: what a stage after the first does to the "
            "earlier domains, at the point where all methods have learned equally much in it.",
            draw_trade_off(study),
        )
    ]
    for order in range(len(study.header.orders)):
        drawn += [
            (
                f"forgetting-order-{order + 1}",
                f"Every domain after every stage, order {order + 1}",
                "The perplexity against the base model's in percent, the mean over seeds. The frame marks the stage's domain. "
                "Earlier domains are on its left. Later and held-out domains are on its right.",
                draw_forgetting(study, order),
            ),
            (
                f"curves-order-{order + 1}",
                f"Every domain along the stages, order {order + 1}",
                "The line is the mean over seeds, and the band goes from the lowest to the highest. The dotted line marks the "
                "stage that learns the domain.",
                draw_curves(study, order),
            ),
        ]
    drawn.append(
        (
            "learning-rates",
            "Learning rates tried",
            "The perplexity of the first domain's selection windows. A ring marks the chosen rate, a cross a rate that "
            "diverged.",
            draw_rates(study),
        )
    )
    return [
        Plot(_write(figure, folder / f"{name}.png"), title, caption)
        for name, title, caption, figure in drawn
        if figure is not None
    ]


def draw_forgetting(study: Study, order: int) -> Figure | None:
    """The forgetting matrices of one order: a panel a method, stages down, domains across."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    sequence = study.header.orders[order]
    runs = [run for run in metrics.runs(study) if run.order == order]
    if not runs:
        return None
    domains = [*sequence, *runs[0].held_out]
    matrices = {
        method: [[_mean_change(of_method, k, d) for d in domains] for k in range(1, len(sequence) + 1)]
        for method, of_method in _by_method(runs).items()
    }
    sizes = [abs(value) for matrix in matrices.values() for row in matrix for value in row if not math.isnan(value)]
    strongest = min(max([*sizes, 0.01]), _STRONGEST)
    rows, columns = grid(len(matrices), 2 if len(domains) > 4 else 3)
    width, height = 1.5 + max(2.2, 0.5 * len(domains)), 1.35 + 0.3 * len(sequence)
    figure = Figure(figsize=(columns * width + 1.0, rows * height + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    norm = Normalize(-strongest, strongest)
    for (method, matrix), axes in zip(matrices.items(), panels, strict=False):
        image = axes.imshow(matrix, cmap=diverging(), norm=norm, aspect="auto")
        _annotate(axes, matrix, strongest)
        seeds = len({run.seed for run in runs if run.method == method})
        axes.set_title(f"{short(method, 30)}  ({seeds} seed{'s' * (seeds > 1)})", loc="left", fontsize=9)
        axes.set_xticks(range(len(domains)), [short(d) for d in domains], rotation=40, ha="right", fontsize=7)
        axes.set_yticks(range(len(sequence)), [f"{k} {short(d)}" for k, d in enumerate(sequence, 1)], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    hide(panels)
    ticks = percent_ticks(-strongest, strongest)
    cut = "both" if max(sizes, default=0.0) > strongest else "neither"
    bar = figure.colorbar(image, ax=figure.axes, extend=cut, shrink=0.6 if rows > 1 else 0.9, aspect=30, pad=0.01)
    bar.set_ticks([at for at, _ in ticks], labels=[text for _, text in ticks], fontsize=8)
    bar.set_label("perplexity against the base model", fontsize=8)
    bar.outline.set_visible(False)
    return figure


def draw_trade_off(study: Study) -> Figure | None:
    """In-domain against earlier-domain perplexity at the end, and at matched in-domain perplexity: a point a method."""
    from matplotlib.figure import Figure

    runs = metrics.runs(study)
    n = metrics.depth(runs)
    points = _end_points(runs, n)
    if not points:
        return None
    matches = [match for match in matched.matches(runs) if match.number > 1]
    figure = Figure(figsize=(10.5 if matches else 6.5, max(4.2, 2.2 + 0.3 * len(points))), layout="constrained")
    panels = figure.subplots(1, 2 if matches else 1, width_ratios=(3, 2) if matches else (1,), squeeze=False)[0]
    looks = looks_of(study)
    _plot_end(panels[0], points, looks)
    panels[0].set_title(f"after stage {n}", loc="left", fontsize=10)
    if matches:
        _plot_matched(panels[1], matches, looks)
        panels[1].set_title("at matched in-domain perplexity", loc="left", fontsize=10)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    return figure


def draw_curves(study: Study, order: int) -> Figure | None:
    """Perplexity along the stages of one order: a panel a domain, a line a method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sequence = study.header.orders[order]
    runs = [run for run in metrics.runs(study) if run.order == order]
    if not runs:
        return None
    domains = [*sequence, *runs[0].held_out]
    rows, columns = grid(len(domains), 3)
    figure = Figure(figsize=(1 + 3.4 * columns, 0.9 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    looks = looks_of(study)
    for domain, axes in zip(domains, panels, strict=False):
        for method, of_method in _by_method(runs).items():
            _curve(axes, of_method, domain, looks[method], short(method, 30))
        if domain in sequence:
            axes.axvline(sequence.index(domain) + 1, color=DARK, linewidth=0.8, linestyle=":", zorder=0)
        ends = [run.perplexities[k][domain] for run in runs for k in range(len(run.perplexities))]
        perplexity_axis(axes, ends)
        axes.set_title(short(domain, 30) + (" (held out)" if domain not in sequence else ""), loc="left", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.2, len(sequence) + 0.2)
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    hide(panels)
    figure.supxlabel("stages finished (0: the base model)", fontsize=9)
    figure.supylabel("perplexity, log scale", fontsize=9)
    figure.legend(*handles, loc="outside upper center", ncols=min(5, 1 + columns), frameon=False, fontsize=8)
    return figure


def draw_rates(study: Study) -> Figure | None:
    """Perplexity of the selection windows by learning rate: a panel a method, all on one scale."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(rate.method for rate in study.rates))
    if not methods:
        return None
    looks = looks_of(study)
    rows, columns = grid(len(methods), 4)
    figure = Figure(figsize=(1.2 + 2.6 * columns, 0.5 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    perplexities = [rate.perplexity for rate in study.rates if rate.perplexity is not None]
    for method, axes in zip(methods, panels, strict=False):
        rates, chosen = chosen_rates.tried(study, method), chosen_rates.chosen(study, method)
        good = [(rate.lr, rate.perplexity) for rate in rates if rate.perplexity is not None]
        look = looks[method]
        axes.plot([lr for lr, _ in good], [value for _, value in good], color=look.color, marker="o", markersize=4)
        ring = [(lr, value) for lr, value in good if lr == chosen]
        axes.scatter([lr for lr, _ in ring], [value for _, value in ring], 110, "none", edgecolors=DARK, zorder=3)
        diverged = [rate.lr for rate in rates if rate.perplexity is None]
        axes.scatter(
            diverged, [0.93] * len(diverged), 40, ALARM, marker="x", transform=axes.get_xaxis_transform(), zorder=3
        )
        axes.set_xscale("log")
        axes.set_xlim(min(rate.lr for rate in rates) / 2, max(rate.lr for rate in rates) * 2)
        axes.set_xticks([rate.lr for rate in rates], [f"{rate.lr:g}" for rate in rates], rotation=40, ha="right")
        axes.set_xticks([], minor=True)
        axes.tick_params(labelsize=7)
        axes.set_title(short(method, 24), loc="left", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if perplexities:
        perplexity_axis(figure.axes[0], perplexities)
    hide(panels)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("perplexity, log scale", fontsize=9)
    return figure


def _plot_end(axes: Axes, points: Mapping[str, tuple[Spread, Spread]], looks: Mapping[str, Look]) -> None:
    """Methods as points, and the line that joins those that no other method beats in both directions."""
    for method, (learned, earlier) in points.items():
        look = looks[method]
        axes.errorbar(
            nats(learned.mean),
            nats(earlier.mean),
            xerr=bars(learned),
            yerr=bars(earlier),
            color=look.color,
            marker=look.marker,
            markersize=8,
            linewidth=1.2,
            label=short(method, 30),
        )
    front = _front([(nats(learned.mean), nats(earlier.mean)) for learned, earlier in points.values()])
    axes.plot([x for x, _ in front], [y for _, y in front], color=DARK, linewidth=0.8, alpha=0.5, zorder=0)
    axes.axhline(0, color=DARK, linewidth=0.8, linestyle=":", zorder=0)
    percent_axis(axes, "x", [end for learned, _ in points.values() for end in bar_ends(learned)])
    percent_axis(axes, "y", [0.0, *(end for _, earlier in points.values() for end in bar_ends(earlier))])
    axes.set_xlabel("in-domain perplexity against the base model")
    axes.set_ylabel("earlier domains against the base model")


def _plot_matched(axes: Axes, matches: Sequence[Match], looks: Mapping[str, Look]) -> None:
    """A row a method, with the number of stages where it is matched unless these are all."""
    changes = matched.change(matched.common(matches), "drift")
    labels, ends = [], [0.0]
    for place, method in enumerate(method for method in looks if any(match.method == method for match in matches)):
        reached = [match.target is not None for match in matches if match.method == method]
        labels.append(short(method, 24) + f"\nin {sum(reached)} of {len(reached)} stages" * (not all(reached)))
        if across := metrics.spread(changes.get(method, {}).values()):
            look = looks[method]
            axes.errorbar(
                nats(across.mean), place, xerr=bars(across), color=look.color, marker=look.marker, markersize=8
            )
            ends += bar_ends(across)
    axes.axvline(0, color=DARK, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    percent_axis(axes, "x", ends)
    axes.set_xlabel("earlier domains since the stage began")


def _curve(axes: Axes, runs: Sequence[Run], domain: str, look: Look, label: str) -> None:
    stages = range(max(len(run.perplexities) for run in runs))
    by_stage = [[math.log(run.perplexities[k][domain]) for run in runs if k < len(run.perplexities)] for k in stages]
    means = [math.exp(fmean(logs)) for logs in by_stage]
    axes.plot(stages, means, color=look.color, marker=look.marker, markersize=4, linewidth=1.2, label=label)
    low, high = ([math.exp(end(logs)) for logs in by_stage] for end in (min, max))
    axes.fill_between(stages, low, high, color=look.color, alpha=0.15, linewidth=0)


def _annotate(axes: Axes, matrix: Sequence[Sequence[float]], strongest: float) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    for row, cells in enumerate(matrix):
        for column, value in enumerate(cells):
            if math.isnan(value):
                continue
            color = LIGHT if abs(value) > 0.65 * strongest else DARK
            axes.text(column, row, _cell(value), ha="center", va="center", fontsize=6.5, color=color)
        frame = Rectangle((row - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=DARK, linewidth=1.2)
        frame.set_path_effects([withStroke(linewidth=2.8, foreground=LIGHT)])
        axes.add_patch(frame)


def _cell(value: float) -> str:
    """A change in percent in five characters at most; the ratio where that is not enough."""
    change = metrics.percent(value)
    if abs(change) < 99.5:
        return f"{change:+z.1f}" if abs(change) < 9.95 else f"{change:+.0f}"
    return f"{change:+.0f}" if change < 999.5 else f"x{change / 100 + 1:.0f}" if change < 99_999 else f"{change:.0e}"


def _mean_change(runs: Iterable[Run], k: int, domain: str) -> float:
    """``mean over runs of log(P[k, d] / P[0, d])``; NaN where no run has k stages."""
    logs = [
        math.log(run.perplexities[k][domain]) - math.log(run.perplexities[0][domain])
        for run in runs
        if k < len(run.perplexities)
    ]
    return fmean(logs) if logs else math.nan


def _end_points(runs: Sequence[Run], n: int) -> dict[str, tuple[Spread, Spread]]:
    learned, earlier = (metrics.values(runs, measure, n) for measure in (metrics.IN_DOMAIN, metrics.EARLIER))
    points = {}
    for method in earlier:
        one = metrics.spread_of(metrics.IN_DOMAIN, learned[method])
        other = metrics.spread_of(metrics.EARLIER, earlier[method])
        if one and other:
            points[method] = (one, other)
    return points


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point is below in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return by_method


def _write(figure: Figure, path: Path) -> Path:
    replace_file(path, lambda beside: figure.savefig(beside, dpi=_DPI))
    return path

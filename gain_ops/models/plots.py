"""Plots the gains of a model layer by layer: one panel for each kind of projection, one bar for each layer.

A bar shows the layer's quantiles: 5 % to 95 % of its gains, the middle half in a darker colour, a white line at the median,
and a thin line from the lowest gain to the highest. matplotlib is loaded when a plot is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gain_ops.models.statistics import GainStatistics, LayerGains
from gain_ops.utils.errors import MissingPackageError, UsageError
from gain_ops.utils.files import replace_file
from gain_ops.utils.wording import named, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["FORMATS", "draw_gains", "write_gain_plot"]

FORMATS = (".png", ".svg")

_MOST_PANELS, _MOST_TICKS = 8, 20
_WHISKER, _WIDE, _MIDDLE = "#4a7ba6", "#9ecae1", "#08519c"  # they differ in lightness, so in grey too
_LINE = "#222222"
_ALARM = "#d55e00"


def write_gain_plot(statistics: GainStatistics, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Write the figure of draw_gains() to a file, which is moved into place when it is complete.

    Args:
        statistics: as in draw_gains().
        path: ends in .png or .svg, which is the format; its folder is made.
        title: as in draw_gains().

    Raises:
        ValueError: another suffix, or gains that are not finite.
        ImportError: matplotlib is not installed.

    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} ends in {path.suffix or 'nothing'}: name a file that ends in {' or '.join(FORMATS)}")
    figure = draw_gains(statistics, title=title)
    replace_file(path, lambda beside: figure.savefig(beside, dpi=150))


def draw_gains(statistics: GainStatistics, *, title: str = "") -> Figure:
    """Draw the distribution of the gains of each layer, as a matplotlib figure of its own, outside pyplot.

    Layers whose names differ only in numbers share a panel ("self_attn.o_proj", "mlp.down_proj"), in the model's order; where
    this would make more than eight panels, all layers share one. The panels have one scale. A line marks gain 1, which changes
    nothing; a triangle below a bar marks a layer with dead or negative gains.

    Args:
        statistics: of gain_ops.models.statistics.gain_statistics().
        title: a line above the figures of all layers, such as the model's name.

    Raises:
        ValueError: gains that are not finite.
        ImportError: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError('plotting gains needs matplotlib: pip install "gain-ops[cli]"') from error
    for layer in statistics.layers:
        if not math.isfinite(layer.gains.rms_from_one):
            raise UsageError(f"cannot plot the gains of {layer.name}: they are not finite; the training has diverged")

    panels = _panels(statistics.layers)
    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(min(14.0, 9 + 0.06 * longest), 1.6 + 2.1 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharey=True, squeeze=False)[:, 0]
    for axes, (kind, layers) in zip(rows, panels.items(), strict=True):
        _plot_panel(axes, kind, layers)
        _plot_alarms(axes, layers)
    rows[-1].set_xlabel("layer")
    figure.suptitle(_headline(statistics, printable(title)), fontsize=10, x=0.01, ha="left", parse_math=False)
    alarms = bool(statistics.overall.dead or statistics.overall.negative)
    figure.legend(handles=_legend(alarms), loc="outside lower right", ncols=5, frameon=False, fontsize=8)
    return figure


def _panels(layers: Sequence[LayerGains]) -> dict[str, list[LayerGains]]:
    """The layers by their names with "*" for numbers; only the part after the first number, where this is unique."""
    panels: dict[str, list[LayerGains]] = {}
    for layer in layers:
        kind = ".".join("*" if part.isdecimal() else part for part in layer.name.split("."))
        panels.setdefault(kind, []).append(layer)
    if len(panels) > _MOST_PANELS:
        return {"all layers": list(layers)}
    short = {kind.partition("*.")[2] or kind: found for kind, found in panels.items()}
    return short if len(short) == len(panels) else panels


def _plot_panel(axes: Axes, kind: str, layers: Sequence[LayerGains]) -> None:
    axes.use_sticky_edges = False  # a bar that reaches the edge looks cut off
    axes.axhline(1, color=_LINE, linewidth=0.8, zorder=0.9)
    places = range(len(layers))
    every = [layer.gains for layer in layers]
    width = min(0.8, 0.2 * len(layers))
    axes.vlines(
        places, [gains.minimum for gains in every], [gains.maximum for gains in every], color=_WHISKER, linewidth=1
    )
    for first, last, color in ((0, -1, _WIDE), (1, -2, _MIDDLE)):
        lows = [gains.quantiles[first] for gains in every]
        heights = [gains.quantiles[last] - low for gains, low in zip(every, lows, strict=True)]
        axes.bar(places, heights, width, lows, color=color, zorder=3)
    ends = [place - width / 2 for place in places], [place + width / 2 for place in places]
    axes.hlines([gains.quantiles[2] for gains in every], *ends, color="white", linewidth=1, zorder=4)
    sizes = {layer.gains.count for layer in layers}
    count = f"{len(layers)} x {sizes.pop():,} gains" if len(sizes) == 1 else f"{len(layers)} layers"
    sides = " and ".join(sorted({layer.side for layer in layers}))
    axes.set_title(f"{named(kind)}  ({count}, {sides} side)", loc="left", fontsize=9, parse_math=False)
    axes.set_ylabel("gain")
    axes.set_xlim(-0.7, len(layers) - 0.3)
    _label_layers(axes, layers)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_layers(axes: Axes, layers: Sequence[LayerGains]) -> None:
    """Write the layer's number, the first in its name, under its first bar; or its position, where names have no number."""
    numbers = [next((part for part in layer.name.split(".") if part.isdecimal()), "") for layer in layers]
    starts = [place for place, number in enumerate(numbers) if place == 0 or number != numbers[place - 1]]
    labels = [numbers[place] for place in starts]
    if "" in labels or len(set(labels)) < len(labels):
        starts, labels = list(range(len(layers))), [str(place) for place in range(len(layers))]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, len(starts)) if len(starts) <= _MOST_TICKS * step)
    axes.set_xticks(starts[::step], labels[::step], fontsize=8)


def _plot_alarms(axes: Axes, layers: Sequence[LayerGains]) -> None:
    """Triangles along the lower edge, for any scale."""
    places = [place for place, layer in enumerate(layers) if layer.gains.dead or layer.gains.negative]
    transform = axes.get_xaxis_transform()
    axes.scatter(places, [0.04] * len(places), 24, _ALARM, marker="^", transform=transform, zorder=5)


def _headline(statistics: GainStatistics, title: str) -> str:
    overall = statistics.overall
    figures = (
        f"{overall.count:,} gains of {len(statistics.layers)} layers: {overall.minimum:.3g} to {overall.maximum:.3g}, "
        f"{overall.rms_from_one:.2g} from 1 (rms), {overall.dead:,} dead (below {statistics.dead_below:g}), "
        f"{overall.negative:,} negative"
    )
    return f"{title}\n{figures}" if title else figures


def _legend(alarms: bool) -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[object] = [
        Line2D([], [], color=_WHISKER, linewidth=1, label="lowest to highest"),
        Patch(color=_WIDE, label="5 % to 95 %"),
        Patch(color=_MIDDLE, label="middle half, white the median"),
        Line2D([], [], color=_LINE, linewidth=0.8, label="1: nothing changed"),
    ]
    if alarms:
        handles.append(Line2D([], [], color=_ALARM, marker="^", linestyle="", label="has dead or negative gains"))
    return handles

"""What the plots of a study share: colours and markers of methods, axes in percent, log scales of perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gain_study.engine.records import Study
from gain_study.report import metrics
from gain_study.report.metrics import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap


__all__ = [
    "ALARM",
    "DARK",
    "LIGHT",
    "Look",
    "bar_ends",
    "bars",
    "diverging",
    "grid",
    "hide",
    "looks",
    "looks_of",
    "nats",
    "percent_axis",
    "percent_ticks",
    "perplexity_axis",
    "short",
]

LIGHT, DARK, ALARM = "#ffffff", "#222222", "#d55e00"

_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),  # Okabe and Ito's, yellow left out on white
    *("#56b4e9", "#000000", "#882255", "#999933", "#7f7f7f"),
)
_MARKERS = "osD^vPX<>*"
_NO_VALUE = "#d9d9d9"
_LONGEST = 16  # characters of a name under a tick
_COARSE = (-99, -90, -80, -70, -60, -50, -40, -30, -20, -10, 0, 15, 30, 50, 75, 100, 150, 200, 300, 500, 900)


class Look(NamedTuple):
    """A method's colour and marker."""

    color: str
    marker: str


def looks_of(study: Study) -> Mapping[str, Look]:
    """The look of every method by its place in the settings, so that it is the same in all plots of a study."""
    return looks([*metrics.method_names(study), *(rate.method for rate in study.rates)])


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each of these methods, by its place among them."""
    return {
        method: Look(_COLORS[rank % len(_COLORS)], _MARKERS[(rank + rank // len(_COLORS)) % len(_MARKERS)])
        for rank, method in enumerate(dict.fromkeys(methods))
    }


def short(name: str, longest: int = _LONGEST) -> str:
    """The name in at most so many characters; a dollar sign would start a formula."""
    cut = name if len(name) <= longest else name[: longest - 1] + "…"
    return cut.replace("$", r"\$")


def bar_ends(spread: Spread) -> tuple[float, float]:
    """The ends of the bars of a spread in percent, in nats: the standard deviation, or the extremes of fewer than three."""
    if spread.deviation is None:
        return nats(spread.low), nats(spread.high)
    return nats(spread.mean - spread.deviation), nats(spread.mean + spread.deviation)


def bars(spread: Spread) -> list[list[float]]:
    """How far the bars of a spread in percent reach down and up, in nats."""
    low, high = bar_ends(spread)
    return [[nats(spread.mean) - low], [high - nats(spread.mean)]]


def nats(change: float) -> float:
    """The logarithm of the ratio of a change in percent; the ratio is at least 0.001."""
    return math.log(max(1 + change / 100, 0.001))


def percent_axis(axes: Axes, which: str, ends: Sequence[float]) -> None:
    """An axis in nats that is labelled in percent."""
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    margin = max(0.06 * (high - low), 0.002)
    low, high = low - margin, high + margin
    ticks = percent_ticks(low, high)
    places, labels = [at for at, _ in ticks], [text for _, text in ticks]
    axes.set(**{f"{which}lim": (low, high)})
    (axes.set_xticks if which == "x" else axes.set_yticks)(places, labels, fontsize=8)


def percent_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Places in nats between two bounds, and their labels in percent."""
    from matplotlib.ticker import MaxNLocator

    if high - low < math.log(3):
        changes = list(
            MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(metrics.percent(low), metrics.percent(high))
        )
    else:
        changes = [*_COARSE, *(100 * 10**power for power in range(1, 30) if high - low > math.log(20))]
        changes = [change for change in changes if low <= nats(change) <= high]
        changes = changes[:: 1 + len(changes) // 9]
    return [(nats(change), f"{change:+g} %" if change else "0 %") for change in changes if low <= nats(change) <= high]


def perplexity_axis(axes: Axes, ends: Sequence[float]) -> None:
    """A log scale of perplexities with round numbers as ticks."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(ends), max(ends)
    margin = max((high / low) ** 0.06, 1.002)
    low, high = low / margin, high * margin
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    if high / low < 4:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    else:
        round_numbers = (digit * 10.0**power for power in range(-1, 300) for digit in (1, 1.5, 2, 3, 5, 7))
        ticks = [tick for tick in round_numbers if low <= tick <= high]
        ticks = ticks[:: 1 + len(ticks) // 8]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def diverging() -> Colormap:
    """Blue below the middle, red above it, grey where there is no value."""
    import matplotlib

    return matplotlib.colormaps["RdBu_r"].with_extremes(bad=_NO_VALUE)


def grid(panels: int, most: int) -> tuple[int, int]:
    """Rows and columns for so many panels: at most ``most`` columns, and as few empty panels as possible."""
    rows = math.ceil(panels / most)
    return rows, math.ceil(panels / rows)


def hide(panels: Iterable[Axes]) -> None:
    """Hide the panels that nothing was drawn in."""
    for axes in panels:
        axes.set_visible(False)

"""Plots of results as PNG: the ratio to the frozen linear by contestant and by tokens, and the share of the roofline.

Each plot is of one device and one dtype. The backends of gain_ops are blues that differ in lightness; the peers are greys.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.harness.results import Row
from benchmarks.report.report import FLOORS, RATIO, Who, latest, number, place, split, spread
from gain_ops.utils.files import replace_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


OURS = {"eager": "#8fc1f2", "triton": "#0b6bcb", "cuda": "#08264d"}  # by backend
PEERS = ("#8a8f98", "#4d5157", "#b9bdc4")  # lines take them in turn; bars take the first

_INK = "#30343a"
_MARKERS = "osD^vPX*<>hd"
_DASHES = ("-", "--", ":", "-.")
_WIDTH = 10.0  # inches: in a README of 900 px, 9 pt are 11 px
_LINE = 0.17  # inches of a line of 9 pt
_NAME = 40  # characters of a name in one line
_TICKS = (0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)


def draw(rows: Iterable[Row], folder: Path, metric: str = "forward+backward") -> list[Path]:
    """Draw every plot that has a figure, and return the written files."""
    kept = latest(rows)
    return [*bars(kept, folder, metric), *lines(kept, folder, metric), *roofline(kept, folder)]


def bars(rows: Sequence[Row], folder: Path, metric: str = "forward+backward") -> list[Path]:
    """Time over the frozen linear's, one panel a site, one file for each device, dtype and number of tokens."""
    written = []
    for (device, dtype, tokens), here in split(_ratios(rows, metric), "layer", "device", "dtype", "tokens").items():
        everyone, sites = list(dict.fromkeys(map(_who, here))), _sites(here)
        names = [textwrap.fill(who.label, _NAME) for who in everyone]
        title = f"{metric}: time / frozen linear, {dtype}, {tokens} tokens, {device}"
        each = 0.1 + _LINE * (1 + max(name.count("\n") for name in names))
        figure, panels = _panels(title, list(sites), 0.7 + each * len(names))
        for ax, panel in zip(panels, sites.values(), strict=True):
            found = {_who(row): row for row in panel}
            _draw_bars(ax, {at: found[who] for at, who in enumerate(everyone) if who in found}, 0.7, start=1)
            for at in (at for at, who in enumerate(everyone) if who not in found):
                _write(ax, "no figure", 1, at, PEERS[0])
            low, high = _bounds(here, room=0.12)
            ax.set_xscale("log")
            ax.set_xlim(low, high)
            ax.set_xticks(_ticks(low, high), [f"{tick:g}" for tick in _ticks(low, high)])
            ax.set_xticks([], minor=True)
            _name_rows(ax, names)
        key = [Patch(color=color, label=f"gain ({backend})") for backend, color in _backends(here).items()]
        peers = [] if all(map(_ours, everyone)) else [Patch(color=PEERS[0], label="peers")]
        written.append(_save(figure, [*key, *peers], folder, ("bars", metric, device, dtype, tokens)))
    return written


def lines(rows: Sequence[Row], folder: Path, metric: str = "forward+backward") -> list[Path]:
    """Time over the frozen linear's against tokens, one panel for each site measured at several numbers of tokens."""
    written = []
    for (device, dtype), here in split(_ratios(rows, metric), "layer", "device", "dtype").items():
        sites = {site: panel for site, panel in _sites(here).items() if len({row.tokens for row in panel}) > 1}
        if not sites:
            continue
        drawn = [row for panel in sites.values() for row in panel]
        tokens, styles = sorted({row.tokens for row in drawn}), _styles(dict.fromkeys(map(_who, drawn)))
        key: list[Artist] = [
            Line2D([], [], label=textwrap.fill(who.label, _NAME), **style) for who, style in styles.items()
        ]
        title = f"{metric}: time / frozen linear, {dtype}, {device}"
        figure, panels = _panels(title, list(sites), 3.3, legend=_LINE * len(key) / 3, same_y=False)
        for ax, panel in zip(panels, sites.values(), strict=True):
            for who, style in styles.items():
                _draw_line(ax, [row for row in panel if _who(row) == who], style)
            low, high = _bounds(panel, room=0.03)
            ax.axhline(1, color=_INK, linewidth=0.8)
            ax.set_yscale("log")
            ax.set_ylim(low, high)
            ax.set_yticks(_ticks(low, high), [f"{tick:g}" for tick in _ticks(low, high)])
            ax.set_yticks([], minor=True)
            ax.set_xscale("log", base=2)
            ax.set_xticks(tokens, [f"{count:,}" for count in tokens])
            ax.set_xticks([], minor=True)
            ax.set_xlabel("tokens", fontsize=9)
            ax.grid(alpha=0.25)
        written.append(_save(figure, key, folder, ("tokens", metric, device, dtype)))
    return written


def roofline(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The roofline's share of each op's time by backend, one panel a site, one file for each device, dtype and tokens."""
    shares = [row for row in rows if row.unit == "share" and row.median is not None]
    written = []
    for (device, dtype, tokens), here in split(shares, "op", "device", "dtype", "tokens").items():
        sites, backends = _sites(here), _backends(here)
        names = list(dict.fromkeys(row.contestant for row in here))
        title = f"share of the roofline, {dtype}, {tokens} tokens, {device}"
        figure, panels = _panels(title, list(sites), 0.7 + len(names) * (0.12 + _LINE * len(backends)))
        thick = 0.84 / len(backends)
        for ax, panel in zip(panels, sites.values(), strict=True):
            for index, backend in enumerate(backends):
                offset = thick * (index - (len(backends) - 1) / 2)
                found = {names.index(row.contestant) + offset: row for row in panel if row.backend == backend}
                _draw_bars(ax, found, 0.9 * thick, start=0)
            right = 1.15 * max(1.0, *(spread(row)[1] for row in here))
            ax.set_xlim(0, right)
            ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            ax.axvline(1, color=_INK, linewidth=0.8)
            _name_rows(ax, names)
        key = [Patch(color=color, label=backend) for backend, color in backends.items()]
        written.append(_save(figure, key, folder, ("roofline", device, dtype, tokens)))
    return written


def _ratios(rows: Iterable[Row], metric: str) -> list[Row]:
    """The ratios that were measured, without the frozen linear's own, which is 1."""
    wanted = metric + RATIO
    return [row for row in rows if row.metric == wanted and row.median is not None and row.contestant not in FLOORS]


def _sites(rows: Iterable[Row]) -> dict[str, list[Row]]:
    sites: dict[str, list[Row]] = {}
    for row in rows:
        sites.setdefault(place(row), []).append(row)
    return sites


def _who(row: Row) -> Who:
    return Who(row.contestant, row.backend)


def _ours(who: Who) -> bool:
    return who.backend in OURS


def _backends(rows: Iterable[Row]) -> dict[str, str]:
    """The backends that are there, with their colours."""
    found = {row.backend for row in rows}
    return {backend: color for backend, color in OURS.items() if backend in found}


def _styles(everyone: Iterable[Who]) -> dict[Who, dict[str, Any]]:
    """A line for each contestant: ours coloured by backend and dashed by method, each peer with its own marker."""
    kinds: dict[str, int] = {}
    styles: dict[Who, dict[str, Any]] = {}
    for who in everyone:
        kind = kinds.setdefault(f"{_ours(who)} {who.contestant}", sum(key.startswith(str(_ours(who))) for key in kinds))
        if _ours(who):
            look = {
                "color": OURS[who.backend],
                "linewidth": 1.8,
                "linestyle": _DASHES[kind % len(_DASHES)],
                "zorder": 3,
            }
        else:
            look = {"color": PEERS[kind % len(PEERS)], "linewidth": 1.0, "linestyle": "-", "zorder": 2}
        styles[who] = look | {"marker": _MARKERS[kind % len(_MARKERS)], "markersize": 5}
    return styles


def _bounds(rows: Iterable[Row], room: float) -> tuple[float, float]:
    """Limits of a logarithmic axis for ratios, which include 1, with room for the text after the highest."""
    ends = [end for row in rows for end in (*spread(row), 1.0)]
    low, high = min(ends), max(*ends, 1.05)
    span = math.log(high / low)
    return low * math.exp(-0.03 * span), high * math.exp((0.03 + room) * span)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, including 1, no closer than their labels need."""
    apart, chosen = math.log(high / low) / 9, [1.0]
    for tick in _TICKS:
        if low <= tick <= high and all(abs(math.log(tick / other)) >= apart for other in chosen):
            chosen.append(tick)
    return sorted(chosen)


def _panels(
    title: str, sites: Sequence[str], height: float, legend: float = 0.0, same_y: bool = True
) -> tuple[Figure, list["Axes"]]:
    """A figure with a panel a site, two in a line."""
    columns = min(len(sites), 2)
    down = math.ceil(len(sites) / columns)
    figure = Figure(figsize=(_WIDTH, 0.8 + legend + down * height), layout="constrained")
    figure.suptitle(textwrap.fill(title, 105), fontsize=11)
    every = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=same_y).flatten()
    for ax in every[len(sites) :]:
        ax.remove()
    for ax, site in zip(every, sites, strict=False):
        ax.set_title(textwrap.fill(site, 50), loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, labelbottom=True)
    return figure, list(every[: len(sites)])


def _draw_bars(ax: "Axes", rows: Mapping[float, Row], thick: float, start: float) -> None:
    """Bars from ``start``, at their places, with whiskers, and the figure after them."""
    for at, row in rows.items():
        value, (low, high) = number(row), spread(row)
        ax.barh(at, value - start, thick, left=start, color=OURS.get(row.backend, PEERS[0]))
        for color, width in (("white", 2.5), (_INK, 1.0)):  # outlined, to be visible on the darkest bar
            ax.plot(
                (low, high), (at, at), color=color, linewidth=width, marker="|", markersize=5, markeredgewidth=width
            )
        _write(ax, f"{value:.2f}" if start else f"{100 * value:.0f}", max(high, start), at, _INK)


def _write(ax: "Axes", text: str, x: float, y: float, color: str) -> None:
    around = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    ax.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=color, bbox=around)


def _name_rows(ax: "Axes", names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(alpha=0.25, axis="x")
    ax.set_axisbelow(True)


def _draw_line(ax: "Axes", rows: Iterable[Row], style: Mapping[str, Any]) -> None:
    ordered = sorted(rows, key=lambda row: row.tokens)
    tokens, ends = [row.tokens for row in ordered], [spread(row) for row in ordered]
    ax.plot(tokens, [number(row) for row in ordered], **style)
    ax.vlines(tokens, [low for low, _ in ends], [high for _, high in ends], color=style["color"], linewidth=1)


def _save(figure: Figure, key: Sequence["Artist"], folder: Path, name: Sequence[str]) -> Path:
    figure.legend(handles=key, loc="outside lower center", ncols=4 if len(key) <= 4 else 3, frameon=False, fontsize=9)
    stem = re.sub(r"[^\w.+]+", "-", "-".join(name)).strip("-").lower()
    path = folder / f"{stem}.png"
    replace_file(path, lambda beside: figure.savefig(beside, dpi=180))
    return path

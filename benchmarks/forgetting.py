"""The published studies of what is forgotten: what each of them is, how it is run again, and what is shown of all of them.

    python examples/study_texts.py FOLDER/texts
    python -m benchmarks.forgetting run NAME --folder FOLDER [OPTIONS]   again to go on; OPTIONS of gain-ops study: a part
    python -m benchmarks.forgetting publish                              docs/forgetting.md and its plot, of what is committed

A study's results go to FOLDER/NAME, and are published in benchmarks/results/forgetting/NAME. SmolLM2-135M is studied at one
length, as a stage takes minutes on a CPU. The others are byte-level models of two layers, trained from scratch on text that no
domain has: a stage takes them seconds, so they show what length, learning rate, absorbing and size do.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import update_page
from gain_ops.recipes.commands import app
from gain_ops.recipes.domains import from_path
from gain_ops.recipes.study import metrics
from gain_ops.recipes.study.metrics import Spread, Values
from gain_ops.recipes.study.pages import markdown
from gain_ops.recipes.study.plot_parts import Look, looks, nats, percent_axis
from gain_ops.recipes.study.records import Study, read
from gain_ops.recipes.study.running import RESULTS
from gain_ops.recipes.study.tables import NOTHING, Table, spread_text
from gain_ops.recipes.study.toy import save_toy_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PUBLISHED = Path(__file__).resolve().parent / "results" / "forgetting"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "forgetting.md"
PLOT = PAGE.with_name("forgetting.png")

_TEXTS = (
    "--domain texts/bible --domain texts/python --domain texts/foldoc --domain texts/licences "
    "--held-out texts/held-out/wikipedia --seeds 0,1,2 --orders 2"
)
LEARNED_BEFORE = ("held-out/wikipedia", "fortunes", "essays", "manual")
"""The texts that the small models are trained on before."""

_GAINS = ("gain", "gain-ffn", "gain-ffn-input", "ia3")
_LOW_RANK = ("lora", "lora-same", "dora")
_EVERY = (*_GAINS, *_LOW_RANK, "lora-replay", "ewc", "full")
_FEW = ("gain", "gain-ffn", "lora", "lora-same", "full")


@dataclass(frozen=True)
class Published:
    """A study: its name in the table and in the plot, options, and the width of the model trained for it, None for SmolLM2."""

    title: str
    label: str
    options: str
    width: int | None = None

    @property
    def model(self) -> str:
        """The folder of the model that is trained for it."""
        return {80: "smaller-model", 160: "small-model", 320: "larger-model"}[self.width or 160]


def _rates(gains: str, low_rank: str, full: str) -> str:
    grids = [*((name, gains) for name in _GAINS), *((name, low_rank) for name in _LOW_RANK), ("full", full)]
    return " ".join(f"--rates {name}={grid}" for name, grid in grids)


def _small(
    title: str,
    label: str,
    steps: int,
    methods: Sequence[str],
    *,
    rates: str = _rates("1e-2,3e-2,1e-1,3e-1", "3e-3,1e-2,3e-2,1e-1", "3e-4,1e-3,3e-3,1e-2"),
    more: str = "",
    width: int = 160,
) -> Published:
    options = (
        f"--methods {','.join(methods)} --steps {steps} --batch-tokens 1024 --sequence-length 128 --validation-windows 24 "
        f"--selection-windows 24 --curve-points 4 --curve-windows 6 --no-tasks --ewc-lambda 300 {rates} {more}"
    )
    return Published(title, label, options, width)


STUDIES = {
    "smollm2": Published(
        "SmolLM2-135M, 16 steps of 512 tokens",
        "16",
        f"--methods {','.join(_EVERY)} --steps 16 --batch-tokens 512 --sequence-length 256 --validation-windows 6 "
        "--selection-windows 4 --curve-points 2 --curve-windows 1 --replay-share 0.5",
    ),
    "small-100": _small("small model, 100 steps of 1024 tokens", "100", 100, _EVERY),
    "small-low-100": _small("100 steps, low rates", "100, low", 100, _FEW, rates=_rates("1e-2", "3e-3", "3e-4")),
    "small-high-100": _small("100 steps, high rates", "100, high", 100, _FEW, rates=_rates("3e-1", "3e-2", "1e-2")),
    "small-25": _small("25 steps", "25", 25, _FEW),
    "small-400": _small("400 steps", "400", 400, _FEW),
    "small-kept-100": _small("100 steps, adapters kept", "kept", 100, _FEW, more="--keep-adapters"),
    "smaller-100": _small("100 steps, half the width", "100", 100, _FEW, width=80),
    "larger-100": _small("100 steps, twice the width", "100", 100, _FEW, width=320),
}

_PANELS = {
    "small model, absorbed, by steps and rate": (
        "small-25",
        "small-low-100",
        "small-100",
        "small-high-100",
        "small-400",
    ),
    "SmolLM2-135M": ("smollm2",),
}

_Ends = dict[str, tuple[Spread, Spread]]
"""Of each method the in-domain perplexity and that of the earlier domains after the last stage, in percent."""


def run(name: str, folder: Path, more: Sequence[str]) -> None:
    """Run a study, or what is left of it, in ``folder``, which has ``texts``; its model is trained where it is missing."""
    published = STUDIES[name]
    with contextlib.chdir(folder):
        model: tuple[str, ...] = ()
        if published.width is not None:
            model = ("--model", published.model)
            if not Path(published.model).exists():
                mixture = [from_path(Path("texts") / text) for text in LEARNED_BEFORE]
                save_toy_model(Path(published.model), mixture, steps=1200, width=published.width)
        app(["study", "--out", name, *_TEXTS.split(), *model, *published.options.split(), *more])


def table(studies: Mapping[str, Study]) -> str:
    """Every study's methods after the last stage: in-domain and earlier domains against the base model, in percent."""
    names = [name for name in STUDIES if name in studies]
    ends = {name: _ends(studies[name]) for name in names}
    methods = [method for method in _EVERY if any(method in found for found in ends.values())]
    rows = [[STUDIES[name].title, *(_text(ends[name].get(method)) for method in methods)] for name in names]
    return markdown(Table(["", *methods], rows))


def draw(studies: Mapping[str, Study]) -> Figure:
    """Learning against forgetting of absorbed stages, a panel a model: the line of a method goes through its rates."""
    from matplotlib.figure import Figure

    panels = [
        (title, {name: _ends(studies[name]) for name in names if name in studies}) for title, names in _PANELS.items()
    ]
    panels = [(title, found) for title, found in panels if any(found.values())]
    figure = Figure(figsize=(5.4 * len(panels), 5), layout="constrained")
    styles = looks(_EVERY)
    for axes, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, found, styles)
        axes.set_title(title, loc="left", fontsize=10)
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [method for method in _EVERY if method in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    return figure


def _draw_panel(axes: Axes, found: Mapping[str, _Ends], styles: Mapping[str, Look]) -> None:
    ends: list[tuple[float, float]] = []
    for method in _EVERY:
        points = [
            (nats(learned.mean), nats(earlier.mean), STUDIES[name].label)
            for name, by_method in found.items()
            if method in by_method
            for learned, earlier in [by_method[method]]
        ]
        look = styles[method]
        rates = [(x, y) for x, y, label in points if label.startswith("100")]
        axes.plot([x for x, _ in rates], [y for _, y in rates], color=look.color, linewidth=1)
        for at, (x, y, label) in enumerate(points):
            axes.plot(x, y, color=look.color, marker=look.marker, markersize=6, linewidth=0, label="" if at else method)
            if len(found) > 1:
                axes.annotate(label, (x, y), (4, 3), textcoords="offset points", fontsize=6, color=look.color)
        ends += [(x, y) for x, y, _ in points]
    axes.axhline(0, color="#333333", linewidth=0.8, linestyle=":", zorder=0)
    axes.axvline(0, color="#333333", linewidth=0.8, linestyle=":", zorder=0)
    percent_axis(axes, "x", [x for x, _ in ends])
    percent_axis(axes, "y", [0.0, *(y for _, y in ends)])
    axes.set_xlabel("in-domain perplexity against the base model")
    axes.set_ylabel("earlier domains against the base model")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _ends(study: Study) -> _Ends:
    runs = metrics.runs(study)
    n = len(study.header.orders[0])
    learned, earlier = (metrics.values(runs, measure, n) for measure in (metrics.IN_DOMAIN, metrics.EARLIER))
    found = {method: (_spread(learned[method]), _spread(earlier[method])) for method in learned}
    return {method: (one, other) for method, (one, other) in found.items() if one and other}


def _spread(found: Values) -> Spread | None:
    return metrics.spread(map(metrics.percent, found.values()))


def _text(found: tuple[Spread, Spread] | None) -> str:
    if found is None:
        return NOTHING
    runs = "" if found[0].count > 2 else f" ({found[0].count} run{'s' * (found[0].count > 1)})"
    return " / ".join(map(spread_text, found)) + runs


def _publish() -> None:
    studies = {path.parent.name: read(path) for path in PUBLISHED.glob(f"*/{RESULTS}")}
    update_page(PAGE, {"forgetting": table(studies)})
    draw(studies).savefig(PLOT, dpi=130)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("run", help="a study, or what is left of it")
    begin.add_argument("name", choices=STUDIES)
    begin.add_argument("--folder", type=Path, required=True, help="has texts/, and gets the models and results")
    commands.add_parser("publish", help="tables and plot of the published results, in docs/")
    arguments, more = parser.parse_known_args()
    if arguments.command == "run":
        run(arguments.name, arguments.folder, more)
    else:
        _publish()


if __name__ == "__main__":
    main()

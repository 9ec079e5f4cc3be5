"""The published studies of what is forgotten: their options, how to run them again, and how they are shown.

    python examples/study_texts.py FOLDER/texts
    python -m benchmarks.report.forgetting run NAME --folder FOLDER [OPTIONS]   the same to continue; OPTIONS of gain-ops study
    python -m benchmarks.report.forgetting publish                       docs/forgetting.md, its plot, and the two reports

A study's results go to FOLDER/NAME. The results in benchmarks/results/forgetting/NAME are published, and everything shown is
made from them. SmolLM2-135M is studied at one length, since a stage takes minutes on a CPU. The other models are byte-level, of
two layers, and trained from scratch on text that no domain has. A stage takes seconds on them, so they show the effects of
length, learning rate, absorbing and size.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report.report import update_page
from gain_ops.commands.app import app
from gain_ops.training.domains import from_path
from gain_ops.utils.files import replace_file
from gain_study.engine.records import RESULTS, Study, read
from gain_study.engine.toy import save_toy_model
from gain_study.report import matched, metrics
from gain_study.report.metrics import Run, Spread, Values
from gain_study.report.pages import markdown
from gain_study.report.plot_parts import bar_ends, bars, grid, hide, looks, nats, percent_axis
from gain_study.report.report import write_report
from gain_study.report.tables import NOTHING, Strong, Table, spread_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "forgetting"
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "forgetting.md"
PLOT = PAGE.with_name("forgetting.png")
REPORTS = {name: PAGE.parent / "forgetting" / f"{name}.html" for name in ("smollm2", "small-100")}
"""The published full reports, of the studies with all methods."""

_TEXTS = (
    "--domain texts/bible --domain texts/python --domain texts/foldoc --domain texts/licences "
    "--held-out texts/held-out/wikipedia --seeds 0,1,2 --orders 2"
)
LEARNED_BEFORE = ("held-out/wikipedia", "fortunes", "essays", "manual")
"""The texts that the small models are pretrained on."""

_OURS = "gain-ffn"
_GAINS = ("gain", "gain-ffn", "gain-ffn-input", "ia3")
_LOW_RANK = ("lora", "lora-same", "dora")
_EVERY = (*_GAINS, *_LOW_RANK, "lora-replay", "ewc", "full")
_FEW = ("gain", "gain-ffn", "lora", "lora-same", "full")


@dataclass(frozen=True)
class Published:
    """A study: its name in the table, its options, and the width of the model trained for it, None for SmolLM2.

    ``beside`` is a study of the same model and texts; the methods of this study are compared with its gain-ffn as long as this
    study has none itself.
    """

    title: str
    options: str
    width: int | None = None
    beside: str = ""

    @property
    def model(self) -> str:
        """The folder of the model that is trained for it."""
        return {80: "smaller-model", 160: "small-model", 320: "larger-model"}[self.width or 160]


def _rates(gains: str, low_rank: str, full: str) -> str:
    grids = [*((name, gains) for name in _GAINS), *((name, low_rank) for name in _LOW_RANK), ("full", full)]
    return " ".join(f"--rates {name}={grid}" for name, grid in grids)


def _smollm2(title: str, methods: Sequence[str], more: str = "", *, beside: str = "") -> Published:
    options = (
        f"--methods {','.join(methods)} --steps 16 --batch-tokens 512 --sequence-length 256 --validation-windows 6 "
        f"--selection-windows 4 --curve-points 2 --curve-windows 1 --replay-share 0.5 {more}"
    )
    return Published(title, options, beside=beside)


def _small(
    title: str,
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
    return Published(title, options, width)


STUDIES = {
    "smollm2": _smollm2("SmolLM2-135M, 16 steps of 512 tokens", _EVERY),
    "smollm2-low": _smollm2(
        "16 steps, LoRA at half its rate",
        ("gain-ffn", "lora", "lora-same", "full"),
        "--no-tasks --rates gain-ffn=3e-3 --rates lora=5e-3 --rates lora-same=2e-3 --rates full=3e-5",
        beside="smollm2",
    ),
    "small-100": _small("small model, 100 steps of 1024 tokens", 100, _EVERY),
    "small-low-100": _small("100 steps, low rates", 100, _FEW, rates=_rates("1e-2", "3e-3", "3e-4")),
    "small-middle-100": _small("100 steps, middle rates", 100, _FEW, rates=_rates("3e-2", "1e-2", "1e-3")),
    "small-high-100": _small("100 steps, high rates", 100, _FEW, rates=_rates("3e-1", "3e-2", "1e-2")),
    "small-25": _small("25 steps", 25, _FEW),
    "small-400": _small("400 steps", 400, _FEW),
    "small-kept-100": _small("100 steps, adapters carried over", 100, _FEW, more="--keep-adapters"),
    "smaller-100": _small("100 steps, half the width", 100, _FEW, width=80),
    "larger-100": _small("100 steps, twice the width", 100, _FEW, width=320),
}

_PANELS = {
    "SmolLM2-135M, 16 steps": {"smollm2": ""},
    "SmolLM2-135M by learning rate": {"smollm2-low": "low", "smollm2": "chosen"},
    "small model, 100 steps": {"small-100": ""},
    "small model by learning rate": {"small-low-100": "low", "small-middle-100": "middle", "small-high-100": "high"},
    "… by steps": {"small-25": "25", "small-100": "100", "small-400": "400"},
    "… by the model's width": {"smaller-100": "80", "small-100": "160", "larger-100": "320"},
    "… absorbed after each domain, or carried over": {"small-100": "absorbed", "small-kept-100": "carried"},
}
"""The studies of each panel of the plot, in the order in which a method's line joins them, and their labels."""

_Ends = dict[str, tuple[Spread, Spread]]
"""Each method's in-domain perplexity, and that of the earlier domains after the last stage, in percent."""


def run(name: str, folder: Path, more: Sequence[str]) -> None:
    """Run a study, or the rest of it, in ``folder``, which has ``texts``; its model is trained if it is missing."""
    published = STUDIES[name]
    with contextlib.chdir(folder):
        model: tuple[str, ...] = ()
        if published.width is not None:
            model = ("--model", published.model)
            if not Path(published.model).exists():
                mixture = [from_path(Path("texts") / text) for text in LEARNED_BEFORE]
                save_toy_model(Path(published.model), mixture, steps=1200, width=published.width)
        app(["study", "--out", name, *_TEXTS.split(), *model, *published.options.split(), *more])


def tables(studies: Mapping[str, Study]) -> dict[str, str]:
    """The page's tables by name: figures after the last stage, and other methods against ``gain-ffn`` for equal learning."""
    studies = {name: studies[name] for name in STUDIES if name in studies}
    ends = {name: _ends(study) for name, study in studies.items()}
    methods = [method for method in _EVERY if any(method in found for found in ends.values())]
    rows = [[STUDIES[name].title, *(_text(found.get(method)) for method in methods)] for name, found in ends.items()]
    others = [method for method in methods if method != _OURS]
    matched_rows = []
    for name in studies:
        runs = _compared(name, studies)
        found = [matched.matches_paired(runs, other, _OURS, "drift") for other in others]
        if any(found):
            matched_rows.append([STUDIES[name].title, *map(_difference, found)])
    return {
        "forgetting": markdown(Table(["", *methods], rows)),
        "matched": markdown(Table(["", *others], matched_rows)),
    }


def _compared(name: str, studies: Mapping[str, Study]) -> list[Run]:
    """A study's runs, with those of gain-ffn from the study beside it if it has none."""
    runs, beside = metrics.runs(studies[name]), studies.get(STUDIES[name].beside)
    if beside is not None and not any(run.method == _OURS for run in runs):
        runs += [run for run in metrics.runs(beside) if run.method == _OURS]
    return runs


def draw(studies: Mapping[str, Study]) -> Figure:
    """Learning against forgetting, a panel for each varied setting; the line of a method goes through its values."""
    from matplotlib.figure import Figure

    found = {name: _ends(study) for name, study in studies.items()}
    panels = [
        (title, [(label, found[name]) for name, label in labels.items() if found.get(name)])
        for title, labels in _PANELS.items()
        if len(found.keys() & labels.keys()) >= min(2, len(labels))
    ]
    rows, columns = grid(len(panels), 4)
    figure = Figure(figsize=(4.6 * columns, 4.3 * rows + 0.6), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, points) in zip(every, panels, strict=False):
        _draw_panel(axes, points)
        axes.set_title(title, loc="left", fontsize=10)
    hide(every[len(panels) :])
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [method for method in _EVERY if method in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside upper center", ncols=10, frameon=False, fontsize=9
    )
    figure.supxlabel("in-domain perplexity against the base model", fontsize=10)
    figure.supylabel("earlier domains' perplexity against the base model", fontsize=10)
    return figure


def _draw_panel(axes: Axes, points: Sequence[tuple[str, _Ends]]) -> None:
    """The methods that all of the studies have, and gain-ffn to compare with."""
    learned: list[float] = []
    earlier = [0.0]
    styles = looks(_EVERY)
    for method in _EVERY:
        there = [(label, ends[method]) for label, ends in points if method in ends]
        if not there or (len(there) < len(points) and method != _OURS):
            continue
        look = styles[method]
        x, y = ([nats(end[which].mean) for _, end in there] for which in (0, 1))
        axes.plot(x, y, color=look.color, marker=look.marker, markersize=6, linewidth=1, label=method)
        learned += x
        earlier += y
        for at, (label, (across, up)) in zip(zip(x, y, strict=True), there, strict=True):
            axes.annotate(label, at, (4, 3), textcoords="offset points", fontsize=6, color=look.color)
            if len(points) == 1:
                axes.errorbar(*at, bars(up), bars(across), color=look.color, linewidth=0.8)
                learned += bar_ends(across)
                earlier += bar_ends(up)
    axes.axhline(0, color="#333333", linewidth=0.8, linestyle=":", zorder=0)
    axes.axvline(0, color="#333333", linewidth=0.8, linestyle=":", zorder=0)
    percent_axis(axes, "x", learned)
    percent_axis(axes, "y", earlier)
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
    return " / ".join(map(spread_text, found)) + _few(found[0]) if found else NOTHING


def _difference(found: Spread | None) -> str:
    text = spread_text(found) + _few(found) if found else NOTHING
    return Strong(text) if found and found.beyond else text


def _few(found: Spread) -> str:
    return "" if found.count > 3 else f" ({found.count} run{'s' * (found.count > 1)})"


def _publish() -> None:
    studies = {path.parent.name: read(path) for path in PUBLISHED.glob(f"*/{RESULTS}")}
    update_page(PAGE, tables(studies))
    replace_file(PLOT, lambda beside: draw(studies).savefig(beside, dpi=130))
    for name, path in REPORTS.items():
        with tempfile.TemporaryDirectory() as folder:
            report, *_ = write_report(studies[name], Path(folder))
            replace_file(path, partial(shutil.copyfile, report))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("run", help="run a study, or the rest of it")
    begin.add_argument("name", choices=STUDIES)
    begin.add_argument("--folder", type=Path, required=True, help="has texts/, and gets the models and results")
    commands.add_parser("publish", help="tables, plot and reports of the published results, in docs/")
    arguments, more = parser.parse_known_args()
    if arguments.command == "run":
        run(arguments.name, arguments.folder, more)
    else:
        _publish()


if __name__ == "__main__":
    main()

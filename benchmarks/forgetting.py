"""The published studies of what is forgotten: what each of them is, how it is run again, and the tables over all of them.

    python examples/study_texts.py FOLDER/texts
    python -m benchmarks.forgetting run NAME --folder FOLDER [OPTIONS]      again to go on; OPTIONS of gain-ops study: a part
    python -m benchmarks.forgetting tables                                  into docs/forgetting.md, from what is committed

A study's results go to FOLDER/NAME, and are published in benchmarks/results/forgetting/NAME. SmolLM2-135M is studied at one
length, as a stage takes minutes on a CPU. The others are byte-level models of two layers, trained from scratch on text that no
domain has: a stage takes them seconds, so they show what length, learning rate, absorbing and size do.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import update_readme
from gain_ops.recipes.commands import app
from gain_ops.recipes.domains import from_path
from gain_ops.recipes.study import matched, metrics
from gain_ops.recipes.study.metrics import Measure, Run, Spread
from gain_ops.recipes.study.pages import markdown
from gain_ops.recipes.study.records import Study, read
from gain_ops.recipes.study.running import RESULTS
from gain_ops.recipes.study.tables import NOTHING, Strong, Table, spread_text
from gain_ops.recipes.study.toy import save_toy_model

PUBLISHED = Path(__file__).resolve().parent / "results" / "forgetting"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "forgetting.md"

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

_OURS = "gain-ffn"
"""What the others are compared with at the same in-domain perplexity."""


@dataclass(frozen=True)
class Published:
    """A study: how it is called in the tables, its options, and the width of the model trained for it, None for SmolLM2."""

    title: str
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
    "smollm2": Published(
        "SmolLM2-135M, 16 steps of 512 tokens",
        f"--methods {','.join(_EVERY)} --steps 16 --batch-tokens 512 --sequence-length 256 --validation-windows 6 "
        "--selection-windows 4 --curve-points 2 --curve-windows 1 --replay-share 0.5",
    ),
    "small-100": _small("small model, 100 steps of 1024 tokens", 100, _EVERY),
    "small-low-100": _small("100 steps, low learning rates", 100, _FEW, rates=_rates("1e-2", "3e-3", "3e-4")),
    "small-high-100": _small("100 steps, high learning rates", 100, _FEW, rates=_rates("3e-1", "3e-2", "1e-2")),
    "small-kept-100": _small("100 steps, adapters kept", 100, _FEW, more="--keep-adapters"),
    "small-25": _small("25 steps", 25, _FEW),
    "small-400": _small("400 steps", 400, _FEW),
    "smaller-100": _small("100 steps, half the width", 100, _FEW, width=80),
    "larger-100": _small("100 steps, twice the width", 100, _FEW, width=320),
}


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


def tables(studies: dict[str, Study]) -> dict[str, str]:
    """What every study found: at its end, and where two methods have learned equally much."""
    names = [name for name in STUDIES if name in studies]
    some = {name: metrics.runs(studies[name]) for name in names}
    methods = [m for m in _EVERY if any(run.method == m for runs in some.values() for run in runs)]
    ends = _table(names, methods, lambda name, method: _end(some[name], method))
    others = [method for method in methods if method != _OURS]
    same = _table(names, others, lambda name, method: _matched(some[name], method))
    return {"forgetting-ends": ends, "forgetting-matched": same}


def _table(names: Sequence[str], methods: Sequence[str], cell: Callable[[str, str], str]) -> str:
    rows = [[STUDIES[name].title, *(cell(name, method) for method in methods)] for name in names]
    return markdown(Table(["", *methods], rows))


def _end(runs: Sequence[Run], method: str) -> str:
    n = metrics.depth(runs)
    found = [_spread(runs, method, measure, n) for measure in (metrics.IN_DOMAIN, metrics.EARLIER)]
    if found[1] is None:
        return NOTHING
    return f"{' / '.join(spread_text(spread) for spread in found)}{_few(found[1])}"


def _spread(runs: Sequence[Run], method: str, measure: Measure, n: int) -> Spread | None:
    return metrics.spread_of(measure, metrics.values(runs, measure, n).get(method, {}))


def _matched(runs: Sequence[Run], method: str) -> str:
    ended = [run for run in runs if len(run.stages) == metrics.depth(runs)]
    found = matched.matches_paired(ended, method, _OURS, "earlier")
    if found is None:
        return NOTHING
    return Strong(spread_text(found)) if found.beyond else f"{spread_text(found)}{_few(found)}"


def _few(found: Spread) -> str:
    return f" ({found.count} run{'s' * (found.count > 1)})" if found.count < 3 else ""


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
    commands.add_parser("tables", help="of the published results, into docs/forgetting.md")
    arguments, more = parser.parse_known_args()
    if arguments.command == "run":
        run(arguments.name, arguments.folder, more)
    else:
        update_readme(PAGE, tables({path.parent.name: read(path) for path in PUBLISHED.glob(f"*/{RESULTS}")}))


if __name__ == "__main__":
    main()

"""The report of a study: one HTML file, a Markdown file with the main tables, and the plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gain_ops.utils.errors import file_errors
from gain_ops.utils.files import replace_file
from gain_study.engine import chosen_rates
from gain_study.engine.records import Study
from gain_study.report import metrics, tables
from gain_study.report.metrics import Run
from gain_study.report.pages import Bullets, Section, to_html, to_markdown
from gain_study.report.plots import Plot, write_plots
from gain_study.report.tables import Table

__all__ = ["sections", "write_report"]

_SPREADS = (
    "After ± is the standard deviation over seeds and orders together. Two runs have their lowest and highest figure in "
    "brackets instead. Neither says how a figure would scatter over other validation text."
)
_AGAINST_BEST = (
    "A change of perplexity is against the base model, or since the stage began where the table says so. Below zero is "
    "better. The next figure compares each method with the best one, run by run with the same seed and order: by how many "
    "percent its perplexity is above the best one's."
)
_BEYOND = (
    "A figure is beyond its spread if all runs are on one side of zero and their mean is further from zero than their "
    f"standard deviation. Fewer than {metrics.FEWEST_RUNS} runs are too few to tell."
)
_PAIRS = (
    "By how many percent the row's perplexity is above the column's, run by run with the same seed and order; below zero "
    "the row is better. Bold: the figure is beyond its spread."
)


@file_errors()
def write_report(study: Study, folder: Path) -> list[Path]:
    """Write report.html, report.md and the plots of what a study has so far; existing files are replaced.

    Args:
        study: from :func:`gain_study.engine.records.read`, finished or not.
        folder: is created if it does not exist.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.

    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = write_plots(study, folder)
    title = f"Forgetting of {study.header.model}, adapted to one domain after another"
    pages = {
        "report.html": to_html(title, sections(study, plots)),
        "report.md": to_markdown(title, _main_sections(study, plots)),
    }
    for name, text in pages.items():
        replace_file(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return [*(folder / name for name in pages), *(plot.path for plot in plots)]


def sections(study: Study, plots: Sequence[Plot]) -> list[Section]:
    """What report.html has of a study, with these of its plots."""
    runs = metrics.runs(study)
    n = metrics.depth(runs)
    return [
        _overview(study, runs, n),
        _what_was_run(study),
        *([_learned_and_forgotten(study, runs, n, plots)] if n else []),
        *([_perplexities(study, runs, n, plots)] if n else []),
        *([_differences(runs, n)] if n else []),
        *([_matched(runs)] if n > 1 else []),
        *([_downstream(study, runs, n)] if n and study.header.tasks else []),
        *([_costs(study)] if study.stages else []),
        *([_rates(study, plots)] if study.rates else []),
        _meanings(),
    ]


def _main_sections(study: Study, plots: Sequence[Plot]) -> list[Section]:
    """The part that fits into a README."""
    runs = metrics.runs(study)
    n = metrics.depth(runs)
    blocks: list[str | Bullets | Table | Plot] = []
    if n:
        blocks += [tables.summary(runs, n), tables.final_perplexities(study, runs, n)]
        blocks += [changes] if (changes := tables.matched_changes(runs)).rows and n > 1 else []
        blocks += [tables.accuracies(study, runs, n)] if study.header.tasks else []
        blocks.append(tables.costs(study))
    figures = [plot for plot in plots if plot.path.stem in ("trade-off", "forgetting-order-1")]
    return [_overview(study, runs, n), Section("Figures", [*blocks, *figures, _measured_on(study)])]


def _overview(study: Study, runs: Sequence[Run], n: int) -> Section:
    """What was run, what is not finished, and each method's figures beside the best one's."""
    against_best = [tables.against_best(runs, metrics.IN_DOMAIN, n)]
    if n > 1:
        against_best += [tables.against_best(runs, metrics.EARLIER, n), tables.matched_against_best(runs)]
    against_best.append(tables.against_best(runs, metrics.HELD_OUT, n))
    notes = _notes(study, runs, n)
    return Section(
        "Overview",
        [
            _headline(study),
            *([Bullets(notes)] if notes else []),
            *_with_rows(tables.unfinished(study), tables.doubted_rates(study)),
            *([_AGAINST_BEST, _SPREADS, _BEYOND] if n else []),
            *(_with_rows(*against_best) if n else []),
        ],
    )


def _headline(study: Study) -> str:
    header, settings = study.header, study.header.settings
    numbers = {
        "method": len(settings["methods"]),
        "seed": len(settings["seeds"]),
        "order": len(header.orders),
        "domain": len(header.orders[0]),
    }
    counted = ", ".join(f"{number} {what}{'s' * (number != 1)}" for what, number in numbers.items())
    adapters = "carried over from stage to stage" if settings["keep_adapters"] else "absorbed after each stage"
    return (
        f"{header.model} learns one domain after another: {counted}. A stage has {settings['steps']} steps of "
        f"{settings['batch_tokens']} tokens in {settings['dtype']}. Adapters are {adapters}."
    )


def _notes(study: Study, runs: Sequence[Run], n: int) -> list[str]:
    """What a reader has to know of an unfinished or small study."""
    if study.base is None:
        return ["The base model has not been measured yet, so there is nothing to compare with."]
    if n == 0:
        return ["No stage is finished yet."]
    notes = []
    if n < len(study.header.orders[0]):
        notes.append(
            f"No run is further than stage {n} of {len(study.header.orders[0])}: figures are after that stage."
        )
    if n == 1:
        notes.append("After one stage there are no earlier domains, so nothing is known of forgetting.")
    if max(Counter(run.method for run in runs if len(run.stages) >= n).values()) == 1:
        notes.append("There is one run a method: nothing is known of the spread, and a difference may be chance.")
    return notes


def _with_rows(*several: Table) -> list[Table]:
    return [table for table in several if table.rows]


def _what_was_run(study: Study) -> Section:
    header = study.header
    settings = [[name.replace("_", " "), _setting_text(value)] for name, value in header.settings.items()]
    orders = [[f"order {number}", ", ".join(order)] for number, order in enumerate(header.orders, 1)]
    facts = [
        ["model", f"{header.model}, {header.model_parameters:,} parameters"],
        ["device", header.device],
        ["date", header.date],
        *([name, version] for name, version in header.environment.items()),
    ]
    words = frozenset({1})
    blocks: list[str | Table] = [
        Table(["", ""], facts, words, "Model, device, versions"),
        tables.domains(study),
        Table(["", ""], orders, words, "Orders in which they are learned"),
        Table(["", ""], settings, words, "Settings"),
    ]
    if header.tasks:
        blocks.insert(2, tables.tasks(study))
    return Section("What was run", blocks)


def _learned_and_forgotten(study: Study, runs: Sequence[Run], n: int, plots: Sequence[Plot]) -> Section:
    blocks: list[str | Table | Plot] = [
        f"Changes of perplexity after stage {n}, as the last section defines them. Below zero is better.",
        tables.summary(runs, n),
        *_named(plots, "trade-off"),
    ]
    if n > 2:
        blocks += [tables.by_stage(runs, metrics.EARLIER, n), tables.by_stage(runs, metrics.BEST, n)]
    if n > 1 and len(study.header.orders) > 1:
        blocks.append(tables.by_order(study, runs, metrics.EARLIER, n))
    return Section("Learning and forgetting", blocks)


def _perplexities(study: Study, runs: Sequence[Run], n: int, plots: Sequence[Plot]) -> Section:
    return Section(
        "Perplexity by domain",
        [
            f"The mean over seeds and orders after stage {n}. In brackets: the change of the geometric mean against the base.",
            tables.final_perplexities(study, runs, n),
            *_named(plots, "forgetting-order"),
            *_named(plots, "curves-order"),
        ],
    )


def _differences(runs: Sequence[Run], n: int) -> Section:
    blocks: list[str | Table] = [_PAIRS, tables.differences(runs, metrics.IN_DOMAIN, n)]
    if n > 1:
        blocks.append(tables.differences(runs, metrics.EARLIER, n))
    return Section("Methods against each other", blocks)


def _matched(runs: Sequence[Run]) -> Section:
    title, changes = "At matched in-domain perplexity", tables.matched_changes(runs)
    if not changes.rows:
        return Section(title, ["No perplexity was measured within a stage, so no method can be matched."])
    return Section(
        title,
        [
            "A method that learns less may forget less. So this section compares methods at equal learning. In each stage "
            "every method has a best in-domain perplexity. The target is the worst of these, so all methods reach it. Each "
            "method is measured where it first reaches the target, between two points of its curve along a straight line in "
            "(step, log perplexity).",
            "A method that does not get below the base model in-domain sets no target and is not matched in that stage. Means "
            "are over the stages where all methods are matched, if there are any. In the overview the best method is one that "
            "is matched in all stages, if there is any.",
            "The figures against the base model include what the earlier stages did, where the methods were not matched. The "
            "column since the stage began leaves that out. All figures are of the few validation windows that curves are of.",
            "The learning rate falls within a stage. A method that reaches the target early is measured at a high learning "
            "rate, which has a cost of its own on the earlier domains. The ends of stages at several learning rates and "
            "lengths are the safer comparison.",
            changes,
            f"{_PAIRS} The target is that of the two methods only.",
            tables.matched_differences(runs),
        ],
    )


def _downstream(study: Study, runs: Sequence[Run], n: int) -> Section:
    return Section(
        "Downstream accuracy",
        [
            f"The share of multiple-choice items with the right answer after stage {n}, in percent; in brackets the change in "
            "points. After the base model's ± is the standard error of a set of that size.",
            tables.accuracies(study, runs, n),
        ],
    )


def _costs(study: Study) -> Section:
    return Section(
        "Cost",
        [
            "Means over all stages, and the maximum for bytes. Tokens per second are of the training steps only.",
            tables.costs(study),
        ],
    )


def _rates(study: Study, plots: Sequence[Plot]) -> Section:
    return Section(
        "Learning rates",
        [
            f"A method's rate is the lowest of its grid whose perplexity is at most {100 * chosen_rates.MARGIN:g} % above the "
            "best one. The perplexity is of the selection windows of the first domain, in the first order and with the first "
            "seed.",
            tables.learning_rates(study),
            *_named(plots, "learning-rates"),
        ],
    )


def _meanings() -> Section:
    rows = [[measure.name, measure.equation, measure.meaning] for measure in (*metrics.MEASURES, metrics.ACCURACY)]
    return Section(
        "How the figures are computed",
        [
            "P[k, d] is the perplexity of domain d after k stages, and k = 0 is the base model. d_k is the domain of stage k, "
            "n is the last stage, and A is accuracy. A measure of perplexity is a mean of logarithms of ratios. It is shown as "
            "100 (exp(mean) - 1) percent.",
            Table(["", "equation", "meaning"], rows, frozenset({1, 2})),
        ],
    )


def _setting_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _measured_on(study: Study) -> str:
    header = study.header
    versions = ", ".join(f"{name} {version}" for name, version in header.environment.items())
    return f"Measured on {header.device}; {versions}; {header.date}."


def _named(plots: Sequence[Plot], prefix: str) -> list[Plot]:
    return [plot for plot in plots if plot.path.stem.startswith(prefix)]

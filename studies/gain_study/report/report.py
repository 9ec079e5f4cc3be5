"""The report of a study: one HTML file, a Markdown file with the main tables, and the plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gain_ops.utils.errors import file_errors
from gain_ops.utils.files import replace_file
from gain_study.engine.records import Study
from gain_study.report import metrics, sentences, tables
from gain_study.report.metrics import Run
from gain_study.report.pages import Bullets, Section, to_html, to_markdown
from gain_study.report.plots import Plot, write_plots
from gain_study.report.tables import Table

__all__ = ["write_report"]

_SPREADS = (
    "After ± stands the standard deviation over seeds and orders together, in brackets the lowest and the highest of fewer "
    "than three runs. How a figure would scatter over other validation text is in neither."
)
_COMPARED = (
    "Of perplexities, below zero is better. Where a method is compared with others, it is run by run, and in brackets "
    "stands by how many percent the other's perplexity is above its own. What is said to differ does so in the same "
    "direction in all runs, and on average by more than they scatter."
)
_PAIRS = (
    "By how many percent the row's perplexity is above the column's, run by run with the same seed and order; below zero "
    "the row is better. Bold: all runs agree, and the mean is further from zero than they scatter."
)


@file_errors()
def write_report(study: Study, folder: Path) -> list[Path]:
    """Write report.html, report.md and the plots of what a study has so far; files of the same names are replaced.

    Args:
        study: of :func:`gain_study.engine.records.read`, finished or not.
        folder: is made where it does not exist.

    Returns:
        What was written.

    Raises:
        ImportError: matplotlib is not installed.

    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = write_plots(study, folder)
    title = f"Forgetting of {study.header.model}, adapted to one domain after another"
    pages = {
        "report.html": to_html(title, _sections(study, plots)),
        "report.md": to_markdown(title, _main_sections(study, plots)),
    }
    for name, text in pages.items():
        replace_file(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return [*(folder / name for name in pages), *(plot.path for plot in plots)]


def _sections(study: Study, plots: Sequence[Plot]) -> list[Section]:
    some = metrics.runs(study)
    n = metrics.depth(some)
    return [
        _answer(study),
        _what_was_run(study),
        *([_learned_and_forgotten(study, some, n, plots)] if n else []),
        *([_perplexities(study, some, n, plots)] if n else []),
        *([_differences(some, n)] if n else []),
        *([_matched(some)] if n > 1 else []),
        *([_downstream(study, some, n)] if n and study.header.tasks else []),
        *([_costs(study)] if study.stages else []),
        *([_rates(study, plots)] if study.rates else []),
        _meanings(),
    ]


def _main_sections(study: Study, plots: Sequence[Plot]) -> list[Section]:
    """What a README has room for."""
    some = metrics.runs(study)
    n = metrics.depth(some)
    blocks: list[str | Bullets | Table | Plot] = []
    if n:
        blocks += [tables.summary(some, n), tables.final_perplexities(study, some, n)]
        blocks += [changes] if (changes := tables.matched_changes(some)).rows and n > 1 else []
        blocks += [tables.accuracies(study, some, n)] if study.header.tasks else []
        blocks += [tables.costs(study), _SPREADS]
    figures = [plot for plot in plots if plot.path.stem in ("trade-off", "forgetting-order-1")]
    return [_answer(study), Section("Figures", [*blocks, *figures, _measured_on(study)])]


def _answer(study: Study) -> Section:
    found = sentences.answer(study)
    return Section(
        "The answer", [f"{sentences.headline(study)}.", *([_COMPARED] if study.stages else []), Bullets(found)]
    )


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


def _learned_and_forgotten(study: Study, some: Sequence[Run], n: int, plots: Sequence[Plot]) -> Section:
    blocks: list[str | Table | Plot] = [
        f"Changes of perplexity after stage {n} against the base model, or as the last section says; below zero is better. "
        f"{_SPREADS}",
        tables.summary(some, n),
        *_named(plots, "trade-off"),
    ]
    if n > 2:
        blocks += [tables.by_stage(some, metrics.EARLIER, n), tables.by_stage(some, metrics.BEST, n)]
    if n > 1 and len(study.header.orders) > 1:
        blocks.append(tables.by_order(study, some, metrics.EARLIER, n))
    return Section("Learning and forgetting", blocks)


def _perplexities(study: Study, some: Sequence[Run], n: int, plots: Sequence[Plot]) -> Section:
    return Section(
        "Perplexity by domain",
        [
            f"After stage {n}, the mean over seeds and orders; in brackets the change of the geometric mean against the base.",
            tables.final_perplexities(study, some, n),
            *_named(plots, "forgetting-order"),
            *_named(plots, "curves-order"),
        ],
    )


def _differences(some: Sequence[Run], n: int) -> Section:
    blocks: list[str | Table] = [_PAIRS, tables.differences(some, metrics.IN_DOMAIN, n)]
    if n > 1:
        blocks.append(tables.differences(some, metrics.EARLIER, n))
    return Section("Methods against each other", blocks)


def _matched(some: Sequence[Run]) -> Section:
    title, changes = "At matched in-domain perplexity", tables.matched_changes(some)
    if not changes.rows:
        return Section(title, ["No perplexity was measured in the middle of a stage, so no method can be matched."])
    return Section(
        title,
        [
            "Who learns less may forget less. So here each method is looked at where its in-domain perplexity first is, in "
            "the middle of a stage, the one that all reach: the worst of the methods' best in that stage. Between two points "
            "of a curve the logarithm of perplexity is taken for a straight line. A method that does not come below the base "
            "model in-domain sets no target and is not matched there; means are over the stages that all reach, if there are "
            "such. What the stages before did, in which the methods were not matched, is in the figures against the base "
            "model; the column since the stage began leaves it out. All are of the few validation windows that curves are of.",
            "The learning rate falls along a stage: a method that is caught early is caught at a high one, which has a cost of "
            "its own on the earlier domains. Ends of stages at several learning rates and lengths are the surer comparison.",
            changes,
            f"{_PAIRS} The target is that of the two methods alone.",
            tables.matched_differences(some),
        ],
    )


def _downstream(study: Study, some: Sequence[Run], n: int) -> Section:
    return Section(
        "Downstream accuracy",
        [
            f"Multiple-choice items answered right after stage {n}, in percent; in brackets the change in points. After the "
            "base model's ± stands the standard error of a set of that size.",
            tables.accuracies(study, some, n),
        ],
    )


def _costs(study: Study) -> Section:
    return Section(
        "Cost",
        [
            "Means over all stages; of bytes the largest. Tokens per second are of the training steps alone.",
            tables.costs(study),
        ],
    )


def _rates(study: Study, plots: Sequence[Plot]) -> Section:
    return Section(
        "Learning rates",
        [
            "Each method's rate is the one of its grid with the lowest perplexity on the selection windows of the first "
            "domain of the first order, with the first seed.",
            tables.learning_rates(study),
            *_named(plots, "learning-rates"),
        ],
    )


def _meanings() -> Section:
    rows = [[measure.name, measure.equation, measure.meaning] for measure in (*metrics.MEASURES, metrics.ACCURACY)]
    return Section(
        "How the figures are computed",
        [
            "P[k, d] is the perplexity of domain d after k stages, k = 0 the base model; d_k is the domain of stage k, n the "
            "last stage; A is accuracy. A measure of perplexities is a mean of logarithms of ratios, and is shown as "
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

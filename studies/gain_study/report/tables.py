"""The tables of a study's report, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from gain_ops.utils.wording import size_text, time_text
from gain_study.engine import chosen_rates
from gain_study.engine.records import BASE, Rate, Study
from gain_study.report import matched, metrics
from gain_study.report.matched import Match
from gain_study.report.metrics import Measure, Run, Spread

__all__ = [
    "Strong",
    "Table",
    "accuracies",
    "against_best",
    "by_order",
    "by_stage",
    "costs",
    "differences",
    "domains",
    "doubted_rates",
    "final_perplexities",
    "learning_rates",
    "matched_against_best",
    "matched_changes",
    "matched_differences",
    "perplexity_text",
    "spread_text",
    "standard_error",
    "summary",
    "tasks",
    "unfinished",
]

NOTHING = "-"
"""Shown where there is no figure."""


_MATCHED = {
    "in_domain": "in-domain",
    "earlier": "earlier domains",
    "drift": "earlier domains since the stage began",
    "held_out": "held out",
}


class Strong(str):
    """The text of a cell that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first column is text, and so are the columns whose numbers are in ``words``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset()
    caption: str = ""


def spread_text(spread: Spread | None, form: str = "+z.1f") -> str:
    """``-3.2 ± 0.4`` with the standard deviation, ``-3.2 (-3.5 to -2.9)`` of two figures, ``-3.2`` of one."""
    if spread is None:
        return NOTHING
    mean = _number(spread.mean, form)
    if spread.deviation is not None:
        return f"{mean} ± {_number(spread.deviation, form.removeprefix('+'))}"
    return mean if spread.count == 1 else f"{mean} ({_number(spread.low, form)} to {_number(spread.high, form)})"


def perplexity_text(value: float) -> str:
    """A perplexity with two decimals, and in powers of ten where it is large."""
    return _number(value, ".2f")


def unfinished(study: Study) -> Table:
    """The methods that have runs left to do; no rows for a finished study."""
    runs, orders = metrics.runs(study), study.header.orders
    expected = len(study.header.settings["seeds"]) * len(orders)
    rows = []
    for method in metrics.method_names(study):
        finished = [len(run.stages) == len(orders[run.order]) for run in runs if run.method == method]
        if sum(finished) < expected:
            rows.append([method, f"{sum(finished)} of {expected}", str(finished.count(False))])
    return Table(["", "runs finished", "runs begun"], rows, caption="Not finished: means are over the runs so far")


def against_best(runs: Sequence[Run], measure: Measure, n: int) -> Table:
    """A measure after n stages, the best method first, and by how many percent each is above the best, run by run.

    No rows where no run has the measure.
    """
    by_method = metrics.values(runs, measure, n)
    spreads = {method: metrics.spread_of(measure, by_run) for method, by_run in by_method.items()}
    ranked = _ranked(spreads)
    return _against_best(
        ranked,
        next(iter(ranked), ""),
        lambda one, other: metrics.paired(measure, by_method[one], by_method[other]),
        f"{_title(measure)} after stage {n}",
    )


def matched_against_best(runs: Sequence[Run]) -> Table:
    """The same of what a stage does to the earlier domains where two methods have learned equally much in it.

    The best is one that is matched in all stages, if there is any. No rows where no curve was measured.
    """
    matches = matched.matches(runs)
    changes = matched.change(matched.common(matches), "drift")
    reached = {method: _reached(matches, method) for method in dict.fromkeys(match.method for match in matches)}
    ranked = _ranked({method: metrics.spread(changes.get(method, {}).values()) for method in reached})
    everywhere = [method for method, change in ranked.items() if change and reached[method][0] == reached[method][1]]
    table = _against_best(
        ranked,
        next(iter(everywhere or ranked), ""),
        lambda one, other: matched.matches_paired(runs, one, other, "drift"),
        "Earlier domains since the stage began, at matched in-domain perplexity",
    )
    rows = [[*row, "{} of {}".format(*reached[row[0]])] for row in table.rows]
    return replace(table, columns=[*table.columns, "stages matched"], rows=rows)


def summary(runs: Sequence[Run], n: int) -> Table:
    """Every measure after n stages, a row a method."""
    measures = [
        measure
        for measure in (*metrics.MEASURES, metrics.ACCURACY)
        if any(measure.of(run, n) is not None for run in runs if len(run.stages) >= n)
    ]
    values = {measure.name: metrics.values(runs, measure, n) for measure in measures}
    rows = []
    for method in _methods_at(runs, n):
        count = sum(run.method == method and len(run.stages) >= n for run in runs)
        cells = [spread_text(metrics.spread_of(m, values[m.name].get(method, {}))) for m in measures]
        rows.append([method, str(count), *cells])
    return Table(
        ["", "runs", *(f"{measure.name}, {measure.unit}" for measure in measures)], rows, caption=f"After stage {n}"
    )


def final_perplexities(study: Study, runs: Sequence[Run], n: int) -> Table:
    """The perplexity of every domain after n stages, and in brackets its change against the base model."""
    names = [*study.header.orders[0], *metrics.held_out_domains(study)]
    rows = [[BASE, *(perplexity_text(study.base.perplexity[d]) for d in names)]] if study.base else []
    for method in _methods_at(runs, n):
        of_method = [run.perplexities for run in runs if run.method == method and len(run.stages) >= n]
        cells = []
        for d in names:
            change = metrics.percent(fmean(math.log(P[n][d]) - math.log(P[0][d]) for P in of_method))
            cells.append(
                f"{spread_text(metrics.spread(P[n][d] for P in of_method), '.2f')} ({_number(change, '+z.1f')} %)"
            )
        rows.append([method, *cells])
    return Table(["", *names], rows, caption=f"Perplexity after stage {n}")


def by_stage(runs: Sequence[Run], measure: Measure, n: int) -> Table:
    """A measure after each of the stages 2 to n."""
    by_stage = [metrics.values(runs, measure, stage) for stage in range(2, n + 1)]
    rows = [
        [method, *(spread_text(metrics.spread_of(measure, values.get(method, {}))) for values in by_stage)]
        for method in _methods_at(runs, 2)
    ]
    return Table(
        ["", *(f"stage {stage}, {measure.unit}" for stage in range(2, n + 1))],
        rows,
        caption=f"{_title(measure)}, stage by stage",
    )


def by_order(study: Study, runs: Sequence[Run], measure: Measure, n: int) -> Table:
    """A measure after n stages in each of the orders, with the spread over seeds only."""
    orders = range(len(study.header.orders))
    by_order = [metrics.values([run for run in runs if run.order == order], measure, n) for order in orders]
    rows = [
        [method, *(spread_text(metrics.spread_of(measure, values.get(method, {}))) for values in by_order)]
        for method in _methods_at(runs, n)
    ]
    columns = ["", *(f"order {order + 1}, {measure.unit}" for order in orders)]
    return Table(columns, rows, caption=f"{_title(measure)} after stage {n}, order by order")


def differences(runs: Sequence[Run], measure: Measure, n: int) -> Table:
    """By how many percent the row's perplexity is above the column's, run by run after n stages."""
    values = metrics.values(runs, measure, n)
    caption = f"{_title(measure)} after stage {n}, row against column, %"
    return _pairs(list(values), lambda one, other: metrics.paired(measure, values[one], values[other]), caption)


def matched_changes(runs: Sequence[Run]) -> Table:
    """What each method has forgotten at equal learning; no rows where no curve was measured.

    Means are over the stages where all methods are matched; if there is none, over all where the method is matched.
    """
    matches = matched.matches(runs)
    common = matched.common(matches)
    changes = {field: change for field in matched.FIELDS if (change := matched.change(common, field))}
    rows = []
    for method in dict.fromkeys(match.method for match in matches):
        reached = "{} of {}".format(*_reached(matches, method))
        cells = [spread_text(metrics.spread(change.get(method, {}).values())) for change in changes.values()]
        rows.append([method, reached, *cells])
    stages = len({match.stage for match in common})
    return Table(
        ["", "reached", *(f"{_MATCHED[field]}, %" for field in changes)],
        rows,
        caption=f"At matched in-domain perplexity, in {stages} stages",
    )


def matched_differences(runs: Sequence[Run]) -> Table:
    """What a stage does to the earlier domains at equal learning in it: how far the row is above the column."""
    names = list(dict.fromkeys(run.method for run in runs))
    caption = "Earlier domains since the stage began, at matched in-domain perplexity, row against column, %"
    return _pairs(names, lambda one, other: matched.matches_paired(runs, one, other, "drift"), caption)


def accuracies(study: Study, runs: Sequence[Run], n: int) -> Table:
    """The share of items with the right answer after n stages, and in brackets its change against the base model."""
    tasks = study.header.tasks
    if study.base is None or not tasks:
        return Table(["", *tasks], [])
    base = study.base.accuracy
    errors = {name: standard_error(base[name], task["items"]) for name, task in tasks.items()}
    rows = [
        ["by chance", *(f"{100 / task['choices']:.1f}" for task in tasks.values())],
        [BASE, *(f"{100 * base[name]:.1f} ± {100 * errors[name]:.1f}" for name in tasks)],
    ]
    for method in _methods_at(runs, n):
        of_method = [run.accuracies[n] for run in runs if run.method == method and len(run.stages) >= n]
        cells = []
        for name in tasks:
            spread = metrics.spread(100 * accuracy[name] for accuracy in of_method)
            change = fmean(100 * (accuracy[name] - base[name]) for accuracy in of_method)
            cells.append(f"{spread_text(spread, '.1f')} ({change:+z.1f})")
        rows.append([method, *cells])
    return Table(
        ["", *(f"{name}, %" for name in tasks)],
        rows,
        caption=f"Multiple-choice accuracy after stage {n}; the base model's ± is a set's standard error",
    )


def standard_error(share: float, items: int) -> float:
    """``sqrt(p (1 - p) / items)``: how much an accuracy p would scatter over other sets of as many items."""
    return math.sqrt(share * (1 - share) / items)


def costs(study: Study) -> Table:
    """What a method trains and costs, over all its stages."""
    rows = []
    for method in metrics.method_names(study):
        stages = [stage for stage in study.stages if stage.method == method]
        if stages:
            trained = max(stage.trained for stage in stages)
            speed = metrics.spread(stage.tokens_per_second for stage in stages)
            rows.append(
                [
                    method,
                    f"{trained:,} ({100 * trained / study.header.model_parameters:.3g} %)",
                    spread_text(speed, ".0f"),
                    time_text(fmean(stage.seconds for stage in stages)),
                    size_text(max(stage.saved_bytes for stage in stages)),
                    size_text(max(stage.peak_bytes for stage in stages)),
                ]
            )
    return Table(
        ["", "trained", "tokens/s", "time a stage, measuring included", "saved for backward in a step", "peak memory"],
        rows,
        caption="Cost",
    )


def learning_rates(study: Study) -> Table:
    """The rates tried and chosen, with a warning where the chosen one may not be the best."""
    rows = []
    for method in metrics.method_names(study):
        owner = chosen_rates.owner(method)
        text = ", ".join(f"{rate.lr:g}: {_rate_text(rate)}" for rate in chosen_rates.tried(study, owner))
        if text:
            whose = "" if owner == method else f"those of {owner}: "
            warning = chosen_rates.doubt(study, method) or ""
            rows.append([method, f"{whose}{text}", _chosen_text(study, method), warning])
    return Table(["", "perplexity by rate", "chosen", "doubt"], rows, frozenset({1, 3}), "Learning rates")


def doubted_rates(study: Study) -> Table:
    """The methods whose chosen learning rate may not be the best; no rows where there is none."""
    doubts = {method: chosen_rates.doubt(study, method) for method in metrics.method_names(study)}
    rows = [[method, _chosen_text(study, method), doubt] for method, doubt in doubts.items() if doubt]
    return Table(["", "chosen", "doubt"], rows, frozenset({2}), "Learning rates that may not be the best")


def domains(study: Study) -> Table:
    """The source of the text, how much there is, and its hash."""
    held_out = metrics.held_out_domains(study)
    facts = {
        name: {"": "held out" if name in held_out else "learned"} | {key: str(fact) for key, fact in domain.items()}
        for name, domain in study.header.domains.items()
    }
    for domain in facts.values():
        domain["sha256"] = f"{domain['sha256'][:16]}…"  # the results file has all of it
    return _facts(facts, frozenset({"", "source", "sha256"}), "Domains")


def tasks(study: Study) -> Table:
    """The multiple-choice sets."""
    facts = {name: {key: str(fact) for key, fact in task.items()} for name, task in study.header.tasks.items()}
    return _facts(facts, frozenset({"source"}), "Multiple-choice sets")


def _facts(facts: Mapping[str, Mapping[str, str]], words: frozenset[str], caption: str) -> Table:
    """A row for each name, a column for each fact."""
    keys = list(dict.fromkeys(key for of_name in facts.values() for key in of_name))
    rows = [[name, *(of_name.get(key, NOTHING) for key in keys)] for name, of_name in facts.items()]
    places = frozenset(place for place, key in enumerate(keys, 1) if key in words)
    return Table(["", *(key.replace("_", " ") for key in keys)], rows, places, caption)


def _title(measure: Measure) -> str:
    return measure.name[0].upper() + measure.name[1:]


def _pairs(names: Sequence[str], compare: Callable[[str, str], Spread | None], caption: str) -> Table:
    rows = []
    for one in names:
        row = [one]
        for other in names:
            difference = None if one == other else compare(one, other)
            text = spread_text(difference)
            row.append(Strong(text) if difference and difference.beyond else text)
        rows.append(row)
    return Table(["", *names], rows, caption=caption)


def _against_best(
    spreads: Mapping[str, Spread | None], best: str, compare: Callable[[str, str], Spread | None], caption: str
) -> Table:
    rows = []
    for method, change in spreads.items():
        above = None if method == best else compare(method, best)
        runs, common = (str(spread.count if spread else 0) for spread in (change, above))
        compared = [spread_text(above), NOTHING if method == best else common, _beyond(above)]
        rows.append([method, runs, spread_text(change), _beyond(change), *compared])
    columns = ["", "runs", "change, %", "beyond its spread", f"above {best}, %", "runs in common", "beyond its spread"]
    return Table(columns, rows, caption=caption)


def _ranked(spreads: Mapping[str, Spread | None]) -> dict[str, Spread | None]:
    """From the lowest mean to the highest, then those without one."""
    return dict(sorted(spreads.items(), key=lambda item: math.inf if item[1] is None else item[1].mean))


def _beyond(spread: Spread | None) -> str:
    if spread is None:
        return NOTHING
    if spread.count < metrics.FEWEST_RUNS:
        return "too few runs"
    return Strong("yes") if spread.beyond else "no"


def _reached(matches: Sequence[Match], method: str) -> tuple[int, int]:
    """In how many stages a method could be matched, and of how many."""
    targets = [match.target for match in matches if match.method == method]
    return len(targets) - targets.count(None), len(targets)


def _methods_at(runs: Sequence[Run], n: int) -> list[str]:
    return list(dict.fromkeys(run.method for run in runs if len(run.stages) >= n))


def _chosen_text(study: Study, method: str) -> str:
    rate = chosen_rates.chosen(study, method)
    return NOTHING if rate is None else f"{rate:g}"


def _rate_text(rate: Rate) -> str:
    return "diverged" if rate.perplexity is None else perplexity_text(rate.perplexity)


def _number(value: float, form: str) -> str:
    """The number in its form; large ones in powers of ten, as nobody reads their digits."""
    return format(value, form) if abs(value) < 10_000 else format(value, f"{'+' * form.startswith('+')}.2e")

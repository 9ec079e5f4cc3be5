"""What the runs of a study learned and forgot, in figures.

A run is one method with one seed on one order of the domains. ``P[k, d]`` is its perplexity of domain d after k stages, where
k = 0 is the base model. ``d_k`` is the domain of stage k, and n is the number of stages that a measure covers. A measure is a
mean of logarithms of ratios of perplexities, which are differences of loss in nats a token::

    shown in percent = 100 (exp(measure) - 1)

So the ratios are averaged geometrically. Below zero the perplexity has fallen, which is better, in every measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from gain_study.engine.records import Perplexities, Stage, Study

__all__ = [
    "ACCURACY",
    "BACKWARD",
    "BEST",
    "EARLIER",
    "FEWEST_RUNS",
    "FORWARD",
    "HELD_OUT",
    "IN_DOMAIN",
    "MEASURES",
    "OVERALL",
    "Measure",
    "Run",
    "Spread",
    "Values",
    "depth",
    "held_out_domains",
    "method_names",
    "paired",
    "percent",
    "runs",
    "spread",
    "spread_of",
    "values",
]

FEWEST_RUNS = 4
"""Of fewer runs nothing is claimed: three agree by chance too often."""

Values = dict[tuple[int, int], float]
"""A measure of a method's runs, by seed and number of the order."""


@dataclass(frozen=True)
class Run:
    """One method with one seed on one order of the domains, up to its last finished stage.

    ``perplexities[k]`` and ``accuracies[k]`` are after k stages, and k = 0 is the base model. ``learned[k - 1]`` is the domain
    of stage k. ``held_out`` are the domains of no order.
    """

    method: str
    seed: int
    order: int
    learned: tuple[str, ...]
    held_out: tuple[str, ...]
    perplexities: tuple[Perplexities, ...]
    accuracies: tuple[dict[str, float], ...]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Measure:
    """What is computed of a run after n stages; None where the run has no domains or tasks for it.

    ``points`` marks a difference of shares. It is shown in percentage points, and higher is better.
    """

    name: str
    equation: str
    meaning: str
    of: Callable[[Run, int], float | None]
    points: bool = False

    @property
    def unit(self) -> str:
        """The unit of the shown figure."""
        return "points" if self.points else "%"

    def shown(self, value: float) -> float:
        """The figure in percent, or in percentage points."""
        return 100 * value if self.points else percent(value)


@dataclass(frozen=True)
class Spread:
    """The mean of figures, the lowest, the highest, their standard deviation (n - 1), and how many they are.

    ``deviation`` is None for fewer than three figures, where it would mean nothing.
    """

    mean: float
    low: float
    high: float
    deviation: float | None
    count: int

    @property
    def beyond(self) -> bool:
        """Whether all figures are on one side of zero, and their mean is further from it than their standard deviation.

        False for fewer than FEWEST_RUNS.
        """
        if self.deviation is None or self.count < FEWEST_RUNS:
            return False
        return (self.low > 0 or self.high < 0) and abs(self.mean) > self.deviation


def percent(value: float) -> float:
    """``100 (exp(value) - 1)``: a mean of log-ratios as a change in percent."""
    return 100 * math.expm1(value)


def spread(figures: Iterable[float]) -> Spread | None:
    """Mean, extremes and standard deviation; None of no figures."""
    listed = list(figures)
    if not listed:
        return None
    deviation = stdev(listed) if len(listed) > 2 else None
    return Spread(fmean(listed), min(listed), max(listed), deviation, len(listed))


def method_names(study: Study) -> list[str]:
    """The methods as the settings list them, including those without a record."""
    return list(study.header.settings["methods"])


def held_out_domains(study: Study) -> list[str]:
    """The domains of no order."""
    learned = {domain for order in study.header.orders for domain in order}
    return [domain for domain in study.header.domains if domain not in learned]


def runs(study: Study) -> list[Run]:
    """The runs that have finished a stage, by method, order and seed; none before the base model is measured.

    The order of the records does not matter. Stages after a gap are left out.
    """
    if study.base is None:
        return []
    stages = {(stage.method, stage.order, stage.seed, stage.number): stage for stage in study.stages}
    held_out = tuple(held_out_domains(study))
    found_runs = []
    ranks = {method: rank for rank, method in enumerate(method_names(study))}
    for method, order, seed in sorted({key[:3] for key in stages}, key=lambda key: (ranks[key[0]], *key[1:])):
        done: list[Stage] = []
        while (stage := stages.get((method, order, seed, len(done) + 1))) is not None:
            done.append(stage)
        if done:
            found_runs.append(
                Run(
                    method,
                    seed,
                    order,
                    tuple(stage.domain for stage in done),
                    held_out,
                    (study.base.perplexity, *(stage.perplexity for stage in done)),
                    (study.base.accuracy, *(stage.accuracy for stage in done)),
                    tuple(done),
                )
            )
    return found_runs


def depth(runs: Sequence[Run]) -> int:
    """The most stages that any run has finished; 0 without runs."""
    return max((len(run.stages) for run in runs), default=0)


def values(runs: Iterable[Run], measure: Measure, n: int) -> dict[str, Values]:
    """The measure after n stages by method, of the runs with n stages; not yet in percent."""
    by_method: dict[str, Values] = {}
    for run in runs:
        value = measure.of(run, n) if len(run.stages) >= n else None
        if value is not None:
            by_method.setdefault(run.method, {})[run.seed, run.order] = value
    return by_method


def spread_of(measure: Measure, by_run: Mapping[tuple[int, int], float]) -> Spread | None:
    """The spread of a measure's values as they are shown, over seeds and orders."""
    return spread(measure.shown(value) for value in by_run.values())


def paired(measure: Measure, one: Values, other: Values) -> Spread | None:
    """``shown(one - other)`` of each seed and order that both have; None where they share none.

    For a measure of perplexity this is by how many percent ``one``'s perplexity is above ``other``'s: the base model's
    cancels out.
    """
    return spread(measure.shown(one[key] - other[key]) for key in one if key in other)


def _mean_log_ratio(pairs: Iterable[tuple[float, float]]) -> float | None:
    logs = [math.log(one) - math.log(other) for one, other in pairs]
    return fmean(logs) if logs else None


def _in_domain(run: Run, n: int) -> float | None:
    P = run.perplexities
    return _mean_log_ratio((P[k][d], P[0][d]) for k, d in enumerate(run.learned[:n], 1))


def _earlier(run: Run, n: int) -> float | None:
    P = run.perplexities
    return _mean_log_ratio((P[n][d], P[0][d]) for d in run.learned[: n - 1])


def _best(run: Run, n: int) -> float | None:
    P = run.perplexities
    return _mean_log_ratio((P[n][d], min(P[k][d] for k in range(n + 1))) for d in run.learned[: n - 1])


def _backward(run: Run, n: int) -> float | None:
    P = run.perplexities
    return _mean_log_ratio((P[n][d], P[j][d]) for j, d in enumerate(run.learned[: n - 1], 1))


def _forward(run: Run, n: int) -> float | None:
    P = run.perplexities
    return _mean_log_ratio((P[j - 1][d], P[0][d]) for j, d in enumerate(run.learned[:n], 1) if j > 1)


def _overall(run: Run, n: int) -> float | None:
    P = run.perplexities
    return _mean_log_ratio((P[n][d], P[0][d]) for d in run.learned[:n])


def _held_out(run: Run, n: int) -> float | None:
    P = run.perplexities
    return _mean_log_ratio((P[n][d], P[0][d]) for d in run.held_out)


def _accuracy(run: Run, n: int) -> float | None:
    before, after = run.accuracies[0], run.accuracies[n]
    changes = [after[task] - before[task] for task in before]
    return fmean(changes) if changes else None


IN_DOMAIN = Measure(
    "in-domain",
    "mean over k = 1..n of log(P[k, d_k] / P[0, d_k])",
    "a domain's perplexity when it has just been learned, against the base model",
    _in_domain,
)
EARLIER = Measure(
    "earlier domains",
    "mean over j < n of log(P[n, d_j] / P[0, d_j])",
    "forgetting against the base model; above zero the earlier domains are worse than before any training",
    _earlier,
)
BEST = Measure(
    "forgetting",
    "mean over j < n of log(P[n, d_j] / min over 0 <= k <= n of P[k, d_j])",
    "forgetting against each domain's own best; never below zero",
    _best,
)
BACKWARD = Measure(
    "backward transfer",
    "mean over j < n of log(P[n, d_j] / P[j, d_j])",
    "what later stages did to a domain after it was learned; below zero they helped it",
    _backward,
)
FORWARD = Measure(
    "forward transfer",
    "mean over 1 < j <= n of log(P[j-1, d_j] / P[0, d_j])",
    "a domain's perplexity just before it is learned, against the base model; below zero earlier stages helped it",
    _forward,
)
OVERALL = Measure(
    "all learned",
    "mean over j <= n of log(P[n, d_j] / P[0, d_j])",
    "all learned domains together, against the base model",
    _overall,
)
HELD_OUT = Measure(
    "held out",
    "mean over d in no order of log(P[n, d] / P[0, d])",
    "text that no stage learns, against the base model",
    _held_out,
)
ACCURACY = Measure(
    "accuracy",
    "mean over tasks t of A[n, t] - A[0, t]",
    "the share of multiple-choice items with the right answer, against the base model; above zero is better",
    _accuracy,
    points=True,
)

MEASURES = (IN_DOMAIN, EARLIER, BEST, BACKWARD, FORWARD, OVERALL, HELD_OUT)
"""The measures of perplexity, in the order in which they are shown."""

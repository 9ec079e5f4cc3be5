"""What methods have forgotten at equal learning: forgetting and learning trade off.

In each stage, every method has a best in-domain perplexity. The target is the worst of these, so all methods reach it. A
curve is interpolated linearly in (step, log perplexity), and forgetting is measured where it first reaches the target. That
is before the first step where the earlier stages have reached it already. All perplexities, also the base model's, are of a
curve's few validation windows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from gain_study.engine.records import Curve, Perplexities
from gain_study.report.metrics import Run, Spread, percent, spread

__all__ = ["FIELDS", "Match", "change", "common", "matches", "matches_paired"]

FIELDS = ("in_domain", "earlier", "drift", "held_out")
"""The figures of a Match."""


@dataclass(frozen=True)
class Match:
    """A run at the point of a stage where it first has the target's perplexity. In nats: means of log-ratios.

    ``target`` is None where the method is not below the base model in the stage, and so are all others. ``in_domain`` is
    ``log(target / base)``. ``earlier`` is of the earlier domains against the base model, and ``drift`` is against the stage's
    beginning. ``held_out`` is of the domains of no order, against the base model. Each is None where there are no such domains.
    """

    method: str
    seed: int
    order: int
    number: int
    target: float | None
    step: float | None = None
    in_domain: float | None = None
    earlier: float | None = None
    drift: float | None = None
    held_out: float | None = None

    @property
    def stage(self) -> tuple[int, int, int]:
        """Seed, order and number: what is the same for all methods."""
        return self.seed, self.order, self.number


def matches(runs: Iterable[Run], methods: Collection[str] | None = None) -> list[Match]:
    """Every stage of the methods' runs that has a curve, at the in-domain perplexity that all of them reach.

    ``target = max over methods of min over the curve's points of P[d]`` in a stage that learns d. Only the methods that get
    below the base model there count: with the others the target would be reached before the training.

    Args:
        runs: of any methods.
        methods: those that are compared; None for all.

    """
    stages: dict[tuple[int, int, int], list[Run]] = {}
    for run in runs:
        if methods is None or run.method in methods:
            for number, stage in enumerate(run.stages, 1):
                if stage.curve and run.stages[0].curve:
                    stages.setdefault((run.seed, run.order, number), []).append(run)
    return [match for (_, _, number), of_stage in sorted(stages.items()) for match in _matches(of_stage, number)]


def common(matches: Sequence[Match]) -> list[Match]:
    """The matches in the stages where every method is matched, so that all are compared on the same; all if there is none."""
    unmatched = {match.stage for match in matches if match.target is None}
    return [match for match in matches if match.stage not in unmatched] or list(matches)


def change(matches: Iterable[Match], field: str) -> dict[str, dict[tuple[int, int], float]]:
    """``100 (exp(mean over the stages of field) - 1)``, by method, seed and order."""
    by_method: dict[str, dict[tuple[int, int], list[float]]] = {}
    for match in matches:
        value = getattr(match, field)
        if value is not None:
            by_method.setdefault(match.method, {}).setdefault((match.seed, match.order), []).append(value)
    return {
        method: {run: percent(fmean(stages)) for run, stages in by_run.items()} for method, by_run in by_method.items()
    }


def matches_paired(runs: Sequence[Run], one: str, other: str, field: str) -> Spread | None:
    """By how many percent ``one``'s perplexity is above ``other``'s where both have learned equally much.

    The target is that of these two only. A run's figure is the mean over the stages where both are matched. ``drift`` compares
    what the stage itself did. ``earlier`` includes what the stages before did, where the two were not matched.
    """
    by_stage: dict[tuple[int, int, int], dict[str, float]] = {}
    for match in matches(runs, {one, other}):
        value = getattr(match, field)
        if value is not None:
            by_stage.setdefault(match.stage, {})[match.method] = value
    differences: dict[tuple[int, int], list[float]] = {}
    for (seed, order, _), by_method in by_stage.items():
        if len(by_method) == 2:
            differences.setdefault((seed, order), []).append(by_method[one] - by_method[other])
    return spread(percent(fmean(stages)) for stages in differences.values())


def _matches(runs: Sequence[Run], number: int) -> list[Match]:
    """Runs with the same seed and order, in one stage."""
    domain = runs[0].learned[number - 1]
    best = {}
    for run in runs:
        reached = min(point.perplexity[domain] for point in run.stages[number - 1].curve)
        if reached < _base(run)[domain]:
            best[run.method] = reached
    target = max(best.values(), default=None)
    return [
        _match(run, number, target) if target is not None and run.method in best else _no_match(run, number)
        for run in runs
    ]


def _no_match(run: Run, number: int) -> Match:
    return Match(run.method, run.seed, run.order, number, None)


def _match(run: Run, number: int, target: float) -> Match:
    domain, base, curve = run.learned[number - 1], _base(run), run.stages[number - 1].curve
    step, logs = _first_at(curve, domain, target)
    earlier = run.learned[: number - 1]
    start = curve[0].perplexity
    return Match(
        run.method,
        run.seed,
        run.order,
        number,
        target,
        step,
        math.log(target) - math.log(base[domain]),
        _mean(logs[d] - math.log(base[d]) for d in earlier),
        _mean(logs[d] - math.log(start[d]) for d in earlier),
        _mean(logs[d] - math.log(base[d]) for d in run.held_out),
    )


def _base(run: Run) -> Perplexities:
    """The base model's perplexities on a curve's windows: before the first step of the first stage."""
    return run.stages[0].curve[0].perplexity


def _first_at(curve: Sequence[Curve], domain: str, target: float) -> tuple[float, dict[str, float]]:
    """Step and log perplexities where the domain's perplexity first equals the target, which the curve reaches."""
    after = next(index for index, point in enumerate(curve) if point.perplexity[domain] <= target)
    reached = {d: math.log(value) for d, value in curve[after].perplexity.items()}
    if after == 0:
        return curve[0].step, reached
    before = {d: math.log(value) for d, value in curve[after - 1].perplexity.items()}
    share = (before[domain] - math.log(target)) / (before[domain] - reached[domain])
    step = curve[after - 1].step + share * (curve[after].step - curve[after - 1].step)
    return step, {d: before[d] + share * (reached[d] - before[d]) for d in reached}


def _mean(figures: Iterable[float]) -> float | None:
    listed = list(figures)
    return fmean(listed) if listed else None

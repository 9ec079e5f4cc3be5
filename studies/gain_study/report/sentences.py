"""The answer of a study in sentences that are made of its figures, each with the spread that it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gain_study.engine import chosen_rates
from gain_study.engine.records import Study
from gain_study.report import matched, metrics, tables
from gain_study.report.metrics import Measure, Run, Spread

__all__ = ["answer", "headline", "missing"]


def headline(study: Study) -> str:
    """What was run, in one sentence."""
    settings, header = study.header.settings, study.header
    return (
        f"{header.model} on {_count(len(header.orders[0]), 'domain')} in turn: {_count(len(settings['methods']), 'method')}, "
        f"{_count(len(settings['seeds']), 'seed')}, {_count(len(header.orders), 'order')}, {settings['steps']} steps of "
        f"{settings['batch_tokens']} tokens a stage, adapters "
        f"{'kept from stage to stage' if settings['keep_adapters'] else 'absorbed after each stage'}, {settings['dtype']}"
    )


def missing(study: Study) -> list[str]:
    """What the study was to do and has not done; nothing when it is finished."""
    if study.base is None:
        return ["The base model has not been measured yet, so there is nothing to compare with."]
    some, seeds, orders = metrics.runs(study), study.header.settings["seeds"], study.header.orders
    wanted = len(seeds) * len(orders)
    short = []
    for method in metrics.method_names(study):
        ends = [len(run.stages) == len(orders[run.order]) for run in some if run.method == method]
        if sum(ends) < wanted:
            begun = f", {_count(ends.count(False), 'more')} begun" if False in ends else ""
            short.append(f"{method} ({sum(ends)} of {wanted} runs{begun})")
    return [f"Not finished: {_listed(short)}. Means are over the runs that are there."] if short else []


def answer(study: Study) -> list[str]:
    """What was found, as far as the study came."""
    some = metrics.runs(study)
    n = metrics.depth(some)
    found = missing(study)
    if n == 0:
        return [*found, "No stage is finished yet."]
    if n < len(study.header.orders[0]):
        found.append(
            f"No run is further than stage {n} of {len(study.header.orders[0])}: figures are after that stage."
        )
    found += _learned(some, n)
    if n > 1:
        found += _forgotten(some, n) + _matched(some)
    else:
        found.append("After one stage there are no earlier domains, so nothing is known of forgetting.")
    found += _range("The perplexity of text that no stage learns", metrics.HELD_OUT, some, n)
    return [*found, *_accuracy(study, some, n), *_caveats(study, some, n)]


def _learned(some: Sequence[Run], n: int) -> list[str]:
    return [
        *_range("When it has just been learned, a domain's perplexity", metrics.IN_DOMAIN, some, n),
        *_extremes("In-domain", metrics.IN_DOMAIN, some, n),
    ]


def _forgotten(some: Sequence[Run], n: int) -> list[str]:
    spreads = _spreads(metrics.EARLIER, some, n)
    groups = (
        ("are better than before any training with", lambda s: s.mean < 0 and _known(s)),
        ("are worse with", lambda s: s.mean >= 0 and _known(s)),
        ("have not clearly changed with", lambda s: not _known(s)),
    )
    parts = []
    for text, belongs in groups:
        names = [
            f"{method} ({tables.spread_text(found)} %{', one run' * (found.count == 1)})"
            for method, found in spreads.items()
            if belongs(found)
        ]
        if names:
            parts.append(f"{text} {_listed(names)}")
    sentence = f"After stage {n} the earlier domains {'; they '.join(parts)}."
    return [sentence, *_extremes("On the earlier domains", metrics.EARLIER, some, n)]


def _matched(some: Sequence[Run]) -> list[str]:
    every = matched.matches(some)
    behind = [name for name in dict.fromkeys(match.method for match in every) if _unmatched(every, name)]
    changes = {
        method: metrics.spread(found.values())
        for method, found in matched.change(matched.common(every), "drift").items()
    }
    there = {method: found for method, found in changes.items() if found}
    whole = {method: found for method, found in there.items() if method not in behind}
    found = []
    if len(there) > 1:
        found.append(
            _compared(
                "Within a stage at matched in-domain perplexity, two methods at a time, to the earlier domains",
                next(iter(_ranked(whole or there))),
                list(_ranked(there)),
                lambda one, other: matched.matches_paired(some, one, other, "drift"),
            )
        )
    if behind:
        texts = [
            f"{name} in {_unmatched(every, name)} of {sum(m.method == name for m in every)} stages" for name in behind
        ]
        found.append(f"Not below the base model in-domain, so not matched there: {_listed(texts)}.")
    return found


def _unmatched(every: Sequence[matched.Match], method: str) -> int:
    return sum(match.target is None for match in every if match.method == method)


def _accuracy(study: Study, some: Sequence[Run], n: int) -> list[str]:
    ranked = _ranked(_spreads(metrics.ACCURACY, some, n))
    if not ranked or study.base is None:
        return []
    errors = [
        100 * tables.standard_error(study.base.accuracy[name], task["items"])
        for name, task in study.header.tasks.items()
    ]
    low, high = next(iter(ranked.items())), list(ranked.items())[-1]
    of = "accuracy" if len(errors) == 1 else "mean accuracy"
    return [
        f"Multiple-choice {of} changes by {tables.spread_text(low[1])} points with {low[0]}"
        + (f" to {tables.spread_text(high[1])} with {high[0]}" if len(ranked) > 1 else "")
        + f"; a set's own standard error is {max(errors):.1f} points{' at most' * (len(errors) > 1)}."
    ]


def _caveats(study: Study, some: Sequence[Run], n: int) -> list[str]:
    found = []
    if max(sum(run.method == one.method and len(run.stages) >= n for run in some) for one in some) == 1:
        found.append("There is one run a method: nothing is known of the spread, and a difference may be chance.")
    doubts: dict[str, list[str]] = {}
    for method in metrics.method_names(study):
        if text := chosen_rates.doubt(study, method):
            doubts.setdefault(text, []).append(method)
    if doubts:
        texts = [f"{text}, with {_listed(methods)}" for text, methods in doubts.items()]
        found.append(f"Learning rates: {'; '.join(texts)}.")
    return found


def _range(what: str, measure: Measure, some: Sequence[Run], n: int) -> list[str]:
    """From the method that is lowest to the one that is highest."""
    ranked = list(_ranked(_spreads(measure, some, n)).items())
    if not ranked:
        return []
    (low, lowest), (high, highest) = ranked[0], ranked[-1]
    first = f"{what} has changed by {tables.spread_text(lowest)} % against the base model with {low}"
    if len(ranked) == 1:
        return [f"{first}."]
    return [f"{first}, the best, to {tables.spread_text(highest)} % with {high}."]


def _extremes(where: str, measure: Measure, some: Sequence[Run], n: int) -> list[str]:
    found = metrics.values(some, measure, n)
    ranked = list(_ranked(_spreads(measure, some, n)))
    if len(ranked) < 2:
        return []
    return [_compared(where, ranked[0], ranked, lambda one, other: metrics.paired(measure, found[one], found[other]))]


def _compared(where: str, best: str, methods: Sequence[str], compare: Callable[[str, str], Spread | None]) -> str:
    """The best method against all others, run by run."""
    groups: dict[str, list[str]] = {}
    for other in methods:
        if other != best:
            found = compare(other, best)
            groups.setdefault(_verdict(found), []).append(f"{other} ({_paired_text(found)})")
    parts = [f"{verdict} {_listed(names)}" for verdict, names in sorted(groups.items())]
    return f"{where} {best} {', '.join(parts[:-1])}{', and ' * (len(parts) > 1)}{parts[-1]}."


def _verdict(found: Spread | None) -> str:
    """How the best stands to another, by the other's perplexity above the best's."""
    if found is None or (found.count > 1 and not found.beyond):
        return "cannot be told from"
    return f"is {'in one run ' * (found.count == 1)}{'better' if found.mean > 0 else 'worse'} than"


def _paired_text(found: Spread | None) -> str:
    return "no run in common" if found is None else f"{tables.spread_text(found)} %"


def _spreads(measure: Measure, some: Sequence[Run], n: int) -> dict[str, Spread]:
    found = {method: metrics.spread_of(measure, by_run) for method, by_run in metrics.values(some, measure, n).items()}
    return {method: spread for method, spread in found.items() if spread}


def _ranked(found: Mapping[str, Spread]) -> dict[str, Spread]:
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


def _known(found: Spread) -> bool:
    """Whether a figure's sign can be told; of one run it is said as it is shown, with a sentence that it is one."""
    return found.beyond or (found.count == 1 and round(found.mean, 1) != 0)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 or what == "more" else f"{number} {what}s"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

"""The figures of a study, against ones that were worked out by hand, and laws that hold for every study."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gain_study.engine.records import Base, Curve
from gain_study.report import matched, metrics

from support.synthetic_studies import STEPS, killed, make_study


def _with_perplexities(matrix, held_out=None, curves=None):
    """A study of one run whose P[k, d] is ``matrix[k][d]``, of domains in the order in which they are learned."""
    study = make_study(1, len(matrix) - 1, held_out=held_out is not None)
    names = list(study.header.domains)
    columns = [list(row) + ([held_out[k]] if held_out else []) for k, row in enumerate(matrix)]
    rows = [dict(zip(names, row, strict=True)) for row in columns]
    stages = [
        replace(stage, perplexity=row, curve=curves[k] if curves else [])
        for k, (stage, row) in enumerate(zip(study.stages, rows[1:], strict=True))
    ]
    return replace(study, base=Base(rows[0], study.base.accuracy), stages=stages)


HAND = _with_perplexities([[10, 20, 40], [5, 10, 40], [8, 5, 20], [4, 10, 10]], held_out=[3, 3, 3, 6])
"""Three stages; the first domain is halved, suffers, and ends lower than ever; the second is learned well and halfway lost."""


@pytest.mark.parametrize(
    ("measure", "ratios"),
    [
        (metrics.IN_DOMAIN, [5 / 10, 5 / 20, 10 / 40]),
        (metrics.EARLIER, [4 / 10, 10 / 20]),
        (metrics.BEST, [4 / 4, 10 / 5]),
        (metrics.BACKWARD, [4 / 5, 10 / 5]),
        (metrics.FORWARD, [10 / 20, 20 / 40]),
        (metrics.OVERALL, [4 / 10, 10 / 20, 10 / 40]),
        (metrics.HELD_OUT, [6 / 3]),
    ],
    ids=lambda value: value.name if isinstance(value, metrics.Measure) else None,
)
def test_a_measure_is_the_geometric_mean_of_the_ratios_that_its_equation_names(measure, ratios):
    (run,) = metrics.runs(HAND)
    expected = 100 * (math.prod(ratios) ** (1 / len(ratios)) - 1)
    assert measure.shown(measure.of(run, 3)) == pytest.approx(expected, abs=1e-9)


def test_a_measure_of_an_earlier_stage_does_not_see_the_later_ones():
    (run,) = metrics.runs(HAND)
    assert metrics.EARLIER.of(run, 2) == pytest.approx(math.log(8 / 10))
    assert metrics.BEST.of(run, 2) == pytest.approx(math.log(8 / 5))
    assert metrics.IN_DOMAIN.of(run, 1) == pytest.approx(math.log(5 / 10))


def test_the_base_counts_as_a_domains_best():
    (run,) = metrics.runs(_with_perplexities([[10, 20], [12, 20], [15, 10]]))
    assert metrics.BEST.of(run, 2) == pytest.approx(math.log(15 / 10))


def test_what_has_nothing_to_be_computed_of_is_none():
    (run,) = metrics.runs(_with_perplexities([[10], [5]]))
    for measure in (metrics.EARLIER, metrics.BEST, metrics.BACKWARD, metrics.FORWARD, metrics.HELD_OUT):
        assert measure.of(run, 1) is None


def test_accuracy_is_in_points():
    study = make_study(1, 1, tasks=("a", "b"))
    study = replace(study, stages=[replace(study.stages[0], accuracy={"a": 0.75, "b": 0.5})])
    (run,) = metrics.runs(study)
    assert metrics.ACCURACY.shown(metrics.ACCURACY.of(run, 1)) == 12.5


def test_spreads_by_hand():
    assert metrics.spread([]) is None
    one = metrics.spread([3.0])
    assert (one.mean, one.deviation, one.count, one.beyond) == (3.0, None, 1, False)
    two = metrics.spread([1.0, 2.0])
    assert (two.mean, two.low, two.high, two.deviation, two.beyond) == (1.5, 1.0, 2.0, None, False)
    three = metrics.spread([1.0, 2.0, 6.0])
    assert three.deviation == pytest.approx(math.sqrt(7))
    assert not metrics.spread([1.0, 1.0, 1.0]).beyond  # three agree by chance too often
    assert metrics.spread([1.0, 2.0, 6.0, 7.0]).beyond
    assert not metrics.spread([0.1, 0.1, 0.1, 2.0]).beyond  # the mean is closer to zero than they scatter
    assert not metrics.spread([-0.1, 9.0, 9.0, 9.0, 9.0]).beyond  # one is on the other side
    assert metrics.spread([-3.0, -2.0, -4.0, -3.0]).beyond


def test_methods_are_compared_on_the_seeds_and_orders_that_both_have():
    one = {(0, 0): math.log(2), (1, 0): math.log(3), (2, 0): math.log(100)}
    other = {(0, 0): math.log(1), (1, 0): math.log(2), (0, 1): math.log(100)}
    found = metrics.paired(metrics.EARLIER, one, other)
    assert (found.count, found.low, found.high) == (2, pytest.approx(50), pytest.approx(100))
    assert metrics.paired(metrics.EARLIER, {(0, 0): 1.0}, {(1, 0): 1.0}) is None


def test_a_run_ends_at_a_gap_and_a_study_without_a_base_has_none():
    study = make_study(2, 4)
    holes = [stage for stage in study.stages if (stage.method, stage.number) != ("lora", 3)]
    assert [len(run.stages) for run in metrics.runs(replace(study, stages=holes))] == [4, 2]
    assert metrics.runs(replace(study, base=None)) == []


def test_runs_that_did_not_come_so_far_are_left_out():
    study = killed(make_study(2, 3), 5)
    some = metrics.runs(study)
    assert metrics.depth(some) == 3
    assert list(metrics.values(some, metrics.EARLIER, 3)) == ["gain-ffn"]
    assert list(metrics.values(some, metrics.EARLIER, 2)) == ["gain-ffn", "lora"]


def test_a_domain_of_no_order_is_held_out():
    assert metrics.held_out_domains(make_study(1, 2)) == ["english"]
    assert metrics.held_out_domains(make_study(1, 2, held_out=False)) == []


any_time = settings(deadline=None)
perplexities = st.floats(1, 1e6)
matrices = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(perplexities, min_size=n, max_size=n), min_size=n + 1, max_size=n + 1)
)


@any_time
@given(matrices)
def test_what_does_not_change_has_no_measure_but_zero(matrix):
    (run,) = metrics.runs(_with_perplexities([matrix[0]] * len(matrix), held_out=[7.0] * len(matrix)))
    for measure in (*metrics.MEASURES, metrics.ACCURACY):
        assert measure.of(replace(run, accuracies=run.accuracies[:1] * len(matrix)), len(matrix) - 1) in (0, None)


@any_time
@given(matrices)
def test_forgetting_is_never_negative_nor_less_than_against_any_one_stage(matrix):
    (run,) = metrics.runs(_with_perplexities(matrix))
    n = len(matrix) - 1
    best = metrics.BEST.of(run, n)
    if best is not None:
        assert best >= 0
        assert best >= metrics.BACKWARD.of(run, n) - 1e-9
        assert best >= metrics.EARLIER.of(run, n) - 1e-9


@any_time
@given(matrices, st.floats(1.01, 10))
def test_worse_at_the_end_is_worse_in_every_measure_of_the_end(matrix, factor):
    (run,) = metrics.runs(_with_perplexities(matrix))
    (worse,) = metrics.runs(_with_perplexities([*matrix[:-1], [factor * value for value in matrix[-1]]]))
    n = len(matrix) - 1
    for measure in (metrics.EARLIER, metrics.BACKWARD, metrics.OVERALL, metrics.IN_DOMAIN):
        if (before := measure.of(run, n)) is not None:
            assert measure.of(worse, n) > before


@any_time
@given(matrices, st.floats(0.1, 10))
def test_measures_do_not_depend_on_the_unit_of_perplexity(matrix, factor):
    (run,) = metrics.runs(_with_perplexities(matrix))
    (scaled,) = metrics.runs(_with_perplexities([[factor * value for value in row] for row in matrix]))
    for measure in metrics.MEASURES:
        found, expected = measure.of(scaled, len(matrix) - 1), measure.of(run, len(matrix) - 1)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-9))


@any_time
@given(st.permutations(range(12)))
def test_the_order_of_the_records_does_not_matter(order):
    study = make_study(3, 2, 2)
    shuffled = replace(study, stages=[study.stages[place] for place in order])
    assert metrics.runs(shuffled) == metrics.runs(study)
    assert matched.matches(metrics.runs(shuffled)) == matched.matches(metrics.runs(study))


def _points(*rows):
    """A curve of the domains python and bible."""
    return [Curve(step, {"python": python, "bible": bible}) for step, python, bible in rows]


def _matched_study():
    """Two methods of two stages; in the second they learn bible, from 40 down to 10 and to 20."""
    study = make_study(2, 2, held_out=False)
    curves = {
        ("gain-ffn", 1): _points((0, 10, 40), (8, 5, 40)),
        ("gain-ffn", 2): _points((0, 5, 40), (4, 20, 10), (8, 99, 99)),
        ("lora", 1): _points((0, 10, 40), (8, 8, 40)),
        ("lora", 2): _points((0, 8, 40), (4, 10, 30), (8, 16, 20)),
    }
    return replace(study, stages=[replace(stage, curve=curves[stage.method, stage.number]) for stage in study.stages])


def test_the_matched_point_lies_on_the_line_between_two_points_of_the_curve():
    found = {(match.method, match.number): match for match in matched.matches(metrics.runs(_matched_study()))}
    quick = found["gain-ffn", 2]
    assert quick.target == 20  # the worst of the best, lora's
    assert quick.step == pytest.approx(2)  # from 40 to 10 in four steps, half the logarithm
    assert quick.earlier == pytest.approx(math.log(10 / 10))  # sqrt(5 * 20) against the base model's 10
    assert quick.drift == pytest.approx(math.log(10 / 5))
    assert quick.in_domain == pytest.approx(math.log(20 / 40))
    slow = found["lora", 2]
    assert (slow.step, slow.earlier, slow.drift) == (8, pytest.approx(math.log(16 / 10)), pytest.approx(math.log(2)))


def test_the_first_stage_has_a_target_and_no_earlier_domains():
    found = [match for match in matched.matches(metrics.runs(_matched_study())) if match.number == 1]
    assert [(match.target, match.earlier, match.drift) for match in found] == [(8, None, None)] * 2


def test_matched_methods_are_compared_two_at_a_time():
    some = metrics.runs(_matched_study())
    found = matched.matches_paired(some, "lora", "gain-ffn", "earlier")
    assert (found.count, found.mean) == (1, pytest.approx(60))
    assert matched.matches_paired(some, "lora", "nobody", "earlier") is None


def test_a_method_that_is_not_below_the_base_model_sets_no_target():
    study = _matched_study()
    bad = _points((0, 9, 40), (8, 9, 45))
    stages = [
        replace(stage, curve=bad) if (stage.method, stage.number) == ("lora", 2) else stage for stage in study.stages
    ]
    found = {m.method: m for m in matched.matches(metrics.runs(replace(study, stages=stages))) if m.number == 2}
    assert (found["lora"].target, found["lora"].earlier) == (None, None)
    assert (found["gain-ffn"].target, found["gain-ffn"].step) == (10, 4)


def test_a_stage_that_begins_at_the_target_is_matched_before_its_first_step():
    study = _matched_study()
    ahead = _points((0, 5, 15), (8, 6, 12))
    stages = [
        replace(stage, curve=ahead) if (stage.method, stage.number) == ("gain-ffn", 2) else stage
        for stage in study.stages
    ]
    found = {m.method: m for m in matched.matches(metrics.runs(replace(study, stages=stages))) if m.number == 2}
    assert (found["gain-ffn"].step, found["gain-ffn"].drift) == (0, 0)
    assert {match.target for match in found.values()} == {20}
    assert found["lora"].step == 8


def test_without_curves_nothing_is_matched():
    study = make_study(2, 2)
    study = replace(study, stages=[replace(stage, curve=[]) for stage in study.stages])
    assert matched.matches(metrics.runs(study)) == []


def test_all_matched_methods_are_at_the_target_and_none_after_the_last_step():
    found = matched.matches(metrics.runs(make_study(4, 3, 2, 2)))
    assert found
    for one, other in permutations(found, 2):
        if one.stage == other.stage and None not in (one.target, other.target):
            assert one.target == other.target
    assert all(0 <= match.step <= STEPS[-1] for match in found if match.target is not None)


def test_methods_are_compared_on_the_stages_that_all_reach():
    every = [
        matched.Match(method, 0, 0, number, target)
        for method, targets in {"a": (9.0, 9.0, None), "b": (9.0, None, 9.0)}.items()
        for number, target in enumerate(targets, 1)
    ]
    assert [(match.method, match.number) for match in matched.common(every)] == [("a", 1), ("b", 1)]
    nothing_in_common = [match for match in every if match.number > 1]
    assert matched.common(nothing_in_common) == nothing_in_common

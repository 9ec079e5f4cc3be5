"""A study's plots show every method, overlap no labels, and take studies of any shape and state."""

import math
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from gain_study.report import plot_parts, plots

from support.synthetic_studies import METHODS, killed, make_study

LARGE = make_study(10, 8, 2, 1)


def _drawn(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def _overlapping(texts, renderer):
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    return [(one, other) for (one, box), (other, there) in combinations(boxes, 2) if box.overlaps(there)]


def _tick_texts(axes):
    return [*axes.get_xticklabels(), *axes.get_yticklabels()] if axes.get_visible() else []


@pytest.mark.parametrize(("methods", "domains"), [(3, 2), (10, 8)])
def test_a_heat_map_says_the_change_in_every_cell_and_frames_the_stages_domain(methods, domains):
    study = make_study(methods, domains, noise=0)
    figure = plots.draw_forgetting(study, 0)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [f"{m}  (1 seed)" for m in list(METHODS)[:methods]]
    for axes in panels:
        assert len(axes.texts) == domains * (domains + 1)  # one domain is held out
        assert [frame.get_xy() for frame in axes.patches] == [(k - 0.47, k - 0.46) for k in range(domains)]
    gain, drift = METHODS["lora"]
    first = [text.get_text() for text in panels[1].texts][: domains + 1]
    assert first == [f"{100 * math.expm1(-gain):+.0f}"] + [f"{100 * math.expm1(drift):+.1f}"] * domains


@pytest.mark.parametrize(
    ("draw", "overlapping"),
    [
        pytest.param(lambda: plots.draw_forgetting(LARGE, 0), [], id="forgetting"),
        pytest.param(lambda: plots.draw_curves(LARGE, 0), [], id="curves"),
        pytest.param(lambda: plots.draw_trade_off(LARGE), [], id="trade-off"),
        pytest.param(lambda: plots.draw_rates(LARGE), [], id="rates"),
    ],
)
def test_no_labels_overlap_with_ten_methods_and_eight_domains(draw, overlapping):
    figure = draw()
    renderer = _drawn(figure)
    titles = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    names = [text for text in (figure._supxlabel, figure._supylabel) if text is not None]
    labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    assert _overlapping([*titles, *legends, *names, *labels], renderer) == overlapping
    for axes in figure.axes:
        upright = [text for text in _tick_texts(axes) if text.get_rotation() == 0]
        assert _overlapping([*upright, *axes.texts], renderer) == overlapping


def test_a_method_looks_the_same_in_all_plots_and_as_no_other():
    looks = plot_parts.looks_of(make_study(10, 2))
    assert len(set(looks.values())) == 10
    assert plot_parts.looks_of(killed(make_study(10, 2), 3)) == looks


def test_the_front_joins_those_that_no_other_is_better_than():
    assert plots._front([(2, 2), (1, 3), (3, 1), (3, 3), (2, 5)]) == [(1, 3), (2, 2), (3, 1)]


def test_panels_fill_their_rows():
    grids = [plot_parts.grid(panels, 3) for panels in (1, 2, 3, 4, 5, 7, 10)]
    assert grids == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (4, 3)]


def test_percent_ticks_are_where_their_labels_say():
    for low, high in ((-0.01, 0.02), (-0.3, 0.3), (-1, 2), (-3, 12), (0, 60)):
        ticks = plot_parts.percent_ticks(low, high)
        assert 2 <= len(ticks) <= 12
        for at, text in ticks:
            assert low <= at <= high
            assert math.expm1(at) * 100 == pytest.approx(float(text.removesuffix(" %")), rel=1e-4, abs=1e-9)
        assert all(one < other for (one, _), (other, _) in pairwise(ticks))


@pytest.mark.parametrize(
    ("change", "text"),
    [(0, "+0.0"), (0.05, "+5.1"), (-0.3, "-26"), (1, "+172"), (5, "x148"), (12, "2e+07"), (-60, "-100")],
)
def test_cells_are_short(change, text):
    assert plots._cell(change) == text
    assert len(text) <= 5


def test_the_chosen_rate_has_a_ring_and_a_diverged_one_a_cross():
    figure = plots.draw_rates(make_study(1, 1))
    ring, cross = figure.axes[0].collections
    assert [tuple(point) for point in ring.get_offsets()] == [(0.01, pytest.approx(math.exp(1.7)))]
    assert [tuple(point) for point in cross.get_offsets()] == [(0.1, 0.93)]


def test_a_method_that_was_not_matched_everywhere_says_so():
    study = make_study(3, 4)  # full forgets so much that it is not below the base model in the later stages
    labels = [text.get_text() for text in plots.draw_trade_off(study).axes[1].get_yticklabels()]
    assert labels == ["gain-ffn", "lora", "full\nin 2 of 3 stages"]


def test_what_is_not_there_is_not_drawn():
    one = make_study(1, 1)
    assert plots.draw_trade_off(one) is None
    nothing = killed(make_study(1, 2), 0)
    assert plots.draw_forgetting(nothing, 0) is None
    assert plots.draw_curves(nothing, 0) is None
    assert plots.draw_rates(replace(one, rates=[])) is None
    bare = make_study(2, 2)
    bare = replace(bare, stages=[replace(stage, curve=[]) for stage in bare.stages])
    assert len(plots.draw_trade_off(bare).axes) == 1


def test_files_are_pictures_whatever_the_figures(tmp_path: Path):
    study = make_study(2, 2)
    far = [replace(s, perplexity={d: 1e80 * p for d, p in s.perplexity.items()}) for s in study.stages]
    written = plots.write_plots(replace(study, stages=[*far[:2], *study.stages[2:]]), tmp_path)
    assert [plot.path.name for plot in written] == [
        "trade-off.png",
        "forgetting-order-1.png",
        "curves-order-1.png",
        "learning-rates.png",
    ]
    for plot in written:
        assert plot.path.read_bytes().startswith(b"\x89PNG")
        assert plot.path.stat().st_size > 5_000

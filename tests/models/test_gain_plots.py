"""The plot shows every layer, legibly, whatever their number."""

import sys
import xml.etree.ElementTree
from itertools import pairwise

import pytest
import torch

from gain_ops.gainfiles.file import GainFile
from gain_ops.models.plots import draw_gains, write_gain_plot
from gain_ops.models.statistics import gain_statistics

OUT, DOWN = "self_attn.o_proj", "mlp.down_proj"


def statistics(names, *, spread=0.1, sizes=16, special=None):
    """Random gains for layers of these names; ``special`` replaces the first delta of some."""
    generator = torch.Generator().manual_seed(0)
    deltas = {name: torch.randn(sizes, generator=generator) * spread for name in names}
    for name, delta in (special or {}).items():
        deltas[name][0] = delta
    return gain_statistics(GainFile(deltas, dict.fromkeys(names, "output"), dict.fromkeys(names), "gain", None, "1"))


def blocks(layers, kinds=(OUT, DOWN), prefix="model.layers"):
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def boxes(texts):
    return [text.get_window_extent() for text in texts if text.get_text()]


def tick_labels(axis):
    """Those that are drawn: matplotlib keeps some beyond the ends."""
    low, high = axis.get_view_interval()
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def assert_legible(figure):
    """All text lies in the figure, and none on its neighbour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis, ends in ((axes.xaxis, ("x1", "x0")), (axes.yaxis, ("y1", "y0"))):
            texts += tick_labels(axis)
            for one, following in pairwise(boxes(tick_labels(axis))):
                assert getattr(one, ends[0]) < getattr(following, ends[1])
    for box in boxes(texts):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    for above, below in pairwise(figure.axes):
        assert above.get_tightbbox().y0 > below.get_tightbbox().y1


@pytest.mark.parametrize("layers", [1, 2, 30, 80, 160])
def test_every_layer_is_shown_legibly(layers):
    names = blocks(layers)
    figure = draw_gains(statistics(names, special={names[-1]: -2.0}), title="a model")
    assert titles(figure) == [f"{kind}  ({layers} x 16 gains, output side)" for kind in (OUT, DOWN)]
    for axes in figure.axes:
        assert len(axes.patches) == 2 * layers, "two bars a layer"
        assert len(axes.get_xticks()) <= 20
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"{place:.0f}" for place in axes.get_xticks()]
    assert_legible(figure)


def test_bars_lines_and_medians_are_the_figures():
    found = statistics(blocks(3, [OUT]))
    (axes,) = draw_gains(found).axes
    for number, layer in enumerate(found.layers):
        wide, middle = axes.patches[number], axes.patches[3 + number]
        low, lower, _, upper, high = layer.gains.quantiles
        assert (wide.get_y(), wide.get_y() + wide.get_height()) == pytest.approx((low, high))
        assert (middle.get_y(), middle.get_y() + middle.get_height()) == pytest.approx((lower, upper))
        assert wide.get_x() + wide.get_width() / 2 == pytest.approx(number)
    whiskers, medians = axes.collections[:2]
    ends = [tuple(segment[:, 1]) for segment in whiskers.get_segments()]
    assert ends == [(layer.gains.minimum, layer.gains.maximum) for layer in found.layers]
    assert [segment[0, 1] for segment in medians.get_segments()] == [layer.gains.quantiles[2] for layer in found.layers]
    assert any(line.get_ydata()[0] == 1 for line in axes.lines), "a line at 1"


def test_panels_share_one_scale_that_holds_all():
    figure = draw_gains(statistics(blocks(4), special={f"model.layers.2.{DOWN}": 7.0}))
    assert {axes.get_ylim() for axes in figure.axes} == {figure.axes[0].get_ylim()}
    assert figure.axes[0].get_ylim()[1] > 8


@pytest.mark.parametrize("special", [-1.0, -1.4])
def test_dead_and_negative_gains_have_a_triangle_and_a_count(special):
    figure = draw_gains(statistics(blocks(4), special={f"model.layers.2.{DOWN}": special}))
    marked = [axes.collections[-1].get_offsets()[:, 0].tolist() for axes in figure.axes]
    assert marked == [[], [2.0]]
    (legend,) = figure.legends
    assert "has dead or negative gains" in [text.get_text() for text in legend.get_texts()]
    assert ("1 dead" if special == -1 else "1 negative") in figure.get_suptitle()
    quiet = draw_gains(statistics(blocks(4)))
    assert "has dead or negative gains" not in [text.get_text() for text in quiet.legends[0].get_texts()]
    assert "0 dead (below 0.001), 0 negative" in quiet.get_suptitle()


def test_the_headline_has_the_title_and_the_figures():
    found = statistics(blocks(2))
    assert draw_gains(found, title="a model").get_suptitle().startswith("a model\n64 gains of 4 layers: ")
    assert draw_gains(found).get_suptitle().startswith("64 gains of 4 layers: ")
    assert f"{found.overall.rms_from_one:.2g} from 1 (rms)" in draw_gains(found).get_suptitle()


@pytest.mark.parametrize(
    ("names", "panels", "labels"),
    [
        (blocks(2, ["attn.c_proj", "mlp.c_proj"], "h"), ["attn.c_proj", "mlp.c_proj"], ["0", "1"]),
        (blocks(2, [f"mlp.experts.{e}.w2" for e in range(3)]), ["mlp.experts.*.w2"], ["0", "1"]),
        (
            blocks(2, [OUT], "encoder") + blocks(2, [OUT], "decoder"),
            [f"encoder.*.{OUT}", f"decoder.*.{OUT}"],
            ["0", "1"],
        ),
        (["0", "2"], ["*"], ["0", "2"]),
        (["first", "second"], ["first", "second"], ["0"]),
        ([f"block_{number}" for number in range(9)], ["all layers"], [str(number) for number in range(9)]),
    ],
    ids=["gpt2", "experts", "encoder-decoder", "sequential", "names", "many"],
)
def test_layers_are_grouped_by_what_their_names_share(names, panels, labels):
    figure = draw_gains(statistics(names))
    assert [title.partition("  (")[0] for title in titles(figure)] == panels
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == labels
    assert sum(len(axes.patches) for axes in figure.axes) == 2 * len(names)
    assert_legible(figure)


def test_layers_of_several_sizes_and_sides():
    deltas = {"l.0.a": torch.zeros(4), "l.1.a": torch.zeros(6)}
    file = GainFile(deltas, {"l.0.a": "output", "l.1.a": "input"}, dict.fromkeys(deltas), "gain", None, "1")
    figure = draw_gains(gain_statistics(file))
    assert titles(figure) == ["a  (2 layers, input and output side)"]
    assert_legible(figure)


def test_png_and_svg_by_suffix(tmp_path):
    found = statistics(blocks(2))
    write_gain_plot(found, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    write_gain_plot(found, str(tmp_path / "gains.svg"))
    assert xml.etree.ElementTree.parse(tmp_path / "gains.svg").getroot().tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {"gains.png", "gains.svg"}


def test_an_error_leaves_an_earlier_plot_and_nothing_else(tmp_path):
    path = tmp_path / "gains.png"
    path.write_text("earlier")
    diverged = statistics(blocks(1), special={f"model.layers.0.{DOWN}": float("nan")})
    with pytest.raises(ValueError, match=rf"cannot plot the gains of model.layers.0.{DOWN}: they are not finite"):
        write_gain_plot(diverged, path)
    for name, shown in {"gains.jpg": ".jpg", "gains": "nothing"}.items():
        with pytest.raises(ValueError, match=rf"{name} ends in {shown}: name a file that ends in .png or .svg"):
            write_gain_plot(statistics(blocks(1)), tmp_path / name)
    assert path.read_text() == "earlier"
    assert [found.name for found in tmp_path.iterdir()] == ["gains.png"]


def test_matplotlib_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "gain-ops\[cli\]"'):
        write_gain_plot(statistics(blocks(1)), tmp_path / "gains.png")
    assert not list(tmp_path.iterdir())

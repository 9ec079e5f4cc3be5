"""combine_gains(): the two rules against exact arithmetic, what is refused, and what becomes of the header."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gain_ops import combine_gains, write_gains
from gain_ops.gainfiles.file import GainFile, GainFileError, read_gains

FLOATS = st.floats(-0.75, 3.0, width=32)
# no denormals: a delta of 1e-40 has no full set of digits to keep
DELTAS = st.lists(FLOATS.map(lambda x: x if abs(x) > 1e-30 else 0.0), min_size=3, max_size=3)
WEIGHTS = st.lists(st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 1.7, 3.0]), min_size=1, max_size=4)


def gains(values, side="output", base="f0", targets="gain", base_model="tiny"):
    """A gain file with the given deltas a layer."""
    deltas = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    return GainFile(deltas, dict.fromkeys(deltas, side), dict.fromkeys(deltas, base), targets, base_model, "0")


@given(st.data(), WEIGHTS)
def test_powers_are_rounded_once(data, weights):
    files = [gains({"a": data.draw(DELTAS)}) for _ in weights]
    found = combine_gains(files, weights).deltas["a"]
    with localcontext(prec=60):
        for i, got in enumerate(found.tolist()):
            factors = [1 + Decimal(file.deltas["a"][i].item()) for file in files]
            terms = [Decimal(weight) * factor.ln() for weight, factor in zip(weights, factors, strict=True)]
            exact = float(sum(terms).exp() - 1)
            # float64 sums the logarithms, so where they cancel it shows there
            assert abs(got - exact) <= 2**-24 * 1.0001 * abs(exact) + 2**-50 * float(sum(map(abs, terms)))


@given(st.data(), WEIGHTS)
def test_mean_is_rounded_once(data, weights):
    files = [gains({"a": data.draw(DELTAS)}) for _ in weights]
    found = combine_gains(files, weights, how="mean").deltas["a"]
    for i, got in enumerate(found.tolist()):
        terms = [Fraction(w) * Fraction(file.deltas["a"][i].item()) for file, w in zip(files, weights, strict=True)]
        size = float(sum(map(abs, terms)))  # float64 sums these, so where they cancel it shows there
        assert abs(got - float(sum(terms))) <= 2**-24 * 1.0001 * abs(float(sum(terms))) + 2**-50 * size


@pytest.mark.parametrize("how", ["powers", "mean"])
def test_one_file_as_it_is(how):
    values = torch.randn(1000) * 10 ** -(torch.rand(1000) * 12)
    values[:4] = torch.tensor([0.0, -1.0, -1.5, 1e-38])
    combined = combine_gains([gains({"a": values.tolist()})], [1], how)
    assert torch.equal(combined.deltas["a"], values)
    assert combined.deltas["a"].dtype == torch.float32


def test_powers_of_gains_that_are_not_positive():
    files = [gains({"a": [-3.0, -3.0, -1.0, -1.0]}), gains({"a": [1.0, -1.5, 1.0, -1.0]})]
    # gains -2, -2, 0, 0 and 2, -0.5, 2, 0
    assert combine_gains(files, (1, 1)).deltas["a"].tolist() == [-5.0, 0.0, -1.0, -1.0]
    assert combine_gains(files, (3, 2)).deltas["a"].tolist() == pytest.approx([-33.0, -3.0, -1.0, -1.0])
    assert combine_gains(files, (0, 0)).deltas["a"].tolist() == [0.0] * 4, "0 ** 0 is 1"
    assert combine_gains(files[:1], (0.0,)).deltas["a"].shape == (4,)
    with pytest.raises(
        GainFileError, match=r"^a has a gain below zero in file 1, which has no power 0.5: give it an integer"
    ):
        combine_gains(files, (0.5, 1))
    with pytest.raises(GainFileError, match="a has a gain below zero in file 2"):
        combine_gains(files, (1, -0.5))
    with pytest.raises(GainFileError, match="a has a gain of zero in file 2, which has no power -1"):
        combine_gains([gains({"a": [1.0]}), gains({"a": [-1.0]})], (1, -1))
    assert combine_gains([gains({"a": [-3.0]})], (-1,)).deltas["a"].tolist() == [-1.5]
    assert combine_gains(files, (0.5, 0.5), how="mean").deltas["a"].tolist() == [-1.0, -2.25, 0.0, -1.0]


def test_mean_is_not_normalised():
    assert combine_gains([gains({"a": [0.5]}), gains({"a": [0.25]})], (2, 2), "mean").deltas["a"].tolist() == [1.5]


@pytest.mark.parametrize(("how", "weights"), [("powers", (1, 1, 1)), ("mean", (1 / 3, 1 / 3, 1 / 3))])
def test_weights_that_are_not_given(how, weights):
    files = [gains({"a": [0.5, -0.25]}), gains({"a": [0.25, 2.0]}), gains({"a": [3.0, 0.125]})]
    assert torch.equal(combine_gains(files, how=how).deltas["a"], combine_gains(files, weights, how).deltas["a"])


def test_there_and_back():
    values = gains({"a": (torch.rand(500) - 0.5).tolist()})
    assert combine_gains([values, values], (1, -1)).deltas["a"].eq(0).all()
    twice = combine_gains([values], (2,))
    torch.testing.assert_close(combine_gains([twice], (0.5,)).deltas["a"], values.deltas["a"], rtol=1e-6, atol=1e-7)


def test_a_layer_that_a_file_lacks_has_gain_one():
    files = [gains({"a": [1.25], "c": [3.0]}), gains({"b": [0.265625]})]
    combined = combine_gains(files, (0.5, 0.5))
    assert list(combined.deltas) == list(combined.sides) == ["a", "c", "b"]
    assert [delta.item() for delta in combined.deltas.values()] == [0.5, 1.0, 0.125]
    combined = combine_gains(files, (0.5, 0.5), how="mean")
    assert [delta.item() for delta in combined.deltas.values()] == [0.625, 1.5, 0.1328125]


def test_paths_and_the_written_file(tmp_path):
    first, second = tmp_path / "first.safetensors", str(tmp_path / "second.safetensors")
    write_gains(gains({"a": [0.5], "b": [1.0]}), first)
    write_gains(gains({"b": [0.5]}), second)
    combined = combine_gains([first, second, gains({"a": [1.0]})], (1, 1, 1))
    write_gains(combined, first)
    read = read_gains(first)
    assert {name: delta.tolist() for name, delta in read.deltas.items()} == {"a": [2.0], "b": [2.0]}
    assert (read.sides, read.fingerprints) == (combined.sides, combined.fingerprints)
    squared = combine_gains([second, second], (1, 1))
    assert squared.deltas["b"].tolist() == [1.25]


def test_the_header():
    combined = combine_gains([gains({"a": [0.5]}, base=None, base_model=None), gains({"a": [0.5], "b": [1.0]})], (1, 1))
    assert combined.fingerprints == {"a": "f0", "b": "f0"}
    assert (combined.targets, combined.base_model) == ("gain", "tiny")
    other = combine_gains([gains({"a": [0.5]}), gains({"b": [0.5]}, targets=("b",), base_model="other")], (1, 1))
    assert (other.targets, other.base_model) == (("a", "b"), None)


def test_files_of_other_weights():
    files = [gains({"a": [0.5], "b": [0.5]}), gains({"a": [0.5], "b": [0.5]}, base="f1", base_model="other")]
    files[1].fingerprints["b"] = "f0"
    with pytest.raises(
        GainFileError, match=r"different weights \(base models: file 1: tiny, file 2: other\).* 1 of 2 layers, a\. "
    ):
        combine_gains(files, (1, 1))
    combined = combine_gains(files, (1, 1), check_base=False)
    assert combined.fingerprints == {"a": None, "b": "f0"}
    assert combined.deltas["a"].tolist() == [1.25]


@pytest.mark.parametrize("how", ["powers", "mean"])
def test_files_that_do_not_fit_together(tmp_path, how):
    path = tmp_path / "input.safetensors"
    write_gains(gains({"b": [0.5]}, side="input"), path)
    with pytest.raises(
        GainFileError,
        match=r"b has its gain on the output side in file 1 and on the input side in file 2 \(.*input.safe",
    ):
        combine_gains([gains({"a": [0.5], "b": [0.5]}), path], (1, 1), how)
    with pytest.raises(GainFileError, match="a has 2 gains in file 1 and 3 in file 3: they are of different models"):
        combine_gains([gains({"a": [1.0, 1.0]}), gains({"b": [1.0]}), gains({"a": [1.0] * 3})], (1, 1, 1), how)


@pytest.mark.parametrize(
    ("how", "weights"),
    [("powers", (1000, 1)), ("mean", (1e38, 1e38)), ("mean", (1e300, 1e300)), ("powers", (1e308, -1e308))],
)
def test_what_float32_cannot_hold(how, weights):
    files = [gains({"a": [0.0, 9.0]}), gains({"a": [0.0, 9.0]})]
    with pytest.raises(GainFileError, match="the combined gain of a does not fit into float32: use smaller weights"):
        combine_gains(files, weights, how)


def test_bad_arguments(tmp_path):
    one = gains({"a": [0.5]})
    with pytest.raises(ValueError, match="how='sum' is not one of 'powers', 'mean'"):
        combine_gains([one], [1], "sum")
    for files, weights in (([], []), ([one], []), ([one], [1, 2])):
        with pytest.raises(ValueError, match=f"got {len(files)} files, {len(weights)} weights"):
            combine_gains(files, weights)
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"every weight must be finite, got 1, {weight}"):
            combine_gains([one, one], [1, weight])
    with pytest.raises(FileNotFoundError):
        combine_gains([tmp_path / "none"], [1])
    (tmp_path / "text").write_text("text")
    with pytest.raises(GainFileError, match="text is not a complete safetensors file"):
        combine_gains([tmp_path / "text"], [1])

"""The figures of gains are those of their definitions, of a model as of its file."""

import dataclasses
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gain_ops
from gain_ops.gainfiles.file import GainFile, read_gains
from gain_ops.models.record import gained_modules
from gain_ops.models.statistics import DEAD_BELOW, QUANTILES, gain_statistics

FLOATS = st.floats(-8, 8, width=32)


def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    gain_ops.apply(model, ["0", "1"])
    with torch.no_grad():
        for layer in gained_modules(model).values():
            layer.delta.copy_(torch.randn(layer.delta.shape) * 0.1)
    return model


def gain_file(*deltas):
    named = {f"layers.{number}": torch.tensor(delta) for number, delta in enumerate(deltas)}
    return GainFile(named, dict.fromkeys(named, "output"), dict.fromkeys(named), "gain", None, "1")


def test_figures_by_hand():
    found = gain_statistics(gain_file([0.0, -1.0, 1.0, -1.5, 0.5]))
    (layer,) = found.layers
    assert (layer.name, layer.side, found.dead_below) == ("layers.0", "output", DEAD_BELOW)
    gains = layer.gains
    assert (gains.count, gains.minimum, gains.maximum, gains.mean) == (5, -0.5, 2.0, 0.8)
    assert gains.rms_from_one == math.sqrt((1 + 1 + 2.25 + 0.25) / 5)
    assert (gains.largest_from_one, gains.dead, gains.negative) == (1.5, 1, 1)
    assert gains.quantiles == pytest.approx((-0.4, 0.0, 1.0, 1.5, 1.9))
    assert found.overall == gains
    with pytest.raises(dataclasses.FrozenInstanceError):
        gains.count = 0


@given(st.lists(st.lists(FLOATS, min_size=1, max_size=30), min_size=1, max_size=4), st.floats(1e-6, 2.0))
def test_figures_are_their_definitions(deltas, dead_below):
    found = gain_statistics(gain_file(*deltas), dead_below=dead_below)
    together = [delta for layer in deltas for delta in layer]
    for values, got in [*zip(deltas, (layer.gains for layer in found.layers), strict=True), (together, found.overall)]:
        gains = sorted(1 + value for value in values)
        assert got.count == len(gains)
        assert (got.minimum, got.maximum) == (gains[0], gains[-1])
        assert got.mean == pytest.approx(statistics.fmean(gains), abs=1e-12)
        assert got.rms_from_one == pytest.approx(math.sqrt(statistics.fmean(v * v for v in values)), rel=1e-12)
        assert got.largest_from_one == max(map(abs, values))
        assert got.dead == sum(abs(gain) < dead_below for gain in gains)
        assert got.negative == sum(gain < 0 for gain in gains)
        for share, quantile in zip(QUANTILES, got.quantiles, strict=True):
            below, part = divmod(share * (len(gains) - 1), 1)
            low, high = gains[int(below)], gains[min(int(below) + 1, len(gains) - 1)]
            assert quantile == pytest.approx(low + part * (high - low), abs=1e-9)


@pytest.mark.parametrize(("gain", "dead"), [(0.0, 1), (0.99e-3, 1), (-0.99e-3, 1), (1.01e-3, 0), (-1.01e-3, 0)])
def test_dead_is_below_the_threshold_in_absolute_value(gain, dead):
    file = gain_file([gain - 1])
    assert gain_statistics(file).overall.dead == dead
    assert gain_statistics(file, dead_below=2e-3).overall.dead == 1


def test_a_model_and_its_file_agree(tmp_path):
    found = gain_statistics(trained := model())
    gain_ops.save_gains(trained, tmp_path / "gains.safetensors")
    assert found == gain_statistics(read_gains(tmp_path / "gains.safetensors"))
    assert [layer.name for layer in found.layers] == ["0", "1"]
    assert [layer.gains.count for layer in found.layers] == [6, 3]
    assert found.overall.count == 9


def test_each_layer_has_its_side():
    mixed = nn.Sequential(
        gain_ops.GainLinear(4, 6, side="input"),
        gain_ops.GainLinear(6, 3, side="output"),
    )
    assert [(layer.side, layer.gains.count) for layer in gain_statistics(mixed).layers] == [("input", 4), ("output", 3)]


def test_half_precision_deltas_are_read_as_they_are():
    layer = gain_ops.GainLinear(4, 2)
    layer.delta.data = torch.tensor([0.1, -0.3], dtype=torch.bfloat16)
    assert gain_statistics(layer).overall.maximum == 1 + layer.delta[0].item()


def test_nothing_is_changed():
    trained = model()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    gain_statistics(trained)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("error")
def test_a_diverged_training_has_figures_that_are_not_finite(bad):
    found = gain_statistics(gain_file([bad, bad, 0.5], [0.5]))
    assert not math.isfinite(found.layers[0].gains.rms_from_one)
    assert not math.isfinite(found.overall.rms_from_one)
    assert found.layers[1].gains.rms_from_one == 0.5


def test_sharded_deltas_are_gathered():
    from torch.distributed.fsdp import fully_shard

    plain, sharded = model(), model()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        found = gain_statistics(sharded)
    finally:
        torch.distributed.destroy_process_group()
    assert found == gain_statistics(plain)


def test_what_has_no_gains_to_read_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no gains: put them on with gain_ops.apply\(\)"):
        gain_statistics(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"cannot read the gains of 0: its delta is on the meta device"):
        gain_statistics(nn.Sequential(gain_ops.GainLinear(4, 2, device="meta")))
    partitioned = nn.Sequential(gain_ops.GainLinear(4, 2))
    partitioned[0].delta.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"partitioned: ask inside deepspeed.zero.GatheredParameters"):
        gain_statistics(partitioned)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"dead_below is .*give a number above 0, such as 0.001"):
            gain_statistics(gain_file([0.0]), dead_below=bad)

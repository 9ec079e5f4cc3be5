"""transformers' float8 formats: quantised and read back by its own conversions, and fbgemm's by the formula."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.testing import assert_no_worse_than_torch

from support.scheme_files import absorb, gains_of, rounded_once, same

finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")

few = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALES = ["float", "ue8m0"]


def config_of(size: list[int] | None, scale_fmt: str = "float") -> dict:
    return {"quant_method": "fp8", "weight_block_size": size, "scale_fmt": scale_fmt, "activation_scheme": "dynamic"}


def tensors_of(weight: Tensor, config: dict) -> dict[str, Tensor]:
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(**config))
    parts = finegrained.Fp8Quantize(quantizer).convert({"o_proj.weight": weight})
    return {name.removeprefix("o_proj."): tensor for name, tensor in parts.items()}


def read(tensors: dict[str, Tensor]) -> Tensor:
    converter = finegrained.Fp8Dequantize(None)
    return converter._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32).double()


def gained(weight: Tensor, gain: Tensor, side: str) -> Tensor:
    return weight * (gain.double()[:, None] if side == "output" else gain.double())


@pytest.mark.parametrize("scale_fmt", SCALES)
@pytest.mark.parametrize("side", ["output", "input"])
def test_blocks_are_refused_or_requantised(scale_fmt, side, tmp_path):
    config = config_of([8, 16], scale_fmt)
    tensors = tensors_of(torch.randn(24, 64), config)
    gain = torch.rand(24 if side == "output" else 64) + 0.5
    reason = "the gain to inputs" if side == "input" else "8 bits" if scale_fmt == "ue8m0" else "serves several rows"
    with pytest.raises(CheckpointError, match=rf"{reason}.*--requantize"):
        absorb(tmp_path, tensors, config, gain, side)
    absorbed = absorb(tmp_path, tensors, config, gain, side, requantize=True)
    exact = gained(read(tensors), gain, side)
    result = read(absorbed.tensors)
    assert (result - exact).abs().max().item() == pytest.approx(absorbed.roundings["weight"].absolute, rel=1e-5)
    assert_no_worse_than_torch(side, result, read(tensors_of(exact.float(), config)), exact)
    unchanged = absorb(tmp_path, tensors, config, torch.ones_like(gain), side, requantize=True)
    assert all(same(unchanged.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("scale_fmt", SCALES)
@few
@given(data=st.data(), side=st.sampled_from(["output", "input"]))
def test_any_gains(scale_fmt, data, side, tmp_path):
    config = config_of([4, 8], scale_fmt)
    outputs, inputs = 4 * data.draw(st.integers(1, 3)), 8 * data.draw(st.integers(1, 3))
    tensors = tensors_of(torch.randn(outputs, inputs), config)
    gain = gains_of(data, outputs if side == "output" else inputs)
    absorbed = absorb(tmp_path, tensors, config, gain, side, requantize=True)
    exact = gained(read(tensors), gain, side)
    step = absorbed.tensors["weight_scale_inv"].float().double().repeat_interleave(4, 0).repeat_interleave(8, 1)
    bound = torch.maximum(exact.abs() * 2.0**-4, step * 2.0**-10) * (1 + 1e-5)
    assert ((read(absorbed.tensors) - exact).abs() <= bound).all()


def test_ragged_blocks_are_those_of_the_config(tmp_path):
    config = config_of([8, 16])
    whole = tensors_of(torch.randn(16, 32), config)
    tensors = whole | {"weight": whole["weight"][:13, :27]}
    gain = torch.rand(13) + 0.5
    absorbed = absorb(tmp_path, tensors, config, gain, requantize=True)
    exact = gained(read(whole)[:13, :27], gain, "output")
    padded = torch.zeros(16, 32).to(torch.float8_e4m3fn)
    padded[:13, :27] = absorbed.tensors["weight"]
    error = (read(absorbed.tensors | {"weight": padded})[:13, :27] - exact).abs()
    assert error.max().item() == pytest.approx(absorbed.roundings["weight"].absolute, rel=1e-5)
    with pytest.raises(CheckpointError, match=r"has scales \[2, 2\] where its weight needs \[4, 2\]"):
        absorb(tmp_path, tensors, config_of([4, 16]), gain, requantize=True)


def test_one_scale_for_the_whole_weight(tmp_path):
    config = config_of(None)
    tensors = tensors_of(torch.randn(8, 16), config)
    tensors["weight_scale_inv"] = tensors["weight_scale_inv"].reshape(())
    tensors["activation_scale"] = torch.tensor(0.5)
    gain = torch.rand(8) + 0.5
    with pytest.raises(CheckpointError, match="serves several rows"):
        absorb(tmp_path, tensors, config, gain)
    absorbed = absorb(tmp_path, tensors, config, gain, requantize=True)
    assert absorbed.tensors["weight_scale_inv"].shape == ()
    exact = gained(read(tensors), gain, "output")
    error = (read(absorbed.tensors) - exact).abs()
    step = absorbed.tensors["weight_scale_inv"].double()
    assert (error <= torch.maximum(exact.abs() * 2.0**-4, step * 2.0**-10) * (1 + 1e-5)).all()


def test_a_scale_under_gains_of_zero_stays(tmp_path):
    config = config_of([8, 16])
    tensors = tensors_of(torch.randn(8, 32), config)
    absorbed = absorb(tmp_path, tensors, config, torch.zeros(8), requantize=True)
    assert same(absorbed.tensors["weight_scale_inv"], tensors["weight_scale_inv"])
    assert not read(absorbed.tensors).any()


def test_mxfp8(tmp_path):
    """Blocks of [1, 32] and exponents in bytes; a gain that is no power of two is rounded in the weights."""
    config = config_of([1, 32]) | {"quant_method": "mxfp8"}
    tensors = tensors_of(torch.randn(8, 64), config_of([1, 32], "ue8m0"))
    tensors["weight_scale_inv"] = tensors["weight_scale_inv"].view(torch.uint8)
    gain = torch.rand(8) + 0.5
    with pytest.raises(CheckpointError, match="8 bits"):
        absorb(tmp_path, tensors, config, gain)
    absorbed = absorb(tmp_path, tensors, config, gain, requantize=True)
    exact = gained(read(tensors), gain, "output")
    assert ((read(absorbed.tensors) - exact).abs() <= exact.abs() * 2.0**-4 + 1e-6).all()
    # the scales are as small as float8 allows: the largest code of each is in the upper half
    assert (absorbed.tensors["weight"].float().abs().unflatten(1, (2, 32)).amax(-1) >= 224).all()
    doubled = absorb(tmp_path, tensors, config, torch.full((8,), 2.0), requantize=True)
    assert torch.equal(read(doubled.tensors), 2 * read(tensors))


@few
@given(data=st.data())
def test_fbgemms_scales_take_row_gains(data, tmp_path):
    outputs, inputs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    tensors = {"weight": torch.randn(outputs, inputs).to(torch.float8_e4m3fn), "weight_scale": torch.rand(outputs, 1)}
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}, gain)
    assert absorbed.roundings.keys() == {"weight_scale"}
    assert same(absorbed.tensors["weight_scale"], rounded_once(tensors["weight_scale"], gain[:, None]))


def test_refusals(tmp_path):
    config = config_of([8, 16])
    tensors = tensors_of(torch.randn(8, 32), config)
    with pytest.raises(CheckpointError, match="takes 8 gains on the output side, the file has 3"):
        absorb(tmp_path, tensors, config, torch.rand(3))
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, {"weight": tensors["weight"]}, config, torch.rand(8))
    with pytest.raises(CheckpointError, match="an unknown way"):  # fp4, two in a byte
        absorb(tmp_path, tensors | {"weight": torch.zeros(8, 16, dtype=torch.int8)}, config, torch.rand(8))
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, tensors | {"weight": torch.zeros(2, 8, 32).to(torch.float8_e4m3fn)}, config, torch.rand(8))
    with pytest.raises(CheckpointError, match="weight_scale_inv overflows with its gain in float32"):
        absorb(
            tmp_path,
            tensors | {"weight_scale_inv": torch.full((1, 2), 2.0)},
            config,
            torch.full((8,), 3e38),
            requantize=True,
        )
    broken = tensors["weight"].clone()
    broken.view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(CheckpointError, match=r"o_proj\.weight is not finite to begin with"):
        absorb(tmp_path, tensors | {"weight": broken}, config, torch.rand(8), requantize=True)

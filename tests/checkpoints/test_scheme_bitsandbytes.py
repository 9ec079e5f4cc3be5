"""bitsandbytes on a CPU: quantised and read back by its own functions."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.testing import assert_no_worse_than_torch

from support.scheme_files import TINY, absorb, gains_of, rounded_once, same

pytest.importorskip("bitsandbytes")

from bitsandbytes import functional

CONFIG = {"quant_method": "bitsandbytes"}
few = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def int8(weight: Tensor) -> dict[str, Tensor]:
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def read_int8(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["weight"].double() * tensors["SCB"].double()[:, None] / 127


def four_bits(weight: Tensor, kind: str, *, size: int = 32, nested: bool = False) -> dict[str, Tensor]:
    packed, state = functional.quantize_4bit(weight, blocksize=size, quant_type=kind, compress_statistics=nested)
    return {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}


def read_four_bits(tensors: dict[str, Tensor], device: str = "cpu") -> Tensor:
    parts = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
    state = functional.QuantState.from_dict(parts, device=torch.device(device))
    return functional.dequantize_4bit(tensors["weight"], state).double()


@few
@given(data=st.data())
def test_int8_takes_row_gains_in_its_scales(data, tmp_path):
    outputs, inputs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    tensors = int8(torch.randn(outputs, inputs))
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain)
    assert absorbed.roundings.keys() == {"SCB"}
    assert same(absorbed.tensors["SCB"], rounded_once(tensors["SCB"], gain))
    read = functional.int8_vectorwise_dequant(absorbed.tensors["weight"], absorbed.tensors["SCB"])
    exact = functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"]).double() * gain.double()[:, None]
    assert ((read.double() - exact).abs() <= exact.abs() * 4 * torch.finfo(torch.float32).eps + TINY).all()


@few
@given(data=st.data())
def test_int8_is_requantised_for_gains_on_inputs(data, tmp_path):
    outputs, inputs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    tensors = int8(torch.randn(outputs, inputs))
    gain = gains_of(data, inputs)
    with pytest.raises(CheckpointError, match=r"belong to outputs, and the gain to inputs.*--requantize"):
        absorb(tmp_path, tensors, CONFIG, gain, "input")
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, "input", requantize=True)
    exact = read_int8(tensors) * gain.double()
    error = (read_int8(absorbed.tensors) - exact).abs()
    assert error.max().item() == pytest.approx(absorbed.roundings["weight"].absolute, rel=1e-9)
    assert (error <= absorbed.tensors["SCB"].double()[:, None] / 254 * (1 + 1e-5)).all()


def test_int8_requantised_is_no_worse_than_quantising_once_more(tmp_path):
    tensors = int8(torch.randn(32, 64))
    gain = torch.rand(64) + 0.5
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, "input", requantize=True)
    exact = read_int8(tensors) * gain.double()
    again = int8(exact.float())
    assert_no_worse_than_torch("int8", read_int8(absorbed.tensors), read_int8(again), exact)
    unchanged = absorb(tmp_path, tensors, CONFIG, torch.ones(64), "input", requantize=True)
    assert all(same(unchanged.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@few
@given(data=st.data())
def test_four_bits_take_row_gains_in_absmax(kind, data, tmp_path):
    outputs, inputs = data.draw(st.integers(1, 9)), 32 * data.draw(st.integers(1, 3))
    tensors = four_bits(torch.randn(outputs, inputs), kind)
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain)
    assert absorbed.roundings.keys() == {"weight.absmax"}
    each = gain.repeat_interleave(inputs // 32)
    assert same(absorbed.tensors["weight.absmax"], rounded_once(tensors["weight.absmax"], each))
    exact = read_four_bits(tensors) * gain.double()[:, None]
    error = (read_four_bits(absorbed.tensors) - exact).abs()
    assert (error <= exact.abs() * 2 * torch.finfo(torch.float32).eps + TINY).all()


def test_refusals(tmp_path):
    weight = torch.randn(8, 64)
    nested = four_bits(weight, "nf4", nested=True)
    for requantize in (False, True):
        with pytest.raises(CheckpointError, match="double quantisation"):
            absorb(tmp_path, nested, CONFIG, torch.rand(8), requantize=requantize)
        with pytest.raises(CheckpointError, match="belong to runs of a row, and the gain to inputs"):
            absorb(tmp_path, four_bits(weight, "nf4"), CONFIG, torch.rand(64), "input", requantize=requantize)
    with pytest.raises(CheckpointError, match="its blocks of 64 do not end with rows of 96"):
        absorb(tmp_path, four_bits(torch.randn(8, 96), "nf4", size=64), CONFIG, torch.rand(8))
    with pytest.raises(CheckpointError, match="takes 8 gains on the output side, the file has 9"):
        absorb(tmp_path, four_bits(weight, "nf4"), CONFIG, torch.rand(9))
    with pytest.raises(CheckpointError, match="takes 8 gains on the output side, the file has 9"):
        absorb(tmp_path, int8(weight), CONFIG, torch.rand(9))
    with pytest.raises(CheckpointError, match="SCB overflows with its gain in float32"):
        absorb(tmp_path, int8(weight), CONFIG, torch.full((8,), 3e38))
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, {"weight": int8(weight)["weight"]}, CONFIG, torch.rand(8))
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, int8(weight) | {"SCB": torch.rand(7)}, CONFIG, torch.rand(8))
    short = four_bits(weight, "nf4") | {"weight.absmax": torch.rand(3)}
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, short, CONFIG, torch.rand(8))
    stateless = {name: tensor for name, tensor in four_bits(weight, "nf4").items() if "quant_state" not in name}
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, stateless, CONFIG, torch.rand(8))


def test_a_config_from_before_there_was_a_quant_method(tmp_path):
    tensors, gain = int8(torch.randn(4, 8)), torch.rand(4)
    absorbed = absorb(tmp_path, tensors, {"load_in_8bit": True}, gain)
    assert same(absorbed.tensors["SCB"], rounded_once(tensors["SCB"], gain))

"""GPTQ and AWQ, packed and read here number by number as their formats are written down: their libraries are not needed."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.testing import assert_no_worse_than_torch

from support.scheme_files import absorb, gains_of, rounded_once, same

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Format:
    name: str
    bits: int
    config: dict[str, Any] = field(default_factory=dict)
    act_order: bool = False
    symmetric: bool = False

    @property
    def method(self) -> str:
        return self.name.split("_")[0]


FORMATS = {
    "gptq 4": Format("gptq", 4),
    "gptq 8": Format("gptq", 8, {"checkpoint_format": "gptq"}),
    "gptq 2": Format("gptq", 2),
    "gptq 4, symmetric": Format("gptq", 4, symmetric=True),
    "gptq 4, act order": Format("gptq", 4, act_order=True),
    "gptq_v2 4": Format("gptq_v2", 4, {"checkpoint_format": "gptq_v2"}),
    "awq": Format("awq", 4, {"version": "GEMM", "zero_point": True}),
    "awq, as transformers 5 names it": Format("awq", 4, {"format": "gemm"}),
}


class Quantised:
    """W = scales[g, o] * (q[i, o] - z[g, o]), in groups of 8 inputs."""

    def __init__(self, how: Format, weight: Tensor) -> None:
        self.how = how
        self.outputs, self.inputs = weight.shape
        self.config = {"quant_method": how.method, "bits": how.bits, "group_size": 8} | how.config
        self.groups = torch.arange(self.inputs) // 8
        if how.act_order:
            self.groups = self.groups[torch.randperm(self.inputs)]
        count = self.inputs // 8
        scale, zero = torch.empty(count, self.outputs), torch.empty(count, self.outputs)
        largest = 2**how.bits - 1
        for group in range(count):
            part = weight[:, self.groups == group]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if how.symmetric:
                high = torch.maximum(high, -low)
                low = -high
            scale[group] = (high - low) / largest
            zero[group] = (largest + 1) / 2 if how.symmetric else (-low / scale[group]).round().clamp(1, largest)
        scale = scale.half()
        codes = (weight.T / scale[self.groups] + zero[self.groups]).round().clamp(0, largest)
        stored_zero = zero - 1 if how.name == "gptq" else zero
        beside = AWQ_ORDER if how.method == "awq" else list(range(32 // how.bits))
        self.tensors = {
            "qweight": self._pack(codes, beside) if how.method == "awq" else self._pack(codes.T, beside).T,
            "qzeros": self._pack(stored_zero, beside),
            "scales": scale,
        }
        if how.method == "gptq":
            self.tensors["g_idx"] = self.groups.int()

    def _pack(self, values: Tensor, order: list[int]) -> Tensor:
        """Along the last dimension, into int32 words; field f of a word is the value order[f] of it."""
        rows, each = values.numpy().astype(np.uint32), len(order)
        words = np.zeros((rows.shape[0], rows.shape[1] // each), dtype=np.uint32)
        for column in range(words.shape[1]):
            for place, value in enumerate(order):
                words[:, column] |= rows[:, column * each + value] << np.uint32(place * self.how.bits)
        return torch.from_numpy(words.view(np.int32))

    def _unpack(self, words: Tensor, order: list[int]) -> Tensor:
        packed, each = words.contiguous().numpy().view(np.uint32), len(order)
        values = np.zeros((packed.shape[0], packed.shape[1] * each))
        for column in range(packed.shape[1]):
            for place, value in enumerate(order):
                field = packed[:, column] >> np.uint32(place * self.how.bits) & np.uint32(2**self.how.bits - 1)
                values[:, column * each + value] = field
        return torch.from_numpy(values)

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight, [outputs, inputs] in float64."""
        if self.how.method == "awq":
            codes, zero = self._unpack(tensors["qweight"], AWQ_ORDER), self._unpack(tensors["qzeros"], AWQ_ORDER)
        else:
            order = list(range(32 // self.how.bits))
            codes, zero = self._unpack(tensors["qweight"].T, order).T, self._unpack(tensors["qzeros"], order)
            zero = zero + 1 if self.how.name == "gptq" else zero
        return ((codes - zero[self.groups]) * tensors["scales"].double()[self.groups]).T


def test_the_packing_of_the_tests_is_that_of_the_formats():
    """Words by hand: 8 outputs of AWQ in its order, 8 inputs of GPTQ below each other."""
    quantised = Quantised(FORMATS["awq"], torch.randn(8, 8))
    assert quantised._pack(torch.arange(8.0)[None], AWQ_ORDER).item() == 0x75316420
    assert quantised._pack(torch.arange(8.0)[None], list(range(8))).item() == 0x76543210
    assert quantised._unpack(torch.tensor([[0x75316420]], dtype=torch.int32), AWQ_ORDER).tolist() == [list(range(8))]


@pytest.mark.parametrize("name", FORMATS)
@few
@given(data=st.data())
def test_a_row_gain_is_rounded_once_into_the_scales(name, data, tmp_path):
    outputs, inputs = 16 * data.draw(st.integers(1, 2)), 16 * data.draw(st.integers(1, 3))
    quantised = Quantised(FORMATS[name], torch.randn(outputs, inputs))
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, rows=data.draw(st.integers(1, 5)))
    assert absorbed.roundings.keys() == {"scales"}
    assert same(absorbed.tensors["scales"], rounded_once(quantised.tensors["scales"], gain))
    exact = gain.double()[:, None] * quantised.read(quantised.tensors)
    error = (quantised.read(absorbed.tensors) - exact).abs()
    # half a step of the scale's, float16: 2^-11 of it, or 2^-25 near zero, for each of as many codes
    assert (error <= exact.abs() * 2.0**-11 + 2**quantised.how.bits * 2.0**-25).all()


def test_no_scheme_needs_group_indices(tmp_path):
    quantised = Quantised(FORMATS["gptq 4"], torch.randn(16, 16))
    del quantised.tensors["g_idx"]
    gain = torch.rand(16) + 0.5
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain)
    assert same(absorbed.tensors["scales"], rounded_once(quantised.tensors["scales"], gain))
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, "input", requantize=True)
    exact = quantised.read(quantised.tensors) * gain
    assert (quantised.read(absorbed.tensors) - exact).abs().max().item() == absorbed.roundings["qweight"].absolute
    del quantised.config["bits"]
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, quantised.tensors, quantised.config, gain)


@pytest.mark.parametrize("name", FORMATS)
@few
@given(data=st.data())
def test_gains_on_inputs_are_requantised(name, data, tmp_path):
    outputs, inputs = 16 * data.draw(st.integers(1, 2)), 16 * data.draw(st.integers(1, 3))
    quantised = Quantised(FORMATS[name], torch.randn(outputs, inputs))
    gain = gains_of(data, inputs)
    gain = gain if quantised.how.symmetric else gain.abs()
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, "input", requantize=True)
    assert absorbed.roundings.keys() == {"qweight", "scales"}
    exact = quantised.read(quantised.tensors) * gain.double()
    error = (quantised.read(absorbed.tensors) - exact).abs()
    assert error.max().item() == absorbed.roundings["qweight"].absolute
    # the nearest code, and none clipped, but for the half a step by which a float16 scale may be too small
    step = absorbed.tensors["scales"].double()[quantised.groups].T
    slack = exact.abs() * 2.0**-11 + 2**quantised.how.bits * 2.0**-25
    assert (error <= step / 2 + slack).all()


@pytest.mark.parametrize("name", FORMATS)
def test_requantised_is_no_worse_than_quantising_once_more(name, tmp_path):
    quantised = Quantised(FORMATS[name], torch.randn(32, 64))
    gain = torch.rand(64) + 0.5
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, "input", requantize=True)
    exact = quantised.read(quantised.tensors) * gain.double()
    again = Quantised(FORMATS[name], exact.float())
    assert_no_worse_than_torch(name, quantised.read(absorbed.tensors), again.read(again.tensors), exact)


@pytest.mark.parametrize("name", FORMATS)
def test_gains_of_one_change_nothing(name, tmp_path):
    quantised = Quantised(FORMATS[name], torch.randn(16, 32))
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, torch.ones(32), "input", requantize=True)
    assert all(same(absorbed.tensors[key], tensor) for key, tensor in quantised.tensors.items())


@pytest.mark.parametrize("name", ["gptq 4", "awq"])
def test_refusals(name, tmp_path):
    quantised = Quantised(FORMATS[name], torch.randn(16, 32))
    with pytest.raises(CheckpointError, match=r"belong to outputs, and the gain to inputs.*--requantize"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.rand(32), "input")
    with pytest.raises(CheckpointError, match="takes 16 gains on the output side, the file has 32"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.rand(32))
    with pytest.raises(CheckpointError, match="takes 32 gains on the input side, the file has 16"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.rand(16), "input")
    with pytest.raises(CheckpointError, match="scales overflows with its gain in float16"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.full((16,), 1e9))
    with pytest.raises(CheckpointError, match="scales overflows with its gain in float16"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.full((32,), 1e9), "input", requantize=True)
    for other in ({"qweight": quantised.tensors["qweight"].short()}, {"scales": torch.rand(4, 8).half()}):
        with pytest.raises(CheckpointError, match="an unknown way"):
            absorb(tmp_path, quantised.tensors | other, quantised.config, torch.rand(16))
    for missing in ("qweight", "scales"):
        rest = {key: tensor for key, tensor in quantised.tensors.items() if key != missing}
        with pytest.raises(CheckpointError, match="an unknown way"):
            absorb(tmp_path, rest, quantised.config, torch.rand(16))


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("gptq 4", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq 4", {"is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ("gptq 4", {"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas'"),
        ("gptq 4", {"rotation": "hadamard"}, "rotated"),
        ("awq", {"version": "gemv_fast"}, "version 'gemv_fast'"),
        ("awq, as transformers 5 names it", {"format": "gemv"}, "version 'gemv'"),
        ("awq", {"version": "marlin"}, "version 'marlin'"),
        ("awq", {"backend": "llm-awq"}, "laid out for one kernel"),
    ],
)
def test_other_layouts_are_refused(name, config, reason, tmp_path):
    quantised = Quantised(FORMATS[name], torch.randn(16, 32))
    with pytest.raises(CheckpointError, match=reason):
        absorb(tmp_path, quantised.tensors, quantised.config | config, torch.rand(16))


def test_three_bits_take_row_gains_and_no_others(tmp_path):
    """32 inputs in 3 words; only the scales are looked at."""
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (6, 8), dtype=torch.int32),
        "qzeros": torch.zeros(2, 1, dtype=torch.int32),
        "scales": torch.rand(2, 8).half(),
        "g_idx": (torch.arange(64) // 32).int(),
    }
    config, gain = {"quant_method": "gptq", "bits": 3}, torch.randn(8)
    absorbed = absorb(tmp_path, tensors, config, gain)
    assert same(absorbed.tensors["scales"], rounded_once(tensors["scales"], gain))
    with pytest.raises(CheckpointError, match="codes of 3 bits cannot be unpacked"):
        absorb(tmp_path, tensors, config, torch.rand(64), "input", requantize=True)


def test_group_indices_beyond_the_groups_are_refused(tmp_path):
    quantised = Quantised(FORMATS["gptq 4"], torch.randn(16, 32))
    quantised.tensors["g_idx"] = quantised.tensors["g_idx"] + 1
    with pytest.raises(CheckpointError, match=r"has scales \[4, 16\] where its weight needs \[5, 16\]"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.rand(32), "input", requantize=True)

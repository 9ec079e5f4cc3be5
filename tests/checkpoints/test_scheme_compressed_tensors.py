"""compressed-tensors: packed by its own compressors, and read back by them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.testing import assert_no_worse_than_torch

from support.scheme_files import absorb, gains_of, rounded_once, same

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

INT8 = {"num_bits": 8, "strategy": "channel"}
DYNAMIC = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
DYNAMIC_FLOAT = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)

# name: weights, activations
BY_ROWS = {
    "int8": (INT8, DYNAMIC),
    "int8, asymmetric": (INT8 | {"symmetric": False}, DYNAMIC),
    "int8, packed": (INT8, None),
    "int8, packed, asymmetric": (INT8 | {"symmetric": False}, None),
    "int4, in int8": ({"num_bits": 4, "strategy": "channel"}, DYNAMIC),
    "int4, groups": ({"num_bits": 4, "strategy": "group", "group_size": 8}, None),
    "int4, groups, asymmetric": ({"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}, None),
    "int2, groups": ({"num_bits": 2, "strategy": "group", "group_size": 16}, None),
    "int3, groups": ({"num_bits": 3, "strategy": "group", "group_size": 8}, None),
    "float8": ({"num_bits": 8, "type": "float", "strategy": "channel"}, DYNAMIC_FLOAT),
}
COARSE = {
    "int8, one scale": ({"num_bits": 8, "strategy": "tensor"}, DYNAMIC),
    "int8, one scale, asymmetric": ({"num_bits": 8, "strategy": "tensor", "symmetric": False}, DYNAMIC),
    "float8, one scale": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, DYNAMIC_FLOAT),
    "float8, blocks": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 16]},
        DYNAMIC_FLOAT,
    ),
    "mxfp8": (
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        None,
    ),
    "mxfp4": (
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        None,
    ),
    "nvfp4": (
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
        None,
    ),
}
REQUANTISED = [(name, "output") for name in COARSE] + [
    (name, "input") for name in {**BY_ROWS, **COARSE} if name != "int3, groups"
]

few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Quantised:
    """A weight in the library's hands."""

    def __init__(self, name: str, weight: Tensor) -> None:
        args, activations = {**BY_ROWS, **COARSE}[name]
        self.shape = weight.shape
        self.scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**args), input_activations=activations
        )
        self.format = infer_module_format(torch.nn.Linear, self.scheme)
        self.compressor = BaseCompressor.get_value_from_registry(self.format.value)
        self.tensors = self.compressor.compress({"weight": weight, **self._scales(weight)}, self.scheme)
        self.config = {
            "quant_method": "compressed-tensors",
            "format": self.format.value,
            "config_groups": {"group_0": self.scheme.model_dump(mode="json")},
        }

    def _scales(self, weight: Tensor) -> dict[str, Tensor]:
        args, strategy = self.scheme.weights, self.scheme.weights.strategy
        grouped = {
            "tensor": lambda: weight.reshape(1, -1),
            "channel": lambda: weight.unsqueeze(1),
            "block": lambda: weight.unflatten(0, (-1, 4)).unflatten(2, (-1, 16)).transpose(1, 2).flatten(2),
        }.get(strategy, lambda: weight.unflatten(1, (-1, args.group_size)))()
        overall = None
        if strategy == "tensor_group":
            overall = (448 * 6 / weight.abs().max()).float().reshape(1)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, overall)
        tensors = {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
        return tensors if overall is None else tensors | {"weight_global_scale": overall}

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        """What the library makes of it, in float64."""
        tensors = dict(tensors)
        if "weight_global_scale" in tensors:
            # it multiplies in bfloat16 here
            codes = unpack_fp4_from_uint8(tensors["weight_packed"], *self.shape).double().unflatten(1, (-1, 16))
            scale = tensors["weight_scale"].float().double() / tensors["weight_global_scale"].double()
            return (codes * scale.unsqueeze(-1)).flatten(1)
        if tensors["weight_scale"].dtype.itemsize > 1:
            tensors["weight_scale"] = tensors["weight_scale"].double()
        return self.compressor.decompress(tensors, self.scheme)["weight"].double()

    def steps(self, tensors: dict[str, Tensor]) -> Tensor:
        """What a code of one stands for, for every weight."""
        scale = tensors["weight_scale"]
        scale = torch.exp2(scale - 127.0) if scale.dtype == torch.uint8 else scale.float()
        scale = scale.double() / tensors.get("weight_global_scale", torch.ones(1)).double()
        scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
        for dim in (0, 1):
            scale = scale.repeat_interleave(self.shape[dim] // scale.shape[dim], dim)
        return scale


def weight_of(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(outputs, inputs) * torch.rand(outputs, 1).exp()).to(dtype)


@pytest.mark.parametrize("name", BY_ROWS)
@few
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_row_gain_is_rounded_once_into_the_scales(name, dtype, data, tmp_path):
    outputs, inputs = data.draw(st.integers(9, 20)), 16 * data.draw(st.integers(1, 3))
    quantised = Quantised(name, weight_of(outputs, inputs, dtype))
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain)
    assert absorbed.roundings.keys() == {"weight_scale"}
    before, after = quantised.tensors["weight_scale"], absorbed.tensors["weight_scale"]
    assert same(after, rounded_once(before, gain[:, None]))
    exact = gain.double()[:, None] * quantised.read(quantised.tensors)
    smallest = torch.finfo(dtype).smallest_normal
    error = (quantised.read(absorbed.tensors) - exact).abs()
    step = (before.double() * gain[:, None]).abs().clamp_min(smallest) * torch.finfo(dtype).eps
    largest = 2**quantised.scheme.weights.num_bits if quantised.scheme.weights.type == "int" else 448
    assert (error <= step.amax(1, keepdim=True) * largest).all()


def test_the_rounding_is_the_scales(tmp_path):
    quantised = Quantised("int4, groups", weight_of(8, 32, torch.bfloat16))
    gain = torch.rand(8) + 0.5
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain)
    exact = quantised.tensors["weight_scale"].double() * gain.double()[:, None]
    error = (absorbed.tensors["weight_scale"].double() - exact).abs()
    rounding = absorbed.roundings["weight_scale"]
    assert rounding.absolute == error.max().item()
    assert rounding.relative == (error / exact.abs()).max().item()
    assert 0 < rounding.relative <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", COARSE)
def test_what_no_scale_can_take_is_refused(name, tmp_path):
    quantised = Quantised(name, weight_of(8, 64))
    reason = "8 bits" if name.startswith(("nv", "mx")) else "serves several rows"
    with pytest.raises(CheckpointError, match=rf"cannot take its gain exactly: .*{reason}.*--requantize"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.rand(8))


@pytest.mark.parametrize("name", [*BY_ROWS, *COARSE])
def test_gains_on_inputs_are_refused(name, tmp_path):
    quantised = Quantised(name, weight_of(8, 64))
    with pytest.raises(CheckpointError, match=r"belong to outputs, and the gain to inputs.*--requantize"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.rand(64), "input")


@pytest.mark.parametrize(("name", "side"), REQUANTISED)
def test_requantised_is_no_worse_than_quantising_once_more(name, side, tmp_path):
    quantised = Quantised(name, weight_of(16, 64))
    gain = torch.rand(16 if side == "output" else 64) + 0.5
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, side, requantize=True)
    exact = quantised.read(quantised.tensors) * (gain.double()[:, None] if side == "output" else gain.double())
    result = quantised.read(absorbed.tensors)
    again = Quantised(name, exact.float())
    assert_no_worse_than_torch(name, result, again.read(again.tensors), exact)
    codes = next(rounding for tensor, rounding in absorbed.roundings.items() if "scale" not in tensor)
    assert codes.absolute == pytest.approx((result - exact).abs().max().item(), rel=1e-6)


@pytest.mark.parametrize(("name", "side"), REQUANTISED)
@few
@given(data=st.data())
def test_requantised_with_any_gains(name, side, data, tmp_path):
    outputs, inputs = 4 * data.draw(st.integers(3, 5)), 32 * data.draw(st.integers(1, 2))
    quantised = Quantised(name, weight_of(outputs, inputs))
    gain = gains_of(data, outputs if side == "output" else inputs)
    if "asymmetric" in name:
        gain = gain.abs()  # negative ones: the next test
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, side, requantize=True)
    exact = quantised.read(quantised.tensors) * (gain.double()[:, None] if side == "output" else gain.double())
    result = quantised.read(absorbed.tensors)
    assert result.isfinite().all()
    # the library reads E8M0 into bfloat16, which has nothing finer than this near zero
    read = 2.0**-134 if absorbed.tensors["weight_scale"].dtype == torch.uint8 else 0.0
    rounding = max(value.absolute for value in absorbed.roundings.values())
    assert ((result - exact).abs() <= rounding * (1 + 1e-6) + read).all()
    scale = absorbed.tensors["weight_scale"]
    assert (scale.float() >= 0).all()
    # the nearest code everywhere, and nothing is clipped
    step = quantised.steps(absorbed.tensors)
    args = quantised.scheme.weights
    half = 0.5 if args.type == "int" else 2.0**-10 if args.num_bits == 8 else 1.0
    relative = 2.0**-4 if args.type == "float" and args.num_bits == 8 else 0.0
    bound = torch.maximum(half * step, relative * exact.abs()) * (1 + 1e-5) + read
    if name == "nvfp4":
        # a scale may lie between two that float8 has near zero
        bound = bound + 6 * 2.0**-10 / absorbed.tensors["weight_global_scale"].double()
    assert ((result - exact).abs() <= bound).all()


@pytest.mark.parametrize(("name", "side"), REQUANTISED)
def test_gains_of_one_change_nothing(name, side, tmp_path):
    quantised = Quantised(name, weight_of(12, 64))
    ones = torch.ones(12 if side == "output" else 64)
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, ones, side, requantize=True)
    assert torch.equal(quantised.read(absorbed.tensors), quantised.read(quantised.tensors))
    assert all(rounding.absolute == 0 for rounding in absorbed.roundings.values())


def test_nvfp4_keeps_its_codes_where_gains_are_positive(tmp_path):
    quantised = Quantised("nvfp4", weight_of(16, 64))
    gain = torch.rand(16) + 0.5
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, requantize=True)
    before, after = (unpack_fp4_from_uint8(t["weight_packed"], 16, 64) for t in (quantised.tensors, absorbed.tensors))
    assert torch.equal(before, after)
    assert absorbed.roundings["weight_packed"].relative <= 2.0**-4
    # its largest scale was 448, so that a gain above 1 needs another overall scale
    assert absorbed.tensors["weight_global_scale"] < quantised.tensors["weight_global_scale"]


def test_scales_that_overflow_are_refused(tmp_path):
    quantised = Quantised("int8", weight_of(4, 16, torch.float16))
    gain = torch.tensor([1.0, 1e8, 1.0, 1.0])
    with pytest.raises(CheckpointError, match=r"weight_scale overflows with its gain in float16"):
        absorb(tmp_path, quantised.tensors, quantised.config, gain)
    quantised = Quantised("float8, one scale", weight_of(4, 16, torch.float16))
    with pytest.raises(CheckpointError, match=r"weight_scale overflows with its gain in float16"):
        absorb(tmp_path, quantised.tensors, quantised.config, gain, requantize=True)
    quantised = Quantised("mxfp4", weight_of(4, 32))
    with pytest.raises(CheckpointError, match="overflows with its gain in E8M0"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.full((4,), 3e38), requantize=True)


def test_negative_gains_need_room_beside_the_zero_points(tmp_path):
    gain = torch.ones(32)
    gain[5] = -1.0
    lopsided = Quantised("int4, groups, asymmetric", weight_of(12, 32).abs())
    with pytest.raises(CheckpointError, match="would need other zero points"):
        absorb(tmp_path, lopsided.tensors, lopsided.config, gain, "input", requantize=True)
    quantised = Quantised("int4, groups, asymmetric", weight_of(12, 32))
    absorbed = absorb(tmp_path, quantised.tensors, quantised.config, gain, "input", requantize=True)
    error = quantised.read(absorbed.tensors) - quantised.read(quantised.tensors) * gain
    assert (error.abs() <= quantised.steps(absorbed.tensors) / 2 * (1 + 1e-5)).all()


def test_ragged_blocks(tmp_path):
    """10 rows in blocks of 4: the last block has 2."""
    quantised = Quantised("float8, blocks", weight_of(12, 32))
    tensors = {name: tensor[:10] if name == "weight" else tensor for name, tensor in quantised.tensors.items()}
    gain = torch.rand(10) + 0.5
    absorbed = absorb(tmp_path, tensors, quantised.config, gain, requantize=True)
    exact = gain.double()[:, None] * quantised.read(tensors)
    error = (quantised.read(absorbed.tensors) - exact).abs()
    assert error.max().item() == absorbed.roundings["weight"].absolute
    assert (error <= exact.abs() * 2.0**-4 + 1e-4).all()
    without = quantised.config | {"config_groups": {}}
    with pytest.raises(CheckpointError, match=r"has scales \[3, 2\] where its weight needs \[4, 2\]"):
        absorb(tmp_path, tensors, without, gain, requantize=True)


def test_other_refusals(tmp_path):
    quantised = Quantised("int8", weight_of(4, 16))
    gain = torch.rand(4)
    with pytest.raises(CheckpointError, match="rotated"):
        absorb(tmp_path, quantised.tensors, quantised.config | {"transform_config": {"config_groups": {"u": {}}}}, gain)
    with pytest.raises(CheckpointError, match="outputs are quantised"):
        absorb(tmp_path, quantised.tensors | {"output_scale": torch.ones(1)}, quantised.config, gain)
    with pytest.raises(CheckpointError, match="takes 4 gains on the output side, the file has 5"):
        absorb(tmp_path, quantised.tensors, quantised.config, torch.rand(5))
    with pytest.raises(CheckpointError, match="takes 16 gains on the input side, the file has 4"):
        absorb(tmp_path, quantised.tensors, quantised.config, gain, "input")
    with pytest.raises(CheckpointError, match=r"an unknown way: .*compressed uint8 \[4\]"):
        absorb(tmp_path, {"compressed": torch.zeros(4, dtype=torch.uint8)}, quantised.config, gain)
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, quantised.tensors | {"weight": torch.rand(4, 16)}, quantised.config, gain)
    grouped = Quantised("int4, groups", weight_of(4, 16))
    ordered = grouped.tensors | {"weight_g_idx": torch.zeros(16, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match="an order of their own"):
        absorb(tmp_path, ordered, grouped.config, torch.rand(16), "input", requantize=True)
    eighth = quantised.tensors | {"weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match="weight_scale is float8_e4m3fn, which is no known kind of scale"):
        absorb(tmp_path, eighth, quantised.config, gain, requantize=True)
    three = Quantised("int3, groups", weight_of(4, 16))
    with pytest.raises(CheckpointError, match=r"codes of \[3\] bits cannot be unpacked"):
        absorb(tmp_path, three.tensors, three.config, torch.rand(16), "input", requantize=True)
    broken = quantised.tensors | {"weight_scale": torch.full((4, 1), float("nan"))}
    with pytest.raises(CheckpointError, match="not finite to begin with"):
        absorb(tmp_path, broken, quantised.config, gain)
    with pytest.raises(CheckpointError, match="scales that are not finite to begin with"):
        absorb(tmp_path, broken, quantised.config, torch.rand(16), "input", requantize=True)

"""torchao's tensors: made, taken apart and put together again by torchao."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.testing import assert_no_worse_than_torch

from support.scheme_files import NAME, TINY, absorb, gains_of, rounded_once, same

pytest.importorskip("torchao")

from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Int4PlainInt32Tensor,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerRow,
    PerTensor,
)
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

CONFIG = {"quant_method": "torchao"}
few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])

BY_ROWS = {
    "int8": lambda weight: Int8Tensor.from_hp(weight, PerRow()),
    "int8, asymmetric": lambda weight: Int8Tensor.from_hp(weight, PerRow(), mapping_type=MappingType.ASYMMETRIC),
    "float8": lambda weight: Float8Tensor.from_hp(weight),
    "int4 in int8, groups": lambda weight: IntxUnpackedToInt8Tensor.from_hp(weight, (1, 8), torch.int4),
    "int2 in int8, groups, asymmetric": lambda weight: IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, 8), torch.int2, mapping_type=MappingType.ASYMMETRIC
    ),
}
COARSE = {
    "int8, one scale": lambda weight: Int8Tensor.from_hp(weight, PerTensor()),
    "float8, one scale": lambda weight: Float8Tensor.from_hp(weight, granularity=PerTensor()),
}


def taken_apart(weight: Tensor) -> tuple[dict[str, Tensor], dict]:
    tensors, metadata = flatten_tensor_state_dict({f"{NAME}.weight": weight})
    described = json.loads(metadata[f"{NAME}.weight"])
    return {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}, described


def put_together(tensors: dict[str, Tensor], described: dict) -> Tensor:
    metadata = {"tensor_names": json.dumps([f"{NAME}.weight"]), f"{NAME}.weight": json.dumps(described)}
    named = {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}
    return unflatten_tensor_state_dict(named, metadata)[0][f"{NAME}.weight"]


def read(tensors: dict[str, Tensor], described: dict) -> Tensor:
    return put_together(tensors, described).dequantize().double()


@pytest.mark.parametrize("name", BY_ROWS)
@few
@given(data=st.data())
def test_a_row_gain_is_rounded_once_into_the_scales(name, data, tmp_path):
    outputs, inputs = data.draw(st.integers(1, 9)), 8 * data.draw(st.integers(1, 4))
    tensors, described = taken_apart(BY_ROWS[name](torch.randn(outputs, inputs)))
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, described=described)
    assert absorbed.roundings.keys() == {"_weight_scale"}
    assert same(absorbed.tensors["_weight_scale"], rounded_once(tensors["_weight_scale"], gain[:, None]))
    exact = read(tensors, described) * gain.double()[:, None]
    error = (read(absorbed.tensors, described) - exact).abs()
    assert (error <= exact.abs() * 4 * torch.finfo(torch.float32).eps + TINY).all()


@pytest.mark.parametrize(
    ("name", "side"), [(name, "output") for name in COARSE] + [(name, "input") for name in {**BY_ROWS, **COARSE}]
)
def test_what_no_scale_can_take_is_requantised(name, side, tmp_path):
    make = {**BY_ROWS, **COARSE}[name]
    tensors, described = taken_apart(make(torch.randn(16, 64)))
    gain = torch.rand(16 if side == "output" else 64) + 0.5
    reason = "serves several rows" if side == "output" else "the gain to inputs"
    with pytest.raises(CheckpointError, match=rf"{reason}.*--requantize"):
        absorb(tmp_path, tensors, CONFIG, gain, side, described=described)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, side, requantize=True, described=described)
    exact = read(tensors, described) * (gain.double()[:, None] if side == "output" else gain.double())
    result = read(absorbed.tensors, described)
    rounding = absorbed.roundings["_weight_qdata"].absolute
    assert (result - exact).abs().max().item() == pytest.approx(rounding, rel=1e-4)
    again = read(*taken_apart(make(exact.float())))
    assert_no_worse_than_torch(name, result, again, exact)
    ones = torch.ones(16 if side == "output" else 64)
    unchanged = absorb(tmp_path, tensors, CONFIG, ones, side, requantize=True, described=described)
    assert all(same(unchanged.tensors[key], tensor) for key, tensor in tensors.items())


def test_an_int8_that_holds_four_bits_still_does(tmp_path):
    """Codes stay within [-8, 7], also where gains turn the signs round."""
    tensors, described = taken_apart(BY_ROWS["int4 in int8, groups"](torch.randn(16, 64)))
    absorbed = absorb(tmp_path, tensors, CONFIG, -torch.rand(64), "input", requantize=True, described=described)
    codes = absorbed.tensors["_weight_qdata"]
    assert codes.min() >= -8
    assert codes.max() == 7
    exact = -torch.ones(64).double() * read(tensors, described)
    turned = absorb(tmp_path, tensors, CONFIG, -torch.ones(64), "input", requantize=True, described=described)
    step = turned.tensors["_weight_scale"].double().repeat_interleave(8, 1)
    assert ((read(turned.tensors, described) - exact).abs() <= step / 2 * (1 + 1e-6)).all()


def int4_parts(outputs: int, inputs: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(-8, 8, (outputs, inputs))
    scale = torch.rand(inputs // size, outputs).to(dtype)
    return codes, scale, torch.randn(inputs // size, outputs).to(dtype)


def test_int4_scales_both_scale_and_zero_point(tmp_path):
    """W = q * scale + zero_point; q is low bits first, two in a byte."""
    codes, scale, zero = int4_parts(16, 64, 32, torch.bfloat16)
    packed = (codes[:, ::2] & 15 | (codes[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int8)
    tensors, described = taken_apart(Int4Tensor(packed, scale, zero, [1, 32], torch.Size([16, 64])))
    gain = torch.randn(16)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, described=described)
    assert absorbed.roundings.keys() == {"_weight_scale", "_weight_zero_point"}
    assert same(absorbed.tensors["_weight_scale"], rounded_once(scale, gain))
    assert same(absorbed.tensors["_weight_zero_point"], rounded_once(zero, gain))
    whole = put_together(absorbed.tensors, described)
    each = [part.double().repeat_interleave(32, 0).T for part in (whole.scale, whole.zero_point, scale, zero)]
    exact = gain.double()[:, None] * (codes * each[2] + each[3])
    magnitude = gain.abs().double()[:, None] * (codes.abs() * each[2] + each[3].abs())
    assert ((codes * each[0] + each[1] - exact).abs() <= magnitude * torch.finfo(torch.bfloat16).eps).all()


def test_tile_packed_int4_as_torchs_own_kernel_multiplies_it(tmp_path):
    """The kernel on a CPU takes the same scales and zeros; 13 outputs are padded to 16."""
    codes, scale, zero = int4_parts(16, 64, 32, torch.bfloat16)
    both = pack_tinygemm_scales_and_zeros(scale.T.contiguous(), zero.T.contiguous(), torch.bfloat16)
    packed = torch.zeros(2, 1, 32, 4, dtype=torch.int32)  # not looked at
    tensors, described = taken_apart(Int4TilePackedTo4dTensor(packed, both, [1, 32], torch.Size([13, 64])))
    gain = torch.randn(13)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, described=described)
    after = absorbed.tensors["_weight_scale_and_zero"]
    padded = torch.cat([gain, torch.ones(3)])
    assert same(after, rounded_once(both, padded[:, None]))
    for_cpu = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    x = torch.eye(64, dtype=torch.bfloat16)
    before, result = (torch.ops.aten._weight_int4pack_mm_for_cpu(x, for_cpu, 32, part) for part in (both, after))
    exact = before[:, :13].double() * gain
    magnitude = (scale.double() * 8 + zero.double().abs()).repeat_interleave(32, 0)[:, :13] * gain.abs()
    assert ((result[:, :13].double() - exact).abs() <= 2 * magnitude * torch.finfo(torch.bfloat16).eps).all()
    assert torch.equal(result[:, 13:], before[:, 13:])


def test_plain_int32_keeps_its_zero_points(tmp_path):
    """W = (q - zero_point) * scale."""
    _, scale, _ = int4_parts(16, 64, 32, torch.float16)
    zero = torch.randint(0, 16, (2, 16), dtype=torch.int8)
    packed = torch.randint(0, 2**31 - 1, (16, 8), dtype=torch.int32)
    weight = Int4PlainInt32Tensor(packed, scale, zero, [1, 32], torch.Size([16, 64]))
    tensors, described = taken_apart(weight)
    gain = torch.randn(16)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, described=described)
    assert absorbed.roundings.keys() == {"_weight_scale"}
    assert same(absorbed.tensors["_weight_scale"], rounded_once(scale, gain))


@pytest.mark.parametrize("shape", [(32,), (1, 32)])
def test_a_scale_of_the_inputs_takes_gains_on_inputs(shape, tmp_path):
    weight = Int8Tensor.from_hp(torch.randn(8, 32), PerRow(), act_pre_scale=torch.rand(shape))
    tensors, described = taken_apart(weight)
    gain = torch.randn(32)
    absorbed = absorb(tmp_path, tensors, CONFIG, gain, "input", described=described)
    assert absorbed.roundings.keys() == {"_weight_act_pre_scale"}
    x = torch.randn(5, 32)
    result = torch.nn.functional.linear(x, put_together(absorbed.tensors, described))
    plain = torch.nn.functional.linear(x * gain, put_together(tensors, described))
    truth = (x.double() * gain.double() * tensors["_weight_act_pre_scale"].double()) @ read(tensors, described).T
    assert_no_worse_than_torch("input side", result, plain, truth)
    static = tensors | {"_weight_act_quant_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match="inputs are quantised with a scale that was chosen"):
        absorb(tmp_path, static, CONFIG, gain, "input", described=described)
    with pytest.raises(CheckpointError, match="takes 32 gains on the input side, the file has 31"):
        absorb(tmp_path, tensors, CONFIG, gain[1:], "input", described=described)


def test_refusals(tmp_path):
    tensors, described = taken_apart(BY_ROWS["int8"](torch.randn(8, 32)))
    with pytest.raises(CheckpointError, match="torchao's MXTensor is not supported"):
        absorb(tmp_path, tensors, CONFIG, torch.rand(8), described=described | {"_type": "MXTensor"})
    with pytest.raises(CheckpointError, match="no header describes torchao"):
        absorb(tmp_path, tensors, CONFIG, torch.rand(8))
    with pytest.raises(CheckpointError, match="takes 8 gains on the output side, the file has 7"):
        absorb(tmp_path, tensors, CONFIG, torch.rand(7), described=described)
    with pytest.raises(CheckpointError, match="_weight_scale overflows with its gain in float32"):
        absorb(
            tmp_path,
            tensors | {"_weight_scale": torch.full((8, 1), 2.0)},
            CONFIG,
            torch.full((8,), 3e38),
            described=described,
        )
    codes, scale, zero = int4_parts(16, 64, 32, torch.bfloat16)
    tensors, described = taken_apart(Int4Tensor(codes.to(torch.int8), scale, zero, [1, 32], torch.Size([16, 64])))
    with pytest.raises(CheckpointError, match="the gain to inputs"):
        absorb(tmp_path, tensors, CONFIG, torch.rand(64), "input", requantize=True, described=described)
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, {"weight_other": torch.zeros(2)}, CONFIG, torch.rand(16), described=described)
    experts = described | {"_data": described["_data"] | {"shape": [2, 16, 64]}}
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, tensors, CONFIG, torch.rand(16), described=experts)

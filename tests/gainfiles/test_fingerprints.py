"""The fingerprint of weights, computed once more from its description."""

import hashlib

import pytest
import torch

from gain_ops.gainfiles.fingerprints import digest, is_copy, is_spots, spots, step


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 1), (1, 1), (4096, 1), (4097, 2), (8192, 2), (8193, 3), (10**9, 244141)]
)
def test_at_most_4096_values_are_sampled(count: int, expected: int):
    assert step(count) == expected
    assert -(-count // expected) <= 4096


def test_it_is_a_hash_of_names_shapes_and_values_rounded_to_bfloat16():
    weight, codes = torch.randn(3, 4), torch.randint(-5, 5, (2,), dtype=torch.int32)
    expected = hashlib.blake2b(digest_size=16)
    expected.update(b"weight:3,4;")
    bits = weight.bfloat16().view(torch.int16).flatten()[::2].tolist()
    expected.update(b"".join(value.to_bytes(2, "little", signed=True) for value in bits))
    expected.update(b"codes:2;")
    expected.update(b"".join(value.to_bytes(4, "little", signed=True) for value in codes.tolist()))
    found = digest([("weight", (3, 4), weight.flatten()[::2]), ("codes", (2,), codes)])
    assert found == expected.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_weight_in_another_precision_has_the_same(dtype: torch.dtype):
    weight = torch.randn(40).bfloat16()
    assert digest([("weight", (40,), weight.to(dtype))]) == digest([("weight", (40,), weight.float())])


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-6])
def test_copies_of_one_weight_in_float16_and_bfloat16_are_known_and_other_weights_are_not(
    base: torch.dtype, scale: float
):
    weight = (torch.randn(4096) * scale).to(base)
    half, brain = weight.half(), weight.bfloat16()
    for one, other in ((half, brain), (half, brain.float()), (weight, half), (half.clone(), weight.bfloat16())):
        assert is_spots(spots(one))
        known = digest([("weight", (4096,), one)]) == digest([("weight", (4096,), other)])
        assert known or is_copy(spots(one), spots(other))
    if scale < 1e-3:
        return  # below float16's normal numbers there is little to tell weights apart by
    near = (weight.float() * (1 + 2**-6 * torch.randn(4096))).bfloat16()
    assert not is_copy(spots(half), spots(near)), "trained a little"
    assert not is_copy(spots(brain), spots(near)), "of one dtype every difference counts"


def test_spots_are_a_few_values():
    values = torch.tensor([1.0, -2.5, 0.1])
    assert spots(values) == spots(values.bfloat16()) == "bfloat16:803f20c0cd3d"
    assert spots(values.half()) == "float16:003c00c1662e"
    assert len(spots(torch.randn(4096))) == len("bfloat16:") + 32 * 4
    wrong = ["bfloat16:", "int8:00", "float16:0", None, "float16:zz00", "bfloat16:" + "0" * 4 * 33, "float32:0000803f"]
    assert not any(map(is_spots, wrong))


def test_a_value_a_name_and_a_shape_count():
    weight = torch.arange(6.0)
    prints = {
        digest([(name, shape, values)])
        for name in ("weight", "bias")
        for shape in ((6,), (2, 3))
        for values in (weight, weight.flip(0), weight.to(torch.uint8), weight > 2)
    }
    assert len(prints) == 16

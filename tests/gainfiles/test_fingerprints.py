"""The fingerprint of weights, computed once more from its description."""

import hashlib

import pytest
import torch

from gain_ops.gainfiles.fingerprints import digest, step


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


def test_a_value_a_name_and_a_shape_count():
    weight = torch.arange(6.0)
    prints = {
        digest([(name, shape, values)])
        for name in ("weight", "bias")
        for shape in ((6,), (2, 3))
        for values in (weight, weight.flip(0), weight.to(torch.uint8), weight > 2)
    }
    assert len(prints) == 16

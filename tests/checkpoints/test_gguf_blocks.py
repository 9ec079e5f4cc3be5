"""Gains in the scales of GGUF's block types, against the decoders of the package gguf."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.formats.gguf_blocks import (
    BLOCKS,
    ScatteredScale,
    can_requantize,
    decode,
    requantize_rows,
    scale_rows,
)

DECODED = sorted(BLOCKS.keys() - {"Q1_0"})
REQUANTIZED = ["MXFP4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
ROWS = 6


def scale_count(kind):
    return 1 if isinstance(BLOCKS[kind], ScatteredScale) else len(BLOCKS[kind].offsets)


def random_rows(kind, blocks=3, seed=0):
    """Random quants, and scales of either sign that are normal numbers in float16, also after a gain from 1/16 to 16."""
    generator = torch.Generator().manual_seed(seed)
    block = BLOCKS[kind]
    quants = torch.randint(0, 256, (ROWS, blocks, block.size), dtype=torch.uint8, generator=generator)
    sizes = 2.0 ** -torch.randint(0, 8, (ROWS, blocks, scale_count(kind)), generator=generator)
    scales = (
        torch.randn(sizes.shape, generator=generator).sign()
        * sizes
        * (1 + torch.rand(sizes.shape, generator=generator))
    )
    return block.replaced(quants, scales.to(torch.float16)).view(ROWS, -1)


def quantized_rows(kind, rows=ROWS, scale=1.0):
    values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = np.random.default_rng(0).normal(size=(rows, 2 * values)).astype(np.float32) * np.float32(scale)
    return torch.from_numpy(gguf.quants.quantize(data, GGMLQuantizationType[kind]))


def column(*gains):
    return torch.tensor(gains, dtype=torch.float32)[:, None]


def test_every_type_with_float16_scales_is_here_in_its_size():
    others = {"F16", "F32", "F64", "BF16", "I8", "I16", "I32", "I64"}
    others |= {"MXFP4", "NVFP4"}  # scales of eight bits
    others |= {"Q8_1", "Q8_K"}  # only in memory, for activations
    assert {kind.name for kind in GGML_QUANT_SIZES} - others <= BLOCKS.keys()
    for kind, block in BLOCKS.items():
        assert (block.values, block.size) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


@pytest.mark.parametrize("kind", BLOCKS)
def test_scales_are_taken_and_put_back_and_nothing_else(kind):
    block = BLOCKS[kind]
    blocks = torch.randint(0, 256, (ROWS, 2, block.size), dtype=torch.uint8)
    scales = torch.randint(-(2**15), 2**15, (ROWS, 2, scale_count(kind)), dtype=torch.int16).view(torch.float16)
    other = block.replaced(blocks, scales)
    assert torch.equal(block.scales(other).view(torch.int16), scales.view(torch.int16))
    assert torch.equal(block.replaced(other, block.scales(blocks)), blocks)


# Powers of two round nothing: any difference would be a scale that was missed, or a quant that was hit.
@pytest.mark.parametrize("kind", DECODED)
def test_a_power_of_two_scales_every_value_to_the_bit(kind):
    rows, gain = random_rows(kind), column(2, -2, 0.5, -1, 0, 1)
    scaled, rounding = scale_rows(kind, rows, gain)
    assert torch.equal(decode(kind, scaled), decode(kind, rows) * gain)
    assert decode(kind, rows)[0].unique().numel() > 2
    assert (rounding.absolute, rounding.relative) == (0.0, 0.0)
    assert torch.equal(scaled[-1], rows[-1])


def test_a_power_of_two_scales_q1_0_to_the_bit():
    def decode_q1_0(rows):  # the package gguf cannot
        blocks = rows.view(ROWS, -1, 18).numpy()
        signs = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32) * 2 - 1
        return signs * blocks[..., :2].copy().view(np.float16).astype(np.float32)

    rows, gain = random_rows("Q1_0"), column(2, -2, 0.5, -1, 0, 1)
    scaled, _ = scale_rows("Q1_0", rows, gain)
    np.testing.assert_array_equal(decode_q1_0(scaled), decode_q1_0(rows) * gain[..., None].numpy())
    with pytest.raises(CheckpointError, match="gguf cannot decode Q1_0"):
        decode("Q1_0", rows)


@pytest.mark.parametrize("kind", DECODED)
@settings(max_examples=30)
@given(gain=st.floats(1 / 16, 16, width=32), negative=st.booleans(), seed=st.integers(0, 100))
def test_a_gain_costs_one_rounding_of_the_scales_and_no_more(kind, gain, negative, seed):
    gain = -gain if negative else gain
    rows, block = random_rows(kind, seed=seed), BLOCKS[kind]
    gains = torch.full((ROWS, 1), gain)
    scaled, rounding = scale_rows(kind, rows, gains)

    before, after = (block.scales(bytes_.view(ROWS, -1, block.size)) for bytes_ in (rows, scaled))
    once = (before.numpy().astype(np.float32) * np.float32(gain)).astype(np.float16)
    np.testing.assert_array_equal(after.numpy(), once)
    assert torch.equal(scaled, block.replaced(rows.view(ROWS, -1, block.size), torch.from_numpy(once)).view_as(rows))

    exact_scales = before.double() * gain
    errors = (after.double() - exact_scales).abs()
    assert rounding.absolute == errors.max().item()
    assert rounding.relative == (errors / exact_scales.abs()).max().item()
    assert rounding.relative <= 2**-11 * (1 + 2**-10)  # once to float32, then to float16

    # The terms of a value are linear in one scale each, and err by that scale's rounding; float32 does the rest.
    terms = torch.zeros_like(decode(kind, rows)).double()
    for index in range(before.shape[-1]):
        alone = torch.zeros_like(before)
        alone[..., index] = before[..., index]
        terms += decode(kind, block.replaced(rows.view(ROWS, -1, block.size), alone).view_as(rows)).double().abs()
    error = (decode(kind, scaled).double() - gain * decode(kind, rows).double()).abs()
    assert (error <= (rounding.relative + 2**-21) * abs(gain) * terms).all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_do_not_depend_on_the_rows_beside_them(kind):
    rows, gain = random_rows(kind), torch.randn(ROWS, 1)
    whole, rounding = scale_rows(kind, rows, gain)
    halves = [scale_rows(kind, rows[part], gain[part]) for part in (slice(0, 2), slice(2, ROWS))]
    assert torch.equal(whole, torch.cat([half for half, _ in halves]))
    assert rounding == halves[0][1] | halves[1][1]


@pytest.mark.parametrize("kind", BLOCKS)
def test_scales_that_overflow_are_refused(kind):
    rows = random_rows(kind)
    with pytest.raises(CheckpointError, match=f"scales of its {kind} blocks overflow float16 with their gain"):
        scale_rows(kind, rows, column(1, 1, 1, 1, 1, 7e8))
    block = BLOCKS[kind]
    scales = block.scales(rows.view(ROWS, -1, block.size))
    scales[3, 1, -1] = torch.nan
    rows = block.replaced(rows.view(ROWS, -1, block.size), scales).view_as(rows)
    with pytest.raises(CheckpointError, match="are not finite to begin with"):
        scale_rows(kind, rows, torch.zeros(ROWS, 1))


def test_what_is_lost_below_the_normal_numbers_is_in_the_rounding():
    rows = quantized_rows("Q4_0")
    _, some = scale_rows("Q4_0", rows, torch.full((ROWS, 1), 1e-4))
    assert 2**-11 < some.relative < 0.01
    killed, all_ = scale_rows("Q4_0", rows, torch.full((ROWS, 1), 1e-9))
    assert all_.relative == 1.0
    assert 0 < all_.absolute < 1e-8
    assert not decode("Q4_0", killed).any()


def test_what_can_be_requantised():
    assert [
        kind.name for kind in sorted(GGML_QUANT_SIZES, key=lambda kind: kind.name) if can_requantize(kind.name)
    ] == [
        "BF16",
        "F16",
        "F32",
        *REQUANTIZED,
    ]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", REQUANTIZED)
def test_requantising_says_its_error(kind, side):
    rows = quantized_rows(kind, scale=0.1)
    width = decode(kind, rows).shape[1]
    gain = 1 + 0.3 * torch.randn(width if side == "input" else (ROWS, 1))
    found, rounding = requantize_rows(kind, rows, gain)

    exact = decode(kind, rows).double() * gain.double()
    expected = gguf.quants.quantize(exact.float().numpy(), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(found.numpy(), expected)
    error = (decode(kind, found).double() - exact).abs()
    largest = exact.view(ROWS, 2, -1).abs().amax(-1, keepdim=True)
    assert rounding.absolute == error.max().item()
    assert rounding.relative == pytest.approx((error.view(ROWS, 2, -1) / largest).max().item(), rel=1e-12)
    # Half a step of the grid and the scale's rounding; a ternary grid has one step from 0 to the largest.
    half = {"Q4_0": 1 / 16, "Q4_1": 1 / 15, "Q5_0": 1 / 32, "Q5_1": 1 / 31, "Q8_0": 1 / 254}.get(kind, 0.5)
    edge = 2 if kind.endswith("_0") and kind[0] == "Q" and kind != "Q8_0" else 1  # the far end of an odd grid is cut
    assert 0 < rounding.relative <= edge * half + 2**-9


def test_requantising_what_is_not_finite_is_refused():
    rows = quantized_rows("Q8_0", scale=1e3)
    width = decode("Q8_0", rows).shape[1]
    with pytest.raises(CheckpointError, match="its weight overflows with its gain in Q8_0"):
        requantize_rows("Q8_0", rows, torch.full((width,), 1e6))
    rows[0, :2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # infinity
    with pytest.raises(CheckpointError, match="not finite to begin with in Q8_0"):
        requantize_rows("Q8_0", rows, torch.ones(width))

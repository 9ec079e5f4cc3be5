"""Which scheme a checkpoint's layers have, and how codes and scales are read and written, apart from any format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.schemes.codes import FP4_E2M1, Fields, Whole

from support.scheme_files import absorb


@pytest.mark.parametrize("config", [{"quant_method": "aqlm"}, {"quant_method": "mxfp4"}, {}])
def test_methods_that_are_not_known_are_refused(config, tmp_path):
    tensors = {"weight": torch.zeros(4, 4, dtype=torch.int8)}
    method = config.get("quant_method", "nothing")
    with pytest.raises(
        CheckpointError, match=rf"quantised by {method}, .*compressed-tensors.*the unquantised checkpoint and quantise"
    ):
        absorb(tmp_path, tensors, config, torch.rand(4), requantize=True)


def test_the_error_names_the_layer_as_the_gain_file_does(tmp_path):
    with pytest.raises(CheckpointError, match=r"^gained\.model\.layers\.0\.self_attn\.o_proj is quantised by aqlm"):
        absorb(tmp_path, {"weight": torch.zeros(4)}, {"quant_method": "aqlm"}, torch.rand(4))


@settings(deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), columns=st.integers(1, 40), bits=st.sampled_from([2, 4, 8]))
@pytest.mark.parametrize("word", [torch.uint8, torch.int32])
@pytest.mark.parametrize("downwards", [False, True])
def test_fields_are_read_as_they_are_written(word, downwards, data, rows, columns, bits):
    codes = torch.arange(2**bits) - 2 ** (bits - 1)
    each = word.itemsize * 8 // bits
    order = tuple(data.draw(st.permutations(range(each)))) if data.draw(st.booleans()) else None
    coding = Fields(codes, columns, word=word, downwards=downwards, order=order)
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows * coding.rows_per_row, columns)).double()
    block = coding.encode(values)
    width = columns if downwards else -(-columns // each)
    assert (block.shape, block.dtype) == ((rows, width * word.itemsize), torch.uint8)
    assert torch.equal(coding.decode(block), values)


@settings(deadline=None)
@given(values=st.lists(st.floats(-6, 6), min_size=1, max_size=20))
def test_the_nearest_code_is_written(values):
    wanted = torch.tensor([values], dtype=torch.float64)
    table = torch.tensor(FP4_E2M1).double()
    coding = Fields(table, len(values))
    error = (coding.decode(coding.encode(wanted)) - wanted).abs()
    assert torch.equal(error, (wanted.unsqueeze(-1) - table).abs().amin(-1))


@settings(deadline=None)
@given(values=st.lists(st.floats(-448, 448), min_size=1, max_size=20))
def test_the_nearest_float8_is_written(values):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().double()
    every = every[every.isfinite()]
    wanted = torch.tensor([values], dtype=torch.float64).float().double()
    coding = Whole(torch.float8_e4m3fn)
    error = (coding.decode(coding.encode(wanted)) - wanted).abs()
    assert torch.equal(error, (wanted.unsqueeze(-1) - every).abs().amin(-1))


@pytest.mark.parametrize(
    ("lowest", "highest", "bounds"),
    [(-8, 7, (-8, 7)), (-7, 7, (-8, 7)), (-1, 8, (-16, 15)), (-128, 127, (-128, 127)), (0, 0, (-1, 0))],
)
def test_an_int8_keeps_to_the_bits_that_it_uses(lowest, highest, bounds):
    assert Whole(torch.int8).bounds(lowest, highest) == bounds

"""HQQ and EETQ by their formulas: neither library runs on a CPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError

from support.scheme_files import TINY, absorb, gains_of, rounded_once, same

few = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
HQQ, EETQ = {"quant_method": "hqq"}, {"quant_method": "eetq"}


def hqq(outputs: int, inputs: int, size: int, axis: int = 1) -> dict[str, Tensor]:
    count = outputs * inputs // size
    return {
        "W_q": torch.randint(0, 16, (count, size) if axis else (size, count), dtype=torch.uint8),
        "scale": torch.rand((count, 1) if axis else (1, count)).to(torch.bfloat16),
        "zero": (torch.rand((count, 1) if axis else (1, count)) * 15).to(torch.bfloat16),
        "shape": torch.tensor([outputs, inputs]),
    }


def read_hqq(tensors: dict[str, Tensor]) -> Tensor:
    """(W_q - zero) * scale, then reshaped; W_q is not packed here."""
    values = (tensors["W_q"].double() - tensors["zero"].double()) * tensors["scale"].double()
    return values.reshape(tensors["shape"].tolist())


@few
@given(data=st.data())
def test_hqqs_scales_take_row_gains(data, tmp_path):
    outputs, inputs = data.draw(st.integers(1, 9)), 8 * data.draw(st.integers(1, 4))
    tensors = hqq(outputs, inputs, 8)
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, tensors, HQQ, gain)
    assert absorbed.roundings.keys() == {"scale"}
    each = gain.repeat_interleave(inputs // 8)[:, None]
    assert same(absorbed.tensors["scale"], rounded_once(tensors["scale"], each))
    exact = read_hqq(tensors) * gain.double()[:, None]
    error = (read_hqq(absorbed.tensors) - exact).abs()
    assert (error <= exact.abs() * torch.finfo(torch.bfloat16).eps + TINY).all()


@pytest.mark.parametrize(
    ("tensors", "side", "reason"),
    [
        (hqq(8, 16, 8, axis=0), "output", "serve several rows"),
        (hqq(8, 16, 64), "output", "serve several rows"),  # a group of four rows
        (hqq(8, 16, 8), "input", "the gain to inputs"),
    ],
)
def test_what_hqqs_scales_cannot_take_is_refused(tensors, side, reason, tmp_path):
    for requantize in (False, True):
        with pytest.raises(CheckpointError, match=reason):
            absorb(tmp_path, tensors, HQQ, torch.rand(8 if side == "output" else 16), side, requantize=requantize)


def test_hqq_as_it_is_not_known(tmp_path):
    tensors = hqq(8, 16, 8)
    quantised_scale = {name: tensor for name, tensor in tensors.items() if name != "scale"} | {"scale_q": torch.ones(2)}
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, quantised_scale, HQQ, torch.rand(8))
    with pytest.raises(CheckpointError, match="takes 8 gains on the output side, the file has 4"):
        absorb(tmp_path, tensors, HQQ, torch.rand(4))


@few
@given(data=st.data())
def test_eetqs_scales_take_row_gains(data, tmp_path):
    outputs, inputs = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    tensors = {
        "weight": torch.randint(-128, 128, (inputs, outputs), dtype=torch.int8),
        "weight_scales": torch.rand(outputs).half(),
    }
    gain = gains_of(data, outputs)
    absorbed = absorb(tmp_path, tensors, EETQ, gain)
    assert absorbed.roundings.keys() == {"weight_scales"}
    assert same(absorbed.tensors["weight_scales"], rounded_once(tensors["weight_scales"], gain))


def test_eetqs_refusals(tmp_path):
    tensors = {"weight": torch.zeros(16, 8, dtype=torch.int8), "weight_scales": torch.rand(8).half()}
    with pytest.raises(CheckpointError, match="the gain to inputs"):
        absorb(tmp_path, tensors, EETQ, torch.rand(16), "input", requantize=True)
    with pytest.raises(CheckpointError, match="takes 8 gains on the output side, the file has 16"):
        absorb(tmp_path, tensors, EETQ, torch.rand(16))
    with pytest.raises(CheckpointError, match="weight_scales overflows with its gain in float16"):
        absorb(tmp_path, tensors, EETQ, torch.full((8,), 1e9))
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, tensors | {"weight_scales": torch.rand(7).half()}, EETQ, torch.rand(8))
    with pytest.raises(CheckpointError, match="an unknown way"):
        absorb(tmp_path, tensors | {"weight": torch.zeros(8, dtype=torch.int8)}, EETQ, torch.rand(8))

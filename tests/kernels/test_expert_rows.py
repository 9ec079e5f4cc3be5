"""Rows by expert in Triton's kernels: any offsets, and rows of nobody that hold NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops import reference
from gain_ops.kernels import backend, config, expert_rows

from support.parity import CALLS, DEVICE, run, tensors

CALLS_BY_EXPERT = [call for call in CALLS if call.startswith(("grouped", "combine"))]
OF_ROWS = ("x", "z", "dy", "dh")


@settings(max_examples=200, deadline=None)
@given(t=st.integers(0, 300), chunk=st.sampled_from([16, 32, 128]), data=st.data())
def test_every_row_is_in_one_slot(t: int, chunk: int, data: st.DataObject) -> None:
    """What rows_of_slot computes, for each slot."""
    ends = sorted(data.draw(st.lists(st.integers(0, t), min_size=1, max_size=9)))
    starts = [0, *ends]
    met: list[tuple[int, int]] = []
    for slot in range(expert_rows.slots(t, len(ends), chunk)):
        expert = sum(end // chunk + e + 1 <= slot for e, end in enumerate(ends))
        first = starts[expert] + (slot - starts[expert] // chunk - expert) * chunk
        met += [(row, expert) for row in range(first, min(first + chunk, [*ends, t][expert]))]
    assert met == [(row, sum(end <= row for end in ends)) for row in range(t)]


@pytest.mark.parametrize("call", CALLS_BY_EXPERT)
@pytest.mark.parametrize("ends", [(0, 0, 0, 0), (0, 0, 0, 40), (1, 17, 17, 33), (40, 40, 40, 40), (16, 32, 33, 39)])
def test_any_offsets_and_rows_that_hold_nan(call: str, ends: tuple[int, ...]) -> None:
    assert config.rows_chunk(40, 8) == 16
    t = tensors(40, 16, 8, torch.float32) | {"offsets": torch.tensor(ends, dtype=torch.int32, device=DEVICE)}
    for name in OF_ROWS:
        t[name] = t[name].index_fill(0, torch.arange(ends[-1], 40, device=DEVICE), float("nan"))
    results: list[tuple[Tensor, ...]] = [run(module, call, t) for module in (backend, reference)]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
        assert torch.equal(got == 0, expected == 0)

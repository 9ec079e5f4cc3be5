"""What kernels do, counted: an increase fails until it is accepted. No time: that is a GPU's to say."""

from pathlib import Path

import pytest
import triton

from ptx.cases import CASES
from ptx.worker import Worker
from support.accepted import hold

ACCEPTED = Path(__file__).with_name(f"counts-triton-{'.'.join(triton.__version__.split('.')[:2])}.json")
FIGURES = (
    "instructions",
    "global load bytes",
    "global load sectors",
    "global store bytes",
    "global store sectors",
    "bank conflicts",
    "TMA bytes",
    "mma.sync",
    "wgmma",
)
"""The figures of a line of the file, of all blocks. Instructions are warps'; sectors have 32 bytes."""

COUNTED = [
    "sm_80 scale bf16 37x64x72 on 132",
    "sm_90 scale bf16 37x64x72 on 132",
    "sm_80 backward bf16 130x1x320 on 132",
    "sm_90 glu bf16 37x64x72 on 132",
    "sm_80 glu_backward fp32 37x64x72 on 132",
    "sm_90 rms_norm bf16 3x1x8200 on 132",
    "sm_90 add_rms_norm without bias bf16 37x64x72 on 132",
    "sm_90 add_rms_norm_backward bf16 37x64x72 on 132",
    "sm_90 rms_norm_add_backward bf16 37x64x72 on 132",
    "sm_80 linear bf16 70x96x136 on 132",
    "sm_90 linear bf16 70x96x136 on 132",
    "sm_90 linear bf16 140x328x264 on 1, weight transposed",
    "sm_80 backward_recompute bf16 70x96x136 on 132",
    "sm_90 backward_recompute bf16 140x328x264 on 1",
    "sm_90 backward_dx bf16 140x264x136 on 1",
]


def test_counted_cases_are_cases() -> None:
    assert set(COUNTED) <= CASES.keys()


@pytest.mark.slow
def test_kernels_do_no_more_than_was_accepted(worker: Worker) -> None:
    found = {
        f"{name}: {kernel}": [counts.get(figure, 0) for figure in FIGURES]
        for name in COUNTED
        for kernel, counts in worker.call("ptx.cases:count", name=name).items()
    }
    hold(ACCEPTED, f"The figures ({', '.join(FIGURES)})", found)


@pytest.mark.slow
def test_a_pass_moves_its_bytes_once(worker: Worker) -> None:
    """Scale of [37, 64] in bf16: x and y once, and the fp32 gain once a block of 8 rows."""
    (counts,) = worker.call("ptx.cases:count", name=COUNTED[0]).values()
    assert counts["global store bytes"] == 37 * 64 * 2
    assert counts["global load bytes"] >= 37 * 64 * 2


@pytest.mark.slow
def test_an_add_and_its_norm_move_every_byte_once(worker: Worker) -> None:
    """On [37, 72] in bf16: the activations once, weight (bf16) and delta (fp32) by every row, or by every chunk of 4 rows."""
    activation, vectors = 37 * 72 * 2, 72 * (2 + 4)
    (forward,) = worker.call("ptx.cases:count", name="sm_90 add_rms_norm without bias bf16 37x64x72 on 132").values()
    assert forward["global load bytes"] == 2 * activation + 37 * vectors
    assert forward["global store bytes"] == 2 * activation + 37 * 4
    backward, _ = worker.call("ptx.cases:count", name="sm_90 add_rms_norm_backward bf16 37x64x72 on 132").values()
    # every lane reads its row's r, and those past the end the last row's
    assert backward["global load bytes"] == 4 * activation + 10 * vectors + 40 * 32 * 4
    assert backward["global store bytes"] == 2 * activation + 10 * 72 * 4

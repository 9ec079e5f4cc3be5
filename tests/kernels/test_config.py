"""The heuristics are total, and what they pick is among what is compiled ahead of time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gain_ops.kernels import config
from gain_ops.kernels._common import input_precision

PRECISIONS = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]


@given(
    arch=st.sampled_from(config.ARCHITECTURES),
    dtype_and_precision=st.sampled_from(PRECISIONS),
    m=st.integers(1, 1 << 24),
    n=st.integers(1, 1 << 18),
    aligned=st.booleans(),
    multiprocessors=st.integers(1, 304),
)
def test_every_pick_is_compiled(arch, dtype_and_precision, m, n, aligned, multiprocessors) -> None:
    dtype, precision = dtype_and_precision
    pick = config.gemm_config(arch, dtype, precision, m, n, aligned, multiprocessors)
    assert (pick, aligned) in config.choices(arch, dtype, precision)
    assert aligned or not pick.use_tma, "TMA cannot read unaligned rows"
    assert not (pick.use_tma and arch in ("sm_80", "gfx942")), "these have no TMA"
    assert pick.block_n % (16 * pick.subtiles) == 0


def test_a_row_of_an_rms_norm_fits_a_block_of_64_wide_wavefronts() -> None:
    rows = [1 << log for log in range(config.NORM_FEATURES.bit_length())]
    assert rows[-1] == config.NORM_FEATURES
    assert all(1 <= config.norm_config(row, rows=1).num_warps <= 1024 // 64 for row in rows)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_large_tiles_only_when_they_fill_the_device(arch: str) -> None:
    def tile(m: int) -> int:
        return config.gemm_config(arch, torch.bfloat16, "ieee", m, 4096, True, 132).block_n

    assert tile(8192) == 256
    assert tile(512) == 128


def test_k_order_does_not_depend_on_the_tokens() -> None:
    """One block_k an architecture and dtype: a row's sum is added up alike whatever the batch it comes in."""
    for arch in config.ARCHITECTURES:
        aligned = {c.block_k for c, wide in config.choices(arch, torch.bfloat16, "ieee") if wide}
        assert len(aligned) == 1 or arch == "sm_80"


@pytest.fixture
def precision():
    """torch's own switches, put back as they were."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before
    torch.backends.fp32_precision = "none"


def test_tf32_only_when_torch_allows_it_by_either_of_its_switches(precision) -> None:
    assert input_precision(torch.float32) == "ieee"
    precision.allow_tf32 = True
    assert input_precision(torch.float32) == "tf32"
    assert input_precision(torch.bfloat16) == "ieee", "bf16 operands have nothing to reduce"
    precision.allow_tf32 = False
    assert input_precision(torch.float32) == "ieee"
    precision.fp32_precision = "tf32"
    assert input_precision(torch.float32) == "tf32"
    precision.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    assert input_precision(torch.float32) == "tf32"

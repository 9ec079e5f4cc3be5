"""The heuristics are total, and what they pick is among what is compiled ahead of time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gain_ops.kernels import config
from gain_ops.kernels.devices import ARCHITECTURES


@given(
    arch=st.sampled_from(ARCHITECTURES),
    m=st.integers(1, 1 << 24),
    n=st.integers(1, 1 << 18),
    multiprocessors=st.integers(1, 304),
)
def test_every_pick_is_compiled(arch: str, m: int, n: int, multiprocessors: int) -> None:
    pick = config.gemm_config(arch, m, n, multiprocessors)
    assert pick in config.choices(arch)
    assert pick.use_tma == (arch in ("sm_90", "sm_100")), "the others have no TMA"
    assert pick.block_n % (16 * pick.subtiles) == 0


def test_a_row_of_an_rms_norm_fits_a_block_of_64_wide_wavefronts() -> None:
    rows = [1 << log for log in range(config.NORM_FEATURES.bit_length())]
    assert rows[-1] == config.NORM_FEATURES
    assert all(1 <= config.rms_norm_config(row, rows=1).num_warps <= 1024 // 64 for row in rows)


@pytest.mark.parametrize(("arch", "large", "small"), [("sm_80", 128, 64), ("sm_90", 256, 128), ("sm_100", 256, 128)])
def test_large_tiles_only_when_they_fill_the_device(arch: str, large: int, small: int) -> None:
    assert config.gemm_config(arch, 8192, 4096, 132).block_n == large
    assert config.gemm_config(arch, 64, 4096, 132).block_n == small


@given(t=st.integers(1, 1 << 22), n=st.integers(1, 1 << 18))
def test_chunks_fill_the_device_and_do_not_depend_on_it(t: int, n: int) -> None:
    """Where short chunks can give 512 programs there are as many; a chunk is whole tiles of rows."""
    chunk = config.rows_chunk(t, n)
    assert all(chunk % block.block_t == 0 for block in (config.ROWS, config.GLU))
    across = -(-n // config.ROWS.block_n)
    assert -(-t // chunk) * across >= min(512, -(-t // 16) * across)


@pytest.mark.parametrize(
    ("t", "n", "programs"), [(512, 1280, 160), (2048, 1280, 640), (8192, 1280, 640), (8192, 4096, 1024)]
)
def test_programs_of_the_one_pass_backward(t: int, n: int, programs: int) -> None:
    assert -(-t // config.rows_chunk(t, n)) * -(-n // config.ROWS.block_n) == programs


@pytest.mark.parametrize(("t", "programs"), [(64, 16), (512, 128), (2048, 256), (8192, 512)])
def test_programs_of_an_rms_norm_s_backward(t: int, programs: int) -> None:
    assert -(-t // config.rms_norm_chunk(t)) == programs


def test_k_order_does_not_depend_on_the_tokens() -> None:
    """One block_k an architecture: a row's sum is added up alike whatever the batch it comes in."""
    for arch in ARCHITECTURES:
        assert len({c.block_k for c in config.choices(arch)}) == 1 or arch == "sm_80"

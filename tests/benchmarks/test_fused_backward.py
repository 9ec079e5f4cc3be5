"""dx and ddelta from one GEMM: no worse than plain torch, whoever scales, and the same bits on every run."""

import pytest
import torch
from torch import Tensor

from benchmarks.experiments import fused_backward
from gain_ops import reference
from gain_ops.backends.operands import fuses
from gain_ops.kernels.config import GemmConfig
from gain_ops.testing import assert_no_worse_than_torch

from support.parity import DEVICE, laid_out, tensors
from support.shapes import EMPTY, SMALL

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

pytestmark = pytest.mark.usefixtures("poisoned")


def _plain(dy: Tensor, z: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    dz, ddelta = reference.backward(dy, z, delta)
    return dz @ weight, ddelta


def _compare(t: dict[str, Tensor], weight: Tensor, *, given_scaled: bool = False) -> None:
    dy, z, delta = t["dy"], t["z"], t["delta_out"]
    if given_scaled:
        # W' is rounded, as dz is otherwise: torch's own errors are those of the same product
        scaled = ((1 + delta)[:, None] * weight).to(weight.dtype)
        results = fused_backward.backward_dx(dy, z, scaled, None)
        plain = dy @ scaled, reference.ddelta(dy, z)
    else:
        results = fused_backward.backward_dx(dy, z, weight, delta)
        plain = _plain(dy, z, weight, delta)
    truth = _plain(*(v.double() for v in (dy, z, weight, delta)))
    size = _plain(*(v.double().abs() for v in (dy, z, weight, delta)))
    for name, *of in zip(("dx", "ddelta"), results, plain, truth, size, strict=True):
        assert (of[0].dtype, of[0].is_contiguous()) == (of[1].dtype, True)
        assert_no_worse_than_torch(name, *of)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("given_scaled", [False, True])
def test_no_worse_than_plain_torch(
    dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool, given_scaled: bool
) -> None:
    t = tensors(*shape, dtype)
    _compare(t, laid_out(t["weight"], "transposed" if transposed else "contiguous"), given_scaled=given_scaled)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty(shape: tuple[int, int, int]) -> None:
    t = tensors(*shape, torch.float32)
    _compare(t, t["weight"])


def test_the_sums_are_fp32_whatever_torchs_default_is() -> None:
    t = tensors(64, 48, 32, torch.float16)
    expected = fused_backward.backward_dx(t["dy"], t["z"], t["weight"], t["delta_out"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        results = fused_backward.backward_dx(t["dy"], t["z"], t["weight"], t["delta_out"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert results[1].dtype == torch.float32
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("layout", ["padded", "every other", "expanded"])
def test_layouts_of_dy_and_z(layout: str) -> None:
    t = tensors(40, 48, 64, torch.float32)
    t["dy"], t["z"] = laid_out(t["dy"], layout), laid_out(t["z"], layout)
    _compare(t, t["weight"])


@pytest.mark.parametrize("subtiles", [1, 2])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(96, 48), (32, 96), (96, 16)])
def test_every_block_of_ddelta_is_summed_once(
    subtiles: int, persistent: bool, in_features: int, out_features: int
) -> None:
    """More tiles in a row than blocks of ``out``, and fewer: each block has one owner, and none is left out."""
    t = tensors(72, in_features, out_features, torch.float16)
    dy, z, weight, dx = t["dy"], t["z"], t["weight"], torch.empty_like(t["x"])
    assert fuses(dy, weight.t(), z)
    config = GemmConfig(16, 32, 16, 4, 2, subtiles=subtiles, group_m=2, persistent=persistent)
    sums = fused_backward.launch(dy, z, weight, t["delta_out"], dx, config)
    again = fused_backward.launch(dy, z, weight, t["delta_out"], torch.empty_like(dx), config)
    assert torch.equal(sums, again)
    given = [v.double() for v in (dy, z, weight, t["delta_out"])]
    plain, truth, size = _plain(dy, z, weight, t["delta_out"]), _plain(*given), _plain(*(v.abs() for v in given))
    for name, *of in zip(("dx", "ddelta"), (dx, sums), plain, truth, size, strict=True):
        assert_no_worse_than_torch(name, *of)


def test_it_serves_hopper_by_tma_alone() -> None:
    by_tma, by_pointers = (GemmConfig(128, 128, 64, 8, 4, use_tma=use) for use in (True, False))
    assert fused_backward.serves("sm_90", by_tma)
    assert not fused_backward.serves("sm_90", by_pointers)
    assert not any(fused_backward.serves(arch, by_tma) for arch in ("sm_80", "sm_100", "gfx942"))

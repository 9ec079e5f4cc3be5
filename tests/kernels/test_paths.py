"""The launch paths of the Triton kernels: every kind of configuration, and the pass of the input side."""

import pytest
import torch
from torch import Tensor

from gain_ops import kernels, reference
from gain_ops.kernels import linear_forward, matmul_reduce, rows
from gain_ops.kernels.config import GemmConfig
from gain_ops.operands import aligned

from parity import DEVICE, compare, laid_out, tensors
from rules import assert_no_worse_than_torch

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("subtiles", [1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_every_path_of_the_gemm_kernels(
    dtype: torch.dtype, transposed: bool, use_tma: bool, subtiles: int, persistent: bool
) -> None:
    """Descriptors and pointers, both layouts of W, whole and split stores, a grid of tiles and a persistent one."""
    t = tensors(72, 48, 80, dtype)
    x, dy, delta = t["x"], t["dy"], t["delta_out"]
    weight = laid_out(t["weight"], "transposed") if transposed else t["weight"]
    assert aligned(x, weight, dy)
    config = GemmConfig(
        16, 32, 16, num_warps=4, num_stages=2, subtiles=subtiles, group_m=2, persistent=persistent, use_tma=use_tma
    )
    exact = [v.double() for v in (x, weight, delta, t["bias"], dy)]
    y, z = torch.empty_like(dy), torch.empty_like(dy)
    linear_forward.launch(x, weight, delta, t["bias"], y, z, config)
    plain, truth = reference.linear_z(x, weight, delta, t["bias"]), reference.linear_z(*exact[:4])
    assert_no_worse_than_torch("y", y, plain[0], truth[0])
    assert_no_worse_than_torch("z", z, plain[1], truth[1])
    plain_dz, plain_sum = reference.backward_recompute(dy, x, weight, delta)
    truth_dz, truth_sum = reference.backward_recompute(exact[4], exact[0], exact[1], exact[2])
    for writes in ("c", "acc", "nothing"):
        out = None if writes == "nothing" else torch.empty_like(dy)
        sums = matmul_reduce.launch(x, weight, dy, None if out is None else delta, out, writes, config)
        assert_no_worse_than_torch(f"sums, {writes}", sums, plain_sum, truth_sum)
        if writes == "c":
            assert_no_worse_than_torch("gain * c", out, plain_dz, truth_dz)
        if writes == "acc":
            unbiased = reference.linear(*exact[:3], None)
            assert_no_worse_than_torch("gain * acc", out, reference.linear(x, weight, delta, None), unbiased)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("t", "scaled"), [(16, (16, 24)), (40, (40, 24)), (41, (40, 24))])
def test_the_input_side_scales_the_smaller_operand_in_one_pass(
    t: int, scaled: tuple[int, int], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = tensors(t, 24, 40, torch.float32)
    if transposed:
        arguments["weight"] = laid_out(arguments["weight"], "transposed")
    passes: list[tuple[int, ...]] = []
    one_pass = rows._scale

    def record(x: Tensor, *rest: object, **options: object) -> Tensor:
        passes.append(tuple(sorted(x.shape, reverse=True)))
        return one_pass(x, *rest, **options)

    monkeypatch.setattr(rows, "_scale", record)
    compare(kernels, "linear_input", arguments)
    assert passes == [tuple(sorted(scaled, reverse=True))]

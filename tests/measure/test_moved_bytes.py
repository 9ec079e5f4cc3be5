"""The bytes that a pass moves: of torch's ops by hand, and of the kernels by what the simulator counted."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gain_ops.layers.linear import GainLinear
from gain_ops.measure.moved_bytes import moved_bytes
from gain_ops.ops import raw
from gain_ops.testing import ARGUMENTS, tensors

COUNTS = Path(__file__).parents[1] / "ptx" / "counts-triton-3.9.json"
X, Y = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(4, 8, dtype=torch.bfloat16)
ONE = 4 * 8 * 2  # bytes of either


@pytest.mark.parametrize(
    ("step", "by_op"),
    [
        (lambda: F.silu(X) * Y, {"silu": 2 * ONE, "mul": 3 * ONE}),
        (lambda: X.float(), {"_to_copy": 3 * ONE}),
        (lambda: X.mul_(Y), {"mul_": 3 * ONE}),
        (lambda: X.mul_(2), {"mul_": 2 * ONE}),
        (lambda: X.copy_(Y), {"copy_": 2 * ONE}),
        (lambda: X.zero_(), {"zero_": ONE}),
        (lambda: torch.zeros_like(X), {"zeros_like": ONE}),
        (lambda: torch.add(X, Y, out=X.new_empty(4, 8)), {"add": 3 * ONE}),
        (lambda: torch.empty_like(X).t().detach().view(8, 4), {}),
        (lambda: X + Y[0], {"add": 2 * ONE + ONE // 4}),
        (lambda: X + Y[:1].expand(4, 8), {"add": 2 * ONE + ONE // 4}),
        (lambda: torch.cat([X, Y]), {"cat": 4 * ONE}),
        (lambda: torch.split(X, 2), {}),
    ],
)
def test_each_op_reads_and_writes_once(step, by_op):
    moved = moved_bytes(step)
    assert dict(moved.by_op) == by_op
    assert moved.passes == sum(by_op.values())
    assert (moved.products, moved.attention, moved.n_products) == (0, 0, 0)


def test_products_and_attention_are_counted_apart():
    w, head = torch.empty(8, 8, dtype=torch.bfloat16), torch.empty(1, 2, 4, 8)
    moved = moved_bytes(lambda: F.linear(X, w) @ w)
    assert (moved.products, moved.n_products, moved.passes) == (2 * (2 * ONE + w.nbytes), 2, 0)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    moved = moved_bytes(lambda: flash(head, head, head, 0.0, True))
    assert moved.attention == 4 * head.nbytes + 4 * 2 * 4
    assert moved.passes == 0


@pytest.mark.parametrize(
    ("options", "passes", "products"),
    [
        # the forward scales z, the backward reads dy and z and writes dz
        ({"save": "output"}, {"linear_z": 2, "backward": 3}, 2),
        ({"save": "input"}, {"linear": 2, "backward_recompute": 3}, 3),
        # W is the smaller operand; dx is scaled in place, and x read
        ({"side": "input"}, {"linear_input": 2, "backward_input": 3}, 2),
    ],
)
def test_a_product_with_a_gain_is_the_vendor_s_and_a_pass(options, passes, products):
    x = torch.empty(64, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    layer = GainLinear(16, 16, bias=False, device="meta", dtype=torch.bfloat16, **options)
    dy = torch.empty_like(x)
    moved = moved_bytes(lambda: layer(x).backward(dy))
    assert moved.n_products == products
    for op, times in passes.items():
        of = 16 * 16 if op == "linear_input" else x.numel()
        assert moved.by_op[op] == pytest.approx(times * 2 * of, abs=2 * 64 + 4 * 16), op  # and vectors


@pytest.mark.parametrize(
    "case",
    [
        "sm_90 scale bf16 37x64x72 on 132: rows.scale_kernel",
        "sm_80 backward bf16 130x1x320 on 132: rows.backward_kernel",
        "sm_90 glu bf16 37x64x72 on 132: glu.glu_kernel",
        "sm_80 glu_backward fp32 37x64x72 on 132: glu.glu_backward_kernel",
        "sm_90 add_rms_norm without bias bf16 37x64x72 on 132: add_norm.add_norm_kernel",
        "sm_90 add_rms_norm_backward bf16 37x64x72 on 132: add_norm.add_norm_backward_kernel",
        "sm_90 rms_norm_add_backward bf16 37x64x72 on 132: norm_add.rms_norm_add_backward_kernel",
    ],
)
def test_the_kernels_move_what_is_counted(case):
    """Beside activations, each program reads the vectors, and may write a row of partial sums: at most one a row."""
    counts = json.loads(COUNTS.read_text())[case]
    simulated = counts[1] + counts[3]  # loaded and stored bytes
    _, op, *_, dtype, shape, _, _ = case.split(":")[0].split()
    t, i, o = map(int, shape.split("x"))
    given = tensors(t, i, o, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], "meta", torch.empty)
    if op == "add_rms_norm":
        given["bias"] = None
    arguments = [given[name] for name in ARGUMENTS[op]]
    results = []
    moved = moved_bytes(lambda: results.append(getattr(raw, op)(*arguments, "triton")))
    everything = [*arguments, *(results[0] if isinstance(results[0], tuple) else results)]
    n = i if op == "scale" else o
    vectors = sum(part.nbytes for part in everything if isinstance(part, Tensor) and part.shape == (n,))
    assert moved.by_op[op] == sum(part.nbytes for part in everything if isinstance(part, Tensor))
    rest = simulated - (moved.by_op[op] - vectors)
    assert 0 < rest <= t * vectors
    assert t < 100 or rest < 0.2 * simulated

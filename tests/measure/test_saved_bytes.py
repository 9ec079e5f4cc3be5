"""What a forward pass keeps for backward is counted by storage, once, weights aside."""

import pytest
import torch
from torch import nn

from gain_ops.measure.saved_bytes import saved_bytes

FLOAT = 4


def test_a_trained_linear_keeps_its_input_and_a_frozen_one_does_not():
    linear = nn.Linear(8, 16, bias=False)
    x = torch.randn(3, 8, requires_grad=True)
    trained = saved_bytes(lambda: linear(x), exclude=linear, inputs=[x])
    assert (trained.new, trained.inputs, trained.total) == (0, 3 * 8 * FLOAT, 3 * 8 * FLOAT)
    linear.requires_grad_(False)
    assert saved_bytes(lambda: linear(x), exclude=linear, inputs=[x]).total == 0


def test_without_exclude_the_weight_counts():
    linear = nn.Linear(8, 16, bias=False)
    x = torch.randn(3, 8, requires_grad=True)
    assert saved_bytes(lambda: linear(x), inputs=[x]).new == 8 * 16 * FLOAT


def test_exclude_takes_tensors_too():
    weight = torch.randn(16, 8)
    x = torch.randn(3, 8, requires_grad=True)
    assert saved_bytes(lambda: x @ weight.T, exclude=[weight]).total == 0
    assert saved_bytes(lambda: x @ weight.T).total == 16 * 8 * FLOAT


def test_a_buffer_of_the_module_does_not_count():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    module = Scaled()
    assert saved_bytes(lambda: module(torch.randn(5, requires_grad=True)), exclude=module).total == 0


def test_two_views_of_one_storage_count_once_and_as_the_whole_storage():
    def forward() -> torch.Tensor:
        base = torch.randn(10, 4, requires_grad=True) * 1
        return base[:2] * base[8:]

    saved = saved_bytes(forward)
    assert len(saved.tensors) == 1
    assert saved.new == 10 * 4 * FLOAT


def test_a_tensor_freed_during_the_pass_does_not_hide_the_next_one():
    def forward() -> torch.Tensor:
        for _ in range(5):
            x = torch.randn(1 << 16, requires_grad=True)
            y = (x * x).sum()  # the graph before dies here, and the next tensor may get the same address
        return y

    assert saved_bytes(forward).new == (1 << 16) * FLOAT


def test_a_storage_is_described_as_it_was_first_saved():
    base = torch.randn(10, 4, requires_grad=True)
    (saved,) = saved_bytes(lambda: (base[:2].sin().sum(), base.sin().sum())).tensors
    assert saved.shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_each_storage_says_shape_dtype_and_size(dtype):
    x = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    (saved,) = saved_bytes(lambda: x.sin(), inputs=[x]).tensors
    assert (saved.shape, saved.dtype, saved.nbytes, saved.is_input) == ((2, 3), dtype, 6 * dtype.itemsize, True)


def test_meta_tensors_are_told_apart():
    def forward() -> torch.Tensor:
        x = torch.empty(100, device="meta", requires_grad=True)
        y = torch.empty(50, device="meta", requires_grad=True)
        return x.sin().sum() + y.sin().sum()

    assert saved_bytes(forward).new == 150 * FLOAT


def test_it_counts_under_no_grad_too():
    x = torch.randn(4, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(lambda: x.sin(), inputs=[x]).inputs == 4 * FLOAT


def test_an_error_in_the_pass_comes_through_and_leaves_no_hook():
    with pytest.raises(ZeroDivisionError):
        saved_bytes(lambda: 1 // 0)
    x = torch.randn(3, requires_grad=True)
    x.sin().sum().backward()
    assert x.grad is not None


def test_a_part_of_the_graph_that_is_dropped_keeps_nothing():
    x = torch.randn(7, requires_grad=True)

    def forward():
        scale = x.exp().sum().detach()  # exp would keep its output
        return x.sin() * scale

    kept = saved_bytes(forward, inputs=[x])
    assert [saved.shape for saved in kept.tensors] == [(7,), ()]
    assert kept.new == 4

"""The rule itself must be able to fail."""

import pytest
import torch

from gain_ops.testing import assert_no_worse_than_torch, relative_error


def test_the_rule_passes_what_is_as_good_and_refuses_what_is_worse() -> None:
    truth = torch.randn(64, 64, dtype=torch.float64)
    plain = truth.to(torch.bfloat16)
    assert_no_worse_than_torch("same", plain, plain, truth)
    with pytest.raises(AssertionError, match="relative error"):
        assert_no_worse_than_torch("worse", plain + 0.02, plain, truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_no_worse_than_torch("shape", plain[1:], plain, truth)


def test_the_rule_refuses_nan() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_no_worse_than_torch("nan", torch.full((4,), float("nan")), truth.float(), truth)


def test_a_zero_truth_is_measured_absolutely() -> None:
    assert relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 1.0


def test_magnitude_grants_a_unit_of_what_was_added_up() -> None:
    terms = torch.tensor([1e4, -1e4, 1.0], dtype=torch.float64)
    truth, plain, result = terms.sum()[None], torch.tensor([1.0]), torch.tensor([1.0 + 2e-3])
    with pytest.raises(AssertionError):
        assert_no_worse_than_torch("sum", result, plain, truth)
    assert_no_worse_than_torch("sum", result, plain, truth, terms.abs().sum()[None])
    with pytest.raises(AssertionError):
        assert_no_worse_than_torch("sum", result + 1e-2, plain, truth, terms.abs().sum()[None])

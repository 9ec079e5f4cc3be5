"""The rule that every result is held to: no tolerance is set by hand."""

import torch
from torch import Tensor


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth (over 1 where the truth is zero), in fp64."""
    truth = truth.double()
    norm = truth.norm().item()
    return (result.double() - truth).norm().item() / (norm if norm else 1.0)


def assert_no_worse_than_torch(
    name: str,
    result: Tensor,
    plain: Tensor,
    truth: Tensor,
    magnitude: Tensor | None = None,
    unit: torch.dtype | None = None,
) -> None:
    """``result`` errs at most twice what ``plain`` (torch in the same dtype) errs against the fp64 ``truth``.

    One unit in the last place of the accumulation dtype is granted beside, for a plain result that happens to be exact: of
    ``unit`` instead, where an operand is itself rounded to that. It is a unit of ``magnitude``, the same computation on
    absolute values, where the terms of a sum may cancel.
    """
    assert result.shape == truth.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    floor = torch.finfo(unit or (torch.float64 if result.dtype == torch.float64 else torch.float32)).eps
    if magnitude is not None and truth.norm() > 0:
        floor *= max(1.0, (magnitude.double().norm() / truth.double().norm()).item())
    error, allowed = relative_error(result, truth), 2 * relative_error(plain, truth) + floor
    # written so that NaN fails
    assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e} (twice plain torch's)"

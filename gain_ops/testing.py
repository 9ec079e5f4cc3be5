"""The rule for results, in place of tolerances set by hand, and the layer as anybody would write it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ARGUMENTS", "PlainGain", "assert_no_worse_than_torch", "relative_error", "tensors"]


ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": ("x", "weight", "delta_out", "bias"),
    "linear_z": ("x", "weight", "delta_out", "bias"),
    "linear_input": ("x", "weight", "delta_in", "bias"),
    "backward_recompute": ("dy", "x", "weight", "delta_out"),
    "ddelta_recompute": ("dy", "x", "weight"),
    "backward_input": ("dy", "x", "weight", "delta_in"),
    "scale": ("x", "delta_in"),
    "backward": ("dy", "z", "delta_out"),
    "ddelta": ("dy", "z"),
    # out_features is the width of the FFN's hidden activation here, and of the norm
    "glu": ("dy", "z", "delta_out", "activation"),
    "glu_backward": ("dh", "dy", "z", "delta_out", "activation"),
    "glu_ddelta": ("dh", "dy", "z", "activation"),
    "rms_norm": ("dy", "norm_weight", "delta_out", "eps"),
    "rms_norm_backward": ("dh", "dy", "norm_weight", "delta_out", "r"),
    "add": ("dy", "z", "delta_out", "bias"),
    "add_rms_norm": ("dy", "z", "delta_out", "bias", "norm_weight", "eps"),
    "add_rms_norm_backward": ("dy", "dh", "h", "z", "delta_out", "norm_weight", "r"),
    "add_layer_norm": ("dy", "z", "delta_out", "bias", "norm_weight", "norm_bias", "eps"),
    "add_layer_norm_backward": ("dy", "dh", "h", "z", "delta_out", "norm_weight", "mean", "r"),
    "rms_norm_add": ("dy", "z", "delta_out", "norm_weight", "eps"),
    "rms_norm_add_backward": ("dh", "z", "delta_out", "norm_weight", "r"),
    "grouped_mm": ("x", "experts", "expert_bias", "offsets"),
    "grouped_scale": ("z", "expert_delta", "expert_bias", "offsets"),
    "grouped_backward": ("dy", "z", "expert_delta", "offsets"),
    "grouped_ddelta": ("dy", "z", "offsets"),
    "grouped_glu": ("dy", "z", "expert_delta", "offsets", "activation"),
    "grouped_glu_backward": ("dh", "dy", "z", "expert_delta", "offsets", "activation"),
    "grouped_glu_ddelta": ("dh", "dy", "z", "offsets", "activation"),
    "combine": ("z", "expert_delta", "expert_bias", "router", "order", "offsets"),
    "combine_backward": ("token_dy", "z", "expert_delta", "expert_bias", "router", "order", "offsets"),
}
"""By op, what it is called with in tests and benchmarks, by the names of ``tensors``."""


def tensors(
    t: int,
    i: int,
    o: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    make: Callable[..., Tensor] = torch.randn,
) -> dict[str, Any]:
    """Everything that ARGUMENTS names, of one linear map and its neighbours: x [T, in] and W [out, in] in ``dtype``.

    dy, z, dh and h are [T, out]; vectors are [in] or [out], mean and r are [T]. Gains are away from 1, and W keeps the size of
    x's elements. delta, mean and r have the dtype of sums: fp64 of fp64, else fp32.
    The rows are those of four experts as well: the second has none, and some rows at the end belong to nobody. The router has
    two slots a token (one where T is odd), so token_dy is [T / 2, out].
    make: what makes a tensor of a shape, as torch.randn and torch.empty do.
    """
    sums = torch.promote_types(dtype, torch.float32)

    def of(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return make(shape, dtype=dtype, device=device)

    slots = 1 + (t % 2 == 0)
    end = t - t // 8
    return {
        "x": of(t, i),
        "weight": of(o, i).div_(max(i, 1) ** 0.5),
        "bias": of(o),
        **{name: of(t, o) for name in ("dy", "z", "dh")},
        "delta_in": of(i, dtype=sums).mul_(0.3),
        "delta_out": of(o, dtype=sums).mul_(0.3),
        "activation": "silu",
        "norm_weight": of(o),
        "eps": 1e-5,
        "r": of(t, dtype=sums).abs_(),
        "h": of(t, o),
        "norm_bias": of(o),
        "mean": of(t, dtype=sums),
        "experts": of(4, o, i).div_(max(i, 1) ** 0.5),
        "expert_delta": of(4, o, dtype=sums).mul_(0.3),
        "expert_bias": of(4, o),
        "offsets": torch.tensor([end // 3, end // 3, end // 2, end], dtype=torch.int32, device=device),
        "router": of(t // slots, slots, dtype=sums),
        "token_dy": of(t // slots, o),
        # the rows of a token are apart
        "order": torch.arange(t, device=device).view(t // slots, slots).t().flatten(),
    }


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth (over 1 where the truth is zero), in fp64."""
    truth = truth.double()
    norm = truth.norm().item()
    return float((result.double() - truth).norm().item() / (norm if norm else 1.0))


def assert_no_worse_than_torch(
    name: str,
    result: Tensor,
    plain: Tensor,
    truth: Tensor,
    magnitude: Tensor | None = None,
    unit: torch.dtype | None = None,
) -> None:
    """Raise AssertionError unless ``result`` errs at most twice what ``plain`` (torch in the same dtype) errs.

    Errors are relative, in the Frobenius norm, against the fp64 ``truth``.
    One unit in the last place of the accumulation dtype is allowed in addition, for a plain result that happens to be exact;
    where an operand is itself rounded to ``unit``, this is a unit of that dtype. Where the terms of a sum may cancel, it is a
    unit of ``magnitude``, the same computation on absolute values.
    """
    if result.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}")
    floor = torch.finfo(unit or (torch.float64 if result.dtype == torch.float64 else torch.float32)).eps
    if magnitude is not None and truth.norm() > 0:
        floor *= max(1.0, (magnitude.double().norm() / truth.double().norm()).item())
    error, allowed = relative_error(result, truth), 2 * relative_error(plain, truth) + floor
    # written so that NaN fails, and raised so that Python's -O does not remove it
    if not error <= allowed:
        raise AssertionError(f"{name}: relative error {error:.3e}, allowed {allowed:.3e} (twice plain torch's)")


class PlainGain(nn.Module):
    """The layer without any of the package's code: F.linear and a multiplication, with parameters of its own."""

    def __init__(self, linear: Any, side: str = "output") -> None:
        super().__init__()
        transposed = type(linear).__name__ == "Conv1D"
        weight = linear.weight.detach()
        self.weight = nn.Parameter((weight.T if transposed else weight).clone(), requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.side = side
        features = self.weight.shape[0 if side == "output" else 1]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.delta = nn.Parameter(torch.zeros(features, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        """Y = gain * (x @ W.T) + b, or (x * gain) @ W.T + b."""
        gain = 1 + self.delta
        if self.side == "input":
            return F.linear((x * gain).to(x.dtype), self.weight, self.bias)
        z = F.linear(x, self.weight)
        y = (z * gain).to(z.dtype)
        return y if self.bias is None else (y + self.bias).to(z.dtype)

"""What the parity tests share: tensors for every op, layouts, and the comparison by the rule."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gain_ops import reference, testing
from gain_ops.testing import ARGUMENTS, assert_no_worse_than_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OTHERS = [act for act in reference.ACTIVATIONS if act != "silu"]
CALLS = {
    **ARGUMENTS,
    "linear without bias": ("x", "weight", "delta_out", "no bias"),
    **{f"glu {act}": ("dy", "z", "delta_out", act) for act in OTHERS},
    **{f"glu without up {act}": ("dy", "no up", "delta_out", act) for act in reference.ACTIVATIONS},
    **{f"glu_backward {act}": ("dh", "dy", "z", "delta_out", act) for act in OTHERS},
    **{f"glu_backward without up {act}": ("dh", "dy", "no up", "delta_out", act) for act in reference.ACTIVATIONS},
    "glu_ddelta without up": ("dh", "dy", "no up", "gelu"),
    "add without bias": ("dy", "z", "delta_out", "no bias"),
    "add_rms_norm without bias": ("dy", "z", "delta_out", "no bias", "norm_weight", "eps"),
    "add_layer_norm without biases": ("dy", "z", "delta_out", "no bias", "norm_weight", "no bias", "eps"),
    "add_layer_norm_backward without dh": ("dy", "no dh", "h", "z", "delta_out", "norm_weight", "mean", "r"),
    "grouped_mm without bias": ("x", "experts", "no bias", "offsets"),
    "grouped_scale without bias": ("z", "expert_delta", "no bias", "offsets"),
    "grouped_glu without up": ("dy", "no up", "expert_delta", "offsets", "relu2"),
    "grouped_glu_backward without up": ("dh", "dy", "no up", "expert_delta", "offsets", "relu2"),
    "combine without bias": ("z", "expert_delta", "no bias", "router", "order", "offsets"),
    "combine_backward without bias": ("token_dy", "z", "expert_delta", "no bias", "router", "order", "offsets"),
    "add_rms_norm_backward without dh": ("dy", "no dh", "h", "z", "delta_out", "norm_weight", "r"),
}

LAYOUTS = ["contiguous", "transposed", "padded", "every other", "expanded"]


def tensors(t: int, i: int, o: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every argument of CALLS."""
    others = {act: act for act in reference.ACTIVATIONS}
    return testing.tensors(t, i, o, dtype, DEVICE) | {"no bias": None, "no up": None, "no dh": None} | others


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` in another layout; "expanded" repeats its first row."""
    rows, columns = t.shape
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "padded":
        # rows of 16 bytes whatever the columns: what TMA can read of a product's operand but not of its k
        padded = t.new_full((rows, columns + 8 + -columns % 8), float("nan"))
        padded[:, :columns] = t
        return padded[:, :columns]
    if layout == "every other":
        spread = t.new_full((rows, 2 * columns), float("nan"))
        spread[:, ::2] = t
        return spread[:, ::2]
    if layout == "expanded":
        return t[:1].expand(rows, columns)
    return t


def run(backend: ModuleType, call: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results of a call, always as a tuple."""
    result = getattr(backend, call.split()[0])(*(given[argument] for argument in CALLS[call]))
    return result if isinstance(result, tuple) else (result,)


def compare(backend: ModuleType, call: str, given: dict[str, Any]) -> None:
    """The backend errs at most twice what plain torch errs, and returns its dtypes and strides."""
    exact = {name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in given.items()}
    absolute = {name: v.abs() if isinstance(v, Tensor) else v for name, v in exact.items()}
    results = (
        run(backend, call, given),
        run(reference, call, given),
        run(reference, call, exact),
        run(reference, call, absolute),
    )
    # the input side rounds an operand, x or W, whichever is smaller; torch always x
    unit = given["x"].dtype if call == "linear_input" else None
    for position, (result, torchs, truth, size) in enumerate(zip(*results, strict=True)):
        assert (result.dtype, result.stride()) == (torchs.dtype, torchs.contiguous().stride())
        assert_no_worse_than_torch(f"{call}[{position}]", result, torchs, truth, size, unit)

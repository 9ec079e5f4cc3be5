"""The gain in an FFN's activation: the public functions, and the autograd Function of both."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gain_ops import reference
from gain_ops.ops import raw
from gain_ops.ops.arguments import (
    check_device,
    check_expert_rows,
    check_features,
    check_floating,
    check_offsets,
    flatten,
)
from gain_ops.ops.autograd import Gradients, cast_to, differentiable, gradients_of, outside_autocast
from gain_ops.ops.calling import call
from gain_ops.ops.entering import entry


def gain_glu(
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor,
    *,
    activation: str = "silu",
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""A gated FFN's activation with a gain on each hidden neuron, ``gain = 1 + delta``, in one pass.

    ::

        h      = act(gate) * up * gain
        dgate  = dh * gain * up * act'(gate)        dup = dh * gain * act(gate)
        ddelta = sum over tokens of dh * act(gate) * up

    It is the input side of the down projection: ``(h0 * gain) @ W.T`` is the linear map of ``W @ diag(gain)`` applied to
    h0 = act(gate) * up, so absorbing the gain there, or into the rows of the up projection, removes it.

    Args:
        gate: [..., n], any strides; float64, float32, bfloat16 or float16. Or packed [..., 2n], gate then up, with up=None.
        up: [..., n] in gate's dtype, or None where gate is packed.
        delta: [n], any floating dtype; with offsets [E, n], a row an expert.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "relu2".
        offsets: the rows of gate and up [S, n] are sorted by expert, and each expert's end here, as in gain_grouped_linear: the
            gain is the input side of the experts' down projections. Rows past the last end are never read; h and the gradients
            are zero there.
        backend: as in gain_linear.

    Returns:
        h [..., n] in gate's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Saved for backward: gate and up as they are (packed: the packed tensor), which the projections have just made. h and
    act(gate) are not saved, and nothing is saved where no gradient is needed. The gradients of gate and up are the two halves
    of one tensor; that of a packed gate_up is this tensor.

    Raises:
        ValueError: shapes or devices that do not fit, or an activation or backend that does not exist.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: GAIN-FFN, arXiv 2604.04516; SwiGLU and GEGLU, arXiv 2002.05202.

    """
    _check_activation(activation)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"without up, gate must be packed [..., 2n], gate then up; got shape {tuple(gate.shape)}")
    else:
        _check_like(gate, up)
    return _activated(gate, up, delta, offsets, activation, up is None, backend)


def gain_swiglu(gate: Tensor, up: Tensor | None, delta: Tensor, *, backend: str = "auto") -> Tensor:
    """``h = silu(gate) * up * (1 + delta)``: gain_glu with ``activation="silu"``."""
    return gain_glu(gate, up, delta, activation="silu", backend=backend)


def gain_geglu(
    gate: Tensor, up: Tensor | None, delta: Tensor, *, approximate: str = "none", backend: str = "auto"
) -> Tensor:
    """``h = gelu(gate) * up * (1 + delta)``: gain_glu with "gelu", or "gelu_tanh" for ``approximate="tanh"``."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} is not one of 'none', 'tanh'")
    activation = "gelu_tanh" if approximate == "tanh" else "gelu"
    return gain_glu(gate, up, delta, activation=activation, backend=backend)


def gain_activation(
    x: Tensor, delta: Tensor, *, activation: str, offsets: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The activation of an FFN without a gate (GPT-2), with a gain on each hidden neuron, ``gain = 1 + delta``, in one pass.

    ::

        h = act(x) * gain        dx = dh * gain * act'(x)        ddelta = sum over tokens of dh * act(x)

    Args:
        x: [..., n], any strides; float64, float32, bfloat16 or float16. It is saved for backward.
        delta: [n], any floating dtype; with offsets [E, n], a row an expert.
        activation: "silu", "gelu", "gelu_tanh" (GPT-2's) or "relu2".
        offsets: as in gain_glu.
        backend: as in gain_linear.

    Returns:
        h [..., n] in x's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Raises: as gain_glu.

    Source: GAIN-FFN, arXiv 2604.04516.

    """
    _check_activation(activation)
    return _activated(x, None, delta, offsets, activation, False, backend)


def gain_relu2(x: Tensor, delta: Tensor, *, backend: str = "auto") -> Tensor:
    """``h = relu(x)^2 * (1 + delta)``: gain_activation with ``activation="relu2"``."""
    return gain_activation(x, delta, activation="relu2", backend=backend)


def _activated(
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor,
    offsets: Tensor | None,
    activation: str,
    packed: bool,
    backend: str,
) -> Tensor:
    check_floating(gate=gate, delta=delta)
    width = gate.shape[-1] if gate.dim() else 0
    n = width // 2 if packed else width
    if offsets is None:
        check_features(gate, n, delta, "the hidden neurons")
    else:
        check_offsets(gate, offsets)
        check_expert_rows(gate, offsets.shape[0], n, delta, "delta", "the hidden neurons")
    return _glu(gate, up, delta, offsets, activation, packed, backend)


def _sharding(
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor,
    offsets: Tensor | None,
    activation: str,
    packed: bool,
    backend: str,
) -> tuple[str, int]:
    # the rules without offsets have no such operand: there this None goes with the options
    return ("glu" if offsets is None else "grouped_glu") + "_packed" * packed, delta.shape[-1]


def _composite(
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor,
    offsets: Tensor | None,
    activation: str,
    packed: bool,
    backend: str,
) -> Tensor:
    g, u = gate.chunk(2, -1) if packed else (gate, up)
    if offsets is None:
        return reference.glu(g, u, delta, activation)
    return reference.grouped_glu(g, u, delta, offsets, activation)


@entry(_sharding, _composite)
def _glu(
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor,
    offsets: Tensor | None,
    activation: str,
    packed: bool,
    backend: str,
) -> Tensor:
    up = None if up is None else flatten(up)
    wants_grad = gate.requires_grad or delta.requires_grad or (up is not None and up.requires_grad)
    if torch.is_grad_enabled() and wants_grad:
        h: Tensor = Glu.apply(gate, up, delta, offsets, activation, packed, backend)
        return h
    return _forward(gate, up, delta, offsets, activation, packed, backend)


def _forward(
    gate: Tensor,
    up: Tensor | None,
    delta: Tensor,
    offsets: Tensor | None,
    activation: str,
    packed: bool,
    backend: str,
) -> Tensor:
    g, u = halves(gate, up, packed)
    if offsets is None:
        return call(raw.glu, g, u, delta, activation, backend)
    return call(raw.grouped_glu, g, u, delta, offsets, activation, backend)


def _check_activation(activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(map(repr, reference.ACTIVATIONS))}")


def _check_like(gate: Tensor, up: Tensor) -> None:
    if up.shape != gate.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    check_device(gate, up, "up")


class Glu(Function):
    """``h = act(gate) * up * gain``; with ``packed`` gate and up are the two halves of the first argument's rows."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        delta: Tensor,
        offsets: Tensor | None,
        activation: str,
        packed: bool,
        backend: str,
    ) -> Tensor:
        """gate [T, n] and up [T, n] or None, or packed [T, 2n] and None; delta [n], or [E, n] with offsets -> h [T, n]."""
        ctx.set_materialize_grads(False)
        ctx.device_type, ctx.delta_dtype = gate.device.type, delta.dtype
        ctx.activation, ctx.packed, ctx.backend = activation, packed, backend
        ctx.save_for_backward(gate, up, delta, offsets)
        return _forward(gate, up, delta, offsets, activation, packed, backend)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dh: Tensor | None) -> Gradients:
        """dh [T, n] -> dgate, dup, ddelta."""
        rest = (None,) * 4
        if dh is None:
            return (None,) * 3 + rest
        gate, up, delta, offsets = ctx.saved_tensors
        needed = needs_gate, needs_up, needs_delta = ctx.needs_input_grad[:3]
        if differentiable():

            def composite(gate: Tensor, up: Tensor | None, delta: Tensor) -> Tensor:
                return _composite(gate, up, delta, offsets, ctx.activation, ctx.packed, ctx.backend)

            return gradients_of(composite, (gate, up, delta), needed, dh) + rest
        g, u = halves(gate, up, ctx.packed)
        if not (needs_gate or needs_up):
            if offsets is None:
                ddelta = call(raw.glu_ddelta, dh, g, u, ctx.activation, ctx.backend)
            else:
                ddelta = call(raw.grouped_glu_ddelta, dh, g, u, offsets, ctx.activation, ctx.backend)
            return None, None, cast_to(ddelta, ctx.delta_dtype), *rest
        if offsets is None:
            dgate_up, ddelta = call(raw.glu_backward, dh, g, u, delta, ctx.activation, ctx.backend)
        else:
            dgate_up, ddelta = call(raw.grouped_glu_backward, dh, g, u, delta, offsets, ctx.activation, ctx.backend)
        dgate, dup = (dgate_up, None) if ctx.packed else halves(dgate_up, None, up is not None)
        return (
            dgate if needs_gate else None,
            dup if needs_up else None,
            cast_to(ddelta, ctx.delta_dtype) if needs_delta else None,
            *rest,
        )


def halves(gate: Tensor, up: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None]:
    """gate and up as they are, or as views of the packed tensor."""
    if not packed:
        return gate, up
    n = gate.shape[1] // 2
    return gate[:, :n], gate[:, n:]

"""Gains folded into what an FFN does anyway: its activation, the norm before it, and the whole of it."""

from functools import partial

import torch
from torch import Tensor

from gain_ops import ops, reference
from gain_ops.arguments import (
    any_sharded,
    check_device,
    check_features,
    check_floating,
    flatten,
    transformed,
    unflatten,
)
from gain_ops.ffn_autograd import Glu, RmsNorm, halves


def gain_glu(
    gate: Tensor, up: Tensor | None, delta: Tensor, *, activation: str = "silu", backend: str = "auto"
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
        delta: [n], any floating dtype.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "relu2".
        backend: as in gain_linear.

    Returns:
        h [..., n] in gate's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Kept for backward: gate and up as they are (packed: the packed tensor), which the projections have just made; h is not
    kept, nor act(gate), and nothing at all where no gradient is wanted. Gradients of gate and up are two halves of one
    tensor; of a packed gate_up that tensor itself.

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
    return _activated(gate, up, delta, activation, up is None, backend)


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


def gain_activation(x: Tensor, delta: Tensor, *, activation: str, backend: str = "auto") -> Tensor:
    """An FFN's activation with a gain on each hidden neuron, ``gain = 1 + delta``, in one pass: GPT-2's and others'.

    ::

        h = act(x) * gain        dx = dh * gain * act'(x)        ddelta = sum over tokens of dh * act(x)

    Args:
        x: [..., n], any strides; float64, float32, bfloat16 or float16. It is what backward keeps.
        delta: [n], any floating dtype.
        activation: "silu", "gelu", "gelu_tanh" (GPT-2's) or "relu2".
        backend: as in gain_linear.

    Returns:
        h [..., n] in x's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Raises: as gain_glu.

    Source: GAIN-FFN, arXiv 2604.04516.

    """
    _check_activation(activation)
    return _activated(x, None, delta, activation, False, backend)


def gain_relu2(x: Tensor, delta: Tensor, *, backend: str = "auto") -> Tensor:
    """``h = relu(x)^2 * (1 + delta)``: gain_activation with ``activation="relu2"``."""
    return gain_activation(x, delta, activation="relu2", backend=backend)


def gain_rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    r"""An RMSNorm with a gain on each feature that it hands on, ``gain = 1 + delta``, in one pass.

    ::

        r      = 1 / sqrt(mean(x^2) + eps)           n = r * x
        y      = n * weight * gain
        dx     = r * (v - n * mean(v * n)),          v = dy * weight * gain
        ddelta = sum over tokens of dy * n * weight

    It is one gain for the input side of every projection that reads y: of q, k and v, or of gate and up. It is absorbed by
    ``weight <- weight * gain``.

    Args:
        x: [..., n], any strides; float64, float32, bfloat16 or float16.
        weight: [n], any floating dtype, frozen. For a norm that multiplies by one plus its weight (Gemma) give 1 + weight.
        delta: [n], any floating dtype.
        eps: added to the mean square.
        backend: as in gain_linear.

    Returns:
        y [..., n] in x's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Kept for backward: x, and r, one number a token.

    Raises:
        ValueError: shapes or devices that do not fit, a weight that requires a gradient, or an unknown backend.
        TypeError: a dtype that is not floating.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: RMSNorm, arXiv 1910.07467; GAIN, arXiv 2604.04516.

    """
    check_floating(x=x, weight=weight, delta=delta)
    n = x.shape[-1] if x.dim() else 0
    if weight.shape != (n,):
        raise ValueError(f"weight must be [{n}] (x.shape[-1]), got shape {tuple(weight.shape)}")
    check_device(x, weight, "weight")
    check_features(x, n, delta, "x.shape[-1]")
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, but the norm of a gained layer is frozen: call weight.requires_grad_(False) "
            "(gain_ops.apply does), or train it with torch.nn.functional.rms_norm"
        )
    if any_sharded(x, weight, delta):
        from gain_ops import sharding

        function = partial(gain_rms_norm, eps=eps, backend=backend)
        return sharding.on_shards("rms_norm", function, {"x": x, "weight": weight, "delta": delta}, n)
    if transformed():
        return reference.composite_rms_norm(x, weight, delta, eps)
    flat = flatten(x)
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        y = RmsNorm.apply(flat, weight, delta, eps, backend)
    else:
        y = ops.rms_norm(flat, weight, delta, eps, backend)[0]
    return unflatten(y, x)


def _activated(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str, packed: bool, backend: str) -> Tensor:
    check_floating(gate=gate, delta=delta)
    width = gate.shape[-1] if gate.dim() else 0
    check_features(gate, width // 2 if packed else width, delta, "the hidden neurons")
    if any_sharded(gate, up, delta):
        from gain_ops import sharding

        function = partial(_activated, activation=activation, packed=packed, backend=backend)
        operands = {"gate": gate, "up": up, "delta": delta}
        return sharding.on_shards("glu_packed" if packed else "glu", function, operands, delta.shape[0])
    if transformed():
        g, u = gate.chunk(2, -1) if packed else (gate, up)
        return reference.composite_glu(g, u, delta, activation)
    flat, flat_up = flatten(gate), None if up is None else flatten(up)
    wants_grad = gate.requires_grad or delta.requires_grad or (up is not None and up.requires_grad)
    if torch.is_grad_enabled() and wants_grad:
        h = Glu.apply(flat, flat_up, delta, activation, packed, backend)
    else:
        h = ops.glu(*halves(flat, flat_up, packed), delta, activation, backend)
    return unflatten(h, gate)


def _check_activation(activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(map(repr, reference.ACTIVATIONS))}")


def _check_like(gate: Tensor, up: Tensor) -> None:
    if up.shape != gate.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    check_device(gate, up, "up")

"""A frozen FFN with a gain on its hidden neurons as one autograd Function: h exists only between two kernels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gain_ops import reference
from gain_ops.ops import raw
from gain_ops.ops.arguments import check_device, check_features, check_floating
from gain_ops.ops.autograd import Gradients, cast_to, differentiable, outside_autocast
from gain_ops.ops.calling import call
from gain_ops.ops.entering import entry, gemm
from gain_ops.ops.glu import halves


@dataclass(frozen=True)
class Options:
    """How an FFN is computed: the arguments that are not tensors."""

    activation: str
    packed: bool
    recompute: bool
    chunk: int | None
    backend: str


# delta, three biases and the options, after x and three weights
_Rest = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Options]


def gain_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    delta: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    recompute: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""A frozen FFN with a gain on each hidden neuron, ``gain = 1 + delta``: the input side of its down projection.

    ::

        g = x @ Wg.T + bg        u = x @ Wu.T + bu
        h = act(g) * u * gain
        y = h @ Wd.T + bd

        dh = dy @ Wd             dg, du, ddelta as in gain_glu             dx = dg @ Wg + du @ Wu

    The shapes choose one of three forms: gated, with gate_weight and up_weight [n, in]; packed, with one gate_weight [2n, in],
    gate rows then up rows, and up_weight=None; plain, with gate_weight [n, in] and up_weight=None, ``h = act(g) * gain``.

    Args:
        x: [..., in], any strides; float64, float32, bfloat16 or float16.
        gate_weight: [n, in] or [2n, in], x's dtype, any strides, frozen.
        up_weight: [n, in] or None.
        down_weight: [out, n].
        delta: [n], any floating dtype.
        gate_bias: [n], packed [2n], or None; frozen, as the other two.
        up_bias: [n] or None.
        down_bias: [out] or None.
        activation: "silu", "gelu", "gelu_tanh" or "relu2".
        recompute: False saves g and u, [..., n] each. True saves x alone and computes g and u again in the backward: two more
            GEMMs, the smallest footprint.
        chunk: how many tokens to work on at a time, or None for all at once. It bounds h, dh, dg and du, and with
            ``recompute`` g and u as well, at ``chunk`` tokens.
        backend: as in gain_linear.

    Returns:
        y [..., out] in x's dtype (in autocast's dtype under autocast).

    Saved for backward, beside aliases of the weights and delta: g and u, 2 n numbers a token (plain: n), or x alone. h and
    act(g) are never saved; a frozen FFN in plain torch saves act(g).

    Raises:
        ValueError: shapes, devices, options that do not fit, or a weight or bias that requires a gradient.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: GAIN-FFN, arXiv 2604.04516.

    """
    weights = (gate_weight, up_weight, down_weight)
    biases = (gate_bias, up_bias, down_bias)
    packed = _check(x, weights, biases, delta, activation, chunk)
    options = Options(activation, packed, recompute, chunk, backend)
    return _mlp(x, gate_weight, up_weight, down_weight, delta, gate_bias, up_bias, down_bias, options)


def _sharding(x: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, *rest: *_Rest) -> tuple[str, int]:
    options = rest[-1]
    return "mlp_packed" if options.packed else "mlp", down.shape[0]


def _composite(x: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, *rest: *_Rest) -> Tensor:
    delta, gate_bias, up_bias, down_bias, options = rest
    g = _linear(x, gate, gate_bias)
    u = None if up is None else _linear(x, up, up_bias)
    if options.packed:
        g, u = g.chunk(2, -1)
    return _linear(reference.glu(g, u, delta, options.activation), down, down_bias)


@entry(_sharding, _composite)
@gemm("the weights are")
def _mlp(x: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, *rest: *_Rest) -> Tensor:
    delta, *biases, options = rest
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        y: Tensor = Mlp.apply(x, delta, options, gate, up, down, *biases)[0]
        return y
    ffn = _Ffn((gate, up, down, *biases), options, x.dtype)
    y = x.new_empty(x.shape[0], ffn.down.shape[0])
    for rows in _chunks(x.shape[0], options.chunk):
        g, u = ffn.halves(ffn.project(x[rows]))
        ffn.finish(call(raw.glu, g, u, delta, options.activation, options.backend), y[rows])
    return y


class Mlp(Function):
    """The FFN of gain_mlp on x [T, in]: y, and the tensors that it saves, which double backward needs as outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, options: Options, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """x [T, in], delta [n], three weights, three biases -> y [T, out] and g, u (or g and u packed, or nothing)."""
        ctx.set_materialize_grads(False)
        ctx.device_type, ctx.delta_dtype, ctx.options = x.device.type, delta.dtype, options
        ffn = _Ffn(parameters, options, x.dtype)
        y = x.new_empty(x.shape[0], ffn.down.shape[0])
        kept = () if options.recompute else tuple(x.new_empty(x.shape[0], w.shape[0]) for w in ffn.projections)
        for rows in _chunks(x.shape[0], options.chunk):
            projected = ffn.project(x[rows], tuple(part[rows] for part in kept))
            ffn.finish(call(raw.glu, *ffn.halves(projected), delta, options.activation, options.backend), y[rows])
        ctx.save_for_backward(*((x,) if options.recompute else kept), delta, *parameters)
        return y, *kept

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None, *dkept: Tensor | None) -> Gradients:
        """dy [T, out] -> dx, ddelta; dkept is not None only in a double backward."""
        options: Options = ctx.options
        saved = ctx.saved_tensors  # read once: non-reentrant checkpointing recomputes for each read
        kept, delta, parameters = saved[:-7], saved[-7], saved[-6:]
        ffn = _Ffn(parameters, options, kept[0].dtype)
        needs_x, needs_delta = ctx.needs_input_grad[:2]
        if differentiable() or any(part is not None for part in dkept):
            dx, ddelta = _composite_gradients(ffn, dy, dkept, kept, delta)
        elif dy is None:
            dx = ddelta = None
        else:
            dx, ddelta = _gradients(ffn, dy.to(kept[0].dtype), kept, delta, needs_x)
        ddelta = None if ddelta is None or not needs_delta else cast_to(ddelta, ctx.delta_dtype)
        return dx if needs_x else None, ddelta, *(None,) * (1 + len(parameters))


class _Ffn:
    """Weights and biases in the dtype to compute in, x's, and the GEMMs on them."""

    def __init__(self, parameters: Sequence[Tensor | None], options: Options, dtype: torch.dtype) -> None:
        gate, up, down, *biases = (None if p is None else cast_to(p, dtype) for p in parameters)
        assert gate is not None  # gain_mlp has checked
        assert down is not None
        self.options = options
        self.down, self.down_bias = down, biases[2]
        self.projections = (gate,) if up is None else (gate, up)
        self.biases = biases[: len(self.projections)]

    def project(self, x: Tensor, out: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """g and u (or g, or both packed), into ``out`` if given."""
        if not out:
            return tuple(_linear(x, w, b) for w, b in zip(self.projections, self.biases, strict=True))
        for w, b, into in zip(self.projections, self.biases, out, strict=True):
            _linear_into(x, w, b, into)
        return out

    def halves(self, projected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """(gate, up) for the glu ops; up is None without a gate."""
        return halves(projected[0], projected[1] if len(projected) == 2 else None, self.options.packed)

    def finish(self, h: Tensor, into: Tensor) -> None:
        """The down projection."""
        _linear_into(h, self.down, self.down_bias, into)

    def project_back(self, dgate_up: Tensor, into: Tensor) -> None:
        """dx = dg @ Wg + du @ Wu, the second GEMM adding to the first."""
        parts = dgate_up.split([w.shape[0] for w in self.projections], 1)
        torch.mm(parts[0], self.projections[0], out=into)
        for part, w in zip(parts[1:], self.projections[1:], strict=True):
            into.addmm_(part, w)


def _gradients(
    ffn: _Ffn, dy: Tensor, kept: tuple[Tensor, ...], delta: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    options = ffn.options
    dx = dy.new_empty(dy.shape[0], ffn.projections[0].shape[1]) if needs_x else None
    ddelta = None
    for rows in _chunks(dy.shape[0], options.chunk):
        parts = tuple(part[rows] for part in kept)
        gate, up = ffn.halves(ffn.project(parts[0]) if options.recompute else parts)
        dh = dy[rows] @ ffn.down
        if dx is None:
            sums = call(raw.glu_ddelta, dh, gate, up, options.activation, options.backend)
        else:
            dgate_up, sums = call(raw.glu_backward, dh, gate, up, delta, options.activation, options.backend)
            ffn.project_back(dgate_up, dx[rows])
        ddelta = sums if ddelta is None else ddelta + sums
    return dx, ddelta


def _composite_gradients(
    ffn: _Ffn, dy: Tensor | None, dkept: Sequence[Tensor | None], kept: tuple[Tensor, ...], delta: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by differentiable torch calls, on all tokens at once."""
    dprojected: list[Tensor | None] = list(dkept) or [None] * len(ffn.projections)
    ddelta = None
    if dy is not None:
        gate, up = ffn.halves(ffn.project(kept[0]) if ffn.options.recompute else kept)
        dgate_up, ddelta = reference.glu_backward(dy @ ffn.down, gate, up, delta, ffn.options.activation)
        through = dgate_up.split([w.shape[0] for w in ffn.projections], 1)
        dprojected = [t if d is None else d + t for d, t in zip(dprojected, through, strict=True)]
    dx = None
    for part, w in zip(dprojected, ffn.projections, strict=True):
        if part is not None:
            dx = part @ w if dx is None else dx + part @ w
    return dx, ddelta


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _linear_into(x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=into)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=into)


def _chunks(tokens: int, chunk: int | None) -> Iterator[slice]:
    """Slices of at most ``chunk`` tokens; without a chunk one slice of all, also of no tokens."""
    step = tokens if chunk is None else chunk
    for start in range(0, max(tokens, 1), max(step, 1)):
        yield slice(start, min(start + step, tokens))


def _check(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor],
    biases: tuple[Tensor | None, ...],
    delta: Tensor,
    activation: str,
    chunk: int | None,
) -> bool:
    """Whether gate_weight is packed; raises for shapes and dtypes that do not fit."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(map(repr, reference.ACTIVATIONS))}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be a number of tokens, at least 1, or None; got {chunk}")
    gate, up, down = weights
    if gate.dim() != 2 or down.dim() != 2:
        raise ValueError(f"weights must have two dimensions, got {tuple(gate.shape)} and {tuple(down.shape)}")
    n = down.shape[1]
    check_features(x, n, delta, "down_weight.shape[1], the hidden neurons")
    packed = up is None and gate.shape[0] == 2 * n
    if not packed and gate.shape[0] != n:
        raise ValueError(
            f"gate_weight must be [{n}, in], or packed [{2 * n}, in] without up_weight, for down_weight "
            f"{tuple(down.shape)}; got {tuple(gate.shape)}"
        )
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up_weight must have gate_weight's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if x.dim() == 0 or x.shape[-1] != gate.shape[1]:
        raise ValueError(f"x must be [..., in_features={gate.shape[1]}], got shape {tuple(x.shape)}")
    if up is None and biases[1] is not None:
        raise ValueError("up_bias goes with an up_weight")
    check_floating(x=x, delta=delta)
    names = ("gate", "up", "down")
    for name, weight, bias in zip(names, weights, biases, strict=True):
        for kind, parameter in (("weight", weight), ("bias", bias)):
            if parameter is None:
                continue
            check_floating(**{f"{name}_{kind}": parameter})
            check_device(x, parameter, f"{name}_{kind}")
            if parameter.requires_grad:
                raise ValueError(
                    f"{name}_{kind} requires a gradient, but the FFN of a gain is frozen and dW is never formed. Call "
                    "requires_grad_(False) (gain_ops.apply does)."
                )
        if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}_bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
        if weight is not None and weight.dtype != gate.dtype:
            raise TypeError(f"{name}_weight is {weight.dtype} and gate_weight {gate.dtype}: they must agree")
    return packed

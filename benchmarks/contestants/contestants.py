"""Who is compared: a gain by each backend, and what users do instead, all on one weight and one input.

Each is a layer y = f(x) around one frozen weight W [out, in], with its own trained parameters and no others.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants.composed import PASSES, Composed, KeptWeight
from benchmarks.contestants.scaled import Scaled
from gain_ops import BackendUnavailable, GainLinear
from gain_ops.ops import dispatch
from gain_ops.planning.methods import DORA, IA3, LORA, METHODS, Method, by_peft

FROZEN = "frozen linear"  # the floor: every other figure also has a ratio to it
COMPOSED = "composed: x @ W.T, then the pass of scale"
KEPT_WEIGHT = "F.linear(x, W'), W' kept"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to adapt one linear map.

    build(linear) takes a frozen nn.Linear without bias, shares its weight and returns the layer to be called; obstacle(x)
    says why it cannot run on a tensor like x, or None.
    """

    name: str
    backend: str
    build: Callable[[nn.Linear], nn.Module]
    obstacle: Callable[[Tensor], str | None] = lambda x: None


def contestants() -> list[Contestant]:
    """All of them, the frozen linear first; a contestant that is not installed is in the list with the reason."""
    found = [Contestant(FROZEN, "-", _Host)]
    for backend in ("eager", "triton", "cuda"):
        for side, save in (("output", "output"), ("output", "input"), ("input", "auto")):
            kept = "" if side == "input" else f", keeps {'z' if save == 'output' else 'x'}"
            build = partial(GainLinear.from_linear, side=side, save=save, backend=backend)
            found.append(Contestant(f"gain, {side} side{kept}", backend, build, partial(backend_obstacle, backend)))
    passes = partial(backend_obstacle, PASSES)
    return [
        *found,
        Contestant(COMPOSED, PASSES, Composed.from_linear, passes),
        Contestant(KEPT_WEIGHT, PASSES, KeptWeight.from_linear, passes),
        Contestant("F.linear(x, W) * s", "-", Scaled),
        Contestant("torch.compile of F.linear(x, W) * s", "-", _compiled),
        Contestant("F.linear(x, s[:, None] * W)", "-", ScaledWeight),
        *(Contestant(f"PEFT {name}", "-", _by_peft(method), _missing("peft")) for name, method in _PEFT.items()),
        Contestant("QuACK's epilogues, output side, keeps x", "-", _quack, _quack_obstacle),
        *(Contestant(name, "-", _never, partial(_say, reason)) for name, reason in _NOT_COMPARED.items()),
    ]


class ScaledWeight(Scaled):
    """The scale on W, computed again in every forward; autograd then forms dW to reduce it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.s[:, None] * self.linear.weight)


# listed anyway, since a reader who knows them will look for them
_NOT_COMPARED = {
    "Liger": "does not apply: it fuses no scaled linear",
}

_PEFT = {
    f"{IA3}, output side": METHODS[IA3],
    f"{IA3}, input side": by_peft(f"{IA3}, input side", "IA3Config", feedforward_modules=["linear"]),
    LORA: METHODS[LORA],
    DORA: METHODS[DORA],
}


def _never(linear: nn.Linear) -> nn.Module:
    raise AssertionError("a contestant with an obstacle is not built")


def _say(reason: str, x: Tensor) -> str:
    return reason


def _compiled(linear: nn.Linear) -> nn.Module:
    return cast(nn.Module, torch.compile(Scaled(linear)))


def _quack(linear: nn.Linear) -> nn.Module:
    from benchmarks.contestants.quack_peer import QuackScaled

    return QuackScaled(linear)


def _quack_obstacle(x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return "QuACK's kernels need a GPU"
    return _missing("quack")(x)


def _missing(package: str) -> Callable[[Tensor], str | None]:
    return lambda x: None if importlib.util.find_spec(package) else f"{package} is not installed"


def backend_obstacle(backend: str, x: Tensor) -> str | None:
    """Why a backend cannot run on a tensor like x, or None."""
    try:
        dispatch.implementation(backend, x)
    except BackendUnavailable as reason:
        return str(reason)
    return None


class _Host(nn.Module):
    """The layer, and a model of this one layer for PEFT."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def _by_peft(method: Method) -> Callable[[nn.Linear], nn.Module]:
    def build(linear: nn.Linear) -> nn.Module:
        host = _Host(linear)
        method.put(host, ["linear"])
        return host

    return build

"""A raw op is called past the dispatcher only where nothing listens to it."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gain_ops import GainLinear, gain_linear
from gain_ops.ops import calling, raw
from gain_ops.ops.calling import call, is_heard

X, DELTA = torch.randn(2, 3), torch.randn(3)


class Subclass(Tensor):
    """One that only torch functions see."""


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    """The names of the ops that cross the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


PLAIN: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "plain tensors": lambda: (X, DELTA),
    "a Parameter": lambda: (X, nn.Parameter(DELTA)),
    "what requires a gradient": lambda: (X.clone().requires_grad_(), DELTA),
    "views": lambda: (X.t().contiguous().t(), DELTA.flip(0)),
    "expanded": lambda: (X[:1].expand(4, 3), DELTA),
}
HEARD: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "a negative x": lambda: (torch._neg_view(X), DELTA),
    "a negative delta": lambda: (X, torch._neg_view(DELTA)),
    "a zero tensor": lambda: (torch._efficientzerotensor(2, 3), DELTA),
    "meta": lambda: (X.to("meta"), DELTA.to("meta")),
    "a subclass as x": lambda: (X.as_subclass(Subclass), DELTA),
    "a subclass as delta": lambda: (X, DELTA.as_subclass(Subclass)),
    "fake tensors outside their mode": lambda: tuple(map(FakeTensorMode().from_tensor, (X, DELTA))),
    "a functional tensor": lambda: (torch._to_functional_tensor(X), torch._to_functional_tensor(DELTA)),
}
LISTENING: dict[str, Callable[[], Any]] = {
    "a mode of dispatch": Seen,
    "a mode of functions": Functions,
    "a default device": lambda: torch.device("cpu"),
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "a profiler": lambda: torch.autograd.profiler.profile(use_cpu=True),
}
SILENT: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "hooks of saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_tensors_are_not_heard(case: str) -> None:
    assert not is_heard(*PLAIN[case](), None, "eager")


@pytest.mark.parametrize("case", HEARD)
def test_tensors_with_other_keys_are(case: str) -> None:
    assert is_heard(*HEARD[case](), "eager")


@pytest.mark.parametrize("case", LISTENING)
def test_what_listens_hears(case: str) -> None:
    with LISTENING[case]():
        assert is_heard(X, DELTA, "eager")
    assert not is_heard(X, DELTA, "eager")


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("case", SILENT)
def test_what_does_not_listen_does_not(case: str) -> None:
    with SILENT[case]():
        assert not is_heard(X, DELTA, "eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_and_tracers_hear() -> None:
    heard = []

    def f(x: Tensor) -> Tensor:
        heard.append(is_heard(x, DELTA, "eager"))
        return x * 2

    torch.func.vmap(f)(X)
    torch.func.grad(lambda x: f(x).sum())(X)
    torch.func.functionalize(f)(X)
    make_fx(f)(X)
    with contextlib.suppress(Exception):
        torch.jit.trace(f, X, check_trace=False)
    assert heard == [True] * 5


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that ``call`` runs itself, by name."""
    names: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            names.append(function.__name__)
            return function(*arguments)

        return run

    monkeypatch.setattr(raw, "FUNCTIONS", {op: noting(function) for op, function in raw.FUNCTIONS.items()})
    return names


def test_the_result_is_that_of_the_op(ran: list[str]) -> None:
    assert torch.equal(call(raw.scale, X, DELTA, "eager"), raw.scale(X, DELTA, "eager"))
    negative = torch._neg_view(X)
    assert torch.equal(call(raw.scale, negative, DELTA, "eager"), raw.scale(-X, DELTA, "eager"))
    assert ran == ["scale"]


def test_every_op_has_its_function() -> None:
    ops = {name: op for name, op in vars(raw).items() if isinstance(op, torch._ops.OpOverload)}
    assert {op: name for name, op in ops.items()} == {op: run.__name__ for op, run in raw.FUNCTIONS.items()}


def _step(layer: GainLinear) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()


def _layer() -> GainLinear:
    return GainLinear.from_linear(nn.Linear(8, 8, bias=False))


def test_a_layer_s_ops_cross_the_dispatcher_for_a_listener_alone(ran: list[str]) -> None:
    layer = _layer()
    _step(layer)
    assert ran == ["linear_z", "backward"]
    ran.clear()
    with Seen() as seen:
        _step(layer)
    assert [name for name in seen.names if name.startswith("gain_ops")] == [
        "gain_ops.linear_z.default",
        "gain_ops.backward.default",
    ]
    assert ran == []


def test_a_profile_has_the_ops(ran: list[str]) -> None:
    with torch.autograd.profiler.profile(use_cpu=True) as profile:
        _step(_layer())
    assert {"gain_ops::linear_z", "gain_ops::backward"} <= {event.key for event in profile.key_averages()}
    assert ran == []


def test_a_batched_backward_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """vmap over a backward: tensors look plain, and are not."""
    asked: list[bool] = []
    monkeypatch.setattr(calling, "is_heard", lambda *of: asked.append(is_heard(*of)) or asked[-1])
    x = torch.randn(2, 8, requires_grad=True)
    layer = _layer()
    y = gain_linear(x, layer.weight, layer.delta)
    with contextlib.suppress(RuntimeError):
        torch.autograd.grad(y, x, torch.randn(3, 2, 8), is_grads_batched=True)
    assert asked == [False, True]

"""pytest-benchmark over the public functions: functions x backends x shapes x {forward, backward, both}.

python -m pytest benchmarks/suites/bench_ops.py [-k "triton and backward and 8192"] [--benchmark-json=FILE]

The time is the wall time of a call and a synchronisation, with cold caches on CUDA. It includes the host's launches, so use it
to compare commits (--benchmark-compare). Quote figures of benchmarks/suites/ops.py and layers.py, which time the device. Shapes
are real ones in bf16 on CUDA, and small ones in fp32 on a CPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contestants import sites
from benchmarks.harness import gate, timing
from gain_ops import BackendUnavailable, gain_linear, gain_scale
from gain_ops.ops import dispatch

pytest.importorskip("pytest_benchmark")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SITES = sites.SITES if ON_GPU else sites.SMALL_SITES
TOKENS = sites.TOKENS if ON_GPU else sites.SMALL_TOKENS
ROUNDS = 30 if ON_GPU else 10

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "gain_linear-output-keeps-z": partial(gain_linear, side="output", save="output"),
    "gain_linear-output-keeps-x": partial(gain_linear, side="output", save="input"),
    "gain_linear-input": partial(gain_linear, side="input"),
    "gain_scale": lambda x, weight, delta, backend: gain_scale(x, delta, backend=backend),
}


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name.replace(" ", "-"))
def test_op(benchmark: Any, site: sites.Site, tokens: int, function: str, backend: str, direction: str) -> None:
    """One function, backend, shape and direction."""
    x, weight, dy = gate.draw(site, tokens, DTYPE, DEVICE)
    try:
        dispatch.implementation(backend, x)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    x.requires_grad_()
    on_input_side = function in ("gain_linear-input", "gain_scale")
    delta = gate.NOISE * torch.randn(site.in_features if on_input_side else site.out_features, device=DEVICE)
    delta.requires_grad_()
    if function == "gain_scale":
        dy = torch.randn_like(x)
    sweep = timing.cold_l2(DEVICE)

    def forward() -> Tensor:
        return FUNCTIONS[function](x, weight, delta, backend=backend)

    def backward(y: Tensor) -> object:
        return torch.autograd.grad(y, (x, delta), dy)

    calls: dict[str, Callable[..., object]] = {
        "forward": forward,
        "backward": backward,
        "both": lambda: backward(forward()),
    }

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = (forward(),) if direction == "backward" else ()
        sweep()
        _synchronize()
        return arguments, {}

    def timed(*arguments: Tensor) -> object:
        result = calls[direction](*arguments)
        _synchronize()
        return result

    benchmark.extra_info.update(dtype=str(DTYPE), in_features=site.in_features, out_features=site.out_features)
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=2)


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()

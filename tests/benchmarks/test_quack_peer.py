"""The QuACK peer against a stand-in for the package that does what its epilogue contract says, in torch."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contestants import quack_peer
from benchmarks.contestants.contestants import Contestant
from benchmarks.contestants.sites import Site
from benchmarks.harness import gate


def _gemm_epilogue(ops: dict[str, Any], reduces: dict[str, Any] | None = None) -> Callable[..., Any]:
    def decorate(f: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Tensor]]:
        def call(a: Tensor, b: Tensor, **operands: Tensor) -> dict[str, Tensor]:
            rows = {name: operands[name][:, None, :] if name in ops else operands[name].float() for name in operands}
            made = f((a.float() @ b.float()), **rows)
            sums = {name: (made[name][0] * made[name][1]).sum(1) for name in reduces or {}}
            return {"D": made["D"].to(a.dtype)} | sums

        return call

    return decorate


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> None:
    package, epilogue, ops = (ModuleType(name) for name in ("quack", "quack.epilogue", "quack.epilogue.ops"))
    epilogue.gemm_epilogue = _gemm_epilogue
    ops.RowVecLoad = lambda name: name
    ops.RowVecReduce = lambda name, scaled: name
    for module in (package, epilogue, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    epilogues = quack_peer._epilogues
    epilogues.cache_clear()
    yield
    epilogues.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_the_gained_map_and_its_gradients(quack: None, dtype: torch.dtype) -> None:
    peer = Contestant("QuACK", "-", quack_peer.QuackScaled)
    assert gate.failures(peer, Site("a site", 24, 40), 33, dtype, torch.device("cpu")) == []


def test_the_gate_refuses_it_where_the_package_does_something_else(
    quack: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = quack_peer._epilogues()

    def wrong(*arguments: Tensor, **operands: Tensor) -> dict[str, Tensor]:
        made = backward(*arguments, **operands)
        return made | {"ds": 1.01 * made["ds"]}

    monkeypatch.setattr(quack_peer, "_epilogues", lambda: (forward, wrong))
    peer = Contestant("QuACK", "-", quack_peer.QuackScaled)
    found = gate.failures(peer, Site("a site", 24, 40), 33, torch.float32, torch.device("cpu"))
    assert any("gradient of the gain" in failure for failure in found)

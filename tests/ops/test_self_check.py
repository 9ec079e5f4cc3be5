"""The check at first use: faults that are planted in kernels are found, and a simpler way takes their place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from gain_ops import gain_linear, reference
from gain_ops.backends import machine
from gain_ops.backends.interface import OPS
from gain_ops.kernels import backend as triton_backend
from gain_ops.kernels import linear_backward, linear_forward, rows
from gain_ops.ops import dispatch, self_check
from gain_ops.ops.self_check import Checked
from gain_ops.testing import ARGUMENTS, tensors
from gain_ops.utils.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that remembers, and a problem that the interpreter computes in tenths of a second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GAIN_OPS_SELF_CHECK", raising=False)
    monkeypatch.setattr(self_check, "SIZES", (19, 24, 40))
    return machine.cache_folder() / "self_check.json"


def _checked(dtype: torch.dtype = torch.float16, backend: Any = triton_backend, simpler: Any = reference) -> Checked:
    return Checked(backend, simpler, "triton", dtype)


def _arguments(op: str, dtype: torch.dtype = torch.float16) -> list[Any]:
    given = tensors(8, 16, 24, dtype)
    return [given[name] for name in ARGUMENTS[op]]


def _equal(found: Any, expected: Any) -> bool:
    pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the interpreter is off")
@pytest.mark.parametrize("op", OPS)
def test_every_op_of_triton_is_right_and_remembered(op: str, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    checked = _checked()
    arguments = _arguments(op)
    state = torch.get_rng_state()
    assert _equal(getattr(checked, op)(*arguments), getattr(triton_backend, op)(*arguments))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers stay the same"
    assert getattr(checked, op) is getattr(triton_backend, op), "later calls pay nothing"
    assert json.loads(kept.read_text()) == {machine.environment(CPU): [f"{op} float16 triton"]}
    assert not caplog.records


@triton.jit
def _gain_without_its_one(delta, cols, N):
    return tl.load(delta + cols, mask=cols < N, other=0.0).to(tl.float32)


@triton.jit
def _stored_a_row_too_low(out, tile, row, col, M, N, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, USE_TMA: tl.constexpr):
    out.store([row + 1, col], tile.to(out.dtype))


def _first_partials_alone(partials: torch.Tensor) -> torch.Tensor:
    return partials[0].clone()


def _refused(*_: Any) -> None:
    raise RuntimeError("out of resource: shared memory\nand more")


# the op, the module of its kernel, what is replaced there, by what, and what the warning says
FAULTS = [
    pytest.param("linear", linear_forward, "load_gain", _gain_without_its_one, "relative error", id="gain"),
    pytest.param("linear_z", linear_forward, "store_tile", _stored_a_row_too_low, "relative error", id="rows"),
    pytest.param("backward_recompute", linear_backward, "sum_partials", _first_partials_alone, "relative", id="sums"),
    pytest.param("backward_input", linear_backward.launching, "launch", _refused, "shared memory", id="refused"),
    pytest.param("backward", rows, "load_gain", _gain_without_its_one, "relative error", id="a pass"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="faults are planted in interpreted kernels")
@pytest.mark.parametrize(("op", "module", "name", "fault", "said"), FAULTS)
def test_a_planted_fault_is_found_and_a_simpler_way_takes_its_place(
    op: str,
    module: Any,
    name: str,
    fault: Any,
    said: str,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, name, fault)
    checked, arguments = _checked(), _arguments(op)
    for _ in range(2):
        assert _equal(getattr(checked, op)(*arguments), getattr(reference, op)(*arguments))
    (warning,) = caplog.records
    for part in (op, "float16", "triton", said, "Please report", machine.environment(CPU)):
        assert part in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert not kept.exists(), "what was wrong is checked again in the next process"


def test_the_small_problem_is_like_the_call() -> None:
    x, weight, delta, bias = _arguments("linear")
    *_, none = self_check.small("linear", (x, weight, delta, None), torch.float16, CPU)
    _, transposed, _, given = self_check.small(
        "linear", (x, weight.t().contiguous().t(), delta, bias), torch.float16, CPU
    )
    assert none is None
    assert given is not None
    assert transposed.stride() == (1, self_check.SIZES[2])
    glu = _arguments("glu")
    assert self_check.small("glu", (*glu[:3], "relu2"), torch.float16, CPU)[3] == "relu2"


def _counted(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    judged: list[str] = []

    class Judge:
        def __init__(self, op: str, arguments: Any) -> None:
            judged.append(op)

        def mismatch(self, run: Any) -> None:
            return None

    monkeypatch.setattr(self_check, "Judge", Judge)
    return judged


@pytest.mark.parametrize(("asked", "times"), [("0", 0), ("1", 1), ("always", 2), (None, 1)])
def test_how_often_is_asked(asked: str | None, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked is not None:
        monkeypatch.setenv("GAIN_OPS_SELF_CHECK", asked)
    judged = _counted(_checked(), monkeypatch)
    for _ in range(2):  # two processes
        checked = _checked(backend=reference)
        for _ in range(3):
            checked.scale(*_arguments("scale"))
    assert len(judged) == times


def test_another_dtype_way_or_machine_is_checked_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = _counted(_checked(), monkeypatch)
    _checked(backend=reference).scale(*_arguments("scale"))
    _checked(torch.float32, backend=reference).scale(*_arguments("scale", torch.float32))
    Checked(reference, reference, "triton with another tile", torch.float16).scale(*_arguments("scale"))
    monkeypatch.setattr(machine, "environment", lambda device: "a newer driver")
    _checked(backend=reference).scale(*_arguments("scale"))
    assert len(judged) == 4


def test_a_value_that_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAIN_OPS_SELF_CHECK", "yes")
    with pytest.raises(UsageError, match="GAIN_OPS_SELF_CHECK='yes': expected 0, 1 or always"):
        _checked(backend=reference).scale(*_arguments("scale"))


def test_a_folder_that_cannot_be_written_only_means_another_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    checked = _checked(backend=reference)
    assert _equal(checked.scale(*_arguments("scale")), checked.scale(*_arguments("scale"))) is False
    assert checked.scale is reference.scale


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = _counted(_checked(), monkeypatch)
    capturing = [True]
    monkeypatch.setattr(self_check, "_capturing", lambda device: capturing[0])
    checked = _checked(backend=reference)
    checked.scale(*_arguments("scale"))
    assert not judged
    capturing[0] = False
    checked.scale(*_arguments("scale"))
    assert judged == ["scale"], "the first call outside is checked"


@pytest.mark.gpu
def test_auto_is_checked_on_a_gpu_and_a_capture_is_not_broken() -> None:
    dispatch.forget()
    x, delta = torch.randn(64, 64, device="cuda"), torch.zeros(64, device="cuda")
    weight = torch.randn(64, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    expected = gain_linear(x, weight, delta)  # kernels are compiled outside a capture
    dispatch.forget()
    with torch.cuda.graph(graph):
        y = gain_linear(x, weight, delta)
    graph.replay()
    assert torch.equal(y, expected)

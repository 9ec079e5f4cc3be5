import dataclasses

import pytest
import torch
from torch import Tensor, nn

from benchmarks.contestants.contestants import Contestant, contestants
from benchmarks.contestants.scaled import Scaled
from benchmarks.contestants.sites import Site
from benchmarks.harness import gate
from gain_ops import GainLinear, reference
from gain_ops.ops import raw

CPU = torch.device("cpu")
SITE = Site("small", 48, 32)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def by_name(name: str, backend: str) -> Contestant:
    return next(c for c in contestants() if (c.name, c.backend) == (name, backend))


def failures(build, dtype: torch.dtype = torch.float32, site: Site = SITE) -> list[str]:
    return gate.failures(Contestant("broken", "-", build), site, 40, dtype, CPU)


class Wrong(torch.autograd.Function):
    """The identity with something wrong on the way there or back."""

    @staticmethod
    def forward(ctx, y: Tensor, there: float, back: float) -> Tensor:
        ctx.back = back
        return y * there

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy * ctx.back, None, None


class Broken(GainLinear):
    there = back = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return Wrong.apply(super().forward(x), self.there, self.back)


def broken(there: float = 1.0, back: float = 1.0):
    kind = type("Broken", (Broken,), {"there": there, "back": back})
    return lambda linear: kind.from_linear(linear, backend="eager")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", [SITE, Site("square", 64, 64)])
def test_who_is_right_passes(dtype: torch.dtype, site: Site) -> None:
    seen = []
    for contestant in contestants():
        if "compile" in contestant.name:  # two seconds of C++; test_layers.py has it without
            continue
        if contestant.obstacle(torch.empty(0, dtype=dtype)) is None:
            seen.append(contestant.name)
            assert gate.failures(contestant, site, 40, dtype, CPU) == [], contestant
    assert {"frozen linear", "gain, input side", "F.linear(x, W) * s"} <= set(seen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_off_by_one_percent(dtype: torch.dtype) -> None:
    assert failures(broken(), dtype) == []
    assert [f.split(":")[0] for f in failures(broken(there=1.01), dtype)] == ["y"]
    assert [f.split(":")[0] for f in failures(broken(back=1.01), dtype)] == ["dx", "gradient of the gain"]


def test_a_sign_in_a_gradient() -> None:
    assert len(failures(broken(back=-1.0))) == 2

    class Negated(GainLinear):
        def forward(self, x: Tensor) -> Tensor:
            # the gain's own value, and its gradient with the wrong sign
            flipped = 2 * self.delta.detach() - self.delta
            return torch.nn.functional.linear(x, self.weight) * (1 + flipped)

    (found,) = failures(lambda linear: Negated.from_linear(linear))
    assert found.startswith("gradient of the gain")


def test_nan() -> None:
    assert len(failures(broken(there=float("nan")))) == 1

    class OneNan(nn.Module):
        """One element of y among many: a norm that skipped NaN would not see it."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y.index_fill(0, torch.tensor([3]), float("nan"))

    assert any(f.startswith("y:") for f in failures(OneNan))


def test_a_gain_that_is_left_out() -> None:
    class Forgets(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.s.detach().mean()

    assert failures(Forgets)  # its gradient is missing: autograd says so

    class Ignores(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + 0 * self.s

    assert any(f.startswith("y:") for f in failures(Ignores))


def test_a_dtype_and_a_shape() -> None:
    class Wide(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    assert any("dtype torch.float32, expected torch.bfloat16" in f for f in failures(Wide, torch.bfloat16))

    class Short(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:-1]

    assert "raised" in failures(Short)[0]  # autograd refuses dy


def test_a_forward_alone_is_held_to_its_output() -> None:
    class Detached(Scaled):
        wrong = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach() * self.wrong

    assert failures(Detached) == []
    assert len(failures(type("Worse", (Detached,), {"wrong": 1.01}))) == 1


def test_a_raw_op(monkeypatch: pytest.MonkeyPatch) -> None:
    dy, z, delta = torch.randn(40, 32), torch.randn(40, 32), 0.3 * torch.randn(32)
    assert gate.op_failures("backward", (dy, z, delta), ["eager"]) == {"eager": []}

    def wrong(dy: Tensor, z: Tensor, delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        dz, ddelta = reference.backward(dy, z, delta)
        return dz, ddelta * 1.01

    monkeypatch.setattr(raw, "backward", wrong)
    (found,) = gate.op_failures("backward", (dy, z, delta), ["eager"])["eager"]
    assert found.startswith("backward[1]")


def test_the_frozen_linear_may_not_be_changed_by_a_contestant() -> None:
    frozen = by_name("frozen linear", "-")

    class Doubles(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear
            with torch.no_grad():
                linear.weight.mul_(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    found = gate.failures(dataclasses.replace(frozen, build=Doubles), SITE, 40, torch.float32, CPU)
    assert found == ["the shared weight has been changed"]

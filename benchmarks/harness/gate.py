"""No figure on a red gate: a contestant first has to give the right outputs and gradients, at the measured size.

Against the equations in fp64, an error may be at most twice that of plain torch in the same dtype: the rule of the tests. A
gain is set away from 1 first, so that a contestant that ignores it fails; LoRA and DoRA are the frozen map at their start, and
are compared with it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants.contestants import Contestant
from benchmarks.contestants.scaled import Scaled
from benchmarks.contestants.sites import Site
from benchmarks.harness.timing import first_line
from gain_ops import reference
from gain_ops.layers.gained import Gained
from gain_ops.ops import raw
from gain_ops.testing import assert_no_worse_than_torch

NOISE = 0.3


@dataclasses.dataclass(frozen=True)
class Trained:
    """The vector that a layer trains: ``gain = offset + parameter`` on one side."""

    parameter: nn.Parameter
    side: str
    offset: int


def trained_gain(layer: nn.Module) -> Trained | None:
    """The gain of a layer, or None for one that trains something else (or nothing)."""
    for module in layer.modules():  # torch.compile and PEFT wrap
        if isinstance(module, Gained):
            return Trained(module.delta, module.side, 1)
        if isinstance(module, Scaled):
            return Trained(module.s, "output", 0)
        if hasattr(module, "ia3_l"):
            return Trained(
                cast(nn.ParameterDict, module.ia3_l)["default"], "input" if module.is_feedforward else "output", 0
            )
    return None


def frozen_linear(weight: Tensor) -> nn.Linear:
    """An nn.Linear without bias around a weight, which is shared and needs no gradient."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def draw(site: Site, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random x [T, in], W [out, in] and dy [T, out]; outputs are of the size of x's elements."""
    shapes = ((tokens, site.in_features), (site.out_features, site.in_features), (tokens, site.out_features))
    x, weight, dy = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    return x, weight.div_(site.in_features**0.5), dy


class Judge:
    """Holds contestants to one x [T, in], W [out, in] and dy [T, out]; what is true of these is computed once."""

    def __init__(self, site: Site, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.x, self.weight, self.dy = draw(site, tokens, dtype, device)
        features = {"output": site.out_features, "input": site.in_features}
        # exact in x's dtype, and so near 1 that gain - 1 is exact: one truth for a vector of any dtype, delta or gain
        self._gains = {
            side: (1 + NOISE * torch.randn(n, device=device)).clamp(0.5, 2).to(dtype) for side, n in features.items()
        } | {None: torch.ones(site.out_features, dtype=dtype, device=device)}
        self._truths: dict[str | None, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def failures(self, contestant: Contestant) -> list[str]:
        """What is wrong with its y, dx and trained gain's gradient, in words; an empty list where nothing is.

        One whose y carries no gradient is held to its y.
        """
        weight = self.weight.clone()
        try:
            layer = contestant.build(frozen_linear(weight))
            trained = trained_gain(layer)
            if trained is not None:
                gain = self._gains[trained.side].to(trained.parameter.dtype) - trained.offset
                with torch.no_grad():
                    trained.parameter.copy_(gain.view_as(trained.parameter))
            _poison(self.x, self.dy, self.dy)
            results = _results(layer, self.x, self.dy, trained)
        except Exception as reason:  # whoever raises gets no figure, and the others go on
            return [f"raised {first_line(reason)}"]
        if not torch.equal(weight, self.weight):
            return ["the shared weight has been changed"]
        try:
            truth, size = self._truth(None if trained is None else trained.side)
            plain = self._plain(trained)
            names = list(results)
            return compare(names, *([by_name[name] for name in names] for by_name in (results, plain, truth, size)))
        except torch.OutOfMemoryError as reason:  # fp64 takes four times what is measured
            return [f"not known to be right: {first_line(reason)}"]

    def _truth(self, side: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The equations in fp64, and on absolute values, where x's dtype will do."""
        if side not in self._truths:
            x, weight, dy, gain = self.x, self.weight, self.dy, self._gains[side]
            exact = _equations(x.double(), weight.double(), dy.double(), gain.double(), side)
            self._truths[side] = exact, _equations(x.abs(), weight.abs(), dy.abs(), gain.abs(), side)
        return self._truths[side]

    def _plain(self, trained: Trained | None) -> dict[str, Tensor]:
        """What autograd makes of the lines that one writes first, in the dtypes of the contestant."""
        x = self.x.detach().requires_grad_()
        if trained is None:
            y = F.linear(x, self.weight)
            return {"y": y.detach(), "dx": torch.autograd.grad(y, x, self.dy)[0]}
        vector = trained.parameter.detach().flatten().requires_grad_()
        gain = trained.offset + vector
        if trained.side == "input":
            y = F.linear((x * gain).to(x.dtype), self.weight)
        else:
            y = (F.linear(x, self.weight) * gain).to(x.dtype)
        dx, dgain = torch.autograd.grad(y, (x, vector), self.dy)
        return {"y": y.detach(), "dx": dx, "gradient of the gain": dgain}


def failures(contestant: Contestant, site: Site, tokens: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What is wrong with one contestant; see Judge.failures()."""
    return Judge(site, tokens, dtype, device).failures(contestant)


def op_failures(name: str, arguments: Sequence[Any], backends: Sequence[str]) -> dict[str, list[str]]:
    """What is wrong with the results of a raw op by each backend, in words; empty lists where nothing is."""
    calls = {backend: functools.partial(getattr(raw, name), *arguments, backend) for backend in backends}
    return call_failures(name, getattr(reference, name), arguments, calls)


def call_failures(
    name: str,
    equation: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Any],
    calls: Mapping[str, Callable[[], Tensor | tuple[Tensor, ...]]],
) -> dict[str, list[str]]:
    """What is wrong with the results of several calls that are to be ``equation(*arguments)``, in words, by their names."""

    def referenced(of: Sequence[Any]) -> list[Tensor]:
        return _as_list(equation(*of))

    if not calls:
        return {}
    plain = referenced(arguments)
    truth = referenced([a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments])
    size = referenced([a.abs() if isinstance(a, Tensor) else a for a in arguments])
    names = [f"{name}[{i}]" for i in range(len(truth))]
    found: dict[str, list[str]] = {}
    for caller, call in calls.items():
        _poison(*plain)
        try:
            results = _as_list(call())
        except Exception as reason:  # whoever raises gets no figure, and the others go on
            found[caller] = [f"raised {first_line(reason)}"]
            continue
        found[caller] = compare(names, results, plain, truth, size)
    return found


def _results(layer: nn.Module, x: Tensor, dy: Tensor, trained: Trained | None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y: Tensor = layer(x)
    if not y.requires_grad:
        return {"y": y}
    if trained is None:
        return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}
    dx, dgain = torch.autograd.grad(y, (x, trained.parameter), dy)
    return {"y": y.detach(), "dx": dx, "gradient of the gain": dgain.flatten()}


def _equations(x: Tensor, weight: Tensor, dy: Tensor, gain: Tensor, side: str | None) -> dict[str, Tensor]:
    """Lines (1) to (7) of gain_ops/reference.py, written out again: the truth shares no code with what it judges."""
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum over tokens overflows fp16
    if side == "input":
        y, back = (x * gain) @ weight.T, dy @ weight
        return {"y": y, "dx": gain * back, "gradient of the gain": back.mul_(x).sum(0, dtype=wide)}
    z = x @ weight.T
    return {"y": gain * z, "dx": (dy * gain) @ weight, "gradient of the gain": z.mul_(dy).sum(0, dtype=wide)}


def _poison(*like: Tensor) -> None:
    """Leave NaN in memory that the allocator hands out next, for outputs that nobody writes."""
    if like[0].is_cuda:
        torch.cuda.empty_cache()  # a block that some earlier right result has left would do as well
    filled = [torch.full_like(t, torch.nan) for t in like]
    del filled


def compare(
    names: Sequence[str],
    results: Sequence[Tensor],
    plain: Sequence[Tensor],
    truth: Sequence[Tensor],
    size: Sequence[Tensor],
) -> list[str]:
    """What is wrong with results, in words, by the rule of the tests; ``size`` are the same sums of absolute values."""
    found = []
    for name, result, torchs, exact, magnitude in zip(names, results, plain, truth, size, strict=True):
        if result.dtype != torchs.dtype:
            found.append(f"{name}: dtype {result.dtype}, expected {torchs.dtype}")
        try:
            assert_no_worse_than_torch(name, result, torchs, exact, magnitude)
        except AssertionError as reason:
            found.append(str(reason))
    return found


def _as_list(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]

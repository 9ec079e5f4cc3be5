"""One decoder block of true size with random weights, forward and backward: the full block, and its gained linears alone.

The frozen block, gains by each backend and the peers, all on the same layers, take turns on one input. ``forward+backward`` is
the full block with its attention and norms. ``forward+backward of the linears`` is the block's layers alone, each on an input
of its own, where nothing dilutes the cost of a gain.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.contestants import models
from benchmarks.contestants.contestants import backend_obstacle
from benchmarks.contestants.scaled import Scaled
from benchmarks.contestants.sites import ARCHITECTURES, Architecture
from benchmarks.harness import gate, timing
from benchmarks.harness.results import Row, environment
from benchmarks.suites import layers
from gain_ops.layers.linears import sizes
from gain_ops.models.sites import pattern_sites, preset_sites
from gain_ops.planning import methods
from gain_ops.planning.methods import FROZEN, IN_MODEL_DTYPE

TOKENS = 8192
SEED = 0
VOCABULARY = 64  # of a model whose block alone is called
GATE_TOKENS = 256  # attention in fp64 has no kernel but the one that forms [heads, T, T]
WHOLE, LINEARS = "forward+backward", "forward+backward of the linears"
WALL = "wall time of forward+backward"
IN_A_ROW = 8  # blocks between two waits for the device, as in a step of a model
WALL_TOKENS = 2048  # few, where the host can be what is waited for
GAIN, IA3, LORA = "gain", f"PEFT {methods.IA3}", f"PEFT {methods.LORA}"
LORA_16, COMPILED = LORA + IN_MODEL_DTYPE, "torch.compile of F.linear(x, W) * s"


@dataclasses.dataclass(frozen=True)
class Place:
    """A block and the layers in it that take a gain; bars: what must and should be reached (targets.py)."""

    architecture: Architecture
    everywhere: bool
    bars: tuple[float, float]

    @property
    def site(self) -> str:
        """The row's site."""
        return (
            f"{self.architecture.name} block, gains on {'every linear' if self.everywhere else 'o_proj and down_proj'}"
        )

    def names(self, model: nn.Module) -> list[str]:
        """The layers, of the model's only block, by their names in the model."""
        block = models.blocks(model)[0]
        inside = {id(module) for module in block.modules()}
        found = pattern_sites(model, [".*"]) if self.everywhere else preset_sites(model, "gain-ffn").sites
        return [site.name for site in found if id(site.module) in inside]


PLACES = (
    Place(ARCHITECTURES["Llama-3-8B"], False, (1.03, 1.01)),
    Place(ARCHITECTURES["Llama-3-8B"], True, (1.12, 1.05)),
    Place(ARCHITECTURES["GPT-2 Large"], True, (1.30, 1.10)),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """Who adapts the layers of these names, in place; package: what it needs beside transformers."""

    name: str
    backend: str
    put: Callable[[nn.Module, list[str]], object]
    package: str = "transformers"

    def obstacle(self, x: Tensor) -> str | None:
        """Why it cannot run on a tensor like x, or None."""
        missing = [name for name in ("transformers", self.package) if importlib.util.find_spec(name) is None]
        if missing:
            return f"{missing[0]} is not installed"
        return None if self.backend == "-" else backend_obstacle(self.backend, x)


class _ScaledModule(Scaled):
    """``base(x) * s``: the obvious code, around a linear map of either kind."""

    def __init__(self, base: nn.Module, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        (_, features), weight = cast(tuple[int, int], sizes(base)), cast(Tensor, base.weight)
        self.base = base
        self.s = nn.Parameter(torch.ones(features, dtype=dtype or weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.base(x) * self.s).to(x.dtype)
        return y


def _scaled(model: nn.Module, names: list[str], compiled: bool = False, dtype: torch.dtype | None = None) -> None:
    """dtype: of the scale; the weight's, if not given."""
    model.requires_grad_(False)
    for name in names:
        layer: Any = _ScaledModule(model.get_submodule(name), dtype)
        parent, _, last = name.rpartition(".")
        # dynamic: the gate's fewer tokens must not make it compile for any number of them
        setattr(model.get_submodule(parent), last, torch.compile(layer, dynamic=False) if compiled else layer)


_WAYS = methods.METHODS
METHODS = (
    Method(FROZEN, "-", _WAYS[FROZEN].put),
    *(Method(GAIN, backend, partial(_WAYS["gain"].put, backend=backend)) for backend in ("eager", "triton", "cuda")),
    Method(IA3, "-", _WAYS[methods.IA3].put, "peft"),
    Method(LORA, "-", _WAYS[methods.LORA].put, "peft"),
    Method(LORA_16, "-", _WAYS[methods.LORA + IN_MODEL_DTYPE].put, "peft"),
    Method(COMPILED, "-", partial(_scaled, compiled=True)),
)

TIMED_BY_WALL = tuple(method for method in METHODS if method.name in (FROZEN, GAIN, LORA_16))


def rows(
    places: Sequence[Place],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    *,
    methods: Sequence[Method] = METHODS,
    graph: bool = True,
    wall: bool = False,
) -> Iterator[Row]:
    """Rows WHOLE and LINEARS in us of every method, and each ``/ frozen`` as a ratio.

    Who cannot run, or does not pass the gate, gets one row without a figure and the reason in its note. budget_s: seconds for
    all places; what is in it, and the rest, is as in layers.rows(). With wall, rows WALL alone: without CUDA graphs, by the
    host's clock.
    """
    # seven modules share one forward, which is compiled for each of their shapes
    with torch._dynamo.config.patch(recompile_limit=64):
        for place, left in timing.shared_out(places, budget_s):
            torch.compiler.reset()
            yield from _place_rows(place, tokens, dtype, device, left, methods, graph, wall)
            layers.free_memory(device)


def _place_rows(
    place: Place,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    left: Callable[[], float],
    methods: Sequence[Method],
    graph: bool,
    wall: bool,
) -> Iterator[Row]:
    row = partial(
        Row,
        "block",
        place.site,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        in_features=place.architecture.hidden,  # as in memory.py
        out_features=place.architecture.intermediate,
        **environment(device),
    )
    judge = Judge(place, min(tokens, GATE_TOKENS), dtype, device)
    adapted: dict[Method, nn.Module] = {}
    for method in methods:
        reason = method.obstacle(judge.given.x)
        if reason is None:
            model, wrong = judge.adapted(method)
            if not wrong:
                adapted[method] = model
                continue
            reason = f"not right, so not measured: {'; '.join(wrong)}"
        yield row(method.name, method.backend, WALL if wall else WHOLE, "us", note=reason, **timing.NO_FIGURE)
    given, pairs = judge.inputs(tokens)
    names = judge.names
    del judge
    layers.free_memory(device)
    cases = {
        (method, metric): case
        for method, model in adapted.items()
        for metric, case in _cases(model, names, given, pairs).items()
    }
    if wall:
        cases = {(method, WALL): _in_a_row(case) for (method, metric), case in cases.items() if metric == WHOLE}
    measured = timing.measure_together(cases, device, budget_s=left(), graph=graph, wall=wall)
    if wall:
        measured = {key: timing.quantiles([us / IN_A_ROW for us in t.rounds], t.note) for key, t in measured.items()}
    frozen = methods[0]
    for (method, metric), time in measured.items():
        who = (method.name, method.backend)
        yield row(*who, metric, "us", note=time.note, **time.columns())
        if method is not frozen:
            ratio = timing.ratio(time, measured[frozen, metric])
            yield row(*who, f"{metric} / frozen", "x", note=ratio.note, **ratio.columns())


@dataclasses.dataclass(frozen=True)
class Given:
    """The input of a block x [windows, length, hidden], what else it takes, and the gradient of its output."""

    x: Tensor
    shared: dict[str, tuple[Tensor, Tensor]]
    dy: Tensor

    @classmethod
    def draw(cls, model: nn.Module, a: Architecture, tokens: int) -> "Given":
        """Random ones in the model's dtype."""
        length = min(tokens, models.CONTEXT[a.model_type])
        weight = next(model.parameters())
        x, dy = (
            torch.randn(tokens // length, length, a.hidden, dtype=weight.dtype, device=weight.device) for _ in range(2)
        )
        body = cast(Any, model).base_model
        positions = torch.arange(length, device=weight.device)[None]
        rotary = {"position_embeddings": body.rotary_emb(x, positions)} if hasattr(body, "rotary_emb") else {}
        return cls(x, rotary, dy)

    def double(self) -> "Given":
        """The same numbers in fp64."""
        shared = {name: (a.double(), b.double()) for name, (a, b) in self.shared.items()}
        return Given(self.x.double(), shared, self.dy.double())

    def through(self, block: nn.Module, x: Tensor) -> Tensor:
        """The block's output; some versions of transformers put it in a tuple."""
        y = block(x, attention_mask=None, **self.shared)
        return cast(Tensor, y[0] if isinstance(y, tuple) else y)


class Judge:
    """Holds methods to one block at a number of tokens: gains away from 1, and the rule of the tests against fp64."""

    def __init__(self, place: Place, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.place, self.dtype, self.device = place, dtype, device
        model = self._model()
        self.names = place.names(model)
        self.given = Given.draw(model, place.architecture, tokens)
        self.gains = {}
        for name in self.names:
            _, features = cast(tuple[int, int], sizes(model.get_submodule(name)))
            noise = gate.NOISE * torch.randn(features, device=device)
            self.gains[name] = (1 + noise).clamp(0.5, 2).to(dtype)
        self._references: dict[torch.dtype | None, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def adapted(self, method: Method) -> tuple[nn.Module, list[str]]:
        """A model whose block the method has adapted, and what is wrong with its results, in words."""
        model = self._model()
        try:
            method.put(model, self.names)
            vectors = self._set_gains(model)
            results = self._results(model, self.given, vectors)
        except Exception as reason:  # whoever raises gets no figure, and the others go on
            return model, [f"raised {timing.first_line(reason)}"]
        kinds = {vector.dtype for vector in vectors.values()}
        plain, truth = self._reference(kinds.pop() if kinds else None)
        names = list(truth)
        if list(results) != names:
            return model, [f"results {', '.join(results)}, expected {', '.join(names)}"]
        columns = [[by_name[name] for name in names] for by_name in (results, plain, truth, truth)]
        return model, gate.compare(names, *columns)

    def inputs(self, tokens: int) -> tuple[Given, list[tuple[Tensor, Tensor]]]:
        """What is timed: the block's input at so many tokens, and x and dy of each of its gained layers."""
        model = self._model()
        given = Given.draw(model, self.place.architecture, tokens)
        pairs = []
        for name in self.names:
            i, o = cast(tuple[int, int], sizes(model.get_submodule(name)))
            x, dy = (given.x.new_empty(*given.x.shape[:-1], n).normal_() for n in (i, o))
            pairs.append((x, dy))
        return given, pairs

    def _model(self) -> nn.Module:
        """The same weights every time."""
        torch.manual_seed(SEED)
        return models.build(self.place.architecture, self.device, self.dtype, layers=1, vocabulary=VOCABULARY)

    def _set_gains(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The trained vectors by the names of their layers; none of a method that trains something else."""
        found = {}
        for name, gain in self.gains.items():
            trained = gate.trained_gain(model.get_submodule(name))
            if trained is not None:
                with torch.no_grad():
                    trained.parameter.copy_(
                        (gain.to(trained.parameter.dtype) - trained.offset).view_as(trained.parameter)
                    )
                found[name] = trained.parameter
        return found

    def _reference(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Plain torch with scales of a dtype (None: of the frozen block), and the same in fp64."""
        if dtype not in self._references:
            made = []
            for wide in (False, True):
                model = self._model().requires_grad_(False)
                if wide:
                    model.double()
                if dtype is not None:
                    _scaled(model, self.names, dtype=torch.float64 if wide else dtype)
                made.append(self._results(model, self.given.double() if wide else self.given, self._set_gains(model)))
            self._references[dtype] = made[0], made[1]
        return self._references[dtype]

    @staticmethod
    def _results(model: nn.Module, given: Given, vectors: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        x = given.x.detach().requires_grad_()
        y = given.through(models.blocks(model)[0], x)
        dx, *gradients = torch.autograd.grad(y, [x, *vectors.values()], given.dy)
        named = {f"gradient of {name}": g.flatten() for name, g in zip(vectors, gradients, strict=True)}
        return {"y": y.detach(), "dx": dx, **named}


def _cases(
    model: nn.Module, names: Sequence[str], given: Given, pairs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, timing.Case]:
    """What is timed of an adapted model. Each has its own leaves: autograd ties a leaf to the stream of its first use."""
    block, parts = models.blocks(model)[0], [model.get_submodule(name) for name in names]
    x, xs = given.x.detach().requires_grad_(), [x.detach().requires_grad_() for x, _ in pairs]
    dys = [dy for _, dy in pairs]

    def whole(_: object) -> object:
        return torch.autograd.grad(given.through(block, x), [x, *models.trained(block)], given.dy)

    def alone(_: object) -> object:
        ys = [part(x) for part, x in zip(parts, xs, strict=True)]
        return torch.autograd.grad(ys, [*xs, *(p for part in parts for p in models.trained(part))], dys)

    return {WHOLE: timing.Case(whole), LINEARS: timing.Case(alone)}


def _in_a_row(case: timing.Case) -> timing.Case:
    return timing.Case(lambda state: [case.run(state) for _ in range(IN_A_ROW)][-1])

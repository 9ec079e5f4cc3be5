"""Full training steps of a stack of blocks of true shape: forward, loss, backward, AdamW; tokens a second and peak memory.

Methods take turns, round after round, so that drift affects them equally. Only one model exists at a time, built from the same
seed in every turn: all start from the same weights, and the peak is one method's own. The batch is the same in every step.
"""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.contestants import models
from benchmarks.contestants.models import METHODS, Method
from benchmarks.contestants.sites import ARCHITECTURES, SMALL, Architecture
from benchmarks.harness import results, timing
from benchmarks.harness.results import Row
from benchmarks.suites import memory
from gain_ops.measure.perplexity import logits, next_token_loss
from gain_ops.ops import dispatch
from gain_ops.planning.methods import FROZEN

SEED = 0
ROUNDS = 5  # at most; fewer where the time is up
CUDA_LAYERS, CUDA_TOKENS, CUDA_VOCABULARY = 8, 8192, 16384
CUDA_ORDER = ("Llama-3-8B", "GPT-2 Large", "Llama-3-70B", "Qwen2.5-7B")  # as far as the time goes
CPU_LAYERS, CPU_TOKENS, CPU_VOCABULARY = 2, 128, 512
GATE_TOKENS = 1024  # of a window: in fp32 a GPU may have no attention but the one that forms [heads, T, T]
NO_TIME = "no time was left"
PEAK_LAYERS = 2  # of the steps whose peak alone is asked for
LEAN = "gain-ffn, lean"
LORA_PEERS = (models.LORA, models.LORA_16)
FILL = 0.7  # of the free memory: the rest is for the logits, workspaces and fragments


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model to be trained, and on what."""

    architecture: Architecture
    layers: int
    vocabulary: int
    tokens: int
    dtype: torch.dtype
    device: torch.device
    checkpointed: bool = False
    warm_up: int = 2  # steps of a turn that compile and allocate
    timed: int = 5  # and those after them

    @property
    def site(self) -> str:
        """The row's site."""
        layers = f"{self.layers} layer" + ("s" if self.layers != 1 else "")
        return f"{self.architecture.name}, {layers}" + (", checkpointed" if self.checkpointed else "")

    @property
    def note(self) -> str:
        """What a reader must know of every figure."""
        frozen = "the frozen model runs the same backward and no optimizer"
        return f"vocabulary of {self.vocabulary}, random weights, one batch; {frozen}"

    def build(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, Tensor]:
        """The model, not adapted, and its ids: the same ones every time; in another dtype the same weights."""
        torch.manual_seed(SEED)
        model = models.build(self.architecture, self.device, self.dtype, layers=self.layers, vocabulary=self.vocabulary)
        ids = models.tokens_of(self.architecture, self.tokens, self.vocabulary, self.device)
        return model.to(dtype or self.dtype), ids


@dataclasses.dataclass
class Measured:
    """What the turns of one method gave."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: tuple[float, float] = (math.nan, math.nan)  # of the first turn's first and last step
    saved: int = 0
    peak: int | None = None
    failure: str | None = None


class Wrong(RuntimeError):
    """A method that is not what it says: its figures would mean nothing."""


def rows(device: torch.device, budget_s: float) -> Iterator[Row]:
    """Every method without and with activation checkpointing, on what the device holds, in about ``budget_s`` seconds.

    On a CPU one small model; on a GPU one architecture after another. Each gets a round while there is time, and more rounds
    within its share of it. What there was no time for is a row that says so; the first frozen model is measured in any case.
    """
    hard = time.monotonic() + budget_s
    pending = settings(device)
    for index, setting in enumerate(pending):
        left = hard - time.monotonic()
        if index and left <= 0:
            yield from _rows(setting, {name: Measured(failure=NO_TIME) for name in METHODS})
            continue
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            setting = dataclasses.replace(setting, layers=layers_that_fit(setting, int(FILL * free)))
        yield from setting_rows(setting, hard - left + left / (len(pending) - index), hard)


def peak_rows(device: torch.device, pending: Sequence[Setting] | None = None) -> Iterator[Row]:
    """The rows of short steps of the frozen model, the lean gains and LoRA on the same layers: what their peaks are asked for.

    pending: the models; two layers of each architecture, not checkpointed, if not given.
    """
    if pending is None:
        pending = [
            dataclasses.replace(setting, layers=PEAK_LAYERS, warm_up=1, timed=1)
            for setting in settings(device)
            if not setting.checkpointed
        ]
    for setting in pending:
        yield from setting_rows(setting, 0.0, math.inf, [METHODS[name] for name in (FROZEN, LEAN, *LORA_PEERS)])


def settings(device: torch.device) -> list[Setting]:
    """What this device is to train, in order; on a GPU with more layers than may fit."""
    if device.type == "cuda":
        whole = [
            Setting(ARCHITECTURES[name], CUDA_LAYERS, CUDA_VOCABULARY, CUDA_TOKENS, torch.bfloat16, device)
            for name in CUDA_ORDER
        ]
    else:
        whole = [Setting(SMALL, CPU_LAYERS, CPU_VOCABULARY, CPU_TOKENS, torch.float32, device, warm_up=1, timed=2)]
    return [
        dataclasses.replace(setting, checkpointed=checkpointed) for setting in whole for checkpointed in (False, True)
    ]


def layers_that_fit(setting: Setting, available: int) -> int:
    """How many blocks, of those the setting asks for, fit into so many bytes under the method that takes most; at least one.

    Beside the blocks there are two vocabulary matrices, with gradients and moments, and the logits: twice in fp32, once in
    the model's dtype.
    """
    itemsize = setting.dtype.itemsize
    matrices = 2 * 4 * itemsize * setting.vocabulary * setting.architecture.hidden
    beside = matrices + (8 + itemsize) * setting.tokens * setting.vocabulary
    block = block_bytes(setting.architecture, setting.tokens, setting.dtype)
    return max(1, min(setting.layers, (available - beside) // block))


@functools.cache
def block_bytes(architecture: Architecture, tokens: int, dtype: torch.dtype) -> int:
    """The bytes of a block under the largest method: weights, gradients, moments, and what is saved for backward."""
    most = 0
    for method in METHODS.values():
        if method.obstacle() is None:
            model = models.build(architecture, dtype=dtype, layers=1)
            models.adapt(model, method.name)
            kept = memory.block_saved(model, tokens)
            figures = memory.figures(models.blocks(model)[0], kept)
            most = max(most, kept.total + int(figures["weights"][0] + figures["optimizer"][0]))
    return most


def setting_rows(
    setting: Setting, soft: float, hard: float, methods: Sequence[Method] = tuple(METHODS.values())
) -> Iterator[Row]:
    """One model under every method, in rounds: the first until ``hard``, others while they would end before ``soft``.

    Both are times of time.monotonic(). The frozen model, with which the others are compared, is measured in any case.

    Raises:
        ValueError: methods that do not begin with the frozen model.

    """
    if not methods or methods[0].name != FROZEN:
        raise ValueError(f"methods must begin with {FROZEN!r}, got {[method.name for method in methods]}")
    found = {method.name: Measured(failure=method.obstacle()) for method in methods}
    gate = None
    round_s = 0.0
    for index in range(ROUNDS):
        started = time.monotonic()
        if index and started + round_s > soft:
            break
        for method in methods if index % 2 == 0 else methods[::-1]:
            measured = found[method.name]
            if measured.failure is not None:
                continue
            if index == 0 and method.name != FROZEN and time.monotonic() > hard:
                measured.failure = NO_TIME
                continue
            try:
                gate = gate or Gate(setting)
                _turn(setting, method, measured, gate if index == 0 else None)
            except Exception as error:  # out of memory, or Wrong: the others go on
                measured.failure = timing.first_line(error)
            _release(setting.device)
        round_s = time.monotonic() - started
    yield from _rows(setting, found)


class Gate:
    """Whether a method starts as the frozen model, by the rule: it errs at most twice what the frozen model errs.

    An error is the root mean square over the tokens of the difference of the losses to those of the same weights in the next
    wider dtype.
    """

    def __init__(self, setting: Setting) -> None:
        wider = torch.float64 if setting.dtype == torch.float32 else torch.float32
        self._truth = token_losses(*setting.build(wider)).double()
        _release(setting.device)  # the wider model is the larger one
        self._allowed = 2 * self._error(token_losses(*setting.build()))

    def check(self, model: nn.Module, ids: Tensor) -> None:
        """Raise Wrong unless the model's losses are the frozen model's."""
        error = self._error(token_losses(model, ids))
        if not error <= self._allowed:  # not > : NaN is wrong
            raise Wrong(
                f"it does not start as the frozen model: its losses are off by {error:.2e}, allowed is {self._allowed:.2e}"
            )

    def _error(self, losses: Tensor) -> float:
        return float((losses.double() - self._truth).square().mean().sqrt())


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """-log p(next token) of a window's first positions, in the logits' dtype, fp32 at least."""
    ids = ids[:, :GATE_TOKENS]
    with torch.no_grad():
        predicted = logits(model, ids)[:, :-1].flatten(0, 1)
        wide = predicted if predicted.dtype == torch.float64 else predicted.float()
        return nn.functional.cross_entropy(wide, ids[:, 1:].flatten(), reduction="none")


def _turn(setting: Setting, method: Method, measured: Measured, gate: Gate | None) -> None:
    """A few steps of one method, timed; with a gate it is also checked, and what does not change between turns is counted."""
    model, ids = setting.build()
    models.adapt(model, method.name)
    if gate is not None:
        gate.check(model, ids)
    if setting.checkpointed:
        models.checkpoint(model)
    if gate is not None:
        measured.saved = memory.model_saved(model, ids).new
    trained = models.trained(model)
    optimizer = torch.optim.AdamW(trained, lr=method.rate, weight_decay=0.0) if trained else None

    def step() -> Tensor:
        loss = next_token_loss(model, ids)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    losses = [step() for _ in range(setting.warm_up)]
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    seconds = [_timed(step, losses, setting.device) for _ in range(setting.timed)]
    first, last = float(losses[0]), float(losses[-1])
    if not math.isfinite(last) or (trained and last == first):
        raise Wrong(f"{len(losses)} steps took the loss from {first} to {last}: it does not train")
    measured.seconds += seconds
    if gate is not None:
        measured.losses = first, last
    if setting.device.type == "cuda":
        measured.peak = max(measured.peak or 0, torch.cuda.max_memory_allocated(setting.device))


def _timed(step: Callable[[], Tensor], losses: list[Tensor], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    losses.append(step())
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()  # a model and its hooks are a cycle
        torch.cuda.empty_cache()


def _rows(setting: Setting, found: dict[str, Measured]) -> Iterator[Row]:
    a, about = setting.architecture, results.environment(setting.device)
    kind = str(setting.dtype).removeprefix("torch.")
    floor = found[FROZEN]
    for name, measured in found.items():
        backend = dispatch.explain(setting.device.type, setting.dtype)[0][1] if METHODS[name].way.targets else "-"
        shape = (setting.tokens, a.hidden, a.intermediate)
        row = Row(
            "step", setting.site, name, backend, "throughput", "tokens/s", kind, *shape, **timing.NO_FIGURE, **about
        )
        if measured.failure is not None:
            yield dataclasses.replace(row, note=measured.failure)
            continue
        row = dataclasses.replace(row, note=setting.note)
        yield _filled(row, [setting.tokens / s for s in measured.seconds])
        if name != FROZEN and floor.failure is None:
            pairs = zip(measured.seconds, floor.seconds, strict=True)
            ratio = dataclasses.replace(row, metric="throughput / frozen", unit="x")
            yield _filled(ratio, [frozen / own for own, frozen in pairs])
        if measured.peak is not None:
            yield _filled(dataclasses.replace(row, metric="peak", unit="B"), [measured.peak])
        yield _filled(dataclasses.replace(row, metric="saved", unit="B"), [measured.saved])
        for metric, loss in zip(("first loss", "last loss"), measured.losses, strict=True):
            yield _filled(dataclasses.replace(row, metric=metric, unit="nats"), [loss])


def _filled(row: Row, values: Sequence[float]) -> Row:
    return dataclasses.replace(row, **timing.quantiles(values).columns())

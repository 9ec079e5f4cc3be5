"""Proof that a model uses its gains: check(), in one small training step, and watch(), in a step that runs anyway.

docs/decisions/0002-ignored-gains.md says what is an error and what is not.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gain_ops.layers.experts import ExpertsGain
from gain_ops.layers.gained import Gained
from gain_ops.measure.perplexity import in_mode
from gain_ops.models.fused_mlp import FusedMlp
from gain_ops.models.fused_residual import FusedResidual
from gain_ops.models.record import gained_modules, refuse_lost
from gain_ops.models.weight_reads import LIKE, QUESTIONS, VIEWS
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import first_of

__all__ = ["Checked", "check", "watch"]


@dataclass(frozen=True)
class Checked:
    """What check() saw.

    Attributes:
        used: the layers whose delta got a gradient, by name.
        unused: the layers that were not called, such as an expert that no token chose. No other code read their weight.
        without_gradient: the layers that were called and whose delta got no gradient: the loss does not depend on their
            output, as in an auxiliary head.

    """

    used: tuple[str, ...]
    unused: tuple[str, ...]
    without_gradient: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"Checked({len(self.used)} layers used, {len(self.unused)} not called, "
            f"{len(self.without_gradient)} without a gradient)"
        )


def check(model: nn.Module, *args: Any, **inputs: Any) -> Checked:
    """Prove that a model uses its gains: one forward and backward in training mode, on inputs that may be tiny.

    ::

        gain_ops.check(model, input_ids=ids, labels=ids)

    apply() refuses a layer whose weight the model's code reads without calling the layer, as far as the source says so.
    This sees it happen, whatever the source. Modes, buffers, gradients and the random state are as before; no parameter
    changes. Call it before the model is wrapped by DDP, FSDP, DeepSpeed or torch.compile.

    Args:
        model: with gains.
        args: the model's inputs, as for its forward.
        inputs: the same, by name. With labels, the loss in the output is differentiated, and otherwise the sum of all that
            the model returns.

    Returns:
        Checked: which layers were used. A layer that was not called is not an error: the inputs may not need it.

    Raises:
        ValueError: no gains; a weight that was read while its layer's gain was not; a layer that ran with autograd off;
            a gain that apply() put on and that is no longer there; or no gain that gets a gradient at all.

    """
    layers = gained_modules(model)
    refuse_lost(model, "check")
    if not layers:
        raise UsageError(f"{type(model).__name__} has no gains to check: put them on with gain_ops.apply()")
    for layer in layers.values():
        layer.refuse_offloaded()
    watcher = _Watcher(model, layers)
    with _as_before(model), in_mode(model, training=True), torch.enable_grad():
        with watcher.watching():
            loss = _loss(model(*args, **inputs))
            if loss is not None:
                loss.backward()
        got = {name for name, layer in layers.items() if layer.delta.grad is not None}
    watcher.refuse_ignored(strict=True)
    cut = [name for name in watcher.called - watcher.recorded if layers[name].delta.requires_grad]
    if cut:
        raise UsageError(
            f"the gain on {min(cut)} cannot be trained: the model calls the layer with autograd off (torch.no_grad or a "
            f"detached graph){_others(cut)}. Leave it out of the targets, or run that part with gradients."
        )
    if not got:
        raise UsageError(
            f"no gain of {type(model).__name__} got a gradient: its output does not depend on the layers "
            f"{first_of(list(layers))}. Give check() inputs that the model trains on, with labels."
        )
    return Checked(
        used=tuple(name for name in layers if name in got),
        unused=tuple(name for name in layers if name not in watcher.called | got),
        without_gradient=tuple(name for name in layers if name in watcher.called - got),
    )


@contextmanager
def watch(model: nn.Module) -> Iterator[None]:
    """Watch one forward of a training that runs anyway, and raise after it if the model ignored a gain.

    Nothing of the step changes. A compiled model is not watched.

    Raises:
        ValueError: a weight was read and its layer, which has a gain, was not called.

    """
    if _compiled(model):
        yield
        return
    watcher = _Watcher(model, gained_modules(model))
    with watcher.watching():
        yield
    watcher.refuse_ignored(strict=False)


class _Watcher(TorchFunctionMode):
    """Notes which layers with a gain are called, and which weights are computed with by anything but their own layer."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Gained]) -> None:
        super().__init__()
        self._layers = layers
        self._names = {id(layer): name for name, layer in layers.items()}
        weights = ((name, getattr(layer, "weight", None)) for name, layer in layers.items())
        self._weights = {id(weight): (name, weight) for name, weight in weights if isinstance(weight, Tensor)}
        owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        self._tied = {name for key, (name, _) in self._weights.items() if owners[key] > 1}
        self._running: list[nn.Module] = []
        self.called: set[str] = set()
        self.recorded: set[str] = set()
        self._read: dict[str, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of a block; of all modules in the process, since a stack of them says whose code is running."""
        handles = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        before = {name: vars(layer).get("forward") for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            # not a hook: some models call layer.forward(x)
            vars(layer)["forward"] = functools.partial(self._run, name, layer, layer.forward)
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            for name, layer in self._layers.items():
                vars(layer).pop("forward")
                if before[name] is not None:
                    vars(layer)["forward"] = before[name]

    def refuse_ignored(self, *, strict: bool) -> None:
        """Raise ValueError for a weight that was read; unless ``strict``, only where its layer was not called at all.

        A weight that another module has too, such as an embedding, may be read for that one.
        """
        both = self.called if not strict else self.called & self._tied
        ignored = {name: who for name, who in self._read.items() if name not in both}
        for name, who in sorted(ignored.items())[:1]:
            raise UsageError(
                f"the gain on {name} is ignored: {who} with its weight, and does not call the layer{_others(ignored)}. "
                "Take the gains off with gain_ops.remove(), and leave it out of the targets."
            )

    def _run(self, name: str, layer: Gained, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward."""
        self.called.add(name)
        self._enter(layer, args)
        try:
            y = forward(*args, **kwargs)
        finally:
            self._leave(layer, args, None)
        self._record(name, y)
        return y

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._running and self._running.pop() is not module:
            pass  # a module whose forward raised
        if isinstance(module, FusedMlp):  # it reads its projections' parameters, and delta among them
            name = self._names[id(module.get_submodule(module._gain_layout.down))]
            self.called.add(name)
            self._record(name, output)
        if isinstance(module, FusedResidual):  # it applies the gains of its projections, which return z without them
            for place in module._gain_places.values():
                self._record(self._names[id(module.get_submodule(place.projection))], output)

    def _record(self, name: str, output: Any) -> None:
        if any(isinstance(y, Tensor) and y.requires_grad for y in tree_leaves(output)):
            self.recorded.add(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _computed_with(func, args, kwargs):
            if id(tensor) in self._weights and not self._owned(tensor):
                name, who = self._weights[id(tensor)][0], type(self._running[-1]).__name__ if self._running else "code"
                self._read.setdefault(name, f"{who} computes ({getattr(func, '__name__', func)})")
        return func(*args, **kwargs)

    def _owned(self, tensor: Tensor) -> bool:
        """Whether the module that runs has the weight itself: the layer, or an embedding that is tied to it."""
        if not self._running:
            return False
        module = self._running[-1]
        return isinstance(module, FusedMlp | ExpertsGain) or any(tensor is own for own in module._parameters.values())


def _computed_with(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Any]:
    """The arguments of a torch function whose values it uses."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return args[:1] if name in VIEWS else ()
    if name in QUESTIONS or (name.startswith("__") and name not in _OPERATORS):
        return ()
    if name in LIKE:
        return args[:1] if name in ("to", "type_as") else ()
    return tree_leaves((args, dict(kwargs)))


_OPERATORS = frozenset(
    f"__{kind}{name}__"
    for kind in ("", "r", "i")
    for name in ("add", "matmul", "mul", "pow", "sub", "truediv", "getitem", "neg")
)


def _loss(output: Any) -> Tensor | None:
    """The loss of an output, or the sum of all in it that depends on a gain; None if nothing does."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum()
    if not isinstance(output, tuple | list | Mapping | Tensor) and hasattr(output, "__dict__"):
        output = vars(output)
    sums = [leaf.float().sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(sums).sum() if sums else None


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and the random state of a model are restored after the block."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    devices = {tensor.device for tensor in (*gradients, *buffers) if tensor.is_cuda}
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(sorted(device.index for device in devices)):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _compiled(model: nn.Module) -> bool:
    """Whether torch.compile is on a part: a mode around it would be compiled into it."""
    kinds = (
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )
    return torch.compiler.is_compiling() or any(kinds)


def _others(names: Iterable[str]) -> str:
    more = len(list(names)) - 1
    return f" (and {more} more)" if more else ""

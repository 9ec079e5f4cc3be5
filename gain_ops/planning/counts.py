"""What training a model needs, counted on the meta device: weights, bytes saved for backward, the peak of a pass."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gain_ops.measure import meta_models
from gain_ops.measure.language_models import first_line, refused, text_config
from gain_ops.measure.peak_bytes import peak_bytes
from gain_ops.measure.perplexity import next_token_loss
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.planning.configs import layer_lists, with_layers
from gain_ops.planning.methods import Method
from gain_ops.utils.errors import UsageError

__all__ = ["Counts", "blocks_alike", "count", "count_pass", "refuse_loops"]

_FEW = 2  # layers: the counts of so many and of one more give those of all
_SHORT = 32  # tokens of a window in which a loop over tokens shows


@dataclass(frozen=True)
class Counts:
    """Bytes of one model under one method.

    Attributes:
        frozen: weights that are not trained.
        trained: weights that are; a gradient takes as much, and AdamW's moments twice that.
        added: what the method put on the model, trained or not.
        saved: saved for backward by a forward pass, without parameters.
        peak: the most that a forward and a backward hold at once, without the gradients of parameters.

    """

    frozen: int
    trained: int
    added: int
    saved: int
    peak: int


def blocks_alike(config: Any, model: nn.Module) -> bool:
    """Whether every further block adds the same, so that two and three of them say what all take.

    Args:
        config: of transformers.
        model: built from it.
    """
    kinds = {tuple((name, p.shape) for name, p in block.named_parameters()) for block in meta_models.blocks(model)}
    layers = text_config(config).num_hidden_layers
    if len(kinds) > 1 or layers <= _FEW + 1:
        return len(kinds) == 1
    if any(repr(value[0]) != repr(other) for value in layer_lists(config).values() for other in value):
        return False  # of several kinds, which may save differently
    dtype = next(model.parameters()).dtype
    try:
        few, more = (_weights(meta_models.build(with_layers(config, n), dtype=dtype)) for n in (_FEW, _FEW + 1))
    except UsageError:  # a config with other numbers that follow the layers
        return False
    extended: bool = few + (layers - _FEW) * (more - few) == _weights(model)
    return extended


def refuse_loops(model: nn.Module) -> None:
    """Raise UsageError for a model that walks token by token where its kernels are missing: a GPU saves other tensors.

    Such a model also takes hours to count.
    """
    kind = type(model).__name__
    ops = []
    with refused(f"{kind} does not run on the meta device, with text alone"):
        for length in (_SHORT, 2 * _SHORT):
            with _Ops() as counted, meta_models.kernel_attention():
                next_token_loss(model, torch.zeros(1, length, dtype=torch.int64, device="meta"))
            ops.append(counted.number)
    if ops[1] > 1.5 * ops[0]:
        raise UsageError(
            f"{kind} walks token by token where its CUDA kernels are missing, so it cannot be counted here"
        )


def count(
    config: Any,
    method: Method,
    tokens: int,
    length: int,
    dtype: torch.dtype,
    *,
    alike: bool,
    eager: bool = False,
) -> tuple[Counts, Counts]:
    """Count one method on the model of a config, without and with activation checkpointing.

    ::

        counts(L) = counts(2) + (L - 2) * (counts(3) - counts(2))      where all L blocks are alike

    which is exact: one more block saves what every block saves, and the peak, without gradients, is reached before the first
    block is finished.

    Args:
        config: of transformers.
        method: how it is adapted.
        tokens: of a pass.
        length: of a window, at most.
        dtype: of the frozen weights.
        alike: blocks_alike() of the model; a model whose blocks differ is counted in full.
        eager: as in peak_bytes.

    Returns:
        The counts where every block runs once, and where every block saves its input alone and is recomputed.

    Raises:
        UsageError: gain_ops or the method's package cannot serve the model, the model does not run on meta, or tokens are no
            whole number of windows.
        ImportError: the method's package is missing.

    """
    text = text_config(config)
    ids = meta_models.random_ids(tokens, length, text.vocab_size)

    def of(layers: int) -> tuple[Counts, Counts]:
        model = meta_models.build(with_layers(config, layers), dtype=dtype)
        before = _weights(model)
        try:
            method.put(model)
        except ImportError:
            raise
        except Exception as error:
            if method.package is None:
                raise
            raise UsageError(f"{method.package} refuses {type(model).__name__}: {first_line(error)}") from error
        added = _weights(model) - before
        with refused(f"{type(model).__name__} does not run on the meta device"):
            once = count_pass(model, ids, eager=eager)
            meta_models.checkpoint(model)
            again = count_pass(model, ids, eager=eager)
        return replace(once, added=added), replace(again, added=added)

    layers = text.num_hidden_layers
    if not alike or layers <= _FEW + 1:
        return of(layers)
    (once, again), (once_more, again_more) = of(_FEW), of(_FEW + 1)
    return _extended(once, once_more, layers), _extended(again, again_more, layers)


def count_pass(model: nn.Module, ids: Tensor, *, eager: bool = False) -> Counts:
    """Count a model as it is, on its next-token loss over ids int64 [windows, tokens]; no gradient stays on it, added is 0."""
    saved = 0

    def step() -> None:
        nonlocal saved
        losses: list[Tensor] = []  # saved_bytes() lets go of what its forward returns
        saved = saved_bytes(lambda: losses.append(next_token_loss(model, ids)), exclude=model, inputs=[ids]).new
        losses.pop().backward()

    parameters = list(model.parameters())
    drops = [p.register_post_accumulate_grad_hook(_drop) for p in parameters if p.requires_grad]
    try:
        apart = [*parameters, *model.buffers(), ids]
        with meta_models.kernel_attention():
            peak = peak_bytes(step, exclude=apart, eager=eager)
    finally:
        for drop in drops:
            drop.remove()
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return Counts(_weights(model) - trained, trained, 0, saved, peak)


class _Ops(TorchDispatchMode):
    """Counts the ops that run."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _extended(few: Counts, more: Counts, layers: int) -> Counts:
    """The counts of so many layers, from those of _FEW and of one more."""
    return Counts(*(a + (layers - _FEW) * (b - a) for a, b in zip(astuple(few), astuple(more), strict=True)))


def _weights(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _drop(parameter: Tensor) -> None:
    """Drop each gradient as soon as it exists: the strategy counts where it is stored."""
    parameter.grad = None

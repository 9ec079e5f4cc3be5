"""Perplexity and logits of a causal language model on fixed windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gain_ops.measure.marks import predicted, unmarked
from gain_ops.utils.errors import DivergedError

__all__ = ["in_mode", "largest_difference", "logits", "next_token_loss", "perplexity", "window_loss"]

_NOT_PREDICTED = -100


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """``model(ids)``'s logits, without a key-value cache.

    Args:
        model: a causal language model of transformers, or one with the same call and the same output.
        ids: int64 [windows, tokens], on any device.

    Returns:
        [windows, tokens, vocabulary], in the dtype and on the device of the model.
    """
    device = next(model.parameters()).device
    output: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return output


def next_token_loss(model: nn.Module, ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over all positions but the last of ``-log p(ids[:, t + 1] | ids[:, : t + 1])``, in nats.

    Args:
        model: as in :func:`logits`.
        ids: int64 [windows, tokens], at least two tokens.
        counted: bool [windows, tokens], the tokens ids[:, t + 1] that the mean is over; None for all.

    Returns:
        fp32 scalar.
    """
    scores = logits(model, ids).flatten(0, 1).float()
    # The last position predicts nothing. Ignoring it in the targets avoids a copy of the logits without it.
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = _NOT_PREDICTED
    if counted is not None:
        targets.masked_fill_(~counted.roll(-1, dims=1), _NOT_PREDICTED)
    return nn.functional.cross_entropy(scores, targets.flatten().to(scores.device), ignore_index=_NOT_PREDICTED)


def window_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """:func:`next_token_loss` over the tokens of the windows that are not marked (:mod:`gain_ops.measure.marks`).

    Args:
        model: as in :func:`logits`.
        windows: int64 [windows, tokens], at least one token to predict.

    Returns:
        fp32 scalar.
    """
    return next_token_loss(model, unmarked(windows), predicted(windows))


def perplexity(model: nn.Module, windows: Tensor, *, batch_size: int = 4) -> float:
    """``exp`` of the mean next-token loss over the windows' tokens; no gradients, evaluation mode.

    Every token that is predicted weighs the same, so the result depends on ``batch_size`` only by rounding. The training mode
    of the model and of each module in it is restored.

    Args:
        model: as in :func:`logits`.
        windows: int64 [windows, tokens], at least one window of at least two tokens, in each a token to predict; those that
            are only read are marked (:mod:`gain_ops.measure.marks`).
        batch_size: windows in one forward pass.

    Raises:
        ValueError: no windows, or windows shorter than two tokens.
        DivergedError: the model's loss is not finite, or its exponential is not.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"got windows of shape {tuple(windows.shape)}; perplexity needs [windows, tokens], at least one window of "
            "two tokens: give a longer text or a shorter window"
        )
    total = 0.0
    with in_mode(model, training=False), torch.no_grad():
        for batch in windows.split(batch_size):
            total += window_loss(model, batch).item() * predicted(batch).sum().item()
    mean = total / predicted(windows).sum().item()
    if not math.isfinite(mean):
        raise DivergedError(f"the mean loss is {mean}: the model's logits are not finite; try it in float32")
    try:
        return math.exp(mean)
    except OverflowError:
        raise DivergedError(
            f"the mean loss is {mean:g} nats, too many for a perplexity: lower the learning rate"
        ) from None


def largest_difference(one: Tensor, other: Tensor) -> float:
    """``max |one - other|`` in fp32, over tensors of one shape."""
    return (one.float() - other.float()).abs().max().item()


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; every module's own mode is restored at the end."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

"""The training loop: plain PyTorch, for the parameters that require a gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gain_ops.measure.perplexity import in_mode, window_loss
from gain_ops.utils.errors import DivergedError, UsageError

__all__ = ["History", "Step", "draw_batches", "learning_rate", "train"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 1, the loss before it, its learning rate, gradient norm and seconds."""

    number: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass
class History:
    """The steps of one training run; ``stopped`` where ``should_stop`` ended it."""

    steps: list[Step] = field(default_factory=list)
    stopped: bool = False

    @property
    def losses(self) -> list[float]:
        """The loss of each step, in nats a token."""
        return [step.loss for step in self.steps]


def learning_rate(step: int, *, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a half cosine: ``peak * step / warmup``, then ``peak * (1 + cos(pi * t)) / 2``.

    ``t`` runs from 0 at the end of the warm-up towards 1, which it would reach one step after the last: no step has a rate
    of zero.

    Args:
        step: from 1 to ``steps``.
        steps: of the full run.
        peak: the highest rate.
        warmup: steps of the warm-up; 0 for none.
    """
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def draw_batches(windows: Tensor, *, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Batches for ``steps`` steps: every window once, in shuffled order, before any repeats.

    Args:
        windows: int64 [windows, tokens].
        batch_size: windows in a batch.
        steps: batches asked for.
        seed: of the shuffles; the same seed gives the same batches.

    Returns:
        ``steps`` tensors, int64 [batch_size, tokens].

    Raises:
        ValueError: fewer windows than one batch takes.
    """
    if len(windows) < batch_size:
        raise UsageError(
            f"got {len(windows)} training windows, but one batch takes {batch_size}: "
            "give more text, or a smaller batch or window"
        )
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(batch_size * steps / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    return [windows[order[start : start + batch_size]] for start in range(0, batch_size * steps, batch_size)]


def train(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    warmup: int | None = None,
    max_grad_norm: float = 1.0,
    after_backward: Callable[[], object] | None = None,
    on_step: Callable[[Step], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> History:
    """Train every parameter that requires a gradient: AdamW without weight decay, clipped gradients, cosine schedule.

    There is no decay because a gain is stored as ``delta = gain - 1``: the pretrained model is at zero, and a domain is
    learned by leaving it.

    Args:
        model: a causal language model of transformers, gains or another adapter on it.
        batches: int64 [windows, tokens] each, one a step; tokens that are only read are marked
            (:mod:`gain_ops.measure.marks`).
        lr: the peak learning rate.
        warmup: steps of linear warm-up; None takes a fifth of the steps, at most 5.
        max_grad_norm: gradients are scaled down to this norm.
        after_backward: called after the loss's gradients are computed and before they are scaled; a regulariser adds its own
            gradients here. Its loss is not in the history.
        on_step: called after each step.
        should_stop: called after each step; True ends the run there, after the step's update.

    Raises:
        ValueError: nothing requires a gradient, or no batches.
        FloatingPointError: a loss or gradient that is not finite; the parameters are those of the step before.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: put gains on it first (gain_ops.apply)")
    if not batches:
        raise ValueError("got no batches: training needs at least one")
    warmup = min(5, len(batches) // 5) if warmup is None else warmup
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    history = History()
    with in_mode(model, training=True):
        for number, ids in enumerate(batches, start=1):
            started = time.perf_counter()
            rate = learning_rate(number, steps=len(batches), peak=lr, warmup=warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss = window_loss(model, ids)
            loss.backward()
            if after_backward is not None:
                after_backward()
            norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
            value = loss.item()
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise DivergedError(
                    f"step {number}: loss {value}, gradient norm {norm}; both should be finite: "
                    f"try a learning rate below {lr:g}"
                )
            optimizer.step()
            step = Step(number, value, rate, norm, time.perf_counter() - started)
            history.steps.append(step)
            if on_step is not None:
                on_step(step)
            if should_stop is not None and should_stop():
                history.stopped = True
                break
    optimizer.zero_grad()
    return history

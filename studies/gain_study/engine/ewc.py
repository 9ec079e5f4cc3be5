"""Elastic weight consolidation: a penalty holds the weights that earlier domains depend on close to their values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gain_ops.measure.marks import predicted
from gain_ops.measure.perplexity import in_mode, window_loss

__all__ = ["Anchor", "add_fisher"]


def add_fisher(model: nn.Module, windows: Tensor, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""``F <- F + 1 / (S T) sum_s (d/dtheta sum_t -log p(x_st | x_s,<t))^2``, by parameter.

    This is the diagonal of the empirical Fisher information per token, with a window's tokens taken together, in evaluation
    mode.

    Args:
        model: a causal language model of transformers; its parameters with ``requires_grad`` count.
        windows: of the domain just learned, int64 [S, T + 1].
        fisher: of the earlier domains; empty if there are none.

    Returns:
        The sum, fp32, by parameter name. ``fisher`` itself does not change.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017; summed over tasks as in Schwarz
    et al., "Progress & Compress", 2018, with no decay.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {
        name: fisher[name].clone() if name in fisher else torch.zeros_like(parameter, dtype=torch.float32)
        for name, parameter in named.items()
    }
    with in_mode(model, training=False):
        for window in windows:
            # The loss is a mean over the T tokens that are predicted: its gradient is 1 / T of the sum's.
            counted = int(predicted(window).sum())
            gradients = torch.autograd.grad(window_loss(model, window[None]), list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    total[name].addcmul_(gradient.float(), gradient.float(), value=counted / len(windows))
    return total


class Anchor:
    """The penalty ``lambda / 2 * sum_i F_i (theta_i - theta*_i)^2``, where theta* are the parameters as they are now.

    Its gradient is written by hand: autograd would save two more copies of the model.

    Args:
        model: the penalty is on its parameters with ``requires_grad``.
        fisher: by parameter name.
        strength: lambda.
    """

    def __init__(self, model: nn.Module, fisher: Mapping[str, Tensor], strength: float) -> None:
        self._strength = strength
        self._held = [
            (parameter, fisher[name].to(parameter.device), parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def add_gradient(self) -> None:
        """``grad <- grad + lambda F (theta - theta*)`` for each parameter that has one."""
        for parameter, fisher, start in self._held:
            if parameter.grad is not None:
                parameter.grad.addcmul_(fisher, parameter.detach() - start, value=self._strength)

"""Bytes that one training step saves for its backward pass: with gains, and with LoRA on the same layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


__all__ = ["LORA_RANK", "backward_bytes", "lora_backward_bytes"]

LORA_RANK = 16


def backward_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that ``next_token_loss(model, ids)`` in training mode saves for backward, without parameters and buffers.

    Args:
        model: a causal language model; the parameters that require a gradient decide what is saved.
        ids: int64 [windows, tokens].
    """
    from gain_ops.measure.perplexity import in_mode, next_token_loss
    from gain_ops.measure.saved_bytes import saved_bytes

    with in_mode(model, training=True):
        return saved_bytes(lambda: next_token_loss(model, ids), exclude=model).new


def lora_backward_bytes(model: nn.Module, layers: Sequence[str], ids: Tensor) -> int | None:
    """The same with LoRA of rank 16 on the named layers, as PEFT makes it by default; None where PEFT is missing.

    LoRA is put into ``model`` itself and stays there, to avoid a copy of the model: measure this last.

    Args:
        model: a causal language model of transformers without gains on it.
        layers: full names of its modules.
        ids: int64 [windows, tokens].
    """
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    config = peft.LoraConfig(r=LORA_RANK, target_modules=list(layers))
    return backward_bytes(peft.get_peft_model(model, config), ids)

"""Causal language models of transformers with random weights, on the meta device, where 405 billion parameters take no memory.

The attention is torch's scaled_dot_product_attention. On meta that would take its math path, which saves [heads, T, T]
matrices and which no GPU runs. So on meta the flash kernel is called by name; it saves q, k, v, its output and one fp32 number
for each head and token.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gain_ops.utils.errors import UsageError

__all__ = ["ATTENTION", "blocks", "build", "checkpoint", "quiet", "random_ids"]

ATTENTION = "gain_ops_attention"
"""What transformers calls the attention above."""


def build(config: Any, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of a transformers config in training mode, with random weights drawn from torch's generator.

    The output of its embeddings requires a gradient, whatever is trained: then the backward runs through all blocks, and the
    first block is like any other. transformers and PEFT do the same under activation checkpointing.

    Args:
        config: of a causal language model. Dropout is that of the config: 0 in most, not in GPT-2's.
        device: "meta" allocates nothing.
        dtype: of every weight.

    Raises:
        ImportError: transformers is missing.
        ValueError: transformers has no causal language model for such a config.

    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _attend)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
            )
    except Exception as error:  # a value of another type ends in errors of every kind there
        raise UsageError(
            f"transformers makes no causal language model of this config: {str(error) or repr(error)}"
        ) from error
    model.enable_input_require_grads()
    return cast(nn.Module, model.train())


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers, in order: transformers never splits them, and FSDP and checkpointing take them one by one.

    Raises:
        ValueError: a model that does not say which they are.

    """
    kinds = set(cast(Any, model)._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    if not found:
        raise UsageError(f"{type(model).__name__} does not say what its blocks are (_no_split_modules)")
    return found


def checkpoint(model: nn.Module) -> None:
    """Activation checkpointing of every block, without reentrance: a block saves its input and is recomputed."""
    with quiet():
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})


@contextmanager
def quiet() -> Iterator[None]:
    """Without two warnings of PEFT: on GPT-2's Conv1D, which it corrects itself, and on a name that transformers 6 drops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def random_ids(tokens: int, length: int, vocabulary: int, device: torch.device | str = "meta") -> Tensor:
    """Random ids int64 [windows, min(tokens, length)] with as many windows as there are tokens.

    Raises:
        ValueError: tokens that are no whole number of windows.

    """
    length = min(tokens, length)
    if length < 1 or tokens % length:
        raise UsageError(f"{tokens} tokens are no whole number of windows of {length}")
    return torch.randint(vocabulary, (tokens // length, length), device=device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention without padding, query [B, heads, T, d] -> [B, T, heads, d].

    transformers makes no mask for an attention that is not its own; making one would read values, and so fail on meta.
    """
    if query.device.type == "meta":
        kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, _ = kept(query, key, value, dropout, True, scale=scaling)
    else:
        grouped = key.shape[1] != query.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    return output.transpose(1, 2).contiguous(), None

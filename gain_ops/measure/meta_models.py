"""Language models of transformers with random weights, on the meta device, where 405 billion parameters take no memory.

The attention is torch's scaled_dot_product_attention. On meta that would take its math path, which saves [heads, T, T]
matrices and which no GPU runs. So on meta the flash kernel is called by name; it saves q, k, v, its output and one fp32 number
for each head and token. Where the heads of v have another size (latent attention), GPUs run the memory-efficient kernel
instead, and so does meta.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gain_ops.measure.language_models import auto_class, decoder_layers, refused
from gain_ops.utils.errors import UsageError

__all__ = ["ATTENTION", "blocks", "build", "checkpoint", "kernel_attention", "quiet", "random_ids"]

ATTENTION = "gain_ops_attention"
"""What transformers calls the attention above."""


def build(config: Any, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of a transformers config in training mode, with random weights drawn from torch's generator.

    The output of its embeddings requires a gradient, whatever is trained: then the backward runs through all blocks, and the
    first block is like any other. transformers and PEFT do the same under activation checkpointing.

    Args:
        config: of a causal or a multimodal language model. Dropout is that of the config: 0 in most, not in GPT-2's.
        device: "meta" allocates nothing.
        dtype: of every weight.

    Raises:
        ImportError: transformers is missing.
        UsageError: transformers has no such model for the config, or cannot build it.

    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    made = auto_class(config)
    with refused(f"transformers cannot build a model of this {config.model_type} config"), torch.device(device):
        try:
            # a copy: transformers writes the attention into the config that it is given
            own = copy.deepcopy(config)
            model = made.from_config(own, dtype=dtype, trust_remote_code=False, attn_implementation=ATTENTION)
        except KeyError as error:
            if ATTENTION not in error.args:
                raise
            # an old model, which chooses among classes of its own; kernel_attention() serves those that call torch's function
            model = made.from_config(config, dtype=dtype, trust_remote_code=False)
        model.enable_input_require_grads()
    return cast(nn.Module, model.train())


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers, in order, as decoder_layers() finds them."""
    return decoder_layers(model)[1]


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
        output = _kernel(query, key, value, dropout, scaling)
    else:
        grouped = key.shape[1] != query.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def kernel_attention() -> Iterator[None]:
    """Within it, torch's scaled_dot_product_attention on meta allocates as the kernels of a GPU, where a model calls it itself.

    torch's function is replaced meanwhile: a mode of torch's would not reach into backward, where blocks are recomputed.
    """
    torchs = nn.functional.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type == "meta":
            return _kernel(query, key, value, dropout_p, scale)
        return torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = torchs


def _kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
    """[B, heads, T, d of value], by the kernel that a GPU would choose."""
    ops = torch.ops.aten
    if query.shape[-1] == value.shape[-1]:
        output, _ = ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, True, scale=scale)
    else:
        heads = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(heads, 1) if heads > 1 else each for each in (key, value))
        output, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, dropout, True, scale=scale
        )
    return cast(Tensor, output)

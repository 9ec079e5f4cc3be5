"""A small language model, trained from scratch in seconds: for tests, and to try a complete study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gain_ops.training.domains import Domain, cut_windows, token_stream
from gain_ops.training.loop import draw_batches, train
from gain_ops.utils.stages import staged_folder

__all__ = ["save_toy_model"]

_LENGTH = 128
_BATCH = 16


def save_toy_model(folder: Path, mixture: Sequence[Domain], *, steps: int = 300, width: int = 96) -> None:
    """Train a byte-level Llama of two layers on the domains' training text, and write it for transformers.

    The same text gives the same model. ``folder`` is complete or absent.

    Args:
        folder: to be created; its parent must exist.
        mixture: each domain gives equally many windows.
        steps: of training.
        width: of the residual stream, a multiple of 8.

    Raises:
        ValueError: too little text for one batch.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    count = -(-steps * _BATCH // len(mixture))
    windows = [
        cut_windows(token_stream(domain.train, tokenizer, limit=count * _LENGTH), length=_LENGTH, count=count, seed=0)
        for domain in mixture
    ]
    batches = draw_batches(torch.cat(windows), batch_size=_BATCH, steps=steps, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config)
        train(model, batches, lr=5e-3)
    with staged_folder(folder, "toy") as staged:
        model.save_pretrained(staged.folder)
        tokenizer.save_pretrained(staged.folder)


def _tokenizer() -> Any:
    """A token for each byte, and one for the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<eos>"])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<eos>")

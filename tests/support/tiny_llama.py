"""A model of a hundred thousand parameters that has learned a little English, in a folder, for whole commands to work on."""

from pathlib import Path

import torch

from gain_ops.training.loop import draw_batches, train

ENGLISH = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. It was a bright cold day in April, and the "
    "clocks were striking thirteen. All happy families are alike; each unhappy family is unhappy in its own way.\n"
)


def save_tiny_llama(folder: Path) -> None:
    """Write a Llama with two layers and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<eos>"])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<eos>")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=256,
        bos_token_id=256,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer.encode(ENGLISH * 8, add_special_tokens=False))
    windows = ids[: ids.numel() // 32 * 32].view(-1, 32)
    train(model, draw_batches(windows, batch_size=8, steps=40, seed=0), lr=5e-3)

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

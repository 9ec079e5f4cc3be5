"""Small models as llama.cpp's converter writes them."""

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gain_ops.checkpoints.formats.gguf_blocks import BLOCKS, decode


def tiny_llama(width=96, hidden=160):
    return tiny_gated("Llama", width, hidden)


def tiny_gated(name, width, hidden, **options):
    """A model of one of the families that are built as Llama is."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # as trained weights, so that attention attends
        **options,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def llama_fields(config):
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }


def tiny_gpt2():
    torch.manual_seed(0)
    # of GPT-2's own sizes where transformers cannot read them from a GGUF file
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def gpt2_fields(config):
    return {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def as_converted(model, name, weight):
    """The weight as conversion/llama.py, conversion/gpt2.py and conversion/gemma.py hand it on."""
    if model.config.model_type == "gemma2" and name.endswith("norm.weight"):
        return weight + 1
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Conv1D) and weight.dim() == 2:
        return weight.T
    heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    for ending, key in heads.items():
        if name.endswith(ending) and model.config.model_type == "llama":
            count = getattr(model.config, key)
            return weight.reshape(count, 2, len(weight) // count // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    return weight


def random_blocks(kind, rows, columns):
    """Any quants, and scales that make values of the size of a tiny model's weights."""
    block = BLOCKS[kind]
    quants = torch.randint(0, 256, (rows, columns // block.values, block.size), dtype=torch.uint8)
    scales = (torch.rand(block.scales(quants).shape) + 0.5).to(torch.float16)
    whole = block.replaced(quants, scales).view(rows, -1)
    shrink = (0.1 / decode(kind, whole).std()).to(torch.float16)
    return block.replaced(quants, scales * shrink).view(rows, -1).numpy()


def stored(kind, weight):
    """The bytes of a matrix in a type: quantised where the package gguf can, else random."""
    type_ = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(weight, type_), type_
    except NotImplementedError:
        return random_blocks(kind, *weight.shape), type_


def write_model(path, model, architecture, fields, kind="F32", **options):
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in fields.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, fields["block_count"])
    for name, parameter in model.named_parameters():
        weight = as_converted(model, name, parameter.detach()).contiguous().numpy()
        tensor = names.get_name(name, try_suffixes=(".weight", ".bias"))
        in_blocks = weight.ndim == 2 and tensor.startswith("blk.")
        data, type_ = stored(kind, weight) if in_blocks else (weight, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(tensor, data, raw_dtype=type_)
    finish(writer)
    return path


def write_tensors(path, architecture, tensors, **fields):
    """A file with these tensors and no more: for what is read of names and header."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": 2, **fields}.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"{architecture}.{key}", value)
    for name, (kind, *shape) in tensors.items():
        data, type_ = stored(kind, np.random.default_rng(0).normal(size=shape).astype(np.float32))
        writer.add_tensor(name, data, raw_dtype=type_)
    finish(writer)
    return path


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path, **config):
    folder, options = path.parent, {"dtype": torch.float32, **config}
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, **options).eval()

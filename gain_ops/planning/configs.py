"""The models that ``gain-ops plan`` knows, the configs that it reads, and the part of a model on a tensor-parallel rank."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gain_ops.measure.language_models import refused, text_config
from gain_ops.utils.errors import MissingFileError, UsageError, file_errors
from gain_ops.utils.kinds import pickled

if TYPE_CHECKING:
    from torch import nn


__all__ = [
    "BUNDLED",
    "layer_lists",
    "read_config",
    "split_config",
    "split_weights",
    "summed_weights",
    "with_layers",
]

BUNDLED: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "llama-3.1-405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "max_position_embeddings": 163840,
    },
}
"""Configs by name: of Llama, with its vocabulary of 128256, where no model_type is said."""

_MOST_LAYERS = 10_000  # each is made, if without its weights

# The styles of weights in transformers' plans: split into smaller layers, split outside of blocks, not split.
_SPLIT_IN_A_BLOCK = {"colwise", "rowwise"}
_SPLIT_OUTSIDE = {"colwise_gather_output", "embedding_rowwise"}
_WHOLE = {"replicated_with_grad_allreduce"}


def read_config(model: str) -> Any:
    """The transformers config of a bundled name, a config.json, or a folder with one; no network, and no code of the model's.

    Raises:
        MissingFileError: none of these.
        UsageError: a pickle, or a config that transformers cannot read, such as that of a model with code of its own.
        CheckpointError: not a JSON object.

    """
    path = Path(model)
    with file_errors():
        why = None if model in BUNDLED else pickled(path)
    if why:
        raise UsageError(why)
    if not (model in BUNDLED or path.is_file() or (path / "config.json").is_file()):
        raise MissingFileError(
            f"no config at {model}: give a config.json, the folder of a transformers model, or one of {', '.join(BUNDLED)}"
        )
    from transformers import AutoConfig

    from gain_ops.checkpoints.formats.config import read_object  # needs torch, and --help does not wait for it

    if model in BUNDLED:
        said = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False, **BUNDLED[model]}
        return AutoConfig.for_model(**said)
    with file_errors():
        content = read_object(path if path.is_file() else path / "config.json")
    if (layers := max(_layer_numbers(content), default=0)) > _MOST_LAYERS:
        raise UsageError(f"the config at {model} has {layers:,} layers, of at most {_MOST_LAYERS:,}")
    try:
        with refused(f"transformers cannot read the config at {model}"):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except UsageError as error:
        if "auto_map" not in content:
            raise
        raise UsageError(
            f"the config at {model} is of a model with code of its own (auto_map), which plan does not run: give the "
            "config of a model of the same sizes that transformers has"
        ) from error
    for name in ("num_hidden_layers", "vocab_size"):
        size = getattr(text_config(config), name, None)
        if isinstance(size, int) and size < 1:
            raise UsageError(f"the config at {model} has {name}={size}, expected at least 1")
    return config


def _layer_numbers(content: dict[str, Any]) -> Iterator[int]:
    """The numbers of layers in a config.json and in its sections; transformers makes a list of so many as it reads some."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _layer_numbers(value)
        elif isinstance(value, int) and key.endswith(("layer", "layers", "depth")):
            yield value


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a config with this number of layers."""
    config = copy.deepcopy(config)
    text = text_config(config)
    lists = layer_lists(config)
    text.num_hidden_layers = layers
    for name, value in lists.items():
        setattr(text, name, value[:layers])
    return config


def layer_lists(config: Any) -> dict[str, list[Any]]:
    """What a config says of each layer, by name: layer_types and its like."""
    text = text_config(config)
    return {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list) and len(value) == text.num_hidden_layers
    }


def split_config(config: Any, model: nn.Module, ranks: int) -> Any:
    """The config of the model that one of ``ranks`` ranks computes under transformers' own plan of tensor parallelism.

    ::

        heads, key-value heads and the FFN's hidden neurons / ranks; the size of a head, the width and the vocabulary undivided

    Args:
        config: the full model's.
        model: built from it.
        ranks: how many share it.

    Raises:
        ValueError: transformers has no such plan for the model, or a size that ranks does not divide.

    """
    kind = type(model).__name__
    if text_config(config) is not config:
        raise UsageError(f"tensor parallelism is not planned for {kind}, which has parts beside the language model")
    plan = getattr(config, "base_model_tp_plan", None) or {}
    if not plan or set(plan.values()) - _SPLIT_IN_A_BLOCK - _WHOLE:
        raise UsageError(f"transformers has no plan of tensor parallelism for {kind} whose parts are smaller layers")
    sizes = {}
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name, None)
        if not isinstance(size, int) or size % ranks:
            raise UsageError(f"{name}={size} of {kind} is no multiple of {ranks}")
        sizes[name] = size // ranks
    part = copy.deepcopy(config)
    part.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, size in sizes.items():
        setattr(part, name, size)
    return part


def split_weights(model: nn.Module, ranks: int) -> dict[str, int]:
    """The bytes of every parameter that one of ``ranks`` ranks holds under transformers' own plan, by name, each once."""
    divided = _of_style(model, _SPLIT_IN_A_BLOCK | _SPLIT_OUTSIDE)
    return {name: p.nbytes // ranks if name in divided else p.nbytes for name, p in model.named_parameters()}


def summed_weights(model: nn.Module) -> int:
    """Bytes of the weights that transformers' plan puts on each rank undivided; each rank has a term of their gradient."""
    named = _of_style(model, _WHOLE)
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if name in named)


def _of_style(model: nn.Module, styles: set[str]) -> set[str]:
    """The names of the parameters whose layers have one of these styles in transformers' plan."""
    plan: dict[str, str] = cast(Any, model)._tp_plan or {}
    patterns = [pattern for pattern, style in plan.items() if style in styles]
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if any(fnmatch.fnmatch(name.rpartition(".")[0], pattern) for pattern in patterns)}

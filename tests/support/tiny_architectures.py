"""Every architecture of the installed transformers that can be built tiny, with inputs for one forward."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# By name, wherever a config or a config inside it has such a number.
_SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "hidden_dim": 32, "n_embed": 32,
    "word_embed_proj_dim": 32, "embedding_size": 32, "model_dim": 32, "encoder_hidden_dim": 32, "decoder_hidden_dim": 32,
    "projection_dim": 32, "hidden_channels": 32, "encoder_hidden_size": 32, "decoder_hidden_size": 32, "attn_hidden_size": 32,
    "intermediate_size": 48, "d_ff": 48, "n_inner": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "mlp_dim": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "ffn_hidden_size": 48,
    "encoder_intermediate_size": 48, "decoder_intermediate_size": 48, "inner_dim": 48, "hidden_dim_ffn": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "depth": 2, "num_hidden_groups": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "attention_heads": 4, "num_kv_heads": 2, "kv_n_heads": 2,
    "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
    "head_dim": 8, "d_kv": 8, "attention_head_dim": 8, "kv_channels": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "global_head_dim": 8,
    "vocab_size": 128, "max_position_embeddings": 64, "n_positions": 64, "type_vocab_size": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2, "num_experts_per_token": 2, "num_expert_group": 1,
    "first_k_dense_replace": 1, "expert_ffn_hidden_size": 16, "zero_expert_num": 2,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1, "state_size": 8,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "mamba_dt_rank": 4,
    "mamba_d_ssm": 64, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8,
    "rotary_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "max_source_positions": 32,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
# What the sizes alone do not make small, or do not make fit.
_OTHERWISE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "hybrid"]},
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
}
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id")


class CannotBuild(Exception):
    """An architecture that does not come out tiny."""


def model_types() -> list[str]:
    """All that transformers knows."""
    return sorted(CONFIG_MAPPING)


def build(model_type: str, *, run: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with random weights, and its inputs; of a family that generates text, the one with a head.

    With ``run`` the model has run on them once.

    Raises:
        CannotBuild: no such tiny model.

    """
    reasons = []
    for small in (_made_small, _changed_to_small):
        with quiet():
            try:
                model = _model(small(model_type))
                inputs = inputs_of(model)
                if run:
                    with torch.no_grad():
                        model(**inputs)
                return model, inputs
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
    raise CannotBuild("; ".join(reasons))


def _model(config: PreTrainedConfig) -> nn.Module:
    kinds = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoModel)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise CannotBuild("no model of its own")
    with torch.device("meta"):
        if sum(p.numel() for p in kind.from_config(config).parameters()) > 30_000_000:
            raise CannotBuild("not tiny")
    torch.manual_seed(0)
    return kind.from_config(config).float().eval()


def _made_small(model_type: str) -> PreTrainedConfig:
    options = _options(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **{**options, **_OTHERWISE.get(model_type, {})})


def _changed_to_small(model_type: str) -> PreTrainedConfig:
    config = AutoConfig.for_model(model_type)
    for part in _parts(config):
        for name, value in _options(part).items():
            if not isinstance(value, dict):
                with contextlib.suppress(Exception):
                    setattr(part, name, value)
    return config


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Inputs by the names that the forward takes; what a model needs beside them, it does not get."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    text = getattr(config, "text_config", config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, min(getattr(text, "vocab_size", None) or 64, 100), (2, 8), generator=generator)
    image = getattr(getattr(config, "vision_config", config), "image_size", 32)
    size = image if isinstance(image, int) else 32
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    main = getattr(model, "main_input_name", "input_ids")
    possible = {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "pixel_values": torch.randn(2, channels, size, size, generator=generator),
        "input_values": torch.randn(2, 1600, generator=generator),
        "input_features": torch.randn(2, getattr(config, "num_mel_bins", 16), 64, generator=generator),
    }
    wanted = {main} | ({"decoder_input_ids"} if getattr(config, "is_encoder_decoder", False) else set())
    if main == "pixel_values" and "input_ids" in names:
        wanted.add("input_ids")
    inputs = {name: possible[name] for name in wanted if name in possible and name in names}
    return inputs | ({"use_cache": False} if "use_cache" in names else {})


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _options(config: PreTrainedConfig) -> dict[str, Any]:
    """What makes a config of this kind small, with those inside it as dictionaries."""
    options: dict[str, Any] = {}
    for name in vars(config):
        value = _get(config, name)
        if isinstance(value, PreTrainedConfig):
            options[name] = {"model_type": value.model_type, **_options(value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in _SIZES:
                options[name] = min(_SIZES[name], value) if "layers" in name else _SIZES[name]
            elif name in _IDS:
                options[name] = 1
        elif name == "initializer_range" and isinstance(value, float) and value < 1e-3:  # SAM's is 1e-10
            options[name] = 0.02
    if {"kv_lora_rank", "num_key_value_heads"} <= options.keys() or _get(config, "num_key_value_heads") is None:
        options["num_key_value_heads"] = _SIZES["num_attention_heads"]
    rope = _get(config, "rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        options["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    kinds = _get(config, "layer_types")
    if isinstance(kinds, list) and "layer_types" in vars(config):  # one of each kind
        options["layer_types"] = sorted(set(kinds)) if len(set(kinds)) > 1 else kinds[:2]
        options["num_hidden_layers"] = len(options["layer_types"])
    ffns = _get(config, "mlp_layer_types")
    if isinstance(ffns, list) and "mlp_layer_types" in vars(config):  # the last is a mixture
        options["mlp_layer_types"] = [ffns[0], *ffns[-1:] * (options["num_hidden_layers"] - 1)]
    return options


def _get(config: PreTrainedConfig, name: str) -> Any:
    with contextlib.suppress(Exception):  # a number that differs by layer
        return getattr(config, name)
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

"""Causal language models of true size with random weights, and every way to adapt one, in place."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import gain_ops
from benchmarks.contestants import liger_swiglu
from benchmarks.contestants.contestants import RANK
from benchmarks.contestants.sites import Architecture
from gain_ops.measure import meta_models
from gain_ops.measure.meta_models import blocks as blocks  # the benchmarks take all that is about a model from here
from gain_ops.measure.meta_models import checkpoint as checkpoint
from gain_ops.measure.meta_models import quiet as quiet
from gain_ops.models.sites import preset_sites

FROZEN = "frozen"  # the floor: what every other figure is compared with
FROZEN_LIGER = "frozen, with Liger's SwiGLU"  # and the floor of who keeps less than eager PyTorch
CONTEXT = {"llama": 8192, "qwen2": 32768, "gpt2": 1024}  # the longest window; more tokens make more windows
GATED = ("llama", "qwen2")  # the model types with a SwiGLU


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    put(model, backend) does it in place and leaves requires_grad as training would have it; backend is for our gains alone.
    rate is a learning rate that suits the method; packages are what it needs, model_types what it is for.
    """

    name: str
    put: Callable[[nn.Module, str], object]
    rate: float
    packages: tuple[str, ...] = ()
    ours: bool = False
    model_types: tuple[str, ...] = tuple(CONTEXT)

    def obstacle(self, model_type: str | None = None) -> str | None:
        """What is not installed that building a model or this method needs, or that it is not for such a model, or None."""
        missing = [package for package in ("transformers", *self.packages) if importlib.util.find_spec(package) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        unfit = model_type is not None and model_type not in self.model_types
        return f"does not apply: {model_type} has no gated FFN" if unfit else None


def _gain(name: str, targets: str, **options: Any) -> Method:
    def put(model: nn.Module, backend: str) -> None:
        gain_ops.apply(model, targets, backend=backend, **options)

    return Method(name, put, 1e-2, ours=True)


def _peft(name: str, rate: float, config: Callable[[nn.Module], object], fp32_adapters: bool = True) -> Method:
    def put(model: nn.Module, backend: str) -> None:
        import peft

        with quiet():
            peft.get_peft_model(cast(Any, model), cast(Any, config(model)), autocast_adapter_dtype=fp32_adapters)

    return Method(name, put, rate, ("peft",))


def _with_liger(method: Method, name: str) -> Method:
    """A method with the hidden activation of every FFN as Liger keeps it."""

    def put(model: nn.Module, backend: str) -> None:
        liger_swiglu.put(model)
        method.put(model, backend)

    return dataclasses.replace(method, name=name, put=put, model_types=GATED)


def _ia3(model: nn.Module) -> object:
    import peft

    return peft.IA3Config(target_modules=_same_layers(model), feedforward_modules=[])


def _lora(targets: Callable[[nn.Module], list[str]], dora: bool = False) -> Callable[[nn.Module], object]:
    def config(model: nn.Module) -> object:
        import peft

        return peft.LoraConfig(r=RANK, target_modules=targets(model), use_dora=dora)

    return config


def _same_layers(model: nn.Module) -> list[str]:
    """The layers that "gain-ffn" takes."""
    return [site.name for site in preset_sites(model, ffn=True)]


def _query_and_value(model: nn.Module) -> list[str]:
    """PEFT's own default; in GPT-2 one layer holds q, k and v."""
    return ["c_attn"] if cast(Any, model).config.model_type == "gpt2" else ["q_proj", "v_proj"]


_SAME = "on o_proj and down_proj"
METHODS = {
    method.name: method
    for method in (
        Method(FROZEN, lambda model, backend: model.requires_grad_(False), 0.0),
        _gain("gain", "gain"),
        _gain("gain, lean", "gain", memory="lean"),
        _gain("gain-ffn", "gain-ffn"),
        _gain("gain-ffn, lean", "gain-ffn", memory="lean"),
        _gain("gain-ffn, input side", "gain-ffn", side="input"),
        _gain("gain-ffn, input side, fused MLP", "gain-ffn", side="input", fuse_mlp=True),
        _gain("gain-ffn, input side, fused MLP, lean", "gain-ffn", side="input", fuse_mlp=True, memory="lean"),
        _peft(f"PEFT (IA)^3 {_SAME}", 1e-2, _ia3),
        _peft(f"PEFT LoRA r={RANK} {_SAME}", 1e-3, _lora(_same_layers)),
        _peft(f"PEFT LoRA r={RANK} {_SAME}, adapters in the model's dtype", 1e-3, _lora(_same_layers), False),
        _peft(f"PEFT LoRA r={RANK} on q and v", 1e-3, _lora(_query_and_value)),
        _peft(f"PEFT DoRA r={RANK} {_SAME}", 1e-3, _lora(_same_layers, dora=True)),
        _peft(
            f"PEFT DoRA r={RANK} {_SAME}, adapters in the model's dtype", 1e-3, _lora(_same_layers, dora=True), False
        ),
        Method("full fine-tuning", lambda model, backend: model.requires_grad_(True), 1e-4),
    )
}
_LORA = f"PEFT LoRA r={RANK} {_SAME}"
_LORA_16 = f"{_LORA}, adapters in the model's dtype"
COUNTED = METHODS | {
    method.name: method
    for method in (
        _with_liger(METHODS[FROZEN], FROZEN_LIGER),
        _with_liger(METHODS[_LORA], f"{_LORA}, with Liger's SwiGLU"),
        _with_liger(METHODS[_LORA_16], f"{_LORA_16}, with Liger's SwiGLU"),
    )
}
"""METHODS and those that are counted and never timed: they keep what another's kernels keep, in plain PyTorch."""


def build(
    architecture: Architecture,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
) -> nn.Module:
    """The model, not adapted, as meta_models.build makes it, without dropout.

    Args:
        architecture: the sizes.
        device: "meta" allocates nothing.
        dtype: of every weight.
        layers, vocabulary: fewer than the architecture's, for what is to be run.

    Raises:
        ImportError: transformers is missing.
        ValueError: an architecture of another model_type than CONTEXT names.

    """
    config = _config(architecture, layers or architecture.layers, vocabulary or architecture.vocabulary)
    return meta_models.build(config, device, dtype)


def _config(architecture: Architecture, layers: int, vocabulary: int) -> Any:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    a = architecture
    no_tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # their defaults may lie outside
    if a.model_type == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_positions=CONTEXT["gpt2"],
            n_embd=a.hidden,
            n_layer=layers,
            n_head=a.heads,
            n_inner=a.intermediate,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **no_tokens,
        )
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    if a.model_type not in kinds:
        raise ValueError(f"{a.name} is of model_type {a.model_type!r}; known are {', '.join(CONTEXT)}")
    return kinds[a.model_type](
        vocab_size=vocabulary,
        hidden_size=a.hidden,
        intermediate_size=a.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=CONTEXT[a.model_type],
        tie_word_embeddings=False,
        **no_tokens,
    )


def adapt(model: nn.Module, name: str, backend: str = "auto") -> None:
    """Adapt a model of build() in place by one of COUNTED.

    Raises:
        KeyError: a name that COUNTED lacks.
        ImportError: something that the method needs is missing.
        ValueError: the method is not for such a model.

    """
    method = METHODS.get(name) or COUNTED[name]
    if obstacle := method.obstacle():
        raise ImportError(f"{name} cannot be put on the model: {obstacle}")
    if obstacle := method.obstacle(cast(Any, model).config.model_type):
        raise ValueError(f"{name} cannot be put on the model: {obstacle}")
    method.put(model, backend)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tokens_of(architecture: Architecture, tokens: int, vocabulary: int, device: torch.device | str) -> Tensor:
    """Random ids int64 [windows, length] with windows * length = tokens, each window as long as the model takes.

    Raises:
        ValueError: tokens that are no whole number of windows.

    """
    return meta_models.random_ids(tokens, CONTEXT[architecture.model_type], vocabulary, device)

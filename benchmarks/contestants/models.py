"""Causal language models of true size with random weights, and every way to adapt one, in place."""

import dataclasses
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.contestants import liger_swiglu
from benchmarks.contestants.sites import Architecture
from gain_ops.measure import meta_models
from gain_ops.measure.meta_models import blocks as blocks  # the benchmarks take all that is about a model from here
from gain_ops.measure.meta_models import checkpoint as checkpoint
from gain_ops.planning import methods
from gain_ops.planning.methods import DORA, FROZEN, FULL, IA3, IN_MODEL_DTYPE, ON_PEFTS_LAYERS

_LIGER = ", with Liger's SwiGLU"
FROZEN_LIGER = FROZEN + _LIGER  # the floor of who keeps less than eager PyTorch; FROZEN is that of the others
CONTEXT = {"llama": 8192, "qwen2": 32768, "gpt2": 1024}  # the longest window; more tokens make more windows
GATED = ("llama", "qwen2")  # the model types with a SwiGLU


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to adapt a model, by the name that results files have for it, with a learning rate that suits it.

    liger: the hidden activation of every FFN is kept as Liger keeps it.
    """

    name: str
    way: methods.Method
    rate: float
    liger: bool = False

    def put(self, model: nn.Module, backend: str) -> None:
        """Adapt a model in place; requires_grad is as training would have it. backend is of gains."""
        if self.liger:
            liger_swiglu.put(model)
        self.way.put(model, backend=backend)

    def obstacle(self, model_type: str | None = None) -> str | None:
        """What is not installed that building a model or this method needs, or that it is not for such a model, or None."""
        needed = ("transformers", self.way.package)
        missing = [package for package in needed if package and importlib.util.find_spec(package) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        unfit = self.liger and model_type is not None and model_type not in GATED
        return f"does not apply: {model_type} has no gated FFN" if unfit else None


_SAME = " on o_proj and down_proj"
LORA = f"PEFT {methods.LORA}{_SAME}"
LORA_16 = LORA + IN_MODEL_DTYPE
# published results have these names, which say whose adapters they are, on which layers, and what a fused FFN implies
METHODS = {
    name: Method(name, methods.METHODS[way], rate)
    for name, way, rate in (
        (FROZEN, FROZEN, 0.0),
        ("gain", "gain", 1e-2),
        ("gain, lean", "gain, lean", 1e-2),
        ("gain-ffn", "gain-ffn", 1e-2),
        ("gain-ffn, lean", "gain-ffn, lean", 1e-2),
        ("gain-ffn, input side", "gain-ffn, input side", 1e-2),
        ("gain-ffn, input side, fused MLP", "gain-ffn, fused", 1e-2),
        ("gain-ffn, input side, fused MLP, lean", "gain-ffn, fused, lean", 1e-2),
        (f"PEFT {IA3}{_SAME}", IA3, 1e-2),
        (LORA, methods.LORA, 1e-3),
        (LORA_16, methods.LORA + IN_MODEL_DTYPE, 1e-3),
        (f"PEFT {methods.LORA} on q and v", methods.LORA + ON_PEFTS_LAYERS, 1e-3),
        (f"PEFT {DORA}{_SAME}", DORA, 1e-3),
        (f"PEFT {DORA}{_SAME}{IN_MODEL_DTYPE}", DORA + IN_MODEL_DTYPE, 1e-3),
        (FULL, FULL, 1e-4),
    )
}
COUNTED = METHODS | {
    f"{name}{_LIGER}": dataclasses.replace(METHODS[name], name=f"{name}{_LIGER}", liger=True)
    for name in (FROZEN, LORA, LORA_16)
}
"""METHODS, and methods that are counted and never timed: in plain PyTorch they save what another package's kernels save."""


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

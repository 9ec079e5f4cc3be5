"""Causal language models of true size with random weights, and every way to adapt one, in place.

On the meta device nothing is allocated, so 70 billion parameters are built on a laptop in a second. The attention is torch's
scaled_dot_product_attention. On meta that would take its math path, which keeps [heads, T, T] matrices and is what no GPU
runs; there the flash kernel is called by name instead, which keeps q, k, v, its output and one fp32 number a head and token.
"""

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

import gain_ops
from benchmarks.contestants import RANK
from benchmarks.sites import Architecture
from gain_ops.architectures import preset_sites

FROZEN = "frozen"  # the floor: what every other figure is compared with
CONTEXT = {"llama": 8192, "qwen2": 32768, "gpt2": 1024}  # the longest window; more tokens make more windows
ATTENTION = "gain_ops_benchmarks"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    put(model, backend) does it in place and leaves requires_grad as training would have it; backend is for our gains alone.
    rate is a learning rate that suits the method; packages are what it needs.
    """

    name: str
    put: Callable[[nn.Module, str], object]
    rate: float
    packages: tuple[str, ...] = ()
    ours: bool = False

    def obstacle(self) -> str | None:
        """What is not installed that building a model or this method needs, or None."""
        missing = [package for package in ("transformers", *self.packages) if importlib.util.find_spec(package) is None]
        return f"{' and '.join(missing)} not installed" if missing else None


def _gain(name: str, targets: str, **options: str) -> Method:
    def put(model: nn.Module, backend: str) -> None:
        gain_ops.apply(model, targets, backend=backend, **options)

    return Method(name, put, 1e-2, ours=True)


def _peft(name: str, rate: float, config: Callable[[nn.Module], object], fp32_adapters: bool = True) -> Method:
    def put(model: nn.Module, backend: str) -> None:
        import peft

        with quiet():
            peft.get_peft_model(cast(Any, model), cast(Any, config(model)), autocast_adapter_dtype=fp32_adapters)

    return Method(name, put, rate, ("peft",))


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


def build(
    architecture: Architecture,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
) -> nn.Module:
    """The model, not adapted, in training mode, with random weights drawn from torch's generator and no dropout.

    The output of its embeddings requires a gradient under every method: then the backward runs through all of the blocks,
    the first is as any other, and what differs between two methods is theirs. transformers and PEFT do so themselves under
    activation checkpointing.

    Args:
        architecture: the sizes.
        device: "meta" allocates nothing.
        dtype: of every weight.
        layers, vocabulary: fewer than the architecture's, for what is to be run.

    Raises:
        ImportError: transformers is missing.
        ValueError: an architecture of another model_type than CONTEXT names.

    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _attend)
    config = _config(architecture, layers or architecture.layers, vocabulary or architecture.vocabulary)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    model.enable_input_require_grads()
    return cast(nn.Module, model.train())


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

    For an attention that is not its own transformers makes no mask, whose making would read values and so fail on meta.
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


def adapt(model: nn.Module, name: str, backend: str = "auto") -> None:
    """Adapt a model of build() in place by one of METHODS.

    Raises:
        KeyError: a name that METHODS lacks.
        ImportError: something that the method needs is missing.

    """
    method = METHODS[name]
    if obstacle := method.obstacle():
        raise ImportError(f"{name} cannot be put on the model: {obstacle}")
    method.put(model, backend)


def checkpoint(model: nn.Module) -> None:
    """Activation checkpointing of every block, without reentrance: a block keeps its input and is run again."""
    with quiet():
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PEFT says on GPT-2's Conv1D, which it then sets right itself, and on a name that transformers 6 drops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder layers, in order."""
    body = cast(Any, model).base_model
    return cast(Sequence[nn.Module], body.h if hasattr(body, "h") else body.layers)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tokens_of(architecture: Architecture, tokens: int, vocabulary: int, device: torch.device | str) -> Tensor:
    """Random ids int64 [windows, length] with windows * length = tokens, each window as long as the model takes.

    Raises:
        ValueError: tokens that are no whole number of windows.

    """
    length = min(tokens, CONTEXT[architecture.model_type])
    if tokens % length:
        raise ValueError(f"{tokens} tokens are no whole number of {architecture.name}'s windows of {length}")
    return torch.randint(vocabulary, (tokens // length, length), device=device)

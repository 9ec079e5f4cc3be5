"""Whole quantised models: saved by transformers, absorbed on disk, loaded by transformers again, on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gain_ops.checkpoints.absorb import absorb
from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.plan import plan
from gain_ops.gainfiles.file import read_gains
from gain_ops.testing import assert_no_worse_than_torch

from support.small_checkpoints import save_gain_file

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

IDS = torch.arange(24).view(2, 12) * 5 % 64


@dataclass(frozen=True)
class Kind:
    """How a plain model's folder becomes a quantised one, and what a layer of it weighs in float64."""

    package: str
    quantise: Callable[[Path, Path], None]
    weight: Callable[[nn.Module], Tensor]


def plain_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load(folder: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options).eval()


def by_transformers(config: Callable[[], object]) -> Callable[[Path, Path], None]:
    def quantise(plain: Path, folder: Path) -> None:
        load(plain, quantization_config=config()).save_pretrained(folder)

    return quantise


def by_compressed_tensors(activations: dict | None = None, **weights: object) -> Callable[[Path, Path], None]:
    def quantise(plain: Path, folder: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from compressed_tensors.quantization.utils import calculate_qparams

        model = load(plain)
        args = QuantizationArgs(**weights)
        inputs = QuantizationArgs(dynamic=True, strategy="token", **activations) if activations else None
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
        apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                groups = {"group": (-1, args.group_size or 1), "channel": (1, -1)}.get(args.strategy)
                weight = module.weight.unflatten(-1, groups) if groups else module.weight.reshape(1, -1)
                scale, zero = calculate_qparams(weight.amin(-1), weight.amax(-1), args)
                module.weight_scale.data.copy_(scale)
                module.weight_zero_point.data.copy_(zero)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    return quantise


def torchao_config(name: str, **options: object) -> Callable[[], object]:
    def config() -> object:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)(**options))

    return config


def int8_weight(module: nn.Module) -> Tensor:
    scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
    codes = module.weight.CB if module.state.CB is None else module.state.CB
    return codes.double() * scale.double()[:, None] / 127


def four_bit_weight(module: nn.Module) -> Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state).double()


def plain_weight(module: nn.Module) -> Tensor:
    return module.weight.double()


def torchao_weight(module: nn.Module) -> Tensor:
    return module.weight.dequantize(torch.float32).double()


INT8, FLOAT8 = {"num_bits": 8}, {"num_bits": 8, "type": "float"}
KINDS = {
    "compressed-tensors int8": Kind(
        "compressed_tensors", by_compressed_tensors(INT8, strategy="channel", **INT8), plain_weight
    ),
    "compressed-tensors int4, groups": Kind(
        "compressed_tensors", by_compressed_tensors(num_bits=4, strategy="group", group_size=32), plain_weight
    ),
    "compressed-tensors float8": Kind(
        "compressed_tensors", by_compressed_tensors(FLOAT8, strategy="channel", **FLOAT8), plain_weight
    ),
    "torchao int8": Kind("torchao", by_transformers(torchao_config("Int8WeightOnlyConfig")), torchao_weight),
    "torchao int8, dynamic": Kind(
        "torchao", by_transformers(torchao_config("Int8DynamicActivationInt8WeightConfig")), torchao_weight
    ),
    "torchao float8": Kind("torchao", by_transformers(torchao_config("Float8WeightOnlyConfig")), torchao_weight),
    "bitsandbytes int8": Kind(
        "bitsandbytes", by_transformers(lambda: BitsAndBytesConfig(load_in_8bit=True)), int8_weight
    ),
    "bitsandbytes nf4": Kind(
        "bitsandbytes",
        by_transformers(lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        four_bit_weight,
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    plain_model(folder)
    return folder


@pytest.fixture(scope="module")
def gain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    names = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("self_attn.o_proj", "mlp.down_proj")]
    path = tmp_path_factory.mktemp("gains") / "gains.safetensors"
    return save_gain_file(path, {name: torch.randn(64) * 0.3 for name in names})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def exact(plain: Path, model: nn.Module, kind: Kind, gains: dict[str, Tensor]) -> nn.Module:
    """In float64 a plain model with this one's weights, which has run before, and the gains folded in."""
    truth = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float64).eval()
    for name, module in truth.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = kind.weight(model.get_submodule(name))
            module.weight.copy_(weight * gains[name].double()[:, None] if name in gains else weight)
    return truth


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_model_with_gains(name, plain, gain_file, tmp_path):
    kind = KINDS[name]
    pytest.importorskip(kind.package)
    kind.quantise(plain, tmp_path / "quantised")
    done = absorb(plan(tmp_path / "quantised", gain_file, check_base=False), tmp_path / "absorbed")
    assert (done.layers, done.verified) == (4, True)
    gains = {layer: 1 + delta for layer, delta in read_gains(gain_file).deltas.items()}
    model = load(tmp_path / "quantised")
    for layer, gain in gains.items():
        hook = lambda _, __, out, gain=gain: (out.float() * gain).to(out.dtype)  # noqa: E731
        model.get_submodule(layer).register_forward_hook(hook)
    gained = logits(model)
    truth = logits(exact(plain, model, kind, gains))
    assert_no_worse_than_torch(name, logits(load(tmp_path / "absorbed")), gained, truth, unit=torch.bfloat16)


def test_a_requantised_model_is_no_worse_than_one_quantised_once_more(plain, gain_file, tmp_path):
    pytest.importorskip("compressed_tensors")
    kind = Kind("compressed_tensors", by_compressed_tensors(FLOAT8, strategy="tensor", **FLOAT8), plain_weight)
    kind.quantise(plain, tmp_path / "quantised")
    with pytest.raises(CheckpointError, match=r"o_proj cannot take its gain exactly.*down_proj cannot take its gain"):
        plan(tmp_path / "quantised", gain_file, check_base=False)
    todo = plan(tmp_path / "quantised", gain_file, requantize=True, check_base=False)
    absorb(todo, tmp_path / "absorbed")
    gains = {layer: 1 + delta for layer, delta in read_gains(gain_file).deltas.items()}
    model = load(tmp_path / "quantised")
    logits(model)  # unpacks it
    truth = exact(plain, model, kind, gains)
    truth.to(torch.bfloat16).save_pretrained(tmp_path / "gained")
    kind.quantise(tmp_path / "gained", tmp_path / "again")
    again, absorbed = (logits(load(tmp_path / folder)) for folder in ("again", "absorbed"))
    assert_no_worse_than_torch("one scale", absorbed, again, logits(exact(plain, model, kind, gains)))

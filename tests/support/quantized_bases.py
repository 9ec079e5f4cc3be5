"""Quantised linears and models of the packages that make them, and the weights that they stand for, decoded by hand."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gain_ops.layers.linears import is_plain_linear
from gain_ops.testing import PlainGain

IN, OUT = 128, 96  # bitsandbytes repacks 32 rows at a time
GROUP = 32
IDS = torch.arange(1, 17)[None]

Make = Callable[[nn.Linear], nn.Module]


def four_bit(kind: str, nested: bool) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=nested,
            quant_type=kind,
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to(linear.weight.device)

    return make


def eight_bit(threshold: float) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict(linear.state_dict())
        return layer.to(linear.weight.device)

    return make


def torchao(config: str, **options) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        from torchao.quantization import granularity

        built = {name: getattr(granularity, of)(*sizes) for name, (of, *sizes) in options.items()}
        if config.endswith("IntxWeightConfig") or config.startswith("Intx"):
            built["weight_dtype"] = torch.int4
        holder = nn.Sequential(copy.deepcopy(linear))
        quantization.quantize_(holder, getattr(quantization, config)(**built))
        return holder[0]

    return make


def int4_for_cpus(linear: nn.Linear) -> nn.Module:
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")
    weight = int4.Int4OpaqueTensor.from_hp(linear.weight.detach(), [1, GROUP])
    return with_weight(linear, weight)


def with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    linear = copy.deepcopy(linear)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def packed_gguf(kind: str) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        gguf = pytest.importorskip("gguf")
        utils = pytest.importorskip("transformers.integrations.gguf.utils")
        blocks = gguf.quants.quantize(linear.weight.detach().float().numpy(), gguf.GGMLQuantizationType[kind])
        sizes = linear.in_features, linear.out_features, int(gguf.GGMLQuantizationType[kind])
        layer = utils.GgufLinear(*sizes, linear.bias is not None)
        layer.weight = nn.Parameter(torch.from_numpy(blocks), requires_grad=False)
        layer.bias = linear.bias
        return layer

    return make


TRAINABLE: dict[str, Make] = {
    "nf4": four_bit("nf4", nested=False),
    "nf4-doubly": four_bit("nf4", nested=True),
    "fp4": four_bit("fp4", nested=False),
    "fp4-doubly": four_bit("fp4", nested=True),
    "llm-int8": eight_bit(0.0),
    "llm-int8-outliers": eight_bit(2.0),
    "int8-row": torchao("Int8WeightOnlyConfig"),
    "int8-group": torchao("Int8WeightOnlyConfig", granularity=("PerGroup", GROUP)),
    "int8-tensor": torchao("Int8WeightOnlyConfig", granularity=("PerTensor",)),
    "int4-group": torchao("IntxWeightOnlyConfig", granularity=("PerGroup", GROUP)),
    "float8": torchao("Float8WeightOnlyConfig"),
    "gguf-q8_0": packed_gguf("Q8_0"),
    "gguf-q4_0": packed_gguf("Q4_0"),
}


# The forward quantises x as well, or calls a kernel that has no backward.
INFERENCE: dict[str, Make] = {
    "int8-dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "int4-dynamic": torchao("Int8DynamicActivationIntxWeightConfig", weight_granularity=("PerGroup", GROUP)),
    "int4-for-cpus": int4_for_cpus,
}


# One scale or more for every row, and none for two.
ROWWISE = {
    name: make
    for name, make in (TRAINABLE | INFERENCE).items()
    if not name.startswith("gguf") and name != "int8-tensor"
}


def exact_weight(base: nn.Module) -> Tensor:
    """The weight [out, in] in fp64 on the CPU, from codes and scales, by no function of the package that made them."""
    weight = base.weight
    if hasattr(weight, "quant_state"):
        return four_bit_weight(base)
    if hasattr(base, "state"):
        return wide(weight.data) * wide(base.state.SCB if weight.SCB is None else weight.SCB)[:, None] / 127
    if hasattr(base, "ggml_type"):
        import gguf

        return torch.from_numpy(gguf.quants.dequantize(weight.data.numpy(), base.ggml_type)).double()
    if hasattr(weight, "scale_and_zero"):
        scale, zero = (spread(weight.scale_and_zero[..., i].T, weight.shape) for i in (0, 1))
        ones = torch.stack((torch.ones(IN // GROUP, OUT), torch.zeros(IN // GROUP, OUT)), -1)
        read_off = type(weight)(
            weight.qdata, ones, weight.block_size, weight.shape
        )  # the codes, as the kernel has them
        return wide(nn.functional.linear(torch.eye(IN), read_off).T) * scale + zero
    zero = getattr(weight, "zero_point", None)
    codes = wide(weight.qdata) - (0 if zero is None else spread(zero, weight.shape))
    return codes * spread(weight.scale, weight.shape)


def four_bit_weight(base: nn.Module) -> Tensor:
    """bitsandbytes' fp4 and nf4: two codes a byte, the first one high, looked up, times the scale of their block."""
    state, codes = base.weight.quant_state, base.weight.data.view(torch.uint8).flatten().cpu()
    absmax = wide(state.absmax)
    if state.nested:
        outer = wide(state.state2.absmax).repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = wide(state.state2.code)[absmax.long()] * outer + wide(state.offset)
    values = wide(state.code)[torch.stack((codes >> 4, codes & 15), 1).flatten().long()]
    return (values.view(-1, state.blocksize) * absmax[:, None]).view(base.out_features, base.in_features)


def spread(parts: Tensor, shape: torch.Size) -> Tensor:
    """One value a group, [rows, groups] or fewer, as one a weight."""
    for dim in (0, 1):
        parts = wide(parts).repeat_interleave(shape[dim] // parts.shape[dim], dim)
    return parts


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def plain_layer(base: nn.Module, side: str, dtype: torch.dtype) -> PlainGain:
    """The gained layer in plain torch on the weight that the base stands for."""
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(exact_weight(base))
        if base.bias is not None:
            linear.bias.copy_(base.bias)
    return PlainGain(linear, side)


def random_gain(size: int) -> Tensor:
    """delta: gains of both signs, one of them zero."""
    delta = torch.randn(size) * 0.7
    delta[1] = -1
    return delta


def make_linear(bias: bool, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(IN, OUT, bias, dtype=dtype)
    return linear.requires_grad_(False)


def scale_dtype(base: nn.Module) -> torch.dtype:
    for name in ("scale", "scale_and_zero"):
        if hasattr(base.weight, name):
            return getattr(base.weight, name).dtype
    return torch.float32


def added_zero(base: nn.Module) -> Tensor:
    """The zero that is added after scaling, one a weight; without such, zeros."""
    if not hasattr(base.weight, "scale_and_zero"):
        return torch.zeros(OUT, IN)
    return spread(base.weight.scale_and_zero[..., 1].T, base.weight.shape)


def repacked(name: str) -> nn.Module:
    """A bitsandbytes layer after its first evaluation on this CPU."""
    base = TRAINABLE[name](make_linear(False, torch.float32))
    with torch.no_grad():
        base.eval()(torch.randn(4, IN))
    if not getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on a CPU with AVX512-BF16")
    return base


# models, as users load them


def save_llama(path: Path) -> None:
    """Write a Llama of random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def bitsandbytes_config(**options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao_config(name, **options):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    if "granularity" in options:
        options["granularity"] = quantization.granularity.PerGroup(options["granularity"])
    return TorchAoConfig(getattr(quantization, name)(**options))


CONFIGS = {
    "nf4": lambda: bitsandbytes_config(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-doubly": lambda: bitsandbytes_config(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "llm-int8": lambda: bitsandbytes_config(load_in_8bit=True),
    "int8": lambda: torchao_config("Int8WeightOnlyConfig"),
    "int4": lambda: torchao_config("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=GROUP),
    "float8": lambda: torchao_config("Float8WeightOnlyConfig"),
}


def load(folder, config=None, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    options = {} if config is None else {"quantization_config": config}  # None would hide the checkpoint's own
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def unpacked(model, folder, dtype):
    """The model with plain weights, those that the quantised ones stand for."""
    plain = load(folder).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not is_plain_linear(module):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(exact_weight(module))
    return plain.requires_grad_(False)


def with_plain_gains(model, names, side):
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PlainGain(model.get_submodule(name), side))
    return model


def set_gains(model, scale=0.2):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".delta"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def gradients(model):
    return torch.cat([p.grad.double() for name, p in model.named_parameters() if name.endswith(".delta")])

"""Gains trained on quantised bases, each held to the weight that the base's own codes and scales stand for.

What runs on a CPU runs here; what needs a GPU's kernels is marked so. A package that is not installed is skipped.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import gain_ops
from gain_ops.gainfiles.file import GainFileError
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.linears import own_tensors
from gain_ops.layers.make import gain_layer
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.models.files import fingerprint
from gain_ops.testing import assert_no_worse_than_torch

from support.quantized_bases import (
    CONFIGS,
    IDS,
    IN,
    INFERENCE,
    OUT,
    TRAINABLE,
    gradients,
    load,
    make_linear,
    plain_layer,
    random_gain,
    repacked,
    save_llama,
    set_gains,
    torchao_config,
    unpacked,
    with_plain_gains,
)

SIDES = ("output", "input")
T = 12  # transformers' packed GGUF takes up to 8 tokens to a kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


# bitsandbytes' int8 rounds x on a GPU, in training too
ON_GPUS = [name for name in TRAINABLE if not name.startswith(("gguf", "llm"))]


@pytest.mark.parametrize(
    ("name", "device"),
    [*((name, "cpu") for name in TRAINABLE), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ON_GPUS)],
)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_the_dequantised_layer(name, device, side, bias, dtype):
    base = TRAINABLE[name](make_linear(bias, dtype).to(device)).train()
    x, dy = (torch.randn(2, T // 2, size, dtype=dtype, device=device) for size in (IN, OUT))
    layers = gain_layer(base, side=side), plain_layer(base, side, dtype), plain_layer(base, side, torch.float64)
    assert isinstance(layers[0], GainWrapper)
    delta = random_gain(layers[0].features)
    results = []
    for layer in layers:
        layer.to(device).delta.data.copy_(delta)
        wide = torch.float64 if layer is layers[2] else dtype
        given = x.to(wide, copy=True).requires_grad_()
        y = layer(given)
        y.backward(dy.to(wide))
        results.append((y, given.grad, layer.delta.grad))
    for what, ours, plain, exact in zip(("y", "dx", "ddelta"), *results, strict=True):
        assert_no_worse_than_torch(f"{name} {what}", ours, plain, exact)
        assert ours.dtype == plain.dtype


def kept(layer: nn.Module, x: Tensor) -> tuple[list[tuple[int, ...]], bool]:
    """Shapes of what a forward saves, weights aside; and whether x outlives it (bitsandbytes keeps it out of sight)."""
    saved = saved_bytes(lambda: layer(x), exclude=own_tensors(layer).values())
    made = x * 1
    alive = StorageWeakRef(made.untyped_storage())
    y = layer(made)
    del made
    return [tensor.shape for tensor in saved.tensors], not alive.expired() and y.requires_grad


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("side", SIDES)
def test_one_activation_is_kept_beside_what_the_base_keeps(name, side):
    base = TRAINABLE[name](make_linear(False, torch.float32)).train()
    x = torch.randn(T, IN, requires_grad=True)
    shapes, keeps_x = kept(base, x)
    with_gain, keeps_x_too = kept(gain_layer(base, side=side), x)
    assert sorted(with_gain) == sorted([*shapes, (T, OUT) if side == "output" else (T, IN)])
    assert keeps_x_too == (keeps_x or side == "input")


def test_a_bias_costs_no_second_activation():
    base = TRAINABLE["nf4"](make_linear(True, torch.float32)).train()
    shapes, _ = kept(gain_layer(base), torch.randn(T, IN, requires_grad=True))
    assert shapes == [(T, OUT), (OUT,)]


def test_on_4_bits_qlora_keeps_x_and_a_gain_does_not():
    peft = pytest.importorskip("peft")
    x = torch.randn(T, IN, dtype=torch.bfloat16, requires_grad=True)
    base = TRAINABLE["nf4"](make_linear(False, torch.bfloat16)).train()
    assert kept(base, x) == ([], False)
    assert kept(gain_layer(base), x) == ([(T, OUT)], False)
    model = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=16, target_modules=["0"]))
    saved = saved_bytes(lambda: model(x), exclude=own_tensors(model).values())
    assert [(tensor.shape, tensor.dtype) for tensor in saved.tensors] == [
        ((T, IN), torch.float32),
        ((T, 16), torch.float32),
    ]


@pytest.mark.parametrize("name", [*TRAINABLE, *INFERENCE])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_gain_changes_no_bit_and_remove_leaves_the_base(name, side, mode):
    model = nn.Sequential((TRAINABLE | INFERENCE)[name](make_linear(True, torch.bfloat16)))
    getattr(model, mode)()
    base, keys = model[0], list(model.state_dict())
    x = torch.randn(T, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        gain_ops.apply(model, ["0"], side=side)
        assert torch.equal(model(x), expected)
        model[0].delta.copy_(random_gain(model[0].features))
        assert not torch.equal(model(x), expected)
    assert model[0].delta.dtype == torch.float32
    assert {key.replace("0.base.", "0.") for key in model.state_dict()} == {*keys, "0.delta"}
    gain_ops.remove(model)
    assert model[0] is base
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        if mode == "train":  # in eval state_dict() repacks bitsandbytes' weights, and rounds
            assert torch.equal(model(x), expected)


# in models


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_models_gradients_are_those_of_the_unpacked_model(folder, name, side, autocast):
    model = load(folder, CONFIGS[name]()).train()
    plain, exact = (unpacked(model, folder, dtype).train() for dtype in (torch.float32, torch.float64))
    applied = gain_ops.apply(model, "gain-ffn", side=side)
    assert len(applied.names) == 4
    assert all(isinstance(model.get_submodule(layer), GainWrapper) for layer in applied.names)
    results = []
    for each in (model, with_plain_gains(plain, applied.names, side), with_plain_gains(exact, applied.names, side)):
        set_gains(each)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and each is not exact):
            loss = each(IDS, labels=IDS).loss
        loss.backward()
        results.append(gradients(each))
    assert_no_worse_than_torch("gradient of the gains", *results)
    assert {p.grad is None for name, p in model.named_parameters() if not name.endswith(".delta")} == {True}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(folder, name, reentrant):
    model = load(folder, CONFIGS[name]()).train()
    gain_ops.apply(model, "gain-ffn")
    set_gains(model)
    model(IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    assert torch.equal(gradients(model), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_gain_files_know_a_quantised_base_whatever_was_done_with_it(folder, tmp_path, name):
    model = load(folder, CONFIGS[name]()).train()
    applied = gain_ops.apply(model, "gain-ffn")
    set_gains(model)
    fresh = {layer: fingerprint(model.get_submodule(layer)) for layer in applied.names}
    assert None not in fresh.values()
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        model.eval()(IDS)  # bitsandbytes repacks here
    gain_ops.save_gains(model, tmp_path / "gains")
    assert fresh == {layer: fingerprint(model.get_submodule(layer)) for layer in applied.names}

    again = load(folder, CONFIGS[name]())
    again.save_pretrained(tmp_path / "model")
    for other in (again, load(tmp_path / "model")):
        gain_ops.load_gains(other, tmp_path / "gains")
        for layer in applied.names:
            assert torch.equal(other.get_submodule(layer).delta, model.get_submodule(layer).delta)

    scaled = load(folder, CONFIGS[name]())
    gain_ops.apply(scaled, "gain-ffn")
    set_gains(scaled)
    gain_ops.absorb(scaled)
    with pytest.raises(GainFileError, match="trained on other weights"):
        gain_ops.load_gains(scaled, tmp_path / "gains")


def llama_gguf(path, kind: str):
    """A GGUF of a Llama of random weights, and its projections as they are stored."""
    gguf = pytest.importorskip("gguf")
    hidden, ffn, heads, vocab, layers = 64, 128, 4, 96, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{part}": (ffn, hidden) for part in ("gate", "up")} | {
            f"blk.{i}.ffn_down": (hidden, ffn)
        }
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", torch.ones(hidden).numpy())
    writer.add_tensor("output_norm.weight", torch.ones(hidden).numpy())
    quantization, stored = gguf.GGMLQuantizationType[kind], {}
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(torch.randn(shape).mul_(0.2).numpy(), quantization)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=quantization)
        stored[name] = torch.from_numpy(gguf.quants.dequantize(blocks, quantization))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_gguf_is_unpacked_by_transformers_and_gained_as_plain_layers(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    stored = llama_gguf(tmp_path / "model.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    plain, exact = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).double().requires_grad_(False)
    names = gain_ops.apply(model, "gain-ffn").names
    for layer, kept in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        for i in (0, 1):
            gained = model.get_submodule(f"model.layers.{i}.{layer}")
            assert isinstance(gained, GainLinear)
            assert torch.equal(gained.weight, stored[f"blk.{i}.{kept}"])
    results = []
    for each in (model, with_plain_gains(plain, names, "output"), with_plain_gains(exact, names, "output")):
        set_gains(each)
        each(IDS, labels=IDS).loss.backward()
        results.append(gradients(each))
    assert_no_worse_than_torch("gradient of the gains", *results)


def compressed(folder, path, *, bits: int, activations: bool = False):
    """The Llama as compressed-tensors saves it: int8 codes, a scale a row, or packed int4, a scale a group."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    layout = {"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": 32}
    weights = QuantizationArgs(num_bits=bits, **layout)
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    model = load(folder)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.view(*module.weight_scale.shape, -1)
            module.weight_scale.data.copy_(groups.abs().amax(-1) / (2 ** (bits - 1) - 1))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_tensors_unpacks_in_the_first_forward(folder, tmp_path, bits):
    from transformers import CompressedTensorsConfig

    compressed(folder, tmp_path, bits=bits)
    model = load(tmp_path).train()
    plain = load(tmp_path, CompressedTensorsConfig(dequantize=True)).requires_grad_(False)
    exact = copy.deepcopy(plain).double()
    applied = gain_ops.apply(model, "gain-ffn")
    fresh = {layer: fingerprint(model.get_submodule(layer)) for layer in applied.names}
    assert fresh == {layer: fingerprint(plain.get_submodule(layer)) for layer in applied.names}
    results = []
    for each in (
        model,
        with_plain_gains(plain, applied.names, "output"),
        with_plain_gains(exact, applied.names, "output"),
    ):
        set_gains(each)
        each(IDS, labels=IDS).loss.backward()
        results.append(gradients(each))
    assert_no_worse_than_torch("gradient of the gains", *results)
    assert fresh == {layer: fingerprint(model.get_submodule(layer)) for layer in applied.names}
    with pytest.raises(ValueError, match=r"cannot absorb model.layers.0.self_attn.o_proj: it wraps a Linear .* again"):
        gain_ops.absorb(model)


def test_compressed_tensors_with_quantised_activations_is_for_inference(folder, tmp_path):
    compressed(folder, tmp_path, bits=8, activations=True)
    model = load(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
        gain_ops.apply(model, "gain-ffn")
        assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(RuntimeError, match="gives its input no gradient"):
        model(IDS)


# a base that gives its input no gradient


@pytest.mark.parametrize("name", ["int8-dynamic", "int4-dynamic"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("needs_x", [True, False])
def test_quantised_activations_are_for_inference(name, side, needs_x):
    layer = gain_layer(INFERENCE[name](make_linear(True, torch.float32)), side=side)
    x = torch.randn(T, IN, requires_grad=needs_x)
    with pytest.raises(RuntimeError, match=r"Linear with a .* gives its input no gradient.*Int8WeightOnlyConfig"):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base(x))


def test_a_model_with_quantised_activations_is_for_inference(folder):
    # q, k and v cut the gradient too, so no gained layer has an input that needs one
    model = load(folder, torchao_config("Int8DynamicActivationInt8WeightConfig"))
    with torch.no_grad():
        expected = model(IDS).logits
        gain_ops.apply(model, "gain-ffn")
        assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(RuntimeError, match=r"Linear with a Int8Tensor .* gives its input no gradient"):
        model(IDS)


def test_a_base_without_a_backward():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    layer = gain_layer(Detached(IN, OUT))
    layer(torch.randn(T, IN)).sum().backward()
    assert layer.delta.grad is not None
    with pytest.raises(RuntimeError, match=r"Detached .* gives its input no gradient"):
        layer(torch.randn(T, IN, requires_grad=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao.quantization", "ignore:torch.quantize_per")
def test_torchs_own_dynamic_linear_is_for_inference():
    base = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(IN, OUT)), {nn.Linear})[0]
    layer = gain_layer(base)
    x = torch.randn(T, IN)
    with torch.no_grad():
        layer.delta.copy_(random_gain(OUT))
        torch.testing.assert_close(layer(x), layer.gain * (base(x) - base.bias()) + base.bias())
    with pytest.warns(UserWarning, match="quantized::linear_dynamic: an autograd kernel was not registered"):
        layer(x.requires_grad_()).sum().backward()  # torch's own word, and no gradient for x
    assert x.grad is None
    assert fingerprint(layer) is None


def test_a_repacked_base_is_for_inference():
    layer = gain_layer(repacked("nf4").train())
    x = torch.randn(T, IN)
    assert layer(x).isfinite().all()
    with pytest.raises(RuntimeError, match=r"Linear4bit .* gives its input no gradient: bitsandbytes has repacked"):
        layer(x.requires_grad_())


@pytest.mark.parametrize("name", ["nf4", "nf4-doubly"])
def test_the_fingerprint_of_a_repacked_base_is_that_of_the_base(name):
    torch.manual_seed(1)
    linear = make_linear(False, torch.float32)
    base = TRAINABLE[name](linear)
    before = fingerprint(gain_layer(base))
    with torch.no_grad():
        base.eval()(torch.randn(T, IN))
    assert fingerprint(gain_layer(base)) == before
    scaled = TRAINABLE[name](nn.Linear(IN, OUT, bias=False))
    assert fingerprint(gain_layer(scaled)) != before


def test_scales_are_part_of_the_fingerprint():
    base = TRAINABLE["llm-int8"](make_linear(False, torch.float32))
    before = fingerprint(gain_layer(base))
    base(torch.randn(T, IN))  # the scales move from the weight to the layer's state
    assert fingerprint(gain_layer(base)) == before
    base.state.SCB.mul_(2)
    assert fingerprint(gain_layer(base)) != before


# torch.compile


@pytest.mark.parametrize("name", ["nf4", "nf4-doubly", "llm-int8", "int8-row", "int4-group", "float8"])
@pytest.mark.parametrize("side", SIDES)
def test_what_compiles_without_a_gain_compiles_with_one(name, side):
    torch._dynamo.reset()
    layer = gain_layer(TRAINABLE[name](make_linear(True, torch.float32)).train(), side=side)
    x, dy = torch.randn(T, IN, requires_grad=True), torch.randn(T, OUT)
    assert graph_breaks(layer, x) <= graph_breaks(layer.base, x)
    with torch.no_grad():
        layer.delta.copy_(random_gain(layer.features))
    compiled = torch.compile(layer, backend="aot_eager")
    expected, got = layer(x), compiled(x)
    torch.testing.assert_close(got, expected)
    wanted = x, layer.delta
    torch.testing.assert_close(torch.autograd.grad(got, wanted, dy), torch.autograd.grad(expected, wanted, dy))


def graph_breaks(module: nn.Module, x: Tensor) -> int:
    torch._dynamo.reset()
    return torch._dynamo.explain(module)(x).graph_break_count

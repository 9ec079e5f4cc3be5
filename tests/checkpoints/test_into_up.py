"""Input gains of quantised down projections, absorbed on disk into the up projections' rows: logits, bits, refusals."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gain_ops
from gain_ops.checkpoints.absorb import absorb
from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.formats.gguf import _GATED, _PACKED, open_gguf
from gain_ops.checkpoints.formats.gguf_blocks import BLOCKS, decode
from gain_ops.checkpoints.formats.safetensors_folder import SafetensorsCheckpoint
from gain_ops.checkpoints.formats.skeleton import skeleton
from gain_ops.checkpoints.plan import plan
from gain_ops.gainfiles.file import read_gains
from gain_ops.models.ffn_layout import layout_of
from gain_ops.models.record import gained_modules
from gain_ops.testing import assert_no_worse_than_torch

from support.gguf_files import llama_fields, load, tiny_gated, write_model, write_tensors
from support.small_checkpoints import save_folder, save_gain_file

IDS = torch.arange(24).view(2, 12)
DOWN = "model.layers.0.mlp.down_proj"
MODELS = {
    "llama": ("Llama", {"mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
}


def up_of(kind: str) -> str:
    return "gate_up_proj" if kind == "phi3" else "up_proj"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def put_gains(model: nn.Module, path: Path, targets: str = r"mlp\.down_proj") -> dict[str, Tensor]:
    """Random gains of both signs, one of them zero, on the model and in a file."""
    gain_ops.apply(model, [targets], side="input")
    for layer in gained_modules(model).values():
        nn.init.normal_(layer.delta, std=0.3)
        layer.delta.data[1] = -1
        layer.delta.data[2] = -2
    gain_ops.save_gains(model, path)
    return read_gains(path).deltas


# safetensors


def bitsandbytes(**options: object) -> Callable[[], object]:
    return lambda: transformers.BitsAndBytesConfig(**options)


def torchao(name: str) -> Callable[[], object]:
    def config() -> object:
        from torchao import quantization

        return transformers.TorchAoConfig(getattr(quantization, name)())

    return config


SCHEMES = {
    "nf4": ("bitsandbytes", bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "int8": ("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "torchao int8": ("torchao", torchao("Int8WeightOnlyConfig")),
}


def quantised_folder(folder: Path, kind: str, scheme: str = "torchao int8", **options: object) -> Path:
    """A model that transformers has quantised and saved."""
    package, config = SCHEMES[scheme]
    pytest.importorskip(package)
    name, extra = MODELS[kind]
    model = tiny_gated(name, 64, 128, tie_word_embeddings=False, **extra, **options)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder / "plain")
    read(folder / "plain", quantization_config=config()).save_pretrained(folder / "base")
    return folder / "base"


def read(folder: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).train()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_is_the_one_absorbed_in_memory(tmp_path, kind, scheme):
    base = quantised_folder(tmp_path, kind, scheme)
    model = read(base)
    put_gains(model, tmp_path / "gains.safetensors")
    expected = logits(model)
    work = plan(base, tmp_path / "gains.safetensors")
    done = absorb(work, tmp_path / "out")
    assert (done.layers, done.verified) == (2, True)
    assert done.where.endswith("mlp.down_proj")
    assert all(change.into_up and f".{up_of(kind)}." in change.tensor for change in work.changes)

    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not same(before[name], after[name])}
    assert changed == {change.tensor for change in work.changes}
    assert len(changed) == (4 if kind == "llama" else 2), "scales, and biases where there are some"
    if kind == "phi3":
        assert all(same(before[name].chunk(2)[0], after[name].chunk(2)[0]) for name in changed), "the gate's half"

    gain_ops.absorb(model)
    absorbed = logits(model)
    assert torch.equal(logits(read(tmp_path / "out")), absorbed)
    # two ways to round a scale, and one that rounds none
    torch.testing.assert_close(absorbed, expected, rtol=1e-4, atol=1e-4)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def test_a_plain_up_beside_a_quantised_down_is_rounded_once(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny_gated("Llama", 64, 128, mlp_bias=True).to(torch.bfloat16)
    nn.init.normal_(model.model.layers[0].mlp.up_proj.bias)
    model.save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["up_proj", "lm_head"])
    options = {"dtype": torch.bfloat16, "device_map": "cpu"}
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, **options)
    quantised.save_pretrained(tmp_path / "base")
    delta = torch.randn(128) * 0.3
    delta[:3] = 2**-12
    gain = 1 + delta
    path = save_gain_file(tmp_path / "gains.safetensors", {DOWN: delta}, side="input")
    done = absorb(plan(tmp_path / "base", path), tmp_path / "out")
    assert (done.layers, done.tensors, done.lost) == (1, 2, 3), "lost in weight and bias, and counted once"
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    up = "model.layers.0.mlp.up_proj"
    for name in before:
        factor = {f"{up}.weight": gain[:, None], f"{up}.bias": gain}.get(name)
        wanted = before[name] if factor is None else (before[name].float() * factor).bfloat16()
        assert same(after[name], wanted), name


def ints(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def halves(*shape: int) -> Tensor:
    return (torch.rand(shape) + 0.5).half()


# by method: the tensors of a layer, and the one that takes the gain, each gain once
FORMATS: dict[str, tuple[Callable[[int, int], dict[str, Tensor]], str]] = {
    "gptq": (
        lambda o, i: {
            "qweight": ints(i // 8, o),
            "qzeros": ints(i // 32, o // 8),
            "scales": halves(i // 32, o),
            "g_idx": torch.arange(i, dtype=torch.int32) // 32,
        },
        "scales",
    ),
    "awq": (
        lambda o, i: {
            "qweight": ints(i, o // 8),
            "qzeros": ints(i // 32, o // 8),
            "scales": halves(i // 32, o),
        },
        "scales",
    ),
    "compressed-tensors": (
        lambda o, i: {
            "weight_packed": ints(o, i // 8),
            "weight_scale": halves(o, 1),
            "weight_shape": torch.tensor([o, i]),
        },
        "weight_scale",
    ),
    "fbgemm_fp8": (
        lambda o, i: {"weight": torch.randn(o, i).to(torch.float8_e4m3fn), "weight_scale": torch.rand(o, 1)},
        "weight_scale",
    ),
    "eetq": (lambda o, i: {"weight": ints(i, o).to(torch.int8), "weight_scales": halves(o)}, "weight_scales"),
    "hqq": (
        lambda o, i: {
            "W_q": ints(o * i // 64, 32).to(torch.uint8),
            "scale": halves(o * i // 64, 1),
            "zero": halves(o * i // 64, 1),
            "shape": torch.tensor([o, i]),
        },
        "scale",
    ),
}


@pytest.mark.parametrize("method", FORMATS)
def test_the_scales_of_up_in_every_format_with_row_scales(tmp_path, method):
    make, scale = FORMATS[method]
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, architectures=["LlamaForCausalLM"]
    ).to_dict()
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "config_groups": {}}
    sizes = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    shard = {
        f"model.layers.0.mlp.{leaf}.{name}": tensor
        for leaf, size in sizes.items()
        for name, tensor in make(*size).items()
    }
    shard["model.layers.0.mlp.up_proj.bias"] = halves(128)
    base = save_folder(tmp_path / "base", [shard], config)
    gain = 1 + (delta := torch.randn(128))
    path = save_gain_file(tmp_path / "gains.safetensors", {DOWN: delta}, side="input")
    absorb(plan(base, path), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    up = "model.layers.0.mlp.up_proj"
    for name, tensor in shard.items():
        factor = gain if tensor.dim() == 1 or tensor.shape[-1] == 128 else gain[:, None]
        takes = name in (f"{up}.{scale}", f"{up}.bias")
        wanted = (tensor.float() * factor).to(tensor.dtype) if takes else tensor
        assert same(after[name], wanted), name


def test_a_plain_down_takes_its_gain_itself(tmp_path):
    base = quantised_folder(tmp_path, "llama").parent / "plain"
    path = save_gain_file(tmp_path / "gains.safetensors", {DOWN: torch.randn(128)}, side="input")
    (change,) = plan(base, path, check_base=False).changes
    assert (change.tensor, change.into_up) == (f"{DOWN}.weight", False)


def test_what_is_exact_is_not_quantised_anew(tmp_path):
    base = quantised_folder(tmp_path, "llama")
    path = save_gain_file(tmp_path / "gains.safetensors", {DOWN: torch.randn(128)}, side="input")
    assert all(change.into_up for change in plan(base, path, requantize=True).changes)
    attention = DOWN.replace("mlp.down_proj", "self_attn.o_proj")
    path = save_gain_file(tmp_path / "other.safetensors", {attention: torch.randn(64)}, side="input")
    assert not any(change.into_up for change in plan(base, path, requantize=True).changes)
    with pytest.raises(
        CheckpointError, match=r"o_proj cannot take its gain exactly.*not known to be the down projection"
    ):
        plan(base, path)


def test_two_gains_that_do_the_same(tmp_path):
    base = quantised_folder(tmp_path, "llama")
    file = read_gains(save_gain_file(tmp_path / "gains.safetensors", {DOWN: torch.randn(128)}, side="input"))
    file.deltas[up := DOWN.replace("down", "up")] = torch.randn(128)
    file.sides[up], file.fingerprints[up] = "output", None
    with pytest.raises(CheckpointError, match=r"Nor can .*mlp\.up_proj has a gain of its own"):
        SafetensorsCheckpoint(base).edits(file, requantize=False, check_base=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.unlink(), r"transformers cannot read .*config\.json"),
        (lambda config: replaced(config, '"llama"', '"no-such-model"'), "transformers cannot read .*no-such-model"),
        (lambda config: replaced(config, "LlamaForCausalLM", "OtherForCausalLM"), "names OtherForCausalLM, which the"),
        (lambda config: replaced(config, '"num_hidden_layers": 2', '"num_hidden_layers": 0'), "a model without model"),
    ],
)
def test_a_config_that_does_not_say(tmp_path, change, message):
    base = quantised_folder(tmp_path, "llama")
    path = save_gain_file(tmp_path / "gains.safetensors", {DOWN: torch.randn(128)}, side="input")
    checkpoint = SafetensorsCheckpoint(base)  # has read what it needs itself
    change(base / "config.json")
    with pytest.raises(CheckpointError, match=f"{DOWN} cannot take its gain exactly.*Nor can .*{message}"):
        checkpoint.edits(read_gains(path), requantize=False, check_base=True)


def replaced(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def test_an_up_projection_that_is_not_there_or_of_other_rows(tmp_path):
    base = quantised_folder(tmp_path, "llama")
    path = save_gain_file(tmp_path / "gains.safetensors", {DOWN: torch.randn(128)}, side="input")
    checkpoint = SafetensorsCheckpoint(base)
    up = DOWN.replace("down", "up")
    for name in list(checkpoint._entries):
        if name.startswith(f"{up}."):
            checkpoint._entries[name.replace("layers.0", "layers.9")] = checkpoint._entries.pop(name)
    with pytest.raises(CheckpointError, match=f"there is no {up} in the checkpoint"):
        checkpoint.edits(read_gains(path), requantize=False, check_base=True)


def test_a_skeleton_has_no_numbers_and_runs_no_code_of_the_folder(tmp_path):
    base = quantised_folder(tmp_path, "gemma")
    model = skeleton(base, most_layers=99)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert layout_of(model.model.layers[0].mlp).up == "up_proj"
    (base / "code.py").write_text("raise SystemExit")
    replaced(base / "config.json", '"model_type": "gemma"', '"model_type": "x", "auto_map": {"AutoConfig": "code.C"}')
    with pytest.raises(CheckpointError, match="transformers cannot read"):
        skeleton(base, most_layers=99)


def test_without_transformers_there_is_no_telling(tmp_path, monkeypatch):
    base = quantised_folder(tmp_path, "llama")
    path = save_gain_file(tmp_path / "gains.safetensors", {DOWN: torch.randn(128)}, side="input")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r'this needs the package transformers: pip install "gain-ops\[cli\]"'):
        plan(base, path)
    assert not any(change.into_up for change in plan(base, path, requantize=True).changes)


# GGUF


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Phi3"])
def test_a_gguf_file_is_the_gained_model(tmp_path, family, kind):
    architecture, padding = family.lower(), {"pad_token_id": 0}  # Phi-3's is beyond the vocabulary else
    model = tiny_gated(family, 256, 512, **padding, **({"head_dim": 64} if family == "Gemma2" else {}))
    fields = llama_fields(model.config) | {"attention.key_length": 64, "attention.value_length": 64}
    base = write_model(tmp_path / "base.gguf", model, architecture, fields, kind)
    model = load(base, **padding)
    deltas = put_gains(model, tmp_path / "gains.safetensors")
    work = plan(base, tmp_path / "gains.safetensors")
    absorb(work, tmp_path / "out")
    ups = [f"blk.{number}.ffn_up.weight" for number in (0, 1)]
    assert [(change.layer, change.tensor, change.into_up) for change in work.changes] == [
        (layer, up, True) for layer, up in zip(deltas, ups, strict=True)
    ]
    found, truth = logits(load(tmp_path / "out" / "base.gguf", **padding)), logits(copy.deepcopy(model).double())
    twin = in_halves(model, base, ups, deltas)
    assert_no_worse_than_torch("logits", found, logits(twin), truth, unit=torch.float16)
    before, after = (tensors_of(path) for path in (base, tmp_path / "out" / "base.gguf"))
    assert {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])} == set(ups)
    for up in ups:
        rows = [tensors[up].view(tensors[up].shape[0], -1) for tensors in (before, after)]
        if architecture == "phi3":
            gates = [half.chunk(2)[0] for half in rows]
            assert torch.equal(*gates), "the gate has changed"
            rows = [half.chunk(2)[1] for half in rows]
        assert not torch.equal(*rows)
        assert not decode(kind, rows[1])[1].any(), "a gain of zero"
        assert torch.equal(decode(kind, rows[1])[2], -decode(kind, rows[0])[2]), "a gain of -1"


def in_halves(model: nn.Module, base: Path, ups: list[str], deltas: dict[str, Tensor]) -> nn.Module:
    """The gained model's twin, whose up projections have the terms of their blocks rounded once to float16."""
    twin, tensors = copy.deepcopy(model), open_gguf(base).tensors
    with torch.no_grad():
        for up, (layer, delta) in zip(ups, deltas.items(), strict=True):
            mlp = twin.get_submodule(layer.rpartition(".")[0])
            module = mlp.up_proj if hasattr(mlp, "up_proj") else mlp.gate_up_proj
            gain = torch.cat([torch.ones(len(module.weight) - len(delta)), 1 + delta])
            kind, rows = tensors[up].kind, tensors[up].region.read()
            block = BLOCKS[kind]
            blocks = rows.view(len(rows), -1, block.size)
            scales = block.scales(blocks)
            alone = torch.eye(scales.shape[-1], dtype=torch.float16)
            terms = [decode(kind, block.replaced(blocks, scales * only).view_as(rows)) for only in alone]
            module.weight.copy_(sum((term * gain[:, None]).half().float() for term in terms))
            mlp.down_proj.delta.zero_()
    return twin


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor.region.read() for name, tensor in open_gguf(path).tensors.items()}


@pytest.mark.parametrize("architecture", sorted(_GATED))
def test_the_architectures_of_gguf_are_gated_in_transformers_too(architecture):
    """By the class of the same model_type, and by the names that the converter gives its projections."""
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    config = transformers.AutoConfig.for_model(f"{architecture}_text" if architecture == "gemma3" else architecture)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        mlp = AutoModelForCausalLM.from_config(config).model.layers[0].mlp
    layout, names = layout_of(mlp), gguf.get_tensor_name_map(arch, 1)
    assert (layout.gated, layout.packed) == (True, architecture in _PACKED)
    assert names.get_name(f"model.layers.0.mlp.{layout.down}") == "blk.0.ffn_down"
    assert names.get_name(f"model.layers.0.mlp.{layout.gate if layout.packed else layout.up}") == "blk.0.ffn_up"


def gguf_edits(path: Path, architecture: str, tensors: dict[str, tuple], *, requantize: bool = False, **more: str):
    """The edits of a file with these tensors for an input gain of the down projection, and for ``more`` gains by side."""
    deltas = {DOWN: torch.randn(256)} | {name: torch.randn(256) for name in more}
    file = read_gains(save_gain_file(path.with_suffix(".safetensors"), deltas, side="input"))
    file.sides.update(more)
    checkpoint = open_gguf(write_tensors(path, architecture, tensors))
    return checkpoint, checkpoint.edits(file, requantize=requantize, check_base=True)


FFN = {f"blk.0.ffn_{leaf}.weight": ("Q8_0", 256, 256) for leaf in ("gate", "up", "down")}


def test_a_bias_takes_the_gain_too(tmp_path):
    biases = {"blk.0.ffn_up.bias": ("F32", 256), "blk.0.ffn_gate.bias": ("F32", 256)}
    checkpoint, edits = gguf_edits(tmp_path / "a.gguf", "llama", FFN | biases)
    assert [edit.tensor for edit in edits] == ["blk.0.ffn_up.weight", "blk.0.ffn_up.bias"]
    assert {edit.layer for edit in edits} == {DOWN}
    before = checkpoint.tensors["blk.0.ffn_up.bias"].region.read()
    gain = 1 + read_gains(tmp_path / "a.safetensors").deltas[DOWN]
    after, _ = edits[1].rewrite(before, 0)
    assert torch.equal(after.view(torch.float32), before.view(torch.float32) * gain)
    assert checkpoint.describe(edits[1]) == "F32 [256]"


@pytest.mark.parametrize(
    ("architecture", "tensors", "message"),
    [
        ("starcoder2", FFN, r"blk\.0\.ffn_down is not known to be that of a gated FFN \(architecture starcoder2\)"),
        ("llama", {"blk.0.ffn_down.weight": ("Q8_0", 256, 256)}, "not known to be that of a gated FFN"),
        ("llama", {name: FFN[name] for name in FFN if "gate" not in name}, "not known to be that of a gated FFN"),
        ("phi3", FFN, "not known to be that of a gated FFN"),
        (
            "phi3",
            {name: FFN[name] for name in FFN if "gate" not in name},
            "ffn_up takes 256 gains on the output side.*512",
        ),
        ("llama", FFN | {"blk.0.ffn_up.weight": ("MXFP4", 256, 256)}, "ffn_up cannot take its gain on the output side"),
        ("llama", FFN | {"blk.0.ffn_up.bias": ("Q8_0", 1, 256)}, "ffn_up is stored in an unknown way: bias"),
        ("llama", FFN | {"blk.0.ffn_up.lora_a": ("F32", 4, 256)}, "ffn_up has further terms"),
    ],
)
def test_ffns_whose_up_projection_cannot_take_it(tmp_path, architecture, tensors, message):
    with pytest.raises(
        CheckpointError, match=f"{DOWN} cannot take its gain on the input side exactly.*Nor can .*{message}"
    ):
        gguf_edits(tmp_path / "a.gguf", architecture, tensors)
    _, (edit,) = gguf_edits(tmp_path / "b.gguf", architecture, tensors, requantize=True)
    assert (edit.tensor, edit.into_up) == ("blk.0.ffn_down.weight", False)


def test_two_gains_that_do_the_same_in_a_gguf_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up has a gain of its own"):
        gguf_edits(tmp_path / "a.gguf", "llama", FFN, **{DOWN.replace("down", "up"): "output"})

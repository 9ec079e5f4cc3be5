"""Gain files as PEFT's (IA)^3 adapters and back: the same map in plain PEFT, to the bit where it is promised."""

import json
import os
import pathlib
import sys

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.ia3 import IA3Layer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops.gainfiles.file import GainFile, GainFileError, read_gains
from gain_ops.integrations.ia3 import from_peft, to_peft
from gain_ops.models.files import fingerprint
from gain_ops.models.record import gained_modules

IDS = torch.arange(1, 9)[None]
BASE = {"vocab_size": 50, "num_hidden_layers": 2}


def llama(**extra):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**{**BASE, **sizes, **extra})).eval()


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def make_gains(path, model, targets, side):
    """Random gains on a model, saved to a file; returns the model's logits."""
    gain_ops.apply(model, targets, side=side)
    with torch.no_grad():
        for layer in gained_modules(model).values():
            layer.delta.normal_(std=0.5)
    gain_ops.save_gains(model, path)
    return model(IDS).logits


def write(path, sides, sizes=4):
    """A gain file of nothing but ones plus a half."""
    deltas = {name: torch.full((sizes,), 0.5) for name in sides}
    gain_ops.write_gains(GainFile(deltas, dict(sides), dict.fromkeys(sides), "gain", None, "0"), path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "domain.safetensors"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("build", "targets", "side"),
    [
        (llama, "gain", "output"),
        (llama, "gain-ffn", "output"),
        (llama, "gain-ffn", "input"),
        (llama, [r"layers\.1\.mlp\.down_proj", "q_proj"], "output"),
        (llama, ["lm_head"], "output"),
        (lambda: llama(attention_bias=True, mlp_bias=True), "gain-ffn", "input"),
        (gpt2, "gain", "input"),
        (gpt2, "gain-ffn", "input"),
    ],
)
def test_plain_peft_computes_the_same(path, folder, build, targets, side):
    expected = make_gains(path, build(), targets, side)
    to_peft(path, folder, build())
    assert config_of(folder)["fan_in_fan_out"] == (build is gpt2)  # PEFT would correct it, and warn
    adapted = peft.PeftModel.from_pretrained(build(), folder)
    assert torch.equal(adapted(IDS).logits, expected)

    absorbed = build()
    gain_ops.load_gains(absorbed, path)
    gain_ops.absorb(absorbed)
    merged = adapted.merge_and_unload()
    for (name, ours), theirs in zip(absorbed.state_dict().items(), merged.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name

    back = path.with_name("back.safetensors")
    from_peft(folder, back, build())
    before, after = read_gains(path), read_gains(back)
    assert (after.sides, after.fingerprints) == (before.sides, before.fingerprints)
    assert all(torch.equal(1 + after.deltas[name], 1 + delta) for name, delta in before.deltas.items())
    twin = build()
    gain_ops.load_gains(twin, back)
    assert torch.equal(twin(IDS).logits, expected)


def test_the_kinds_of_peft_s_own_default(path, folder):
    """k_proj and v_proj on the output side, down_proj on the input side, trained and saved by PEFT."""
    theirs = peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ia3_l" in name:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(folder)
    from_peft(folder, path, llama())
    file = read_gains(path)
    assert {name.rpartition(".")[2]: side for name, side in file.sides.items()} == {
        "k_proj": "output",
        "v_proj": "output",
        "down_proj": "input",
    }
    assert (len(file.deltas), file.targets, file.base_model) == (6, ("down_proj", "k_proj", "v_proj"), None)
    model = llama()
    assert gain_ops.load_gains(model, path).side == "mixed"
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)

    again = folder.with_name("again")
    to_peft(path, again, model)  # a model with gains is asked as well as a plain one
    assert torch.equal(peft.PeftModel.from_pretrained(llama(), again)(IDS).logits, theirs(IDS).logits)
    for key in ("target_modules", "feedforward_modules"):
        assert sorted(config_of(again)[key]) == sorted(config_of(folder)[key])


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def block(*names):
    """A model whose linear layers have the given names, with a dot where one module is inside another."""
    model = nn.Module()
    for name in names:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(4, 4, bias=False))
    return model


@pytest.mark.parametrize(
    ("sides", "others", "targets", "feedforward"),
    [
        ({"a.up": "output", "b.up": "output"}, ["a.down"], ["up"], []),
        ({"a.up": "output", "b.up": "input"}, [], ["a.up", "b.up"], ["b.up"]),
        ({"a.up": "output"}, ["b.up"], ["a.up"], []),
        ({"l.0.a.up": "input", "l.0.b.up": "output", "l.1.a.up": "input"}, ["l.1.b.up"], ["0.b.up", "a.up"], ["a.up"]),
        # PEFT's feedforward_modules match "o_proj" by "proj" too
        ({"a.o_proj": "output", "a.proj": "input"}, [], ["a.proj", "o_proj"], ["a.proj"]),
        # no end of "a.up" is without "x.a.up"
        ({"a.up": "output"}, ["x.a.up"], r"a\.up", []),
        ({"a.up": "input"}, ["x.a.up"], r"a\.up", r"a\.up"),
        ({"a.up": "input", "x.a.up": "output"}, ["y.a.up"], r"a\.up|x\.a\.up", r"a\.up"),
        ({"a.up": "input", "xa.up": "output"}, [], r"a\.up|xa\.up", r"a\.up"),
    ],
)
def test_peft_changes_the_very_layers_of_the_file(path, folder, sides, others, targets, feedforward):
    model = block(*sides, *others)
    write(path, sides)
    to_peft(path, folder, model)
    assert (config_of(folder)["target_modules"], config_of(folder)["feedforward_modules"]) == (targets, feedforward)
    adapted = peft.PeftModel.from_pretrained(model, folder)
    found = {
        name.removeprefix("base_model.model."): "input" if layer.is_feedforward else "output"
        for name, layer in adapted.named_modules()
        if isinstance(layer, IA3Layer)
    }
    assert found == sides
    assert all((p == 1.5).all() for name, p in adapted.named_parameters() if "ia3_l" in name)


def test_many_layers_by_their_full_names(path, folder):
    """PEFT shortens a long list of targets for other methods."""
    names = [f"layers.{i}.{kind}" for i in range(30) for kind in ("up", "down")]
    sides = {name: "input" if "up" in name else "output" for i, name in enumerate(names) if i % 3}
    write(path, sides)
    to_peft(path, folder, block(*names))
    adapted = peft.PeftModel.from_pretrained(block(*names), folder)
    layers = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, IA3Layer)}
    assert {name.removeprefix("base_model.model."): layer.is_feedforward for name, layer in layers.items()} == {
        name: side == "input" for name, side in sides.items()
    }


def test_the_folder(path, folder, monkeypatch):
    model = llama()
    model.config._name_or_path = "/home/someone/SmolLM2-135M"
    make_gains(path, model, "gain-ffn", "output")
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it fails
    folder.mkdir()
    to_peft(path, folder, model.to("meta"))
    assert {file.name for file in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert list(folder.parent.glob(".*")) == []
    config = config_of(folder)
    assert config["base_model_name_or_path"] == "SmolLM2-135M"
    assert (config["target_modules"], config["feedforward_modules"]) == (["down_proj", "o_proj"], [])
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.tags) == ("peft", "SmolLM2-135M", ["gain", "ia3"])
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.ia3_l"].shape == (16, 1)

    named = folder.with_name("named")
    to_peft(path, named, llama(), base_model="org/base: a name")
    assert huggingface_hub.ModelCard.load(named / "README.md").data.base_model == "org/base: a name"
    assert config_of(named)["base_model_name_or_path"] == "org/base: a name"
    from_peft(named, path, llama())
    assert read_gains(path).base_model == "base: a name"


def test_a_base_without_a_name(path, folder):
    make_gains(path, llama(), "gain", "output")
    to_peft(path, folder, llama())
    assert huggingface_hub.ModelCard.load(folder / "README.md").data.base_model is None
    assert config_of(folder)["base_model_name_or_path"] is None


def test_peft_finds_the_base_by_itself(path, folder, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    expected = make_gains(path, llama(), "gain-ffn", "output")
    to_peft(path, folder, llama(), base_model=str(tmp_path / "base"))
    for auto in (peft.AutoPeftModel, peft.AutoPeftModelForCausalLM):
        assert torch.equal(auto.from_pretrained(folder).eval()(IDS).logits, expected)


def single(features):
    return nn.Sequential(nn.Linear(1, features, bias=False, device="meta"))


def some_floats(low, high):
    """Float32 values of every magnitude in [low, high)."""
    values = torch.randint(-(2**31), 2**31, (1 << 18,)).int().view(torch.float32)
    near = 1 + torch.randn(1 << 14) * 10 ** (-torch.rand(1 << 14) * 9)
    values = torch.cat([values, near, torch.tensor([0.0, -1.0, -2.0, 0.5, 1.0, 2.0, 2.0**-25, 1 - 2.0**-24])])
    return values[(values >= low) & (values < high)]


def test_gains_keep_their_bits(path, folder):
    delta = some_floats(-(2.0**24), 2.0**24)
    delta = delta[(1 + delta).abs() < 2**24]
    gain_ops.write_gains(GainFile({"0": delta}, {"0": "output"}, {"0": None}, "gain", None, "0"), path)
    to_peft(path, folder, single(delta.numel()))
    assert torch.equal(
        safetensors.torch.load_file(folder / "adapter_model.safetensors")["base_model.model.0.ia3_l"][:, 0], 1 + delta
    )
    from_peft(folder, path, single(delta.numel()))
    assert torch.equal(1 + read_gains(path).deltas["0"], 1 + delta)


def adapter(folder, tensors, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", **config}))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def imported(path, folder, scale):
    adapter(folder, {"base_model.model.0.ia3_l": scale[:, None]})
    from_peft(folder, path, single(scale.numel()))
    return 1 + read_gains(path).deltas["0"]


def test_what_is_exact_of_vectors_from_peft(path, folder):
    scale = some_floats(0.5, 2.0**24)
    assert torch.equal(imported(path, folder, scale), scale)


def test_how_far_off_other_vectors_from_peft_are(path, folder):
    scale = some_floats(-(2.0**24), 0.5)
    error = (imported(path, folder, scale).double() - scale.double()).abs()
    assert (error <= 2.0**-24 * (1 - scale.double())).all()
    assert error.max() > 0, "the bound is not vacuous"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_in_other_dtypes(path, folder, dtype):
    scale = torch.rand(64).to(dtype) + 0.5
    assert torch.equal(imported(path, folder, scale), scale.float())


def test_fingerprints_come_from_the_model(path, folder):
    make_gains(path, llama(), "gain", "output")
    to_peft(path, folder, llama())
    model = llama()
    from_peft(folder, path, model)
    assert read_gains(path).fingerprints["model.layers.0.self_attn.o_proj"] == fingerprint(
        model.model.layers[0].self_attn.o_proj
    )
    from_peft(folder, path, model.to("meta"))
    assert set(read_gains(path).fingerprints.values()) == {None}


def test_a_bias_on_the_output_side(path, folder):
    make_gains(path, gpt2(), "gain-ffn", "output")
    with pytest.raises(
        ValueError, match=r"does not scale the bias, and 4 of 4 layers have one: transformer.h.0.attn.c_proj"
    ):
        to_peft(path, folder, gpt2())
    assert not folder.exists()

    make_gains(path, llama(), "gain-ffn", "output")
    to_peft(path, folder, llama())
    path.unlink()
    with pytest.raises(
        ValueError, match=r"cannot write .* as a gain file: .* 2 of 4 layers .* model.layers.0.self_attn"
    ):
        from_peft(folder, path, llama(attention_bias=True))
    assert not path.exists()


def test_a_quantised_layer_with_a_bias(path, folder):
    class Packed(nn.Module):
        in_features = out_features = 4

        def bias(self):
            return torch.zeros(4)

    write(path, {"0": "output"})
    with pytest.raises(ValueError, match="1 of 1 layers have one: 0"):
        to_peft(path, folder, nn.Sequential(Packed()))


def test_a_layer_in_two_places(path, folder):
    model = block("a.up", "b.down")
    model.b.up = model.a.up
    write(path, {"a.up": "output"})
    with pytest.raises(ValueError, match=r"a\.up are in several places of the model"):
        to_peft(path, folder, model)


def test_a_gain_file_of_another_model(path, folder):
    make_gains(path, llama(), "gain", "output")
    with pytest.raises(GainFileError, match="does not fit the model: layers of the file that the model does not have"):
        to_peft(path, folder, llama(num_hidden_layers=1))
    with pytest.raises(GainFileError, match="takes 32 gains on the output side, the file has 16"):
        to_peft(path, folder, llama(hidden_size=32))
    with pytest.raises(FileNotFoundError):
        to_peft(path.with_name("none"), folder, llama())
    assert not folder.exists()


def test_a_folder_that_is_there_stays(path, folder, monkeypatch):
    make_gains(path, llama(), "gain", "output")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        to_peft(path, folder, llama())
    with pytest.raises(FileExistsError, match="not an empty folder"):
        to_peft(path, path, llama())
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]

    def full_disk(file, content):
        if file.suffix == ".md":
            raise OSError("No space left on device")
        return os.close(os.open(file, os.O_CREAT))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        to_peft(path, folder.with_name("new"), llama())
    assert sorted(file.name for file in folder.parent.iterdir()) == ["adapter", "domain.safetensors"]


VECTOR = {"base_model.model.model.layers.0.mlp.down_proj.ia3_l": torch.ones(1, 40)}


def _peft(config):
    return lambda folder: peft.get_peft_model(llama(), config).save_pretrained(folder)


def _without(name):
    def make(folder):
        adapter(folder, VECTOR)
        (folder / name).unlink()

    return make


def _with(name, content):
    def make(folder):
        adapter(folder, VECTOR)
        (folder / name).write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            _peft(peft.LoraConfig(target_modules=["q_proj"])),
            ValueError,
            "is a LORA adapter; of PEFT's methods only IA3",
        ),
        (
            _peft(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"])),
            ValueError,
            r"also trained other modules \(lm_head: its modules_to_save\)",
        ),
        (lambda folder: None, FileNotFoundError, "is not a folder: download an adapter on the Hub first"),
        (_without("adapter_config.json"), FileNotFoundError, "is not a PEFT adapter: it has no adapter_config.json"),
        (
            _without("adapter_model.safetensors"),
            FileNotFoundError,
            "has no adapter_model.safetensors: load the adapter",
        ),
        (_with("adapter_config.json", b"{"), ValueError, "adapter_config.json is damaged: JSONDecodeError"),
        (_with("adapter_config.json", b"[]"), ValueError, "adapter_config.json is damaged: TypeError"),
        (_with("adapter_config.json", b"[" * 100_000), ValueError, "adapter_config.json is damaged: .*in one another"),
        (
            _with("adapter_config.json", b'{"peft_type": "IA3", "modules_to_save": 7}'),
            ValueError,
            "adapter_config.json is damaged: TypeError",
        ),
        (
            _with("adapter_config.json", b'{"peft_type": "IA3", "base_model_name_or_path": ["a"]}'),
            ValueError,
            "base_model_name_or_path is",
        ),
        (_with("adapter_config.json", b"{}"), ValueError, "adapter_config.json is damaged: KeyError"),
        (_with("adapter_config.json", b"\xff"), ValueError, "adapter_config.json is damaged: UnicodeDecodeError"),
        (_with("adapter_model.safetensors", b"\x00" * 64), ValueError, "is not a complete safetensors file"),
        (lambda folder: adapter(folder, {}), ValueError, "holds nothing, where vectors"),
        (
            lambda folder: adapter(folder, {**VECTOR, "lm_head.weight": torch.ones(2)}),
            ValueError,
            "holds lm_head.weight",
        ),
        (
            lambda folder: adapter(folder, {"base_model.model.model.embed_tokens.ia3_l": torch.ones(50, 1)}),
            ValueError,
            "has no linear layers model.embed_tokens",
        ),
        (
            lambda folder: adapter(folder, {next(iter(VECTOR)): torch.ones(1, 16)}),
            ValueError,
            r"vector of shape \(1, 16\), expected \(16, 1\) or \(1, 40\)",
        ),
        (lambda folder: adapter(folder, {next(iter(VECTOR)): torch.ones(40)}), ValueError, r"vector of shape \(40,\)"),
        (
            lambda folder: adapter(folder, {next(iter(VECTOR)): torch.full((1, 40), torch.nan)}),
            ValueError,
            "values that are not finite, in model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_what_is_no_gain_is_refused(path, folder, make, error, message):
    path.write_text("an earlier file")
    make(folder)
    with pytest.raises(error, match=message):
        from_peft(folder, path, llama())
    assert path.read_text() == "an earlier file"
    assert {file.name for file in path.parent.iterdir()} <= {"adapter", "domain.safetensors"}

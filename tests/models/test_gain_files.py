"""Gain files: the round trip, what is refused, and that a refusal or an interruption changes nothing."""

import hashlib
import json
import os
import re

import numpy
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops.checkpoints.plan import plan
from gain_ops.gainfiles.file import GainFileError, read_gains
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.files import collect_gains, fingerprint
from gain_ops.models.record import gained_modules

IDS = torch.arange(1, 9)[None]


def build(seed=0, **extra):
    torch.manual_seed(seed)
    options = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**options, "vocab_size": 50, **extra})).eval()


def gained(seed=0, targets="gain-ffn", side="output", scale=0.2, **extra):
    """A model with random gains."""
    model = build(seed, **extra)
    gain_ops.apply(model, targets, side=side)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in gained_modules(model).values():
            layer.delta.copy_(torch.randn(layer.delta.shape, generator=generator) * scale)
    return model


def contents(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "domain.safetensors"


@pytest.fixture
def saved(path):
    gain_ops.save_gains(gained(), path)
    return path


def rewrite(path, change_header=None, change_tensors=None, key="gain_ops"):
    """Write the file anew with its header or tensors changed."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["gain_ops"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    safetensors.torch.save_file(tensors, path, metadata={key: json.dumps(header)})


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("targets", ["gain", "gain-ffn", ["down_proj", "lm_head"]])
def test_round_trip(path, side, targets):
    model = gained(targets=targets, side=side)
    expected = model(IDS).logits
    gain_ops.save_gains(model, path)
    for twin in (build(), gained(targets=targets, side=side, scale=3.0)):
        applied = gain_ops.load_gains(twin, path)
        assert applied.side == side
        assert applied.targets == (targets if isinstance(targets, str) else tuple(targets))
        assert applied.names == tuple(gained_modules(model))
        assert torch.equal(twin(IDS).logits, expected)
        trained = {name for name, p in twin.named_parameters() if p.requires_grad}
        assert trained == {f"{name}.delta" for name in gained_modules(model)}


def test_loaded_gains_come_off_again(saved):
    model = build()
    before, flags = contents(model), [p.requires_grad for p in model.parameters()]
    gain_ops.load_gains(model, saved, memory="lean", backend="eager")
    layer = model.model.layers[0].self_attn.o_proj
    assert (layer.save, layer.backend) == ("input", "eager")
    gain_ops.remove(model)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_both_sides_in_one_file(path):
    model = nn.Sequential(GainLinear(4, 6), nn.ReLU(), GainLinear(6, 4, side="input"))
    gain_ops.save_gains(model, path)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "delta" not in name})
    applied = gain_ops.load_gains(plain, path)
    assert applied.side == "mixed"
    assert [layer.side for layer in gained_modules(plain).values()] == ["output", "input"]
    assert gain_ops.load_gains(model, path) is None, "gains put on by hand have no record"


def test_what_the_file_holds(saved):
    model = gained()
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert list(metadata) == ["gain_ops"]
    header = json.loads(metadata["gain_ops"])
    assert names == {f"{name}.delta" for name in gained_modules(model)}
    assert (header["format"], header["version"]) == ("gain_ops.gains", 1)
    assert header["package"] == gain_ops.__version__
    assert header["targets"] == "gain-ffn"
    assert header["base_model"] is None
    assert {layer["side"] for layer in header["layers"].values()} == {"output"}
    assert saved.stat().st_size < 4000


def test_what_was_read_can_be_written(saved, tmp_path):
    other = tmp_path / "other.safetensors"
    gain_ops.write_gains(read_gains(saved), other)
    assert other.read_bytes() == saved.read_bytes()


def test_collected_gains_stay_those_of_that_moment(tmp_path):
    model, first, second = gained(), tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    gain_ops.save_gains(model, first)
    collected = collect_gains(model)
    for layer in gained_modules(model).values():
        layer.delta.data.zero_()
    gain_ops.write_gains(collected, second)
    assert second.read_bytes() == first.read_bytes()


def test_base_model_is_a_basename(path):
    model = gained()
    model.config._name_or_path = "/data/someone/models/Llama-3.1-8B"
    gain_ops.save_gains(model, path)
    assert read_gains(path).base_model == "Llama-3.1-8B"
    assert b"someone" not in path.read_bytes()


def test_the_fingerprint_can_be_taken_without_torch(saved, tmp_path):
    gain_ops.remove(model := gained())
    safetensors.torch.save_file(
        {n: p.clone() for n, p in model.state_dict().items() if n != "lm_head.weight"}, tmp_path / "base"
    )
    base = safetensors.numpy.load_file(tmp_path / "base")
    for name, expected in read_gains(saved).fingerprints.items():
        weight = base[f"{name}.weight"]
        bits = weight.reshape(-1)[:: max(1, -(-weight.size // 4096))].copy().view(numpy.uint32).astype(numpy.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        text = f"weight:{weight.shape[0]},{weight.shape[1]};".encode()
        assert hashlib.blake2b(text + rounded.tobytes(), digest_size=16).hexdigest() == expected


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (64, 65), (300, 301)])
def test_fingerprint_of_bfloat16_is_that_of_float32(shape):
    linear = nn.Linear(shape[1], shape[0])
    half = nn.Linear(shape[1], shape[0], dtype=torch.bfloat16)
    half.load_state_dict(linear.state_dict())
    assert fingerprint(linear) == fingerprint(half) == fingerprint(GainLinear.from_linear(linear))
    with torch.no_grad():
        linear.weight[0, 0] += 0.1
    assert fingerprint(linear) != fingerprint(half)


def test_fingerprint_of_a_quantised_base_is_over_its_raw_tensors():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 4
            self.register_buffer("qweight", torch.arange(16, dtype=torch.int8).view(4, 4))
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x):
            return x @ (self.qweight * self.scale).T

    one, other = GainWrapper(Packed(), 4, 4), GainWrapper(Packed(), 4, 4)
    assert fingerprint(one) == fingerprint(other) == fingerprint(one.base)
    other.base.qweight[3, 3] += 1
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(GainWrapper(Packed().to("meta"), 4, 4)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_load_into_a_model_of_another_dtype(saved, dtype):
    model = build().to(dtype)
    gain_ops.load_gains(model, saved)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, layer in gained_modules(model).items():
        assert layer.delta.dtype == wide
        assert torch.equal(layer.delta.float(), read_gains(saved).deltas[name])
    assert model(IDS).logits.isfinite().all()


def test_other_base_weights(saved):
    model = build(seed=1)
    model.config._name_or_path = "org/other-model"
    before = contents(model)
    with pytest.raises(
        GainFileError, match=r"base model unknown; this one is other-model.*differ in 4 of 4 layers, model"
    ):
        gain_ops.load_gains(model, saved)
    assert_unchanged(model, before)
    gain_ops.load_gains(model, saved, check_base=False)
    assert len(gained_modules(model)) == 4


def test_one_other_base_weight(saved):
    for model in (build(), gained(scale=0.5)):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        before = contents(model)
        with pytest.raises(
            GainFileError, match=r"differ in 1 of 4 layers, model.layers.1.mlp.down_proj\. Load the base"
        ):
            gain_ops.load_gains(model, saved)
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: build(num_hidden_layers=1),
            "layers of the file that the model does not have: model.layers.1.mlp.down_proj",
        ),
        (lambda: build(intermediate_size=48), "takes 48 gains on the input side, the file has 40"),
        (lambda: gained(targets="gain", side="input"), "does not have: model.layers.0.mlp.down_proj"),
        (
            lambda: gained(targets=[".*_proj"], side="input"),
            "gains of the model that the file does not have: .* and 6 more",
        ),
        (lambda: gained(side="output"), "has its gain on the output side, in the file on the input side"),
    ],
)
def test_layers_that_do_not_fit(path, make, message):
    gain_ops.save_gains(gained(side="input"), path)
    model = make()
    before = contents(model)
    with pytest.raises(GainFileError, match=message):
        gain_ops.load_gains(model, path)
    assert_unchanged(model, before)


def _damage(header=None, tensors=None, key="gain_ops"):
    return lambda path: rewrite(path, header, tensors, key)


def _set(name, value):
    return lambda mapping: mapping.__setitem__(name, value)


FIRST = "model.layers.0.self_attn.o_proj"
LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "is not a complete safetensors file"),
        (lambda path: path.write_bytes(b"\x00" * 64), "is not a complete safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is not a complete safetensors file"),
        (lambda path: path.write_bytes(os.urandom(500)), "is not a complete safetensors file"),
        (lambda path: torch.save({"delta": torch.zeros(4)}, path), "is a pickle, which can run any code"),
        (
            lambda path: safetensors.torch.save_file(LORA, path),
            "is not a gain file: .* holds base_model.*lora_A.weight",
        ),
        (lambda path: safetensors.torch.save_file({}, path), "is not a gain file: .* holds nothing"),
        (_damage(key="other"), "is not a gain file"),
        (_damage(_set("format", "other.format")), "has format 'other.format', expected 'gain_ops.gains'"),
        (_damage(_set("version", 3)), r"format version 3, written by gain_ops .*upgrade gain_ops"),
        (_damage(lambda header: header.pop("layers")), "damaged gain_ops header: KeyError"),
        (_damage(_set("layers", ["a"])), r"damaged gain_ops header: .*layers is \['a'\]"),
        (_damage(lambda header: header["layers"].pop(FIRST)), f"disagree on {FIRST}.delta"),
        (_damage(lambda header: header["layers"][FIRST].update(side="rows")), "on side 'rows'"),
        (_damage(None, _set(f"{FIRST}.delta", torch.zeros(16, dtype=torch.bfloat16))), r"shape \(16,\) and BF16"),
        (
            _damage(None, _set(f"{FIRST}.delta", torch.zeros(4, 4))),
            "takes [0-9]+ gains on the output side, the file has 4x4",
        ),
        (_damage(None, _set(f"{FIRST}.delta", torch.zeros(4, 4, 4))), r"shape \(4, 4, 4\)"),
        (_damage(None, _set(f"{FIRST}.delta", torch.zeros(15))), "takes 16 gains on the output side, the file has 15"),
        (_damage(None, _set(f"{FIRST}.delta", torch.full((16,), torch.nan))), f"not finite, in {FIRST}"),
        (_damage(None, _set(f"{FIRST}.delta", torch.full((16,), torch.inf))), f"not finite, in {FIRST}"),
        (_damage(None, lambda tensors: tensors.pop(f"{FIRST}.delta")), f"disagree on {FIRST}.delta"),
    ],
)
def test_bad_files_change_nothing(saved, damage, message):
    damage(saved)
    for model in (build(), gained(scale=0.5)):
        before = contents(model)
        with pytest.raises(GainFileError, match=message):
            gain_ops.load_gains(model, saved)
        assert_unchanged(model, before)


def test_a_header_that_is_no_json(saved):
    tensors = safetensors.torch.load_file(saved)
    for header in ("{", "[]", '"text"', "null"):
        safetensors.torch.save_file(tensors, saved, metadata={"gain_ops": header})
        with pytest.raises(GainFileError, match="damaged gain_ops header"):
            gain_ops.load_gains(build(), saved)


def test_no_such_file(path):
    with pytest.raises(FileNotFoundError):
        gain_ops.load_gains(build(), path)


def test_a_folder_is_no_gain_file(saved):
    message = f"{saved.parent} is a folder: name the gain file in it, such as {saved.parent / 'gains.safetensors'}"
    for opened in (str(saved.parent), saved.parent):
        with pytest.raises(GainFileError) as error:
            read_gains(opened)
        assert str(error.value) == message


def test_bad_options_change_nothing(saved):
    model = build()
    before = contents(model)
    for options in ({"memory": "low"}, {"backend": "fast"}):
        with pytest.raises(ValueError, match="is not one of"):
            gain_ops.load_gains(model, saved, **options)
    assert_unchanged(model, before)


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        gain_ops.save_gains(gained(scale=1.0), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_reader_of_the_old_file_keeps_it_whole(saved):
    before = saved.read_bytes()
    with saved.open("rb") as reader:
        gain_ops.save_gains(gained(scale=1.0), saved)
        assert reader.read() == before
    assert saved.read_bytes() != before
    assert list(saved.parent.iterdir()) == [saved]


def test_diverged_gains_are_not_saved(saved):
    before = saved.read_bytes()
    model = gained()
    model.model.layers[0].mlp.down_proj.delta.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj: its delta is not finite; the training has diverged"):
        gain_ops.save_gains(model, saved)
    assert saved.read_bytes() == before


def test_nothing_to_save(path):
    with pytest.raises(ValueError, match="has no gains to save"):
        gain_ops.save_gains(build(), path)
    with pytest.raises(ValueError, match="on the meta device"):
        gain_ops.save_gains(gained().to("meta"), path)
    partitioned = gained()
    partitioned.model.layers[0].mlp.down_proj.delta.data = torch.empty(0)
    with pytest.raises(
        ValueError, match=r"partitioned: call gain_ops.integrations.deepspeed.save_gains\(\) on every process"
    ):
        gain_ops.save_gains(partitioned, path)
    assert not path.exists()


def test_gains_outside_the_part_that_apply_was_called_on_are_not_left_out(path):
    model = nn.ModuleDict({"body": gained(), "head": GainLinear(4, 4)})
    with pytest.raises(ValueError, match="cannot save while head has a gain outside the module that apply"):
        gain_ops.save_gains(model, path)
    assert not path.exists()
    gain_ops.save_gains(model["body"], path)
    assert len(read_gains(path).deltas) == 4


def test_a_quantised_base_is_told_apart(saved):
    model = build()
    linear = model.model.layers[0].self_attn.o_proj
    model.model.layers[0].self_attn.o_proj = torch.ao.nn.quantized.dynamic.Linear(16, 16)
    with pytest.raises(GainFileError, match="differ in 1 of 4 layers"):
        gain_ops.load_gains(model, saved)
    assert linear.weight.requires_grad


def test_names_do_not_change_under_wrappers(path):
    model = gained()
    outer = nn.ModuleDict({"module": model})
    outer["module"].model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    gain_ops.save_gains(outer, path)
    gain_ops.load_gains(build(), path)


def test_shared_modules(path):
    def make():
        torch.manual_seed(0)
        shared = nn.Linear(4, 4)
        return nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})

    model = make()
    gain_ops.apply(model, ["a"])
    model["b"].delta.data.fill_(0.5)
    gain_ops.save_gains(model, path)
    twin = make()
    gain_ops.load_gains(twin, path)
    assert twin["a"] is twin["b"]
    assert (twin["b"].delta == 0.5).all()


def test_sharded_model(path, tmp_path):
    model, twin = gained(), gained(scale=2.0)
    expected = model(IDS).logits
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for sharded in (model, twin):
            torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
        gain_ops.save_gains(model, path)
        twin(IDS)  # leaves the parameters gathered
        gain_ops.load_gains(twin, path)
        for layer in gained_modules(twin).values():
            assert type(layer.delta).__name__ == "DTensor"
        torch.testing.assert_close(twin(IDS).logits, expected)
        for action in (gain_ops.absorb, gain_ops.remove):
            with pytest.raises(ValueError, match=r"after fully_shard\(\)"):
                action(twin)
        fresh = torch.distributed.fsdp.fully_shard(build(), mesh=mesh)
        with pytest.raises(ValueError, match=r"cannot put gains on after fully_shard\(\)"):
            gain_ops.apply(fresh)
    finally:
        torch.distributed.destroy_process_group()
    plain = build()
    gain_ops.load_gains(plain, path)
    torch.testing.assert_close(plain(IDS).logits, expected)


# weights that are not there yet


@pytest.mark.parametrize("check_base", [True, False])
@pytest.mark.parametrize("with_gains", [False, True])
def test_gains_are_not_loaded_before_the_weights(tmp_path, check_base, with_gains):
    path = tmp_path / "g.safetensors"
    gain_ops.save_gains(gained(), path)
    model = (gained() if with_gains else build()).to("meta")
    before = list(model.state_dict())
    load = {"load_gains": lambda: gain_ops.load_gains(model, path, check_base=check_base)}
    if not with_gains:
        load["add_gains"] = lambda: gain_ops.add_gains(model, {"a": path}, check_base=check_base)
    for call in load.values():
        with pytest.raises(GainFileError, match=r"cannot be loaded yet: the weights of .* are not there"):
            call()
    assert list(model.state_dict()) == before
    assert not gain_ops.list_gains(model)


def test_gains_applied_on_meta_begin_at_one_wherever_the_weights_come_from():
    poisoned = torch.full((1 << 16,), float("nan"))
    model = gained().to("meta")
    del poisoned
    model.to_empty(device="cpu")
    assert all(not layer.delta.any() for layer in gained_modules(model).values())


def test_a_weight_is_not_quantised_under_its_gain(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    gain_ops.apply(model, ["1"])
    with pytest.raises(ValueError, match=r"quantise the model first, and put the gains on after it"):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    model[1]._parameters["weight"] = model[0].weight  # past the check, as swap_tensors does it
    with pytest.raises(ValueError, match="was quantised after it got its gain"):
        gain_ops.save_gains(model, tmp_path / "g")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    gain_ops.apply(model, ["1"])
    gain_ops.save_gains(model, tmp_path / "g")


class Outer(nn.Module):
    """A module that holds a model under another name, beside others."""

    def __init__(self, name, model):
        super().__init__()
        self.add_module(name, model)
        self.value = nn.Linear(4, 1)


def multimodal():
    """A model whose language model is build()'s."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = build().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision},
        )
    )
    model.model.language_model.load_state_dict(build().model.state_dict())
    return model


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        (multimodal, "model.language_model.layers.0"),
        (lambda: Outer("module", build()), "module.model.layers.0"),
        (lambda: Outer("policy", build()), "policy.model.layers.0"),
        (lambda: build().model, "layers.0"),
        (lambda: nn.Sequential(Outer("auto_model", build().model), nn.Linear(4, 4)), "0.auto_model.layers.0"),
        (lambda: nn.Sequential(build()), "0.model.layers.0"),
    ],
)
@pytest.mark.parametrize("back", [False, True])
def test_one_model_under_other_names(wrapped, name, back, tmp_path):
    """Both ways: a file of the bare model in the other, and the reverse."""
    path, layer = tmp_path / "gains.safetensors", "self_attn.o_proj"
    makes = [build, wrapped]
    names = [f"model.layers.0.{layer}", f"{name}.{layer}"]
    first, second = makes[back], makes[not back]
    source = first()
    gain_ops.apply(source, [re.escape(names[back])])
    nn.init.normal_(source.get_submodule(names[back]).delta)
    gain_ops.save_gains(source, path)
    target = second()
    applied = gain_ops.load_gains(target, path)
    assert applied.names == (names[not back],)
    assert applied.renamed == ((names[back], names[not back]),)
    assert f"1 by other names, {names[back]} as {names[not back]}" in repr(applied)
    assert torch.equal(target.get_submodule(names[not back]).delta, source.get_submodule(names[back]).delta)
    assert gain_ops.load_gains(target, path).renamed == applied.renamed, "a second time, into the gains"
    sets = second()
    gain_ops.add_gains(sets, {"one": path})
    gain_ops.set_gains(sets, "one")
    assert torch.equal(sets.get_submodule(names[not back]).delta, source.get_submodule(names[back]).delta)


def test_a_name_that_fits_two_parts_is_not_guessed(saved):
    model = nn.ModuleDict({"actor": build(), "critic": build()})
    before = contents(model)
    with pytest.raises(
        GainFileError, match=r"layers.0.self_attn.o_proj of the gain file could be any of actor.*, critic"
    ):
        gain_ops.load_gains(model, saved)
    assert_unchanged(model, before)


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16])
def test_gains_fit_a_copy_of_their_base_in_the_other_half_precision(trained, path, tmp_path):
    other = torch.float16 if trained == torch.bfloat16 else torch.bfloat16
    model = build().to(trained)
    gain_ops.apply(model)
    gain_ops.save_gains(model, path)
    gain_ops.load_gains(build().to(other), path)
    build().to(other).save_pretrained(tmp_path / "base")
    assert plan(tmp_path / "base", path).changes
    with pytest.raises(GainFileError, match="trained on other weights"):
        gain_ops.load_gains(build(seed=1).to(other), path)

    def forget(header):
        for entry in header["layers"].values():
            del entry["spots"]

    rewrite(path, forget)
    gain_ops.load_gains(build().to(trained), path)
    with pytest.raises(GainFileError, match="trained on other weights"):
        gain_ops.load_gains(build().to(other), path)


@pytest.mark.parametrize(
    "options",
    [
        {"side": "input", "fuse_mlp": True, "memory": "lean", "mlp_chunk": 4},
        {"side": "mixed", "fuse_mlp": True, "fuse_residual": True},
    ],
)
def test_a_loaded_model_runs_the_graph_that_it_was_trained_with(options, path):
    model = build()
    gain_ops.apply(model, "gain-ffn", **options)
    for layer in gained_modules(model).values():
        nn.init.normal_(layer.delta, std=0.1)
    gain_ops.save_gains(model, path)
    how = {name: value for name, value in options.items() if name != "side"}
    loaded, in_sets = build(), build()
    gain_ops.load_gains(loaded, path, **how)
    gain_ops.add_gains(in_sets, {"one": path}, **how)
    gain_ops.set_gains(in_sets, "one")
    graphs = [graph(one(IDS, labels=IDS).loss.grad_fn) for one in (model, loaded, in_sets)]
    assert graphs[0] == graphs[1] == graphs[2]
    assert graphs[0] != graph(gain_ops.load_gains(plain := build(), path) and plain(IDS, labels=IDS).loss.grad_fn)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def graph(node):
    """The names of all backward steps."""
    pending, seen, names = [node], set(), []
    while pending:
        if (node := pending.pop()) is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            pending += [following for following, _ in node.next_functions]
    return sorted(names)


def test_options_that_the_files_side_does_not_allow_change_nothing(saved):
    model = build()
    before = contents(model)
    with pytest.raises(ValueError, match="fuse_mlp folds the gain"):
        gain_ops.load_gains(model, saved, fuse_mlp=True)
    assert_unchanged(model, before)

"""modules_to_save: a head that is trained whole beside the gains, in the file, in memory and on disk."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import gain_ops
from gain_ops.checkpoints.absorb import absorb
from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.plan import plan
from gain_ops.gainfiles.combining import combine_gains
from gain_ops.gainfiles.file import GainFileError, read_gains

IDS = torch.arange(1, 9)[None]
SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def build(seed=0, kind=LlamaForSequenceClassification):
    """A base with the weights of seed 0, and a head of its own."""
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES, pad_token_id=0, num_labels=3))
    if kind is LlamaForSequenceClassification:
        torch.manual_seed(seed)
        nn.init.normal_(model.score.weight)
    return model.eval()


def trained(seed=0):
    model = build(seed)
    applied = gain_ops.apply(model, modules_to_save=["score"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(IDS, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    return model, applied


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gains.safetensors"


def test_a_head_is_trained_saved_and_restored(path):
    model, applied = trained()
    assert applied.kept == ("score",)
    assert applied.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 16 + 3 * 16
    assert "score trained whole" in repr(applied)
    assert not torch.equal(model.score.weight, build().score.weight)
    gain_ops.save_gains(model, path)
    fresh = build(seed=1)
    loaded = gain_ops.load_gains(fresh, path)
    assert loaded.kept == ("score",)
    assert fresh.score.weight.requires_grad
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        fresh.score.weight.zero_()
    gain_ops.load_gains(fresh, path)  # into a model that has gains
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_what_the_file_says(path, tmp_path):
    gain_ops.save_gains(trained()[0], path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["gain_ops"])
        assert "score.weight" in file.keys()  # noqa: SIM118
    assert (header["version"], header["modules"]) == (2, {"score": ["weight"]})
    gain_ops.write_gains(read_gains(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    with pytest.raises(GainFileError, match=r"modules that were trained whole, and gains alone can be combined"):
        combine_gains([path, path])
    with pytest.raises(GainFileError, match="holds score, trained whole, and a gain set has gains alone"):
        gain_ops.add_gains(build(), {"one": path})


def _of_another_size(model):
    model.score = nn.Linear(16, 5, bias=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(kind=LlamaForCausalLM), "holds trained modules that the model does not have: score"),
        (lambda: _changed(build(), _of_another_size), r"holds score with other tensors .* weight \[5, 16\]"),
    ],
)
def test_a_model_without_that_head_is_refused_and_not_changed(path, make, message):
    gain_ops.save_gains(trained()[0], path)
    model = make()
    names = list(model.state_dict())
    with pytest.raises(GainFileError, match=message):
        gain_ops.load_gains(model, path)
    assert list(model.state_dict()) == names


def _changed(model, change):
    change(model)
    return model


def test_absorb_and_remove_leave_the_head_as_it_is():
    for finish in (gain_ops.absorb, gain_ops.remove):
        model, _ = trained()
        head, logits = model.score.weight.detach().clone(), model(IDS).logits
        finish(model)
        assert torch.equal(model.score.weight, head)
        assert finish is gain_ops.remove or torch.allclose(model(IDS).logits, logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_written_into_the_checkpoint(path, tmp_path, dtype):
    build(seed=1).to(dtype).save_pretrained(tmp_path / "base")
    model, _ = trained()
    gain_ops.save_gains(model, path)
    done = absorb(plan(tmp_path / "base", path), tmp_path / "out")
    assert (done.layers, done.tensors, done.verified) == (2, 3, True)
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(loaded.score.weight, model.score.weight.to(dtype))
    if dtype == torch.float32:
        gain_ops.absorb(model)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_checkpoint_without_the_head_is_refused(path, tmp_path):
    build(kind=LlamaForCausalLM).save_pretrained(tmp_path / "base")
    gain_ops.save_gains(trained()[0], path)
    with pytest.raises(CheckpointError, match=r"it has no score\.weight, of a module that was trained whole"):
        plan(tmp_path / "base", path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nothing"], "modules_to_save names 'nothing', and no module"),
        ("score", r"is a string: give a list, \['score'\]"),
        (["self_attn"], "is in modules_to_save, and .*o_proj gets a gain"),
        (["o_proj"], "is in modules_to_save, and .*o_proj gets a gain"),
    ],
)
def test_names_that_cannot_be_kept_change_nothing(names, message):
    model = build()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        gain_ops.apply(model, modules_to_save=names)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_head_that_is_tied_to_the_embedding_is_refused():
    model = build(kind=LlamaForCausalLM)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(
        ValueError, match=r"lm_head is in modules_to_save and shares a weight with model.embed_tokens.weight"
    ):
        gain_ops.apply(model, modules_to_save=["lm_head"])


def test_a_frozen_head_that_may_be_new_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"score of LlamaForSequenceClassification is frozen.*modules_to_save=\['score'\]"
    ):
        gain_ops.apply(build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gain_ops.apply(build(), modules_to_save=[])
        gain_ops.apply(build(kind=LlamaForCausalLM))
        gain_ops.apply(build().model)


@pytest.mark.parametrize(
    "modules", [{"score": "weight"}, ["score"], {"score": ["weight", "weight"]}, {"score": [1]}, {}, None]
)
def test_a_damaged_list_of_modules(path, modules):
    gain_ops.save_gains(trained()[0], path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["gain_ops"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata={"gain_ops": json.dumps(header | {"modules": modules})})
    with pytest.raises(GainFileError, match="damaged"):
        read_gains(path)

"""Checkpoints whose names transformers converts while it loads them: absorbed as in memory, or refused in words."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import gain_ops
from gain_ops.checkpoints.absorb import absorb
from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.formats.safetensors_folder import SafetensorsCheckpoint
from gain_ops.checkpoints.plan import plan
from gain_ops.models.record import gained_modules
from gain_ops.models.sites import linear_modules

from support.small_checkpoints import save_gain_file
from support.tiny_architectures import CannotBuild, build, model_types

ZAMBA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "hybrid"] * 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "mamba_dt_rank": 4,
    "n_mamba_heads": 2,
    "vocab_size": 64,
}


def put_gains(model: nn.Module, targets: list[str], path: Path) -> None:
    gain_ops.apply(model, targets)
    for layer in gained_modules(model).values():
        nn.init.normal_(layer.delta, std=0.2)
    gain_ops.save_gains(model, path)


@pytest.mark.parametrize(
    ("model_type", "target"),
    [("vit", r"(o_proj|fc2)"), ("kimi_linear", r"shared_experts\.down_proj"), ("llava", r"language_model.*\.o_proj")],
)
def test_renamed_layers_are_absorbed_as_in_memory(model_type, target, tmp_path):
    model = build(model_type, run=False)[0]
    model.save_pretrained(tmp_path / "base")
    put_gains(model, [target], tmp_path / "gains.safetensors")
    work = plan(tmp_path / "base", tmp_path / "gains.safetensors")
    assert not any(change.tensor.startswith(change.layer) for change in work.changes)
    assert absorb(work, tmp_path / "out").layers == len(gained_modules(model))
    gain_ops.absorb(model)
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_weight_that_is_split_while_loading_is_refused_by_the_name_of_what_is_stored(tmp_path):
    model = build("gte", run=False)[0]
    model.save_pretrained(tmp_path / "base")
    put_gains(model, [r"0\.mlp\.gate_proj"], tmp_path / "gains.safetensors")
    stored = r"layers.0.mlp.gate_proj is made of \S+up_gate_proj.weight.* absorb in memory"
    with pytest.raises(CheckpointError, match=stored):
        plan(tmp_path / "base", tmp_path / "gains.safetensors")


def test_a_gain_on_one_of_several_shared_blocks_is_refused(tmp_path):
    torch.manual_seed(0)
    model = transformers.ZambaForCausalLM(transformers.ZambaConfig(**ZAMBA))
    model.save_pretrained(tmp_path / "base")
    for name, other in ((1, 3), (3, 1)):
        names = [f"model.layers.{i}.shared_transf.self_attn.o_proj" for i in (name, other)]
        path = save_gain_file(tmp_path / "gains.safetensors", {names[0]: torch.ones(32)})
        with pytest.raises(CheckpointError, match=f"{names[0]} and {names[1]} have one weight.*load_gains"):
            plan(tmp_path / "base", path)


def test_a_config_of_absurdly_many_layers_is_not_built(tmp_path):
    model = build("llama", run=False)[0]
    model.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 2000000000'))
    checkpoint = SafetensorsCheckpoint(tmp_path / "base")
    assert checkpoint._loaded is None
    with pytest.raises(CheckpointError, match=r"describes 2,000,000,000 layers, and the checkpoint has \d+ tensors"):
        _ = checkpoint._skeleton


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [name for name in model_types() if get_checkpoint_conversion_mapping(name) is not None]
)
def test_every_name_that_is_resolved_has_the_layers_weight(model_type, tmp_path):
    try:
        model = build(model_type, run=False)[0]
    except CannotBuild as error:
        pytest.skip(str(error)[:200])
    try:
        model.save_pretrained(tmp_path)
    except Exception as error:
        pytest.skip(f"not saved by transformers itself: {error}"[:200])
    layers = dict(linear_modules(model))
    names, problems = SafetensorsCheckpoint(tmp_path)._names(layers)
    assert names or problems
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for layer, name in names.items():
            if f"{name}.weight" in stored:
                assert torch.equal(file.get_tensor(f"{name}.weight"), layers[layer].weight)

"""Gains under DeepSpeed's ZeRO: training as in one process, the gain file, its own checkpoints."""

import importlib.util
import os

import pytest
import torch
import torch.distributed as dist

import gain_ops
from gain_ops.gainfiles.file import read_gains
from gain_ops.testing import assert_no_worse_than_torch

from support.group import Group
from support.small_training import backward, batches, build, deltas, own_part

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

STEPS = 3
LR = 0.5


@pytest.fixture(scope="module")
def two():
    """A group of its own: what DeepSpeed changes in a process is gone with it."""
    with Group(2) as group:
        yield group


def deepspeed():
    """DeepSpeed on gloo; without this it compiles a collective of its own for the CPU, a minute at first."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def config_of(stage):
    return {
        "train_micro_batch_size_per_gpu": 2,
        # the threshold: the smallest are parted as well
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }


def engine_of(model, stage, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([delta for _, delta in deltas(model)], lr=LR)
    return deepspeed().initialize(model=model, optimizer=optimizer, config=config_of(stage))[0]


def train_steps(engine, first, last):
    losses = []
    for ids in batches(first, last):
        part = own_part(ids)
        loss = engine(input_ids=part, labels=part).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def gathered(model):
    """The deltas, and the length that ZeRO leaves of each outside a forward."""
    lengths = {delta.numel() for _, delta in deltas(model)}
    with deepspeed().zero.GatheredParameters([delta for _, delta in deltas(model)]):
        return {name: delta.detach().clone() for name, delta in deltas(model)}, lengths


def train_under_zero(stage, options):
    model = build(**options)
    losses = train_steps(engine_of(model, stage), 0, STEPS)
    return (losses, *gathered(model))


def train_in_one(options, dtype):
    model = build(**options).to(dtype)
    optimizer = torch.optim.SGD([delta for _, delta in deltas(model)], lr=LR)
    losses = []
    for ids in batches(0, STEPS):
        losses.append(backward(model, ids))
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: delta.detach() for name, delta in deltas(model)}


def flat(tensors):
    return torch.cat([tensors[name] for name in sorted(tensors)])


# an FFN that reads the parameters of its projections, and none of them is called
FUSED = {"side": "input", "fuse_mlp": True, "memory": "lean"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options"), [(1, {}), (2, {}), (3, {}), (3, FUSED)], ids=["1", "2", "3", "3-fused-mlp"]
)
def test_zero_trains_as_one_process(two, stage, options):
    answers = two(train_under_zero, stage, options)
    plain_losses, plain = train_in_one(options, torch.float32)
    true_losses, truth = train_in_one(options, torch.float64)
    for _, found, lengths in answers:
        assert lengths == ({0} if stage == 3 else {delta.numel() for delta in plain.values()})
        assert_no_worse_than_torch(f"deltas under ZeRO-{stage}", flat(found), flat(plain), flat(truth))
    losses = torch.tensor([losses for losses, *_ in answers], dtype=torch.float64).mean(0)
    assert_no_worse_than_torch(
        "losses", losses.float(), torch.tensor(plain_losses), torch.tensor(true_losses, dtype=torch.float64)
    )


def train_bfloat16(stage):
    model = build(dtype=torch.bfloat16)
    before, _ = gathered(model)
    train_steps(engine_of(model, stage), 0, 1)
    after, _ = gathered(model)
    weights = {p.dtype for _, p in model.named_parameters() if not p.requires_grad}
    return weights, before, after


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_delta_stays_float32_beside_bfloat16_weights(two, stage):
    for weights, before, after in two(train_bfloat16, stage):
        assert weights == {torch.bfloat16}
        for name, delta in after.items():
            assert delta.dtype == torch.float32
            assert (delta.bfloat16() != delta).any(), "not rounded to bfloat16 on the way"
            assert not torch.equal(delta, before[name])


def save(stage, path):
    from gain_ops.integrations.deepspeed import save_gains

    model = build()
    engine = engine_of(model, stage)
    train_steps(engine, 0, 1)
    save_gains(engine, path)
    there = path.is_file()
    with pytest.raises(OSError, match=r"could not be written by the first process: .*is a folder"):
        save_gains(engine, path.parent)
    if stage == 3:
        with pytest.raises(ValueError, match="its weight is partitioned"):
            gain_ops.absorb(model)
    return there, gathered(model)[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_first_process_writes_a_gain_file_that_fits_the_base(two, stage, tmp_path):
    path = tmp_path / "gains.safetensors"
    answers = two(save, stage, path)
    assert [there for there, _ in answers] == [True, True], "the other process waits for it"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    file = read_gains(path)
    for _, found in answers:
        assert all(torch.equal(file.deltas[name.removesuffix(".delta")], delta) for name, delta in found.items())
    base = build()
    gain_ops.load_gains(base, path)  # refuses other frozen weights
    assert all(torch.equal(delta, answers[0][1][name]) for name, delta in deltas(base))


def diverged(path):
    from gain_ops.integrations.deepspeed import save_gains

    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.delta[0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: its delta is not finite"):
        save_gains(engine_of(model, 3), path)
    gain_ops.remove(plain := build())
    with pytest.raises(ValueError, match="no gains to save"):
        save_gains(plain, path)
    outside = torch.nn.ModuleList([build(), gain_ops.GainLinear(8, 8)])
    with pytest.raises(ValueError, match="cannot save while 1 has a gain outside the module that apply"):
        save_gains(outside, path)


def test_what_cannot_be_saved_is_refused_on_every_process(two, tmp_path):
    two(diverged, tmp_path / "gains.safetensors")
    assert not any(tmp_path.iterdir())


def adam(model):
    return torch.optim.AdamW([delta for _, delta in deltas(model)], lr=1e-2)


def go_on(stage, folder):
    """Losses of steps 1 and 2, through, and from a checkpoint between them."""
    through = build()
    engine = engine_of(through, stage, adam(through))
    train_steps(engine, 0, 1)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    losses = train_steps(engine, 1, 3)
    again = build()
    engine = engine_of(again, stage, adam(again))
    engine.load_checkpoint(folder, load_module_strict=False)
    return losses, train_steps(engine, 1, 3)


def test_a_checkpoint_of_deepspeed_without_the_frozen_weights_goes_on_with_the_same_losses(two, tmp_path):
    for through, again in two(go_on, 3, tmp_path):
        assert again == through
        assert through[0] != through[1]
    states = [torch.load(path, weights_only=False) for path in tmp_path.rglob("*model_states.pt")]
    for state in states:
        assert all(name.endswith(".delta") for name, value in state["module"].items() if value.numel())


def from_parts(folder, path):
    """A model that transformers reads into parts, so that no process ever holds it, and what gains learn on it."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from gain_ops.integrations.deepspeed import save_gains

    deepspeed().init_distributed()
    parts = HfDeepSpeedConfig(config_of(3))  # in force while it lives
    model = LlamaForCausalLM.from_pretrained(folder)
    del parts
    assert {p.numel() for p in model.parameters()} == {0}
    gain_ops.apply(model, "gain-ffn")
    engine = engine_of(model, 3)
    save_gains(engine, path)
    train_steps(engine, 0, 2)
    return gathered(model)[0]


def test_gains_go_on_a_model_that_was_loaded_in_parts(two, tmp_path):
    base = build()
    gain_ops.remove(base)
    base.save_pretrained(tmp_path / "base")
    answers = two(from_parts, tmp_path / "base", tmp_path / "gains.safetensors")

    gain_ops.load_gains(base, tmp_path / "gains.safetensors")  # the fingerprints are those of the whole weights
    optimizer = torch.optim.SGD([delta for _, delta in deltas(base)], lr=LR)
    for ids in batches(0, 2):
        backward(base, ids)
        optimizer.step()
        optimizer.zero_grad()
    for found in answers:
        for name, delta in deltas(base):
            torch.testing.assert_close(found[name], delta.detach())

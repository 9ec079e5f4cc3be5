"""FSDP2: the training of one process, what is gathered for it, and gain files of a sharded model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import gain_ops
from gain_ops.gainfiles.file import GainFileError, read_gains
from gain_ops.gainfiles.fingerprints import digest, sample
from gain_ops.integrations.fsdp import shard_gains
from gain_ops.models.record import gained_modules
from gain_ops.models.sets import add_gains, set_gains
from gain_ops.models.statistics import gain_statistics
from gain_ops.testing import assert_no_worse_than_torch

from support.small_training import (
    backward,
    batches,
    build,
    config,
    deltas,
    gradients,
    mesh_of,
    optimizer_of,
    shard,
    train,
    whole,
)
from support.traffic import DeltaDtypes, Traffic

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


# training


def _ten_steps(sharded, checkpointing, options, policy=None):
    model = build(**options)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if policy is not None:
        shard_gains(model, mesh=mesh_of())
    if sharded:
        shard(model, mesh_of(), **({"mp_policy": policy} if policy else {}))
    with DeltaDtypes() as dtypes:
        backward(model, next(batches()))
    first = gradients(model)
    model.zero_grad()
    losses = train(model, optimizer_of(model), batches())
    return losses, first, whole(deltas(model)), dtypes.seen


SETTINGS = [
    {},
    {"side": "input"},
    {"memory": "lean"},
    {"side": "input", "fuse_mlp": True, "memory": "lean"},
    {"side": "input", "fuse_mlp": True},
    {"dtype": torch.bfloat16, "side": "input", "fuse_mlp": True},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [*((options, False) for options in SETTINGS), *((options, True) for options in SETTINGS[::3])],
    ids=lambda value: ("", "checkpointing")[value] if isinstance(value, bool) else "-".join(map(str, value.values())),
)
def test_ten_steps_are_those_of_one_process(two, options, checkpointing):
    expected, results = _ten_steps(False, checkpointing, options), two(_ten_steps, True, checkpointing, options)
    for losses, first, trained, dtypes in results:
        # in bfloat16 too: rows are rounded one by one, wherever they are, and summed in float32
        torch.testing.assert_close(losses, expected[0], rtol=1.3e-6, atol=1e-5)
        torch.testing.assert_close(first, expected[1])
        torch.testing.assert_close(trained, expected[2])
        assert dtypes == {torch.float32}
    untrained = whole(deltas(build(**options)))
    assert all((delta - untrained[name]).abs().mean() > 0.02 for name, delta in expected[2].items())


@pytest.mark.parametrize("options", [{}, {"side": "input", "fuse_mlp": True}], ids=["output", "fused"])
def test_under_a_policy_delta_is_not_rounded_either(two, options):
    options = {"dtype": torch.bfloat16, **options}
    expected = _ten_steps(False, False, options)
    for losses, _, trained, dtypes in two(_ten_steps, True, False, options, BF16):
        torch.testing.assert_close(losses, expected[0], rtol=1.3e-6, atol=1e-5)
        torch.testing.assert_close(trained, expected[2])
        assert dtypes == {torch.float32}


def _dtypes_under_a_policy():
    model = shard(build(dtype=torch.bfloat16), mesh_of(), mp_policy=BF16)
    with DeltaDtypes() as dtypes:
        backward(model, next(batches()))
    return dtypes.seen


def test_one_group_under_a_policy_would_round_it(two):
    assert two(_dtypes_under_a_policy) == [{torch.bfloat16}] * 2, "shard_gains() is not needed any more"


def _train_a_norm_too(dtype=torch.bfloat16):
    model = build(dtype=torch.bfloat16).to(dtype)
    model.model.layers[0].input_layernorm.requires_grad_(True)
    if dist.is_initialized():
        shard_gains(model, mesh=mesh_of())
        shard(model, mesh_of())
    backward(model, next(batches()))
    return gradients(model)


def test_gains_beside_parameters_that_are_trained_in_bfloat16(two):
    plain, truth = _train_a_norm_too(), _train_a_norm_too(torch.float64)
    for found in two(_train_a_norm_too):
        for name, gradient in found.items():
            assert gradient.dtype == (torch.float32 if name.endswith("delta") else torch.bfloat16)
            assert_no_worse_than_torch(name, gradient, plain[name], truth[name], unit=gradient.dtype)


def test_what_shard_gains_refuses():
    with pytest.raises(ValueError, match="param_dtype would round delta"):
        shard_gains(build(), mp_policy=BF16)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no gains: put them on with gain_ops.apply\(\) first"):
        shard_gains(LlamaForCausalLM(config()))


def _accumulate(parts):
    """The gradient of some batches, of which the last alone is reduced."""
    model = shard(build(dtype=torch.bfloat16), mesh_of())
    for part in range(parts):
        model.set_requires_gradient_sync(part == parts - 1)
        with Traffic() as traffic:
            ids = next(batches(part, part + 1)).chunk(2)[dist.get_rank()]
            (model(ids, labels=ids).loss / parts).backward()
        assert bool(traffic.of("reduce")) == (part == parts - 1)
    return gradients(model)


def test_accumulation_without_reductions_between(two):
    model = build(dtype=torch.bfloat16)
    for ids in batches(0, 3):
        (model(ids, labels=ids).loss / 3).backward()
    for found in two(_accumulate, 3):
        torch.testing.assert_close(found, gradients(model))


# what is gathered


def _step(targets, options, own_groups=False):
    model = LlamaForCausalLM(config(num_hidden_layers=4))
    gain_ops.apply(model, targets)
    if own_groups:
        shard_gains(model, mesh=mesh_of())
    shard(model, mesh_of(), **options)
    backward(model, next(batches()))  # the first one sets up
    ids = next(batches()).chunk(2)[dist.get_rank()]
    with Traffic() as forward:
        loss = model(ids, labels=ids).loss
    with Traffic() as back:
        loss.backward()
    return forward, back, sum(delta.numel() for _, delta in deltas(model))


@pytest.mark.parametrize(
    ("targets", "options", "gathers", "reductions"),
    [
        ("gain-ffn", {}, 4, 4),
        ("gain-ffn", {"reshard_after_forward": False}, 0, 4),
        # nothing below the lowest gain needs a gradient: one block is gathered in advance, and not used
        ([r"layers\.[23]\..*o_proj"], {}, 3, 2),
        ([r"layers\.3\..*o_proj"], {}, 2, 1),
    ],
)
def test_what_a_step_gathers_and_reduces(two, targets, options, gathers, reductions):
    for forward, back, trained in two(_step, targets, options):
        assert len(forward.of("allgather")) == 5, "four blocks, and the rest"
        assert not forward.of("reduce")
        assert len(back.of("allgather")) == gathers
        assert len(back.of("reduce_scatter")) == reductions
        assert sum(back.of("reduce")) == 4 * trained, "the gradients of deltas, in float32, and nothing else"


def test_groups_of_their_own_cost_a_gather_for_each_layer_with_a_gain(two):
    for forward, back, trained in two(_step, "gain-ffn", {}, True):
        assert len(forward.of("allgather")) == 5 + 8
        assert len(back.of("allgather")) == 4 + 8
        assert sum(back.of("reduce")) == 4 * trained


# gain files


def _mesh_and_placements(kind):
    """How a model is sharded: on rows, columns, replicated groups, or with tensor parallelism on the same dimension."""
    if kind in ("rows", "columns"):
        return mesh_of(), (lambda p: Shard(p.dim() - 1)) if kind == "columns" else None
    names = ("replicate", "shard") if kind == "groups" else ("shard", "tp")
    return dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names), None


def _sharded(kind, dtype=torch.float32):
    model = build(dtype=dtype)
    mesh, placements = _mesh_and_placements(kind)
    if kind == "tp":  # by hand: of a layer with a gain both, and nothing is computed here
        for layer in gained_modules(model).values():
            for name in ("weight", "delta"):
                tensor = getattr(layer, name)
                split = distribute_tensor(tensor.detach(), mesh["tp"], [Shard(0)])
                setattr(layer, name, nn.Parameter(split, requires_grad=tensor.requires_grad))
        mesh = mesh["shard"]
    return shard(model, mesh, reshard_after_forward=False, **({"shard_placement_fn": placements} if placements else {}))


def _save(kind, dtype, path):
    model = _sharded(kind, dtype)
    if kind != "tp":
        model(next(batches()))  # and all stays gathered
    with Traffic() as traffic:
        gain_ops.save_gains(model, path)
    assert Path(path).exists(), "no rank goes on before the file is there"
    if kind != "tp":
        model(next(batches()))
    gain_ops.load_gains(model, path)
    return traffic, [layer.delta.numel() for layer in gained_modules(model).values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["rows", "columns", "groups", "tp"])
def test_the_file_of_a_sharded_model_is_that_of_the_whole_one(request, tmp_path, kind, dtype):
    group = request.getfixturevalue("two" if kind in ("rows", "columns") else "four")
    gain_ops.save_gains(build(dtype=dtype), tmp_path / "whole")
    found = group(_save, kind, dtype, str(tmp_path / "sharded"))
    assert (tmp_path / "sharded").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded", "whole"]
    samples = 2 * (2 * 24 * 24 + 2 * 24 * 200 // 2)  # every second value of the larger weights, in bfloat16
    for traffic, features in found:
        dims = 2 if kind == "tp" else 1  # of the mesh, over which a tensor is sharded
        assert sum(traffic.of("gather")) <= dims * 4 * sum(features)
        assert sum(traffic.of("reduce")) == dims * samples + 4 * (1 if group.world == 2 else 2)


def _prints(shape, dtype, kind):
    mesh, _ = _mesh_and_placements(kind if kind in ("groups", "tp") else "rows")
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "tp": [Shard(0), Shard(1)], "groups": [Shard(1), Shard(1)]}
    tensor = _weight(shape, dtype)
    with Traffic() as traffic:
        found = sample(distribute_tensor(tensor, mesh, placements[kind], src_data_rank=None))
    return digest([("weight", shape, found)]), traffic.seen


def _weight(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(50).to(dtype)


@pytest.mark.parametrize("kind", ["rows", "columns", "tp", "groups"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3), torch.float32), ((70, 130), torch.bfloat16), ((257, 65), torch.float16), ((90, 101), torch.int8)],
)
def test_the_fingerprint_of_a_sharded_weight_is_that_of_the_whole_one(four, shape, dtype, kind):
    weight = _weight(shape, dtype)
    expected = digest([("weight", shape, weight.flatten()[:: -(-weight.numel() // 4096)])])
    for found, seen in four(_prints, shape, dtype, kind):
        assert found == expected
        assert all(size <= 8192 for _, size in seen)
        assert len(seen) == (2 if kind in ("tp", "groups") else 1)


class _Coded(nn.Module):
    """A linear map that is stored as codes and scales."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 64, 96
        self.codes = nn.Parameter(torch.randint(-127, 128, (96, 64), dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.rand(96, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.codes * self.scales)


def _save_coded(path, sharded):
    torch.manual_seed(0)
    model = nn.Sequential(gain_ops.layers.make.gain_layer(_Coded()))
    if sharded:
        fully_shard(model, mesh=mesh_of())
    gain_ops.save_gains(model, path)


def test_the_file_of_gains_round_a_quantised_layer(two, tmp_path):
    _save_coded(tmp_path / "whole", False)
    two(_save_coded, tmp_path / "sharded", True)
    assert (tmp_path / "sharded").read_bytes() == (tmp_path / "whole").read_bytes()


def _load_another(path, other):
    model = shard(build(), mesh_of())
    gain_ops.load_gains(model, path)
    messages = []
    with torch.no_grad():
        part = model.model.layers[1].mlp.down_proj.weight.to_local()
        if dist.get_rank() == other:
            part[0, 0] += 1  # one value, on one rank
    try:
        gain_ops.load_gains(model, path)
    except GainFileError as error:
        messages.append(str(error))
    return whole(deltas(model)), messages


@pytest.mark.parametrize("other", [0, 1])
def test_loading_into_a_sharded_model_checks_the_base_on_every_rank(two, tmp_path, other):
    source = build()
    with torch.no_grad():
        for _, delta in deltas(source):
            delta.mul_(-3)
    gain_ops.save_gains(source, tmp_path / "gains")
    for found, messages in two(_load_another, str(tmp_path / "gains"), other):
        assert {
            f"{name}.delta": delta for name, delta in read_gains(tmp_path / "gains").deltas.items()
        }.keys() == found.keys()
        for name, delta in deltas(source):
            assert torch.equal(found[name], delta)
        assert len(messages) == 1
        assert "differ in 1 of 4 layers, model.layers.1.mlp.down_proj" in messages[0]


def _save_nowhere(path):
    model = shard(build(), mesh_of())
    try:
        gain_ops.save_gains(model, path)
    except OSError as error:
        return type(error).__name__, str(error)


def test_a_file_that_cannot_be_written_is_an_error_on_every_rank(two, tmp_path):
    (tmp_path / "gains").mkdir()
    first, second = two(_save_nowhere, str(tmp_path / "gains"))
    assert first[0] == "IsAFolderError"
    assert second == (
        "FileError",
        f"{tmp_path}/gains could not be written; the error of the mesh's first rank says why",
    )


def _switch(path):
    model = shard(build(), mesh_of())
    before = whole(deltas(model))
    add_gains(model, {"mine": None, "file": path})
    found = []
    for name in ("file", None, "mine"):
        set_gains(model, name)
        backward(model, next(batches()))
        found.append(gain_statistics(model).overall.rms_from_one)
    assert all(torch.equal(before[name], delta) for name, delta in whole(deltas(model)).items())
    return found


def test_named_sets_on_a_sharded_model(two, tmp_path):
    model = build()
    mine = gain_statistics(model).overall.rms_from_one
    with torch.no_grad():
        for _, delta in deltas(model):
            delta.mul_(2)
    gain_ops.save_gains(model, tmp_path / "gains")
    assert two(_switch, str(tmp_path / "gains")) == [[pytest.approx(2 * mine), 0, mine]] * 2


# from the meta device


def _from_meta(folder, how):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    gain_ops.apply(model, "gain-ffn")
    assert all(parameter.is_meta for parameter in shard(model, mesh_of()).parameters())
    model.to_empty(device="cpu")
    model.init_weights()  # what is in no checkpoint: rotary embeddings
    model.tie_weights()
    if how == "folder":
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        dcp.load(frozen, storage_reader=HuggingFaceStorageReader(folder))
    else:
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict() if dist.get_rank() == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, weights, options=options)
    for _, delta in deltas(model):
        nn.init.zeros_(delta)
    ids = next(batches())
    logits = model(ids).logits.detach()
    model(ids, labels=ids).loss.backward()
    return logits, gradients(model)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("how", ["folder", "rank 0"])
def test_a_model_from_the_meta_device_is_loaded_in_shards(two, tmp_path, how, tied):
    torch.manual_seed(3)
    base = LlamaForCausalLM(config(tie_word_embeddings=tied))
    base.save_pretrained(tmp_path)
    ids = next(batches())
    expected = base(ids).logits
    gain_ops.apply(base, "gain-ffn")
    base(ids, labels=ids).loss.backward()
    for logits, found in two(_from_meta, str(tmp_path), how):
        assert torch.equal(logits, expected)
        torch.testing.assert_close(found, gradients(base))


# FSDP1, accelerate's default


def _under_fsdp1(options):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    model = build(**options)
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    loss = backward(wrapped, next(batches()))
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        return loss, {name: delta.grad.clone() for name, delta in deltas(model)}


@pytest.mark.parametrize("options", [{}, {"side": "input", "fuse_mlp": True}], ids=["output", "fused"])
def test_fsdp1_with_original_parameters(two, options):
    model = build(**options)
    expected_loss, expected = backward(model, next(batches())), gradients(model)
    for loss, found in two(_under_fsdp1, options):
        assert loss == pytest.approx(expected_loss)
        names = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in found.items()}
        torch.testing.assert_close(names, expected)

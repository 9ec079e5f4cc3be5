"""Checkpoints of torch.distributed.checkpoint: kilobytes, and training goes on from them on another number of processes."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import gain_ops

from support.small_training import STEPS, batches, build, deltas, mesh_of, optimizer_of, shard, train, whole

SAVED_AFTER = 4


def _state(model, optimizer):
    options = StateDictOptions(ignore_frozen_params=True)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def _run(folder, first, last, how, options):
    """Some steps of the training, from a checkpoint if not from the start, and a checkpoint after them."""
    model = build(**options)
    if how == "fsdp":
        model = shard(model, mesh_of())
    elif how == "ddp":
        model = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    if first:
        with torch.no_grad():
            for _, delta in deltas(model):
                delta.zero_()
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{first}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
    losses = train(model, optimizer, batches(first, last))
    dcp.save(_state(model, optimizer), checkpoint_id=f"{folder}/{last}")
    return losses, {name.removeprefix("module."): delta for name, delta in whole(deltas(model)).items()}


FUSED = {"side": "input", "fuse_mlp": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        (("two", "fsdp"), ("four", "fsdp"), {}),
        (("two", "fsdp"), ("four", "fsdp"), FUSED),
        (("two", "fsdp"), None, {}),
        (("four", "fsdp"), ("two", "fsdp"), {}),
        (("four", "fsdp"), None, FUSED),
        (None, ("four", "fsdp"), {}),
        (("two", "ddp"), ("four", "fsdp"), {}),
        (("four", "fsdp"), ("two", "ddp"), {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "fused" if value else "",
)
def test_training_goes_on_where_it_was(request, tmp_path, before, after, options):
    def run(where, *steps):
        if where is None:
            return [_run(str(tmp_path), *steps, "plain", options)]
        return request.getfixturevalue(where[0])(_run, str(tmp_path), *steps, where[1], options)

    model = build(**options)
    expected = train(model, optimizer_of(model), batches())
    run(before, 0, SAVED_AFTER)
    for losses, trained in run(after, SAVED_AFTER, STEPS):
        torch.testing.assert_close(losses, expected[SAVED_AFTER:], rtol=1.3e-6, atol=1e-5)
        torch.testing.assert_close(trained, whole(deltas(model)))


def test_a_checkpoint_has_the_deltas_and_their_moments_alone(two, tmp_path):
    two(_run, str(tmp_path), 0, 2, "fsdp", {})
    trained = {name: delta.shape for name, delta in deltas(build())}
    found = dcp.FileSystemReader(str(tmp_path / "2")).read_metadata().state_dict_metadata
    tensors = {name: part.size for name, part in found.items() if hasattr(part, "size") and part.size}
    assert tensors == {
        **{f"model.{name}": shape for name, shape in trained.items()},
        **{f"optimizer.state.{name}.{m}": s for name, s in trained.items() for m in ("exp_avg", "exp_avg_sq")},
    }


def _save_gains_of(folder, step):
    model = shard(build(), mesh_of())
    state = {"model": _state(model, optimizer_of(model))["model"]}
    dcp.load(state, checkpoint_id=f"{folder}/{step}")
    gain_ops.save_gains(model, f"{folder}/gains")


def test_a_checkpoint_becomes_a_gain_file(two, tmp_path):
    (_, trained), _ = two(_run, str(tmp_path), 0, 2, "fsdp", {})
    two(_save_gains_of, str(tmp_path), 2)
    model = build()
    gain_ops.load_gains(model, tmp_path / "gains")
    assert all(torch.equal(delta, trained[name]) for name, delta in deltas(model))
    assert not dist.is_initialized()

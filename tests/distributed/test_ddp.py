"""DistributedDataParallel: the training of one process, and what is reduced for it."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import gain_ops
from gain_ops.gainfiles.file import read_gains

from support.small_training import backward, batches, build, deltas, gradients, optimizer_of, train, whole
from support.traffic import Traffic


def _wrap(checkpointing=False, ddp=None, **options):
    model = build(**options)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return DistributedDataParallel(model, **(ddp or {})) if dist.is_initialized() else model


def _unwrapped(tensors):
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _ten_steps(options):
    model = _wrap(**options)
    backward(model, next(batches()))
    first = _unwrapped(gradients(model))
    model.zero_grad()
    losses = train(model, optimizer_of(model), batches())
    return losses, first, _unwrapped(whole(deltas(model)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "input"},
        {"memory": "lean", "ddp": {"static_graph": True}},
        {"side": "input", "fuse_mlp": True, "memory": "lean"},
        {"checkpointing": True},
        {"checkpointing": True, "side": "input", "fuse_mlp": True, "ddp": {"static_graph": True}},
        {"fuse_residual": True},
        {"checkpointing": True, "side": "mixed", "fuse_mlp": True, "fuse_residual": True},
        {"dtype": torch.bfloat16},
        {"ddp": {"gradient_as_bucket_view": True}},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_ten_steps_are_those_of_one_process(two, options):
    expected = _ten_steps(options)
    for losses, first, trained in two(_ten_steps, options):
        torch.testing.assert_close(losses, expected[0], rtol=1.3e-6, atol=1e-5)
        torch.testing.assert_close(first, expected[1])
        torch.testing.assert_close(trained, expected[2])


def _buckets():
    model = _wrap()
    sizes = []

    def note(state, bucket):
        sizes.append((bucket.buffer().dtype, bucket.buffer().nbytes, [tuple(p.shape) for p in bucket.parameters()]))
        return default_hooks.allreduce_hook(state, bucket)

    model.register_comm_hook(None, note)
    for ids in batches(0, 2):  # DDP makes its buckets anew after the first step
        backward(model, ids)
    return sizes, [tuple(delta.shape) for _, delta in deltas(model)]


def test_the_bucket_is_the_gradient_of_the_deltas_alone(two):
    for sizes, shapes in two(_buckets):
        for dtype, size, found in sizes[1:]:
            assert dtype == torch.float32
            assert sorted(found) == sorted(shapes)
            assert size == 4 * sum(length for (length,) in shapes) < 1024
        assert len(sizes) == 2


def _accumulate(parts):
    """The gradient of a batch in parts, of which the last alone is reduced."""
    model = _wrap()
    for ids in list(batches(0, parts))[:-1]:
        with model.no_sync(), Traffic() as silent:
            part = ids.chunk(dist.get_world_size())[dist.get_rank()]
            (model(part, labels=part).loss / parts).backward()
        assert not silent.of("reduce")
    part = next(batches(parts - 1, parts)).chunk(dist.get_world_size())[dist.get_rank()]
    (model(part, labels=part).loss / parts).backward()
    return _unwrapped(gradients(model))


def test_accumulation_without_reductions_between(two):
    model = build()
    for ids in batches(0, 3):
        (model(ids, labels=ids).loss / 3).backward()
    for found in two(_accumulate, 3):
        torch.testing.assert_close(found, gradients(model))


def _save(path):
    model = _wrap()
    train(model, optimizer_of(model), batches(0, 2))
    gain_ops.save_gains(model, path)
    dist.barrier()
    gain_ops.load_gains(model, path)


def test_the_names_in_a_gain_file_are_those_without_ddp(two, tmp_path):
    two(_save, str(tmp_path / "gains"))
    model = build()
    train(model, optimizer_of(model), batches(0, 2))
    found = read_gains(tmp_path / "gains").deltas
    torch.testing.assert_close({f"{name}.delta": delta for name, delta in found.items()}, whole(deltas(model)))
    assert [path.name for path in tmp_path.iterdir()] == ["gains"]

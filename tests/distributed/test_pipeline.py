"""Gains under torch.distributed.pipelining: a Llama in two stages trains as one process does, to the bit."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import LlamaForCausalLM

import gain_ops
from gain_ops.gainfiles.file import read_gains

from support.small_training import BATCH, batches, build, deltas, optimizer_of

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
STEPS = 3


class Stage(nn.Module):
    """Some layers of a Llama, in their places; the first stage embeds the tokens, the last one gives logits."""

    def __init__(self, model: LlamaForCausalLM, index: int, count: int) -> None:
        super().__init__()
        self.whole, self.is_first, self.is_last = model, index == 0, index == count - 1
        layers = model.model.layers
        self.own = range(len(layers) * index // count, len(layers) * (index + 1) // count)
        for other in set(range(len(layers))) - set(self.own):
            layers[other] = nn.Identity()  # so that names stay, and with them those in the gain file

    def forward(self, x: Tensor) -> Tensor:
        llama = self.whole.model
        if self.is_first:
            x = llama.embed_tokens(x)
        positions = torch.arange(x.shape[1])[None]
        for index in self.own:
            x = llama.layers[index](x, position_embeddings=llama.rotary_emb(x, positions), position_ids=positions)
        return self.whole.lm_head(llama.norm(x)) if self.is_last else x


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: delta.grad.clone() for name, delta in deltas(model)}


def train_a_stage(schedule, options, folder):
    """The losses, on the last rank; the gradients of every step; and a gain file of this stage."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(**options)
    stage = PipelineStage(Stage(model, rank, world), rank, world, torch.device("cpu"))
    pipeline = SCHEDULES[schedule](stage, n_microbatches=BATCH, loss_fn=loss_of)
    optimizer = optimizer_of(model)
    losses, gradients = [], []
    for ids in batches(0, STEPS):
        parts = []
        if rank == 0:
            pipeline.step(ids)
        else:
            pipeline.step(target=ids, losses=parts)
            losses.append([part.item() for part in parts])
        gradients.append(gradients_of(model))
        optimizer.step()
        optimizer.zero_grad()
    gain_ops.save_gains(model, folder / f"stage-{rank}.safetensors")
    return losses, gradients


def train_in_one(options):
    """The same in one process, a part of the batch at a time."""
    model = build(**options)
    optimizer = optimizer_of(model)
    losses, gradients = [], []
    for ids in batches(0, STEPS):
        losses.append([])
        for part in ids.split(1):
            loss = loss_of(model(part).logits, part)
            (loss / BATCH).backward()
            losses[-1].append(loss.item())
        gradients.append(gradients_of(model))
        optimizer.step()
        optimizer.zero_grad()
    return model, losses, gradients


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"side": "input", "fuse_mlp": True}], ids=["output", "fused-mlp"])
def test_two_stages_train_as_one_process(two, schedule, options, tmp_path):
    model, losses, gradients = train_in_one(options)
    (_, first), (staged_losses, second) = two(train_a_stage, schedule, options, tmp_path)
    assert staged_losses == losses
    assert all(a.keys().isdisjoint(b) for a, b in zip(first, second, strict=True))
    for step, expected in enumerate(gradients):
        found = first[step] | second[step]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        assert all(gradient.any() for gradient in expected.values())

    # the stages' files are one gain file: a layer is in one of them, with a weight of 1
    stages = [tmp_path / f"stage-{rank}.safetensors" for rank in range(2)]
    joined = gain_ops.combine_gains(stages, [1, 1], how="mean")
    gain_ops.save_gains(model, tmp_path / "one.safetensors")
    one = read_gains(tmp_path / "one.safetensors")
    assert joined.fingerprints == one.fingerprints
    assert joined.targets == one.targets == "gain-ffn"
    assert all(torch.equal(joined.deltas[name], delta) for name, delta in one.deltas.items())

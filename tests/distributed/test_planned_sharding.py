"""What gain-ops plan says of FSDP2 is what two processes send and hold."""

from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.memory import allocator_peak
from gain_ops.recipes import meta_models
from gain_ops.recipes.evaluation import next_token_loss
from gain_ops.recipes.plan_counts import METHODS, count_pass
from gain_ops.recipes.planning import gathered_at_once, sharded_traffic, sizes_of

from traffic import Traffic

LAYERS, TOKENS, VOCABULARY = 6, 64, 96
UNSEEN = (LAYERS + 1) * torch.get_rng_state().nbytes  # what checkpointing keeps outside of torch's dispatcher


def _adapted(name: str, checkpointed: bool, device: str) -> nn.Module:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = meta_models.build(config, device, torch.bfloat16)
    METHODS[name].put(model)
    if checkpointed:
        meta_models.checkpoint(model)
    return model


def _sharded(name: str, checkpointed: bool) -> tuple[int, Counter[str]]:
    """On a rank of two: the peak of a pass beyond the shards, and the bytes of each kind of collective."""
    from torch.distributed.fsdp import fully_shard

    model = _adapted(name, checkpointed, "cpu")
    for block in meta_models.blocks(model):
        fully_shard(block)
    fully_shard(model)
    ids = meta_models.random_ids(TOKENS, TOKENS, VOCABULARY, "cpu")

    def step() -> None:
        next_token_loss(model, ids).backward()
        model.zero_grad()

    step()
    with Traffic() as traffic:
        step()
    moved: Counter[str] = Counter()
    for operation, nbytes in traffic.seen:
        moved[operation] += nbytes
    return min(allocator_peak(step) for _ in range(3)), moved  # a thread of gloo may let go of a buffer late


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["gain-ffn", "full fine-tuning"])
def test_two_processes_send_and_hold_what_is_planned(two, name: str, checkpointed: bool) -> None:
    meta = _adapted(name, checkpointed, "meta")
    counts = count_pass(meta, meta_models.random_ids(TOKENS, TOKENS, VOCABULARY), eager=True)
    sizes = sizes_of(meta)
    gathered = gathered_at_once(sizes, counts.trained)
    for real, moved in two(_sharded, name, checkpointed):
        assert moved["allgather_base"] == 2 * sizes.weights - sizes.root
        assert moved["reduce_scatter_base"] == counts.trained
        assert moved.total() == 2 * sharded_traffic(sizes, counts.trained, 2), "each of two sends one half"
        assert counts.peak < real <= counts.peak + gathered + counts.trained // 2 + UNSEEN

"""What gain-ops plan says of a strategy is what two processes send and hold, and the lines that it prints run."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gain_ops
from benchmarks.suites.memory import allocator_peak
from benchmarks.suites.traffic import Traffic as Payloads
from benchmarks.suites.traffic import sent
from gain_ops.commands.plan import launch
from gain_ops.integrations.tensor_parallel import FusedMlpParallel, place_gains
from gain_ops.measure import meta_models
from gain_ops.measure.perplexity import next_token_loss
from gain_ops.planning.counts import count_pass
from gain_ops.planning.methods import METHODS
from gain_ops.planning.strategies import GIB, Job, Row, gathered_at_once, rows, sharded_traffic, sizes_of

from support.traffic import Traffic

LAYERS, TOKENS, VOCABULARY = 6, 64, 96
LARGE = 4096  # a vocabulary whose weights are more than a pass over a few tokens takes
UNSEEN = (LAYERS + 1) * torch.get_rng_state().nbytes  # what checkpointing keeps outside of torch's dispatcher


def _config(vocabulary: int = VOCABULARY):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


def _adapted(
    name: str, checkpointed: bool, device: str, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    torch.manual_seed(0)
    model = meta_models.build(_config(vocabulary), device, dtype)
    METHODS[name].put(model)
    if checkpointed:
        meta_models.checkpoint(model)
    return model


def _sharded(name: str, checkpointed: bool, tokens: int, vocabulary: int) -> tuple[int, Counter[str]]:
    """On a rank of two: the peak of a pass beyond the shards, and the bytes of each kind of collective."""
    model = _adapted(name, checkpointed, "cpu", vocabulary)
    for block in meta_models.blocks(model):
        fully_shard(block)
    fully_shard(model)
    ids = meta_models.random_ids(tokens, tokens, vocabulary, "cpu")

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


@pytest.mark.parametrize(
    ("name", "checkpointed", "tokens", "vocabulary"),
    [
        ("gain-ffn", True, TOKENS, VOCABULARY),
        pytest.param("gain-ffn", False, TOKENS, VOCABULARY, marks=pytest.mark.slow),
        ("full fine-tuning", False, TOKENS, VOCABULARY),
        pytest.param("full fine-tuning", True, TOKENS, VOCABULARY, marks=pytest.mark.slow),
        ("gain-ffn", True, 8, LARGE),
    ],
)
def test_two_processes_send_and_hold_what_is_planned(
    two, name: str, checkpointed: bool, tokens: int, vocabulary: int
) -> None:
    meta = _adapted(name, checkpointed, "meta", vocabulary)
    counts = count_pass(meta, meta_models.random_ids(tokens, tokens, vocabulary), eager=True)
    sizes = sizes_of(meta)
    gathered = gathered_at_once(sizes, counts.trained, counts.peak)
    # gloo gathers into a buffer of its own: the first block's is there beside the root
    gloos = sizes.block if vocabulary == LARGE else 0
    for real, moved in two(_sharded, name, checkpointed, tokens, vocabulary):
        assert moved["allgather_base"] == 2 * sizes.weights - sizes.root
        assert moved["reduce_scatter_base"] == counts.trained
        assert moved.total() == 2 * sharded_traffic(sizes, counts.trained, 2), "each of two sends one half"
        assert counts.peak < real <= counts.peak + gathered + gloos + counts.trained // 2 + UNSEEN


def _styles(fused: bool) -> dict[str, object]:
    """Torch's own, for what transformers' plan says of a Llama."""
    layer = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    if fused:
        layer["mlp"] = FusedMlpParallel()
    else:
        layer |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        layer["mlp.down_proj"] = RowwiseParallel()
    outside = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    return outside | {f"model.layers.*.{name}": style for name, style in layer.items()}


def _split(name: str, checkpointed: bool) -> int:
    """On a rank of two: the bytes that a pass sends."""
    model = _adapted(name, checkpointed, "cpu")
    parallelize_module(model, init_device_mesh("cpu", (2,)), _styles(METHODS[name].fused))
    place_gains(model)
    ids = meta_models.random_ids(TOKENS, TOKENS, VOCABULARY, "cpu")
    with Payloads() as payloads:
        next_token_loss(model, ids).backward()
    return sent(payloads.payload, 2)


@pytest.mark.parametrize(
    "name",
    [
        "gain-ffn",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gain, lean", "gain-ffn, fused", "full fine-tuning")),
    ],
)
def test_two_processes_of_tensor_parallelism_send_what_is_planned(two, name: str) -> None:
    job = Job(_config(), 2, GIB, TOKENS, TOKENS, reserve=0)
    planned = {row.checkpointed: row.sent for row in rows(job, [METHODS[name]]) if row.strategy == "TP 2"}
    for checkpointed in (False, True):
        assert two(_split, name, checkpointed) == [planned[checkpointed]] * 2


def _passed(model: nn.Module) -> tuple[float, float]:
    """Of a pass the loss and the norm of the gradients."""
    loss = next_token_loss(model, meta_models.random_ids(TOKENS, TOKENS, VOCABULARY, "cpu"))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    whole = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return loss.item(), torch.cat(whole).norm().item()


def _launched(row: Row, gpus: int) -> tuple[float, float]:
    """What the model does that the printed lines make."""
    torch.manual_seed(0)
    model = meta_models.build(_config(), "cpu", torch.float32)
    given = (DistributedDataParallel, fully_shard, init_device_mesh, parallelize_module, place_gains)
    names = {function.__name__: function for function in given}
    names |= {"gain_ops": gain_ops, "model": model, "styles": _styles(METHODS[row.method].fused)}
    lines = launch(row, gpus, "model.layers")[:-1]
    exec("\n".join(lines).replace('"cuda"', '"cpu"'), names)
    torch.manual_seed(1)
    return _passed(names["model"])


@pytest.mark.parametrize(
    ("world", "strategy", "name"),
    [
        *((2, strategy, "gain-ffn") for strategy in ("replicated x 2", "FSDP 2", "TP 2")),
        (2, "TP 2", "gain-ffn, fused"),
        pytest.param(4, "TP 2 x FSDP 2", "gain-ffn", marks=pytest.mark.slow),
    ],
)
def test_the_printed_lines_run(request, world: int, strategy: str, name: str) -> None:
    job = Job(_config(), world, GIB, TOKENS, TOKENS, reserve=0)
    (row,) = [row for row in rows(job, [METHODS[name]]) if row.strategy == strategy and row.checkpointed]
    group = request.getfixturevalue({2: "two", 4: "four"}[world])
    alone = _adapted(name, False, "cpu", dtype=torch.float32)
    torch.manual_seed(1)
    assert group(_launched, row, world) == [pytest.approx(_passed(alone), rel=1e-5)] * world

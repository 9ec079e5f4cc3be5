"""What fits on how many GPUs, and how: memory and traffic of a step under every strategy, from counts on the meta device.

All bytes are of one GPU. n is the GPUs of a group, W the weights, B those of the largest block, R those outside of the blocks,
P the trained parameters, T the tokens, and C the counts of counts.py (exact for the model that a GPU computes):

::

    replicated       weights W     states 3 P     gathered 0                    DDP: one model a GPU
    FSDP             weights W/n   states 3 P/n   gathered R + 3 B + 4 P_B      fully_shard() of the blocks, then of the model
    TP               weights W_n   states 3 P_n   gathered 0                    the part of a rank under transformers' plan
    TP t x FSDP n    FSDP of the part of one of t ranks

    peak = weights + states + gathered + saved + transient
    saved = C.saved               transient = max(C.peak, P of a GPU) - C.saved

*States* are the gradients and AdamW's two moments; DDP allocates gradients at the start. *Transient* memory is what exists
beyond the saved activations at the peak, either in the loss or in a recomputed block. After the backward, AdamW (foreach) makes
one more tensor for each parameter. FSDP2 holds up to three block-sized buffers at once (3 B): the gathered block, the next
block's buffer and its copy-out. For the trained parameters of a block it holds two gradients and two buffers (4 P_B), and the
root parameters throughout (R). At the start, when nothing is saved, it holds the root twice, in its buffer and copied out, and
the first block's buffer (2 R + B). The buffers of tensor parallelism and NCCL's memory are not counted.

Traffic is what each GPU sends in a step, by rings: an all-gather or a reduce-scatter of x bytes sends (n-1)/n x, and an
all-reduce twice as much. With A = T * hidden and V = T * vocabulary numbers:

::

    replicated       all-reduce of P
    FSDP             all-gather of 2 (W - R) + R, reduce-scatter of P; a frozen weight has no gradient to reduce
    TP               all-reduce of A: 2 a block forward, 5 backward, 1 more for recomputed blocks, 2 for embeddings and head;
                     all-gather of V; all-reduce of the gradients of which each rank has a term

The all-reduces of A are Llama's. Forward has one for each row-parallel layer, o_proj and down_proj. Backward has one for the
input of each column-parallel layer: q, k, v, gate and up; a fused FFN has one for the last two. A recomputed block stops before
its last all-reduce, of which nothing is saved; where a norm follows, as in Gemma 2, this all-reduce is sent again, and is not
counted. Each rank has a term of the gradients of output-side gains and of LoRA's B. The gradient of a shard is its rank's own,
and the gradient of a norm between two layers is the same on every rank.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gain_ops.measure import meta_models
from gain_ops.measure.language_models import refuse_encoder, refused
from gain_ops.planning.configs import split_config, split_weights, summed_weights
from gain_ops.planning.counts import Counts, blocks_alike, count, refuse_loops
from gain_ops.planning.methods import FULL, IN_MODEL_DTYPE, LORA, METHODS, Method
from gain_ops.utils.errors import UsageError

__all__ = [
    "GIB",
    "NODE",
    "PLANNED",
    "Job",
    "Row",
    "Sizes",
    "Strategy",
    "gathered_at_once",
    "nearest",
    "recommend",
    "rows",
    "sharded_traffic",
    "sizes_of",
    "strategies",
]

GIB = 2**30
NODE = 8
"""GPUs of a machine. A group of tensor parallelism is no larger, or its all-reduces would cross the network."""

_Counted = dict[tuple[int, str], tuple[Counts, Counts] | str]
"""Counts without and with activation checkpointing, or why there are none, by ranks of tensor parallelism and method."""

_DOUBLED = 7  # times, in nearest()
_FEWEST_TOKENS = 128

_GAINS = ("gain", "gain, lean", "gain-ffn", "gain-ffn, lean", "gain-ffn, fused", "gain-ffn, fused, lean")
PLANNED = {name: METHODS[name] for name in (*_GAINS, LORA, LORA + IN_MODEL_DTYPE, FULL)}
"""By name, the simplest of ours first; LoRA sits on the layers of gain-ffn."""


@dataclass(frozen=True)
class Job:
    """The question: a model's config, GPUs, bytes of each, tokens of a step on each, of a window, and the frozen dtype.

    reserve is for the CUDA context, the libraries' workspaces and fragments, which are not counted.

    Raises:
        ValueError: a number below 1, a reserve that leaves nothing, or tokens that are no whole number of windows.

    """

    config: Any
    gpus: int
    memory: int
    tokens: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    reserve: int = 2 * GIB

    def __post_init__(self) -> None:
        for name in ("gpus", "memory", "tokens", "length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not at least 1")
        if not 0 <= self.reserve < self.memory:
            raise UsageError(f"a reserve of {self.reserve} bytes leaves nothing of {self.memory}")
        meta_models.random_ids(self.tokens, self.length, 1)  # raises for tokens that are no whole number of windows


@dataclass(frozen=True)
class Strategy:
    """How the GPUs share the work: ``tensor`` of them a layer's GEMMs, and ``sharded`` of them the weights of such a part.

    The rest are replicas: ``gpus = tensor * sharded * replicas``. obstacle says why the strategy is impossible, or is None.
    """

    name: str
    tensor: int
    sharded: int
    obstacle: str | None = None


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights: all of them, those outside of its blocks, those of the largest block; and its blocks."""

    weights: int
    root: int
    block: int
    layers: int


@dataclass(frozen=True)
class Row:
    """One way to train: bytes of one GPU, and what it sends in a step; ``step_tokens`` are those of all GPUs.

    tensor and sharded are its Strategy's. Without counts the figures are 0 and ``obstacle`` says why.
    """

    strategy: str
    method: str
    checkpointed: bool
    tensor: int = 1
    sharded: int = 1
    weights: int = 0
    gathered: int = 0
    saved: int = 0
    transient: int = 0
    states: int = 0
    sent: int = 0
    headroom: int = 0
    step_tokens: int = 0
    obstacle: str | None = None

    @property
    def total(self) -> int:
        """The peak of a step."""
        return self.weights + self.gathered + self.saved + self.transient + self.states

    @property
    def fits(self) -> bool:
        """Whether the peak and the reserve are within the memory."""
        return self.obstacle is None and self.headroom >= 0


def strategies(config: Any, model: nn.Module, gpus: int) -> list[Strategy]:
    """The ways to share a model among GPUs, the simplest first.

    Args:
        config: of transformers.
        model: built from it.
        gpus: all of them.
    """
    found = [Strategy("one GPU" if gpus == 1 else f"replicated x {gpus}", 1, 1)]
    if gpus > 1:
        found.append(Strategy(f"FSDP {gpus}", 1, gpus))
    widths = {t: _obstacle(config, model, t) for t in range(2, min(NODE, gpus) + 1) if gpus % t == 0}
    if gpus in widths:
        found.append(Strategy(f"TP {gpus}", gpus, 1, widths[gpus]))
    if able := [t for t, obstacle in widths.items() if obstacle is None and t < gpus]:
        found.append(Strategy(f"TP {able[-1]} x FSDP {gpus // able[-1]}", able[-1], gpus // able[-1]))
    return found


def rows(
    job: Job, methods: Sequence[Method] = tuple(PLANNED.values()), counted: _Counted | None = None
) -> Iterator[Row]:
    """Every strategy with every method, without and with activation checkpointing.

    Args:
        job: the question.
        methods: to count.
        counted: kept between jobs that differ in their GPUs and memory alone.

    Raises:
        UsageError: a config that is no causal or multimodal language model's, or one whose model cannot be counted.

    """
    model = meta_models.build(job.config, dtype=job.dtype)
    refuse_encoder(model)
    refuse_loops(model)
    alike = blocks_alike(job.config, model)
    shares = strategies(job.config, model, job.gpus)
    parts = {
        tensor: split_config(job.config, model, tensor) if tensor > 1 else job.config
        for tensor in dict.fromkeys(share.tensor for share in shares if share.obstacle is None)
    }
    sizes = {tensor: sizes_of(model, tensor) for tensor in parts}
    counted = {} if counted is None else counted
    for share, method, checkpointed in itertools.product(shares, methods, (False, True)):
        row = Row(share.name, method.name, checkpointed, share.tensor, share.sharded, obstacle=share.obstacle)
        if share.obstacle is None:
            key = share.tensor, method.name
            if key not in counted:
                counted[key] = _counts(job, parts[share.tensor], method, alike)
            found = counted[key]
            if isinstance(found, str):
                row = replace(row, obstacle=found)
            else:
                # the first strategy splits no layer; a model that cannot be counted in full cannot be counted in parts
                whole = counted[1, method.name]
                assert not isinstance(whole, str)
                counts = found[checkpointed]
                summed = _summed(model, share.tensor, counts, whole[checkpointed])
                row = _filled(row, job, sizes[share.tensor], counts, summed)
        yield row


def recommend(found: Sequence[Row], family: str) -> Row | None:
    """The first that fits, or None: the fewest changes first.

    In order: how the GPUs share the work, then whether blocks are recomputed, then what a gain saves for backward.

    Args:
        found: of rows().
        family: "gain" or "gain-ffn": which methods count.
    """
    names = [name for name, method in PLANNED.items() if method.targets == family]
    shares = list(dict.fromkeys(row.strategy for row in found))
    fitting = [row for row in found if row.fits and row.method in names]
    return min(
        fitting,
        key=lambda row: (shares.index(row.strategy), row.checkpointed, names.index(row.method)),
        default=None,
    )


def nearest(job: Job, found: Sequence[Row], family: str) -> tuple[Job, Row] | None:
    """Where nothing fits: the job with the most tokens on these GPUs that fits, or else that with the fewest GPUs.

    Tokens are halved, and GPUs are doubled, at most seven times.

    Args:
        job: what was asked.
        found: its rows.
        family: as in recommend().

    Returns:
        The other job and the row that is recommended for it; None where nothing of the family was counted, or no number fits.
    """
    able = [row for row in found if row.obstacle is None and METHODS[row.method].targets == family]
    if not able:
        return None
    methods = [METHODS[name] for name in dict.fromkeys(row.method for row in able)]
    memory = job.memory - job.reserve
    share = max((memory - (row.total - row.saved - row.transient)) / (row.saved + row.transient) for row in able)
    jobs = [
        replace(job, tokens=tokens, length=min(job.length, tokens))
        for tokens in _halves(job.tokens, job.length)
        if tokens <= share * job.tokens  # what a pass holds shrinks no faster than its tokens
    ]
    for other in jobs:
        if (best := recommend(list(rows(other, methods)), family)) is not None:
            return other, best
    counted: _Counted = {}
    for power in range(1, _DOUBLED + 1):
        other = replace(job, gpus=job.gpus << power)
        if (best := recommend(list(rows(other, methods, counted)), family)) is not None:
            return other, best
    return None


def sizes_of(model: nn.Module, tensor: int = 1) -> Sizes:
    """The sizes of a model without adapters, or of the part of it that one of ``tensor`` ranks holds."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = split_weights(model, tensor)
    blocks = [sum(held[names[parameter]] for parameter in block.parameters()) for block in meta_models.blocks(model)]
    weights = sum(held.values())
    return Sizes(weights, weights - sum(blocks), max(blocks), len(blocks))


def gathered_at_once(sizes: Sizes, trained: int, alive: int) -> int:
    """Bytes that FSDP2 has gathered at once, at most: ``max(R + 3 B + 4 P_B, 2 R + B - alive)``.

    alive is what a pass holds beside it at its peak, saved and transient; none of this exists yet at the start, when the
    root is gathered.
    """
    in_the_blocks = sizes.root + 3 * sizes.block + 4 * math.ceil(trained / sizes.layers)
    return max(in_the_blocks, 2 * sizes.root + sizes.block - alive)


def sharded_traffic(sizes: Sizes, trained: int, ranks: int) -> int:
    """Bytes that one of ``ranks`` sends for FSDP2 in a step: all-gathers of ``2 (W - R) + R``, the reduce-scatter of P."""
    return _ring(2 * sizes.weights - sizes.root, ranks) + _ring(trained, ranks)


def _halves(tokens: int, length: int) -> Iterator[int]:
    """Half the windows and half of these, then half a window and half of that, as whole numbers."""
    windows = tokens // length
    while windows > 1:
        windows //= 2
        yield windows * length
    while length >= 2 * _FEWEST_TOKENS:
        length //= 2
        yield length


def _obstacle(config: Any, model: nn.Module, ranks: int) -> str | None:
    try:
        with refused(f"{type(model).__name__} cannot be planned in parts"):
            part = meta_models.build(split_config(config, model, ranks), dtype=next(model.parameters()).dtype)
    except UsageError as error:
        return str(error)
    held = split_weights(model, ranks)
    names = {parameter: name for name, parameter in part.named_parameters()}
    if any(held.get(names[p]) != p.nbytes for block in meta_models.blocks(part) for p in block.parameters()):
        return (
            f"transformers' plan of tensor parallelism for {type(model).__name__} has parts that its config cannot say"
        )
    return None


def _counts(job: Job, config: Any, method: Method, alike: bool) -> tuple[Counts, Counts] | str:
    """The counts without and with activation checkpointing, or why this method is impossible."""
    if method.package is not None and importlib.util.find_spec(method.package) is None:
        return f"{method.package} is not installed"
    try:
        return count(config, method, job.tokens, job.length, job.dtype, alike=alike)
    except UsageError as error:
        return str(error)


def _summed(model: nn.Module, ranks: int, part: Counts, whole: Counts) -> int:
    """Bytes of gradients that tensor parallelism sums over ranks.

    With R bytes that every rank has undivided and S that are sharded, a part has ``R + S / ranks`` and the model ``R + S``.
    """
    if ranks == 1:
        return 0
    if whole.frozen == 0:
        return summed_weights(model)
    return (ranks * part.trained - whole.trained) // (ranks - 1)


def _filled(row: Row, job: Job, base: Sizes, counts: Counts, summed: int) -> Row:
    whole = counts.frozen == 0
    trained = base.weights if whole else counts.trained
    # what a method adds to a model, adapters or gains, is in its blocks
    added = 0 if whole else counts.added
    sizes = replace(base, weights=base.weights + added, block=base.block + math.ceil(added / base.layers))
    n, ranks = row.sharded, row.tensor
    replicas = job.gpus // (n * ranks)
    sent = sharded_traffic(sizes, trained, n) if n > 1 else 2 * _ring(trained, replicas)
    if ranks > 1:
        sent += _tensor_traffic(job, row, base.layers) + 2 * _ring(summed, ranks)
    alive = max(counts.peak, math.ceil(trained / n))
    row = replace(
        row,
        weights=math.ceil(sizes.weights / n),
        gathered=gathered_at_once(sizes, trained, alive) if n > 1 else 0,
        saved=counts.saved,
        transient=alive - counts.saved,
        states=3 * math.ceil(trained / n),
        sent=sent,
        step_tokens=job.tokens * n * replicas,
    )
    return replace(row, headroom=job.memory - job.reserve - row.total)


def _tensor_traffic(job: Job, row: Row, layers: int) -> int:
    activation = job.tokens * job.config.hidden_size * job.dtype.itemsize
    logits = job.tokens * job.config.vocab_size * job.dtype.itemsize
    styles = Counter(job.config.base_model_tp_plan.values())  # of the layers of a block
    sums = styles["rowwise"] + styles["colwise"] - METHODS[row.method].fused + row.checkpointed
    return 2 * _ring(activation * (layers * sums + 2), row.tensor) + _ring(logits, row.tensor)


def _ring(nbytes: int, ranks: int) -> int:
    """What each of ``ranks`` sends to gather, or to reduce and scatter, these bytes; an all-reduce is both."""
    return math.ceil(nbytes * (ranks - 1) / ranks)

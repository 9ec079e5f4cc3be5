"""Bytes that a forward pass saves for its backward: of a layer, of a decoder block, of a model; exact, without a GPU.

Saved-tensor hooks count on the meta device, where nothing is allocated: storages, each once, without parameters and buffers.
``saved`` is what the pass made. ``saved inputs`` is what it holds of its own input, which costs nothing where another op
already holds it. ``optimizer`` is the gradients and AdamW's two moments of the trained parameters, in the parameters' dtypes.
``peak, counted`` of a model is its weights, the moments, and the most that forward and backward hold at once, counted op by op;
cpu_peak_rows() has the CPU allocator's own figure beside it. Only peak_rows() needs a GPU: the allocator's figure for a layer's
forward and backward.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import models, sites
from benchmarks.contestants.contestants import Contestant, contestants
from benchmarks.contestants.sites import Architecture, Site
from benchmarks.harness import results, timing
from benchmarks.harness.results import Row
from gain_ops.measure.peak_bytes import peak_bytes
from gain_ops.measure.perplexity import next_token_loss
from gain_ops.measure.saved_bytes import SavedBytes, SavedTensor, saved_bytes

TOKENS = 8192
ANY_DEVICE = "any device (counted on meta)"
FLASH = "attention as flash keeps it: q, k, v, output, one fp32 a head and token"
AGAIN = "while a block is run again: every block's input and all of that block; what the loss kept is gone by then"
CLOSURES = "rotary tables held by a checkpoint's closure are not seen by hooks"
COUNTED_PEAK, PEAK = "peak, counted", "peak"
CPU_TOKENS = 256  # of the model whose peak a CPU measures
FEW = 17  # tokens where a compiler has to run: prime, so that no other dimension is taken for them

Figures = dict[str, tuple[float, str]]


class Obstacle(RuntimeError):
    """What a contestant says that keeps it from running here."""


def rows(peaks: bool = False) -> Iterator[Row]:
    """Everything that is exact, at true size in bf16 for 8192 tokens: in about a minute, with the models' peaks in many."""
    yield from layer_rows(sites.SITES, TOKENS, torch.bfloat16)
    for architecture in sites.ARCHITECTURES.values():
        yield from block_rows(architecture, TOKENS, torch.bfloat16)
    for architecture in sites.ARCHITECTURES.values():
        yield from model_rows(architecture, TOKENS, torch.bfloat16, peaks)


def layer_rows(where: Iterable[Site], tokens: int, dtype: torch.dtype) -> Iterator[Row]:
    """Every contestant on every site. One that cannot run on meta is counted on the GPU, or on the CPU, where there is one."""
    for site in where:
        for contestant in contestants():
            row = _layer_row(site, contestant, tokens, dtype)
            try:
                layer, kept, note = _layer(contestant, site, tokens, dtype)
            except Obstacle as reason:
                yield dataclasses.replace(row, metric="saved", unit="B", note=str(reason))
            except Exception as error:  # torch.compile without a compiler, say: the others go on
                yield dataclasses.replace(row, metric="saved", unit="B", note=timing.first_line(error))
            else:
                yield from _exact(row, figures(layer, kept), note)


def _layer(contestant: Contestant, site: Site, tokens: int, dtype: torch.dtype) -> tuple[nn.Module, SavedBytes, str]:
    layer, x = _layer_and_input(contestant, site, tokens, dtype, torch.device("meta"))
    if layer is not None and not _compiled(layer):
        return layer, layer_saved(layer, x), ""
    if layer is None:  # a kernel: what it keeps does not depend on who multiplies, but only a GPU says so
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        layer, x = _layer_and_input(contestant, site, tokens, dtype, device)
        if layer is None:
            raise Obstacle(contestant.obstacle(x))
        return layer, layer_saved(layer, x), f"counted on {device.type}"
    torch._dynamo.reset()
    layer, x = _layer_and_input(contestant, site, FEW, dtype, torch.device("cpu"))
    assert layer is not None, "what is compiled has no obstacle"
    kept = _of_more_tokens(layer_saved(layer, x), FEW, tokens)
    return layer, kept, f"counted at {FEW} tokens on the CPU; [{FEW}, n] is [T, n]"


def layer_saved(layer: nn.Module, x: Tensor) -> SavedBytes:
    """What ``layer(x)`` saves, with x counted separately."""
    return saved_bytes(lambda: layer(x), exclude=layer, inputs=[x])


def _layer_and_input(
    contestant: Contestant, site: Site, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module | None, Tensor]:
    """The layer, or None where it cannot run on such an x, with weights and x that nobody has drawn."""
    x = torch.empty(tokens, site.in_features, dtype=dtype, device=device, requires_grad=True)
    if contestant.obstacle(x):
        return None, x
    linear = nn.Linear(site.in_features, site.out_features, bias=False, dtype=dtype, device="meta")
    linear.requires_grad_(False)
    return contestant.build(linear if device.type == "meta" else linear.to_empty(device=device)), x


def _compiled(layer: nn.Module) -> bool:
    """Whether torch.compile made it: on meta that fails, or falls back in silence and keeps nothing."""
    return isinstance(layer, torch._dynamo.OptimizedModule)


def _of_more_tokens(kept: SavedBytes, few: int, tokens: int) -> SavedBytes:
    """The same storages, those of one row a token with more rows."""

    def scaled(saved: SavedTensor) -> SavedTensor:
        if few not in saved.shape:
            return saved
        shape = tuple(tokens if size == few else size for size in saved.shape)
        return dataclasses.replace(saved, shape=shape, nbytes=saved.nbytes // few * tokens)

    return SavedBytes(tuple(scaled(saved) for saved in kept.tensors))


def block_rows(architecture: Architecture, tokens: int, dtype: torch.dtype) -> Iterator[Row]:
    """One decoder block under every method, its input told apart."""
    for method in models.COUNTED.values():
        row = _model_row("block", architecture.name, method.name, architecture, tokens, dtype)
        if obstacle := method.obstacle(architecture.model_type):
            yield dataclasses.replace(row, metric="saved", unit="B", note=obstacle)
            continue
        model = models.build(architecture, dtype=dtype, layers=1)
        models.adapt(model, method.name)
        yield from _exact(row, figures(models.blocks(model)[0], block_saved(model, tokens)), FLASH)


def block_saved(model: nn.Module, tokens: int) -> SavedBytes:
    """What the first block of a model saves without checkpointing, except the rotary tables, which serve all blocks."""
    any_model = cast(Any, model)
    body, config = any_model.base_model, any_model.config
    weight = next(model.parameters())
    length = min(tokens, models.CONTEXT[config.model_type])
    x = torch.empty(
        tokens // length, length, config.hidden_size, dtype=weight.dtype, device=weight.device, requires_grad=True
    )
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    if hasattr(body, "rotary_emb"):
        shared["position_embeddings"] = body.rotary_emb(x, torch.arange(length, device=weight.device)[None])
    block = models.blocks(model)[0]
    apart = [*block.parameters(), *block.buffers(), *shared.get("position_embeddings", ())]
    return saved_bytes(lambda: block(x, attention_mask=None, **shared), exclude=apart, inputs=[x])


def model_rows(architecture: Architecture, tokens: int, dtype: torch.dtype, peaks: bool = False) -> Iterator[Row]:
    """A whole model with its loss under every method, without and with activation checkpointing, every block run on meta."""
    unseen = () if architecture.model_type == "gpt2" else (CLOSURES,)
    for method in models.COUNTED.values():
        row = _model_row("model", architecture.name, method.name, architecture, tokens, dtype)
        checkpointed = dataclasses.replace(row, site=f"{architecture.name}, checkpointed")
        if obstacle := method.obstacle(architecture.model_type):
            yield from (dataclasses.replace(r, metric="saved", unit="B", note=obstacle) for r in (row, checkpointed))
            continue
        model = models.build(architecture, dtype=dtype)
        models.adapt(model, method.name)
        ids = models.tokens_of(architecture, tokens, architecture.vocabulary, "meta")
        yield from _exact(row, _model_figures(model, ids, architecture.vocabulary, peaks), FLASH)
        inputs = architecture.layers * tokens * architecture.hidden * dtype.itemsize
        again = inputs + block_saved(model, tokens).new
        models.checkpoint(model)
        found = _model_figures(model, ids, architecture.vocabulary, peaks)
        found["saved, one block run again"] = (again, "B")
        yield from _exact(checkpointed, found, "; ".join((FLASH, AGAIN, *unseen)))


def model_saved(model: nn.Module, ids: Tensor) -> SavedBytes:
    """What the next-token loss of a model saves."""
    return saved_bytes(lambda: next_token_loss(model, ids), exclude=model, inputs=[ids])


def _model_figures(model: nn.Module, ids: Tensor, vocabulary: int, peaks: bool) -> Figures:
    kept = model_saved(model, ids)
    loss = sum(saved.nbytes for saved in kept.tensors if vocabulary in saved.shape)
    found = {**figures(model, kept), "saved by the loss": (loss, "B")}
    if peaks:
        found[COUNTED_PEAK] = (held(model) + counted_pass(model, ids), "B")
    return found


def held(model: nn.Module) -> int:
    """Bytes that are there before a step begins and after it: the weights and AdamW's two moments."""
    moments = 2 * sum(parameter.nbytes for parameter in models.trained(model))
    return sum(parameter.nbytes for parameter in model.parameters()) + moments


def counted_pass(model: nn.Module, ids: Tensor, *, eager: bool = False) -> int:
    """The most that forward and backward hold at once, gradients too; with our ops as kernels, or as a CPU runs them."""
    apart = [*model.parameters(), *model.buffers(), ids]
    return peak_bytes(lambda: next_token_loss(model, ids).backward(), exclude=apart, eager=eager)


def cpu_peak_rows(architecture: Architecture, tokens: int, dtype: torch.dtype) -> Iterator[Row]:
    """The peak of a whole model's step on a CPU under every method, as its allocator saw it and as it is counted."""
    about = results.environment(torch.device("cpu"))
    for method, checkpointed in itertools.product(models.COUNTED.values(), (False, True)):
        site = f"{architecture.name}, checkpointed" if checkpointed else architecture.name
        row = _model_row("model", site, method.name, architecture, tokens, dtype)
        row = dataclasses.replace(row, **about)
        if obstacle := method.obstacle(architecture.model_type):
            yield dataclasses.replace(row, metric=PEAK, unit="B", note=obstacle)
            continue
        measured = allocated_pass(*_ready(method.name, checkpointed, architecture, tokens, dtype, "cpu"))
        model, ids = _ready(method.name, checkpointed, architecture, tokens, dtype, "meta")
        found = {PEAK: held(model) + measured, COUNTED_PEAK: held(model) + counted_pass(model, ids, eager=True)}
        yield from _exact(row, {metric: (nbytes, "B") for metric, nbytes in found.items()}, "")


def _ready(
    name: str, checkpointed: bool, architecture: Architecture, tokens: int, dtype: torch.dtype, device: str
) -> tuple[nn.Module, Tensor]:
    """An adapted model and its ids."""
    model = models.build(architecture, device, dtype)
    models.adapt(model, name)
    if checkpointed:
        models.checkpoint(model)
    return model, models.tokens_of(architecture, tokens, architecture.vocabulary, device)


def allocated_pass(model: nn.Module, ids: Tensor) -> int:
    """The same by what the CPU's allocator reports, what an op takes and gives back within itself included."""
    return allocator_peak(lambda: next_token_loss(model, ids).backward())


def allocator_peak(step: Callable[[], object]) -> int:
    """The most bytes beyond those at the start that the CPU's allocator had given out during ``step()``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes: list[tuple[float, int]] = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    return max(itertools.accumulate((nbytes for _, nbytes in changes), initial=0))


def peak_rows(where: Iterable[Site], tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """``peak``: allocated at most during forward and backward, beyond W, x, dy and the parameters; so y and dx are in it.

    Raises:
        ValueError: a device without an allocator that counts.

    """
    if device.type != "cuda":
        raise ValueError(f"the peak is read from CUDA's allocator, and the device is {device}")
    about = results.environment(device)
    for site in where:
        for contestant in contestants():
            row = dataclasses.replace(_layer_row(site, contestant, tokens, dtype), **about, metric="peak", unit="B")
            try:
                peak = _peak(contestant, site, tokens, dtype, device)
            except Obstacle as reason:
                yield dataclasses.replace(row, note=str(reason))
            except Exception as error:  # out of memory, or a contestant that cannot compile here: the others go on
                yield dataclasses.replace(row, note=timing.first_line(error))
            else:
                yield dataclasses.replace(row, median=peak, q20=peak, q80=peak, samples=1)
            torch.cuda.empty_cache()


def _peak(contestant: Contestant, site: Site, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    layer, x = _layer_and_input(contestant, site, tokens, dtype, device)
    if layer is None:
        raise Obstacle(contestant.obstacle(x))
    if _compiled(layer):
        torch._dynamo.reset()  # or the shapes of the sites before make it compile for any
    with torch.no_grad():
        x.zero_()
    dy = torch.zeros(tokens, site.out_features, dtype=dtype, device=device)
    before = peak = 0
    for _ in range(3):  # the first two compile and allocate the libraries' workspaces
        layer.zero_grad()
        x.grad = None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        layer(x).backward(dy)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    return float(peak - before)


def figures(module: nn.Module, kept: SavedBytes) -> Figures:
    """What the module saves, trains and holds, by metric, with the unit."""
    trained = models.trained(module)
    return {
        "saved": (kept.new, "B"),
        "saved inputs": (kept.inputs, "B"),
        "trained": (sum(parameter.numel() for parameter in trained), "parameters"),
        "weights": (sum(parameter.nbytes for parameter in module.parameters()), "B"),
        "optimizer": (3 * sum(parameter.nbytes for parameter in trained), "B"),
    }


def _exact(row: Row, figures: Figures, note: str) -> Iterator[Row]:
    for metric, (value, unit) in figures.items():
        said = note if metric.startswith("saved") else ""
        yield dataclasses.replace(
            row, metric=metric, unit=unit, median=value, q20=value, q80=value, samples=1, note=said
        )


def _layer_row(site: Site, contestant: Contestant, tokens: int, dtype: torch.dtype) -> Row:
    """A row of a layer without its figure."""
    sizes = (tokens, site.in_features, site.out_features)
    return _empty("layer", site.name, contestant.name, contestant.backend, sizes, dtype)


def _model_row(group: str, site: str, method: str, architecture: Architecture, tokens: int, dtype: torch.dtype) -> Row:
    """A row of a block or model without its figure; in_features is the hidden size, out_features the FFN's."""
    return _empty(group, site, method, "-", (tokens, architecture.hidden, architecture.intermediate), dtype)


def _empty(
    group: str, site: str, contestant: str, backend: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> Row:
    kind = str(dtype).removeprefix("torch.")
    return Row(group, site, contestant, backend, "", "", kind, *sizes, **timing.NO_FIGURE, **_about())


@functools.cache
def _about() -> results.Environment:
    """Asked once: it runs git, and a meta tensor is counted in less time."""
    return results.environment(torch.device("cpu")) | {"device": ANY_DEVICE}


def main() -> None:
    """Write everything that is exact, and the peaks that this CPU measures, to a results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.memory", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the results file; rows are added to it")
    out = parser.parse_args().out
    for row in itertools.chain(rows(peaks=True), cpu_peak_rows(sites.SMALL, CPU_TOKENS, torch.float32)):
        results.append(out, [row])


if __name__ == "__main__":
    main()

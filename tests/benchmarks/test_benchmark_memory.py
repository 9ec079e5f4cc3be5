"""Meta counts what a CPU keeps, to the byte; ours keep what the README promises, the others what their formulas say."""

import dataclasses
import importlib.util
import itertools

import pytest
import torch

from benchmarks.contestants import models
from benchmarks.contestants.contestants import FROZEN, Contestant, contestants
from benchmarks.contestants.scaled import Scaled
from benchmarks.contestants.sites import ARCHITECTURES, Architecture, Site
from benchmarks.harness.results import Row
from benchmarks.suites import memory
from gain_ops.measure.saved_bytes import SavedBytes, SavedTensor
from gain_ops.measure.step_bytes import LORA_RANK as RANK

T, IN, OUT = 24, 80, 48
SITE = Site("a site", IN, OUT)
TINY = {
    "llama": Architecture("Tiny", "llama", 64, 160, 2, 4, 2, 96),
    "qwen2": Architecture("Tiny", "qwen2", 64, 160, 2, 4, 1, 96),
    "gpt2": Architecture("Tiny", "gpt2", 64, 256, 2, 4, 4, 96),
}
SAME = "on o_proj and down_proj"
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


def _layer(contestant: Contestant, device: str, dtype: torch.dtype) -> SavedBytes:
    layer, x = memory._layer_and_input(contestant, SITE, T, dtype, torch.device(device))
    assert layer is not None
    return memory.layer_saved(layer, x)


def _model(name: str, kind: str, device: str, dtype: torch.dtype, checkpointed: bool = False) -> SavedBytes:
    model = models.build(TINY[kind], device, dtype)
    models.adapt(model, name)
    if checkpointed:
        models.checkpoint(model)
    return memory.model_saved(model, models.tokens_of(TINY[kind], T, 96, device))


def _as_sizes(kept: SavedBytes) -> list[tuple[tuple[int, ...], int, bool]]:
    return sorted((saved.shape, saved.nbytes, saved.is_input) for saved in kept.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_on_meta_keeps_what_it_keeps_on_a_cpu(dtype: torch.dtype) -> None:
    x = torch.empty(T, IN, device="meta")
    able = [c for c in contestants() if not c.obstacle(x) and not c.name.startswith("torch.compile")]
    assert len(able) >= 6
    for contestant in able:
        assert _as_sizes(_layer(contestant, "meta", dtype)) == _as_sizes(_layer(contestant, "cpu", dtype)), contestant


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", TINY)
@needs_peft
def test_a_model_on_meta_keeps_what_it_keeps_on_a_cpu(kind: str, checkpointed: bool) -> None:
    counted = [method.name for method in models.COUNTED.values() if not method.obstacle(kind)]
    for name, dtype in itertools.product(counted, (torch.float32, torch.bfloat16)):
        meta, cpu = (_model(name, kind, device, dtype, checkpointed) for device in ("meta", "cpu"))
        # a CPU keeps LayerNorm's mean and deviation in bf16; meta, as CUDA, in fp32
        norms = (1 if checkpointed else 2 * TINY[kind].layers + 1) if kind == "gpt2" else 0
        wider = norms * 2 * T * 2 if dtype == torch.bfloat16 else 0
        assert (meta.new, meta.inputs) == (cpu.new + wider, cpu.inputs), (name, dtype)


@pytest.mark.slow
@needs_peft
def test_layers_keep_what_is_promised_or_follows_from_their_formulas() -> None:
    rows = list(memory.layer_rows([SITE], T, torch.bfloat16))
    found = {(r.contestant, r.metric): r.median for r in rows if r.backend in ("-", "eager") and r.median is not None}
    kept = {name: (found[name, "saved"], found[name, "saved inputs"]) for name, metric in found if metric == "saved"}
    x, z, w = T * IN * 2, T * OUT * 2, IN * OUT * 2
    assert (
        kept.items()
        >= {
            FROZEN: (0, 0),
            "gain, output side, keeps z": (z, 0),
            "gain, output side, keeps x": (0, x),
            "gain, input side": (0, x),
            "F.linear(x, W) * s": (z, 0),
            "torch.compile of F.linear(x, W) * s": (z, 0),
            "F.linear(x, s[:, None] * W)": (w, x),
            "PEFT (IA)^3, output side": (z + OUT * 4, 0),  # and its vector once more
            "PEFT (IA)^3, input side": (2 * x + IN * 4, 0),  # x once more, in fp32
            f"PEFT LoRA r={RANK}": (2 * x + T * RANK * 4, 0),
        }.items()
    )
    dora, lora = kept[f"PEFT DoRA r={RANK}"][0], kept[f"PEFT LoRA r={RANK}"][0]
    assert dora > lora + z + 2 * z, "DoRA keeps the base output and its own, that in fp32, beside what LoRA keeps"
    assert found["gain, output side, keeps z", "trained"] == OUT
    assert found["gain, output side, keeps z", "weights"] == w + OUT * 4
    assert found["gain, output side, keeps z", "optimizer"] == 3 * OUT * 4
    assert found["gain, input side", "trained"] == IN


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can run")
def test_a_kernel_that_needs_a_gpu_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "contestants", lambda: [c for c in contestants() if c.backend == "cuda"])
    rows = list(memory.layer_rows([SITE], T, torch.bfloat16))
    assert {(row.median, row.samples, row.metric) for row in rows} == {(None, 0, "saved")}
    assert all(row.note.startswith("backend='cuda' cannot run here: the kernels need a GPU") for row in rows)


def test_what_is_counted_at_few_tokens_is_scaled_by_its_rows() -> None:
    def tensor(*shape: int) -> SavedTensor:
        return SavedTensor(shape, torch.float32, 4 * torch.Size(shape).numel(), False)

    kept = memory._of_more_tokens(SavedBytes((tensor(17, 5), tensor(40, 5))), 17, 170)
    assert kept.tensors == (tensor(170, 5), tensor(40, 5))


def test_what_is_compiled_is_never_counted_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Contestant("compiled", "-", lambda linear: torch.compile(Scaled(linear), backend="eager"))
    monkeypatch.setattr(memory, "contestants", lambda: [compiled])
    (saved, *_) = memory.layer_rows([SITE], T, torch.float32)
    assert saved.median == T * OUT * 4
    assert "17 tokens on the CPU" in saved.note


@needs_peft
def test_a_block_keeps_over_the_frozen_one_what_its_method_says() -> None:
    a = TINY["llama"]
    rows = list(memory.block_rows(a, T, torch.bfloat16))
    found = {(row.contestant, row.metric): row.median for row in rows}
    over = {n: found[n, "saved"] - found["frozen", "saved"] for n in models.COUNTED}
    o = down = T * a.hidden * 2
    x = T * a.intermediate * 2
    assert (
        over.items()
        >= {
            "gain": o,
            "gain, lean": 0,  # scaled_dot_product_attention keeps x anyway
            "gain-ffn": o + down,
            "gain-ffn, lean": down,
            "gain-ffn, input side": x,
            "gain-ffn, input side, fused MLP": -x,  # of gate, act(gate) and up the second is made again
            "gain-ffn, input side, fused MLP, lean": o - 3 * x,  # all three are, from the FFN's input
            models.FROZEN_LIGER: -x,
            f"PEFT (IA)^3 {SAME}": o + down + 2 * a.hidden * 4,
            f"PEFT LoRA r=16 {SAME}": 2 * (o + x) + 2 * T * RANK * 4,  # both inputs once more, in fp32
            f"PEFT LoRA r=16 {SAME}, adapters in the model's dtype": x + 2 * T * RANK * 2,
            f"PEFT LoRA r=16 {SAME}, with Liger's SwiGLU": 2 * (o + x) + 2 * T * RANK * 4 - x,
            f"PEFT LoRA r=16 {SAME}, adapters in the model's dtype, with Liger's SwiGLU": 2 * T * RANK * 2,
            "PEFT LoRA r=16 on q and v": 2 * 2 * o + 2 * T * RANK * 4,
        }.items()
    )
    assert over[f"PEFT DoRA r=16 {SAME}"] > over[f"PEFT LoRA r=16 {SAME}"]
    assert found["full fine-tuning", "optimizer"] == 3 * found["full fine-tuning", "weights"]


@pytest.mark.parametrize("kind", TINY)
def test_layers_add_up_to_the_model(kind: str) -> None:
    """In fp32 a block keeps its input as it is, which in the model is what the block before made."""
    kept = []
    for layers in (1, 2, 5):
        model = models.build(TINY[kind], dtype=torch.float32, layers=layers)
        models.adapt(model, "gain-ffn")
        kept.append(memory.model_saved(model, models.tokens_of(TINY[kind], T, 96, "meta")).new)
    block = memory.block_saved(model, T).total
    assert (kept[1] - kept[0], kept[2] - kept[1]) == (block, 3 * block)


@needs_peft
def test_checkpointing_keeps_a_block_input_each_and_runs_one_block_again() -> None:
    a = TINY["llama"]
    rows = {
        (row.site, row.contestant, row.metric): row.median
        for row in memory.model_rows(a, T, torch.bfloat16)
        if row.contestant in ("frozen", "gain-ffn")
    }
    for name in ("frozen", "gain-ffn"):
        model = models.build(a)
        models.adapt(model, name)
        kept = rows["Tiny, checkpointed", name, "saved"]
        final = T * 64 * 4 + T * 4  # what the last norm keeps
        targets = T * 8 + 4  # and the loss: its log-probabilities, the targets, their weight
        assert kept == a.layers * T * 64 * 2 + final + T * 96 * 4 + targets
        assert rows["Tiny, checkpointed", name, "saved by the loss"] == T * 96 * 4
        again = rows["Tiny, checkpointed", name, "saved, one block run again"]
        assert again == a.layers * T * 64 * 2 + memory.block_saved(model, T).new


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama-3-8B", "Llama-3-70B"])
def test_the_gains_of_a_true_model_are_exact(name: str) -> None:
    a, kept = ARCHITECTURES[name], {}
    fused = "gain-ffn, input side, fused MLP"
    for method in ("frozen", "gain, lean", "gain-ffn", fused, f"{fused}, lean", models.FROZEN_LIGER):
        model = models.build(a)
        models.adapt(model, method)
        kept[method] = memory.model_saved(model, models.tokens_of(a, 8192, a.vocabulary, "meta")).new
    assert kept["gain, lean"] == kept["frozen"]
    assert kept["gain-ffn"] - kept["frozen"] == a.layers * 2 * 8192 * a.hidden * 2
    hidden = a.layers * 8192 * a.intermediate * 2
    assert kept["frozen"] - kept[fused] == hidden
    assert kept[models.FROZEN_LIGER] == kept[fused], "Liger's SwiGLU keeps gate and up too, without a gain"
    assert kept["frozen"] - kept[f"{fused}, lean"] == 3 * hidden - a.layers * 8192 * a.hidden * 2


@pytest.mark.slow
@needs_peft
def test_rows_are_exact_and_complete() -> None:
    rows = [
        *memory.block_rows(TINY["gpt2"], T, torch.bfloat16),
        *memory.model_rows(TINY["gpt2"], T, torch.bfloat16, True),
    ]
    unfit = [row for row in rows if row.median is None]
    assert {row.note for row in unfit} == {"does not apply: gpt2 has no gated FFN"}
    assert {row.contestant for row in unfit} == models.COUNTED.keys() - models.METHODS
    rows = [row for row in rows if row not in unfit]
    for row in rows:
        assert row.median == row.q20 == row.q80
        assert row.samples == 1
        assert (row.dtype, row.tokens, row.in_features, row.out_features) == ("bfloat16", T, 64, 256)
        assert row.device == memory.ANY_DEVICE
        assert row.torch == torch.__version__
    metrics = {"saved", "saved inputs", "trained", "weights", "optimizer"}
    whole = metrics | {"saved by the loss", "peak, counted"}
    assert _metrics(rows, "block", "Tiny") == metrics
    assert _metrics(rows, "model", "Tiny") == whole
    assert _metrics(rows, "model", "Tiny, checkpointed") == whole | {"saved, one block run again"}
    assert {row.contestant for row in rows} == set(models.METHODS)


def _metrics(rows: list[Row], group: str, site: str) -> set[str]:
    return {row.metric for row in rows if (row.group, row.site) == (group, site)}


def test_a_missing_peft_is_named_and_nothing_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.setattr(memory, "contestants", lambda: [c for c in contestants() if c.name.startswith("PEFT")])
    a = TINY["llama"]
    rows = [
        *memory.layer_rows([SITE], T, torch.bfloat16),
        *memory.block_rows(a, T, torch.bfloat16),
        *memory.model_rows(a, T, torch.bfloat16),
    ]
    without = [row for row in rows if row.contestant.startswith("PEFT")]
    assert len(without) == 4 + 3 * sum(name.startswith("PEFT") for name in models.COUNTED)
    assert all(row.median is None and row.samples == 0 and "peft" in row.note for row in without)
    assert all(row.median is not None for row in rows if row not in without)


@needs_peft
def test_a_cpus_peak_is_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("frozen", "gain-ffn", "gain-ffn, input side, fused MLP", f"PEFT LoRA r=16 {SAME}", models.FROZEN_LIGER)
    monkeypatch.setattr(models, "COUNTED", {name: models.COUNTED[name] for name in names})
    a = TINY["llama"]
    found = {(r.site, r.contestant, r.metric): r.median for r in memory.cpu_peak_rows(a, T, torch.float32)}
    assert len(found) == 2 * 2 * len(models.COUNTED)
    for (site, name, metric), real in found.items():
        if metric != "peak":
            continue
        counted = found[site, name, "peak, counted"]
        states = (a.layers + 1) * torch.get_rng_state().nbytes if "checkpointed" in site else 0
        assert counted <= real
        if "Liger" not in name:  # which is taken for a kernel, and is none here
            assert real <= counted + states + 256, (site, name)


def test_a_counted_peak_has_the_weights_and_the_moments_in_it() -> None:
    model = models.build(TINY["llama"])
    models.adapt(model, "full fine-tuning")
    ids = models.tokens_of(TINY["llama"], T, 96, "meta")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert memory.held(model) == 3 * weights
    rows = memory._model_figures(model, ids, 96, True)
    assert rows["peak, counted"] == (3 * weights + memory.counted_pass(model, ids), "B")


def test_the_peak_of_an_allocator_is_what_was_alive_at_once() -> None:
    def step() -> None:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second, third = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 19, dtype=torch.uint8)
        del second, third
        torch.empty(1 << 18, dtype=torch.uint8)

    assert memory.allocator_peak(step) == 3 << 19


def test_the_peak_is_refused_where_no_allocator_counts() -> None:
    with pytest.raises(ValueError, match="CUDA's allocator, and the device is cpu"):
        list(memory.peak_rows([SITE], T, torch.bfloat16, torch.device("cpu")))


@pytest.mark.gpu
def test_the_peak_of_a_layer_holds_at_least_what_it_returns() -> None:
    site = Site("a site", 1024, 512)
    rows = list(memory.peak_rows([site], 2048, torch.bfloat16, torch.device("cuda")))
    found = {(row.contestant, row.backend): row.median for row in rows if row.median is not None}
    y_and_dx = 2048 * (512 + 1024) * 2
    assert found[FROZEN, "-"] >= y_and_dx
    assert found["gain, output side, keeps z", "eager"] >= y_and_dx + 2048 * 512 * 2
    assert all(dataclasses.astuple(row)[:1] == ("layer",) and row.metric == "peak" for row in rows)

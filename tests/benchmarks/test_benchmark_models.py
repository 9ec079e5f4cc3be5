"""Models of true size on meta, the methods that adapt them, and that our attention is transformers' own."""

import dataclasses
import importlib.util

import pytest
import torch

from benchmarks.contestants import models
from benchmarks.contestants.liger_swiglu import SwiGlu
from benchmarks.contestants.sites import ARCHITECTURES, Architecture
from gain_ops.measure.perplexity import logits, next_token_loss
from gain_ops.measure.step_bytes import LORA_RANK as RANK

TINY = {
    "llama": Architecture("Tiny", "llama", 64, 160, 2, 4, 2, 96),
    "qwen2": Architecture("Tiny", "qwen2", 64, 160, 2, 4, 1, 96),
    "gpt2": Architecture("Tiny", "gpt2", 64, 256, 2, 4, 4, 96),
}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("GPT-2 Large", 774_030_080),
        ("Llama-3-8B", 8_030_261_248),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3-70B", 70_553_706_496),
    ],
)
def test_a_model_of_true_size_takes_no_memory_and_has_its_published_parameters(name: str, published: int) -> None:
    a = ARCHITECTURES[name]
    model = models.build(a)
    assert sum(parameter.numel() for parameter in model.parameters()) == published == _closed_form(a)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert len(models.blocks(model)) == a.layers


def _closed_form(a: Architecture) -> int:
    h, i, kv = a.hidden, a.intermediate, a.hidden // a.heads * a.kv_heads
    if a.model_type == "gpt2":
        block = 4 * h * h + 2 * h * i + (3 * h + h + i + h) + 4 * h
        return (a.vocabulary + 1024) * h + a.layers * block + 2 * h
    biases = h + 2 * kv if a.model_type == "qwen2" else 0
    return 2 * a.vocabulary * h + a.layers * (2 * h * h + 2 * h * kv + biases + 3 * h * i + 2 * h) + h


@pytest.mark.parametrize("kind", TINY)
@needs_peft
def test_every_method_trains_what_it_says_and_nothing_else(kind: str) -> None:
    a = TINY[kind]
    h, i, n, kv = a.hidden, a.intermediate, a.layers, a.hidden // a.heads * a.kv_heads
    lora, extra = n * RANK * (2 * h + i + h), ", adapters in the model's dtype"
    qv = n * RANK * (4 * h if kind == "gpt2" else 2 * h + h + kv)
    same = "on o_proj and down_proj"
    expected = {
        "frozen": 0,
        "gain": n * h,
        "gain, lean": n * h,
        "gain-ffn": 2 * n * h,
        "gain-ffn, lean": 2 * n * h,
        "gain-ffn, input side": n * (h + i),
        "gain-ffn, input side, fused MLP": n * (h + i),
        "gain-ffn, input side, fused MLP, lean": n * (h + i),
        f"PEFT (IA)^3 {same}": 2 * n * h,
        f"PEFT LoRA r=16 {same}": lora,
        f"PEFT LoRA r=16 {same}{extra}": lora,
        "PEFT LoRA r=16 on q and v": qv,
        f"PEFT DoRA r=16 {same}": lora + 2 * n * h,
        f"PEFT DoRA r=16 {same}{extra}": lora + 2 * n * h,
        "full fine-tuning": _closed_form(a),
    }
    found = {}
    for name in models.METHODS:
        model = models.build(a)
        models.adapt(model, name)
        found[name] = sum(parameter.numel() for parameter in models.trained(model))
        wide = torch.bfloat16 if extra in name or name == "full fine-tuning" else torch.float32
        assert {parameter.dtype for parameter in models.trained(model)} <= {wide}
    assert found == expected


@pytest.mark.parametrize("kind", TINY)
def test_the_attention_is_transformers_own(kind: str) -> None:
    model = models.build(TINY[kind], "cpu", torch.float32)
    ids = models.tokens_of(TINY[kind], 40, 96, "cpu")
    ours = logits(model, ids)
    model.config._attn_implementation = "sdpa"
    assert torch.equal(ours, logits(model, ids))
    assert ours.std() > 0


@pytest.mark.parametrize("kind", TINY)
def test_on_meta_the_attention_has_the_real_shapes_and_strides(kind: str) -> None:
    outputs = []
    for device in ("cpu", "meta"):
        model = models.build(TINY[kind], device, torch.float32)
        block = models.blocks(model)[0]
        attention = block.attn.c_proj if kind == "gpt2" else block.self_attn.o_proj
        attention.register_forward_pre_hook(lambda module, x: outputs.append((x[0].shape, x[0].stride())))
        logits(model, models.tokens_of(TINY[kind], 40, 96, device))
    assert outputs[0] == outputs[1]


def test_checkpointing_changes_neither_loss_nor_gradients() -> None:
    model = models.build(TINY["llama"], "cpu", torch.float32)
    models.adapt(model, "gain-ffn")
    ids = models.tokens_of(TINY["llama"], 24, 96, "cpu")
    results = []
    for _ in range(2):
        loss = next_token_loss(model, ids)
        results.append([loss.detach(), *torch.autograd.grad(loss, models.trained(model))])
        models.checkpoint(model)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_frozen_model_has_a_backward_through_all_of_its_blocks() -> None:
    model = models.build(TINY["llama"], "cpu", torch.float32)
    models.adapt(model, "frozen")
    assert models.trained(model) == []
    reached = []
    models.blocks(model)[0].register_full_backward_hook(lambda *given: reached.append(given))
    next_token_loss(model, models.tokens_of(TINY["llama"], 24, 96, "cpu")).backward()
    assert reached


def test_tokens_are_whole_windows_of_what_the_model_takes() -> None:
    assert models.tokens_of(TINY["gpt2"], 4096, 96, "meta").shape == (4, 1024)
    assert models.tokens_of(TINY["llama"], 4096, 96, "meta").shape == (1, 4096)
    with pytest.raises(ValueError, match="1500 tokens are no whole number of windows of 1024"):
        models.tokens_of(TINY["gpt2"], 1500, 96, "meta")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(TINY["llama"])
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"LoRA r=16 on q and v cannot be put .* transformers and peft not installed"):
        models.adapt(model, "PEFT LoRA r=16 on q and v")


def test_what_is_not_for_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Liger's SwiGLU cannot be put .* gpt2 has no gated FFN"):
        models.adapt(models.build(TINY["gpt2"]), models.FROZEN_LIGER)


def test_the_stand_in_for_liger_is_a_swiglu_and_writes_over_what_it_kept() -> None:
    gate, up, dh = torch.randn(3, 2, 5, 7, dtype=torch.float64)
    gate.requires_grad_(), up.requires_grad_()
    expected = torch.nn.functional.silu(gate) * up
    gradients = torch.autograd.grad(expected, (gate, up), dh)
    inner = [gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()]
    parts = [part * 1 for part in inner]  # as two projections make them
    h = SwiGlu.apply(*parts)
    torch.testing.assert_close(h, expected)
    kept = [part.data_ptr() for part in parts]
    h.backward(dh)
    for part, place, mine, gradient in zip(parts, kept, inner, gradients, strict=True):
        torch.testing.assert_close(mine.grad, gradient)
        assert part.data_ptr() == place
        torch.testing.assert_close(part.detach(), gradient)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="Tiny is of model_type 'bert'; known are llama, qwen2, gpt2"):
        models.build(dataclasses.replace(TINY["llama"], model_type="bert"))

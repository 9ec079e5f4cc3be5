"""Bytes kept for backward by a step: what the gains keep, and LoRA beside them."""

import importlib.util
from pathlib import Path

import pytest
import torch

import gain_ops
from gain_ops.measure.step_bytes import backward_bytes, lora_backward_bytes
from gain_ops.training.loading import load_model

IDS = torch.zeros(2, 16, dtype=torch.int64)
TOKENS, WIDTH, FFN, FLOAT = 32, 64, 128, 4


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return load_model(tiny_model, dtype=torch.float32, device=torch.device("cpu")).model


def _with(model: torch.nn.Module, targets: str) -> int:
    gain_ops.apply(model, targets)
    try:
        return backward_bytes(model, IDS)
    finally:
        gain_ops.remove(model)


def test_a_gain_on_the_last_down_projection_adds_one_tensor_of_its_output(model):
    last = _with(model, [r"layers\.1\.mlp\.down_proj"])
    both = _with(model, [r"layers\.1\.self_attn\.o_proj", r"layers\.1\.mlp\.down_proj"])
    assert last > 0
    assert both - last >= TOKENS * WIDTH * FLOAT


def test_the_model_comes_back_in_its_mode(model):
    _with(model, "gain")
    assert not model.training


def test_lora_keeps_more_than_gains_on_the_same_layers(model):
    applied = gain_ops.apply(model, "gain-ffn")
    gain = backward_bytes(model, IDS)
    gain_ops.absorb(model)
    lora = lora_backward_bytes(model, applied.names, IDS)
    assert lora is not None
    # Two down projections: LoRA keeps their input and r numbers a token, a gain their output.
    assert lora - gain >= 2 * TOKENS * (FFN - WIDTH) * FLOAT


def test_without_peft_there_is_no_figure(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lora_backward_bytes(model, ["o_proj"], IDS) is None

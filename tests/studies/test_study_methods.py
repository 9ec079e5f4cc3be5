"""Each method trains what it says, and leaves a plain model: with what was learned, or without."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gain_ops.measure.perplexity import logits
from gain_study.engine.methods import METHODS, check_packages


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=31, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


@pytest.fixture(params=[_llama, _gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = request.param
    return make().double().eval().requires_grad_(False)


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def _nudge(model: nn.Module) -> None:
    """Give all that is trained other values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


IDS = torch.arange(12)[None] % 7


@pytest.mark.parametrize("method", METHODS)
def test_absorbing_leaves_a_plain_model_that_computes_what_the_adapted_one_did(model, method):
    names, before = list(_parameters(model)), logits(model, IDS)
    for _ in range(2):  # the next domain starts from there
        adapter = METHODS[method].put_on(model)
        _nudge(model)
        with torch.no_grad():
            adapted = logits(model, IDS)
            adapter.absorb()
            absorbed = logits(model, IDS)
        torch.testing.assert_close(absorbed, adapted, rtol=1e-5, atol=1e-6)  # PEFT's and our adapters are float32
        assert (absorbed - before).abs().max() > 1e-3
        assert list(_parameters(model)) == names
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.weights])
def test_removing_leaves_the_model_as_it_was(model, method):
    before = _parameters(model)
    adapter = METHODS[method].put_on(model)
    _nudge(model)
    adapter.remove()
    adapter.remove()  # as after absorbing, nothing is left to do
    after = _parameters(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def _trained(model: nn.Module, method: str) -> dict[str, int]:
    """What is trained: numbers by the kind of layer it lies on."""
    METHODS[method].put_on(model)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kind,) = (part for part in name.split(".") if part.endswith("_proj"))
            found[kind] = found.get(kind, 0) + parameter.numel()
    return found


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("gain", {"o_proj": 2 * 32}),
        ("gain-ffn", {"o_proj": 2 * 32, "down_proj": 2 * 32}),
        ("gain-ffn-input", {"o_proj": 2 * 32, "down_proj": 2 * 48}),
        ("ia3", {"k_proj": 2 * 16, "v_proj": 2 * 16, "down_proj": 2 * 48}),
        ("lora", {"q_proj": 2 * 16 * (32 + 32), "v_proj": 2 * 16 * (32 + 16)}),
        ("lora-same", {"o_proj": 2 * 16 * (32 + 32), "down_proj": 2 * 16 * (48 + 32)}),
        ("dora", {"q_proj": 2 * (16 * (32 + 32) + 32), "v_proj": 2 * (16 * (32 + 16) + 16)}),
        ("lora-replay", {"q_proj": 2 * 16 * (32 + 32), "v_proj": 2 * 16 * (32 + 16)}),
    ],
)
def test_each_adapter_is_on_its_layers(method, trained):
    assert _trained(_llama().requires_grad_(False), method) == trained


@pytest.mark.parametrize("method", ["ewc", "full"])
def test_full_fine_tuning_trains_every_weight(model, method):
    METHODS[method].put_on(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_each_method_has_a_grid_or_takes_anothers():
    for method in METHODS.values():
        assert bool(method.rates) == (method.rates_of is None)
        assert method.rates_of is None or METHODS[method.rates_of].rates
        assert list(method.rates) == sorted(set(method.rates))


def test_without_peft_only_its_methods_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_packages(("gain", "gain-ffn", "ewc", "full"))
    with pytest.raises(ImportError, match=r"ia3, dora: PEFT is needed: pip install"):
        check_packages(("gain", "ia3", "dora"))

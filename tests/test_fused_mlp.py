"""FFNs of transformers run as gain_mlp: the same map, fewer bytes, and undone."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from gain_ops.fused_mlp import FusedMlp, fuse, layout_of, unfuse
from gain_ops.modules import gain_layer
from gain_ops.saved_bytes import saved_bytes

from rules import assert_no_worse_than_torch

HIDDEN, FFN, TOKENS = 16, 24, 10


def mlp(family: str) -> nn.Module:
    import transformers

    small = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    if family == "GPT2":
        from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

        return GPT2MLP(FFN, transformers.GPT2Config(n_embd=HIDDEN))
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    module = __import__(f"transformers.models.{family.lower()}.modeling_{family.lower()}", fromlist=["*"])
    extra = {"pad_token_id": 0} if family == "Phi3" else {}
    return getattr(module, f"{family}MLP")(config(**small, **extra))


FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "Phi3", "GPT2", "Nemotron", "Phi"]


def gained(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = mlp(family).eval()
    layout = layout_of(module)
    assert layout is not None
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    down = gain_layer(module.get_submodule(layout.down), side="input")
    setattr(module, layout.down, down)
    nn.init.normal_(down.delta, std=0.3)
    module.requires_grad_(False)
    down.delta.requires_grad_()
    return module


def delta_of(module: nn.Module) -> nn.Parameter:
    return next(p for n, p in module.named_parameters() if n.endswith("delta"))


def outcome(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = module(x)
    return (y, *torch.autograd.grad(y, (x, delta_of(module)), dy.to(y.dtype)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("recompute", "chunk"), [(False, None), (True, None), (True, 4)])
def test_the_same_map_and_gradients(family: str, recompute: bool, chunk: int | None) -> None:
    module = gained(family)
    x, dy = torch.randn(2, TOKENS, HIDDEN, requires_grad=True), torch.randn(2, TOKENS, HIDDEN)
    plain = outcome(module, x, dy)
    exact = outcome(copy.deepcopy(module).double(), x.detach().double().requires_grad_(), dy)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kind = type(module)
    fuse(module, recompute=recompute, chunk=chunk)
    assert isinstance(module, FusedMlp)
    assert isinstance(module, kind)
    for name, result, torchs, truth in zip(("y", "dx", "ddelta"), outcome(module, x, dy), plain, exact, strict=True):
        assert_no_worse_than_torch(name, result, torchs, truth)
    assert list(module.state_dict()) == list(before)
    unfuse(module)
    assert type(module) is kind
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(outcome(module, x, dy), plain, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept(family: str) -> None:
    module = gained(family)
    layout = layout_of(module)
    assert layout is not None
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    eager = saved_bytes(lambda: module(x), exclude=module)
    fuse(module, recompute=False, chunk=None)
    kept = saved_bytes(lambda: module(x), exclude=module)
    assert kept.total == TOKENS * FFN * 4 * (2 if layout.gated else 1) < eager.total
    unfuse(module)
    fuse(module, recompute=True, chunk=None)
    assert saved_bytes(lambda: module(x), exclude=module, inputs=[x]).new == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_can_be_undone(how: str) -> None:
    module = gained("Llama")
    fuse(module, recompute=False, chunk=None)
    other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    x = torch.randn(TOKENS, HIDDEN)
    assert torch.equal(other(x), module(x))
    unfuse(other)
    assert not isinstance(other, FusedMlp)
    assert isinstance(module, FusedMlp)


def test_projections_with_hooks_or_gains_of_their_own_are_called() -> None:
    module = gained("Llama")
    module.up_proj = gain_layer(module.up_proj)
    nn.init.normal_(module.up_proj.delta, std=0.3)
    calls = []
    module.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(TOKENS, HIDDEN)
    expected = module(x)
    fuse(module, recompute=False, chunk=None)
    torch.testing.assert_close(module(x), expected)
    assert len(calls) == 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="fuse_mlp cannot serve Linear"):
        fuse(nn.Linear(2, 2), recompute=False, chunk=None)
    module = gained("Llama")
    module.act_fn = nn.Tanh()
    with pytest.raises(ValueError, match="does not know the activation Tanh"):
        fuse(module, recompute=False, chunk=None)
    module = gained("Llama")
    module.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="need plain linear layers"):
        fuse(module, recompute=True, chunk=None)
    module = gained("Llama")
    module.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="down_proj, which has hooks"):
        fuse(module, recompute=False, chunk=None)


def test_compile() -> None:
    torch._dynamo.reset()
    module = gained("Llama")
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    expected = outcome(module, x, torch.ones(TOKENS, HIDDEN))
    fuse(module, recompute=False, chunk=None)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    grads = torch.autograd.grad(y, (x, delta_of(module)), torch.ones_like(y))
    for got, wanted in zip((y, *grads), expected, strict=True):
        torch.testing.assert_close(got, wanted)

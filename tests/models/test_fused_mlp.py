"""FFNs of transformers run as gain_mlp: the same map, fewer bytes, and undone."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gain_ops
from gain_ops.layers.make import gain_layer
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.models.ffn_layout import layout_of
from gain_ops.models.fused_mlp import FusedMlp, fuse, unfuse
from gain_ops.testing import assert_no_worse_than_torch

from support.tiny_architectures import build

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
    if family == "GPTJ":
        from transformers.models.gptj.modeling_gptj import GPTJMLP

        return GPTJMLP(FFN, transformers.GPTJConfig(n_embd=HIDDEN))
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    name = {"GPTNeoX": "gpt_neox"}.get(family, family.lower())
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["*"])
    extra = {
        "Phi3": {"pad_token_id": 0},
        "Falcon": {"ffn_hidden_size": FFN},
        "Lfm2": {"block_auto_adjust_ff_dim": False},
    }
    extra = extra.get(family, {})
    return getattr(module, f"{family}MLP")(config(**small, **extra))


FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "Phi3", "GPT2", "Nemotron", "Phi"]
FAMILIES += ["Falcon", "GPTNeoX", "GPTJ", "Lfm2", "Persimmon"]


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


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS)
def test_a_hook_of_any_kind_on_the_down_projection_is_refused(register: str) -> None:
    module = gained("Llama")
    getattr(module.down_proj, register)(lambda *_: None)
    with pytest.raises(ValueError, match="down_proj, which has hooks"):
        fuse(module, recompute=False, chunk=None)


@pytest.mark.parametrize("register", HOOKS)
def test_a_hook_of_any_kind_on_another_projection_runs(register: str) -> None:
    module, calls = gained("Llama"), []
    getattr(module.gate_proj, register)(lambda *_: calls.append(1))
    fuse(module, recompute=False, chunk=None)
    module(torch.randn(TOKENS, HIDDEN, requires_grad=True)).sum().backward()
    assert len(calls) == 1


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


def model_of(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if family == "GPT2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=32, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 32,
        "pad_token_id": 0,
    }
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**small)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


WHOLE = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma3", "Phi3", "GPT2"]


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_apply_fuses_every_ffn_and_remove_undoes_it_to_the_bit(family: str, memory: str) -> None:
    model = model_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    ids = torch.randint(0, 32, (2, 9))
    plain = model(ids).logits
    gain_ops.apply(
        model, "gain-ffn", side="input", memory=memory, fuse_mlp=True, mlp_chunk=4 if memory == "lean" else None
    )
    assert sum(isinstance(module, FusedMlp) for module in model.modules()) == 2
    torch.testing.assert_close(model(ids).logits, plain)
    names = set(model.state_dict()) - set(before)
    assert names
    assert all(name.endswith(".delta") for name in names)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    gain_ops.remove(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(ids).logits, plain)


def test_the_fused_model_absorbs_saves_and_loads(tmp_path: Path) -> None:
    model, other = model_of("Llama"), model_of("Llama")
    gain_ops.apply(model, "gain-ffn", side="input", fuse_mlp=True)
    gain_ops.apply(other, "gain-ffn", side="input")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            nn.init.normal_(parameter, std=0.1)
    gain_ops.save_gains(model, tmp_path / "g.safetensors")
    gain_ops.load_gains(other, tmp_path / "g.safetensors")
    ids = torch.randint(0, 32, (2, 9))
    fused, plain = model(ids).logits, other(ids).logits
    torch.testing.assert_close(fused, plain)
    gain_ops.absorb(model)
    assert not any(isinstance(module, FusedMlp) for module in model.modules())
    torch.testing.assert_close(model(ids).logits, fused)


def test_checkpointing_and_autocast() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of("Llama").train()
        gain_ops.apply(model, "gain-ffn", side="input", fuse_mlp=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.arange(18).view(2, 9)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse_mlp": True}, "side='input'"),
        ({"mlp_chunk": 8}, "needs fuse_mlp=True"),
        ({"fuse_mlp": True, "side": "input", "mlp_chunk": 0}, "at least 1"),
        ({"fuse_mlp": True, "side": "input", "targets": "gain"}, "found no FFN"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    model = model_of("Llama")
    with pytest.raises(ValueError, match=message):
        gain_ops.apply(model, **{"targets": "gain-ffn"} | options)
    assert not any(name.endswith("delta") for name, _ in model.named_parameters())


def test_a_gained_mixer_is_no_ffn() -> None:
    model, inputs = build("qwen3_5_text")
    plain = model(**inputs).logits
    gain_ops.apply(model, ["gain-ffn", "gain-mixer"], side="input", fuse_mlp=True)
    assert sum(isinstance(module, FusedMlp) for module in model.modules()) == 2
    torch.testing.assert_close(model(**inputs).logits, plain)


class Forwards:
    """Forwards that look like an FFN's and are not, or not in this order."""

    class SwappedHalves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.gate_up(x).chunk(2, dim=-1)
            return self.down(up * self.act(gate))

    class OtherDimension(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up(x).chunk(2, dim=1)
            return self.down(up * self.act(gate))

    class TwoInputs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.gate(x)) * self.up(self.norm(x)))

    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.act(self.up(x)))

    class Overwritten(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.down(self.act(self.up(x)))

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x * 2
            return self.down(self.act(self.up(x)))


@pytest.mark.parametrize("kind", [kind for kind in vars(Forwards).values() if isinstance(kind, type)])
def test_a_forward_that_is_not_an_ffns(kind: type[nn.Module]) -> None:
    assert layout_of(kind()) is None


def test_an_ffn_that_is_not_known_is_refused_and_nothing_is_left() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(torch.sin(self.up_proj(x)))

    model = nn.Sequential(Odd())
    with pytest.raises(ValueError, match="fuse_mlp cannot serve Odd"):
        gain_ops.apply(model, ["down_proj"], side="input", fuse_mlp=True)
    assert type(model[0].down_proj) is nn.Linear

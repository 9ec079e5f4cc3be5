"""A gain on the input of a quantised down projection, absorbed into the rows of the up projection: the same map, or refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gain_ops
from gain_ops.layers.gained import Gained
from gain_ops.layers.linears import is_plain_linear, own_tensors
from gain_ops.models.quantized import lasting_tensors
from gain_ops.models.record import gained_modules
from gain_ops.models.up_rows import up_rows
from gain_ops.testing import PlainGain, assert_no_worse_than_torch

from support.quantized_bases import (
    CONFIGS,
    IDS,
    ROWWISE,
    TRAINABLE,
    exact_weight,
    load,
    random_gain,
    save_llama,
    scale_dtype,
    set_gains,
    unpacked,
    with_plain_gains,
)

transformers = pytest.importorskip("transformers")

DOWN = [r"mlp\.down_proj"]
FFN = 128
MODELS = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
}
BASES = ["nf4", "nf4-doubly", "llm-int8", "int8-row", "int4-group", "float8"]


def make_model(kind: str) -> nn.Module:
    name, options = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **options,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("proj.bias"):
            nn.init.normal_(parameter)
    return model


def quantise(model: nn.Module, name: str, leaves: str = "gate_proj up_proj gate_up_proj down_proj") -> None:
    for module in list(model.modules()):
        for leaf in leaves.split():
            if isinstance(getattr(module, leaf, None), nn.Linear):
                setattr(module, leaf, ROWWISE[name](getattr(module, leaf)))


def gain_down(model: nn.Module, **options: object) -> None:
    gain_ops.apply(model, DOWN, side="input", **options)
    with torch.no_grad():
        for layer in gained_modules(model).values():
            layer.delta.copy_(random_gain(layer.features))


def in_float64(plain: nn.Module, model: nn.Module) -> nn.Module:
    """The plain model with the weights that a gained, quantised one of the same names has, and its gains, in float64."""
    truth = plain.double()
    for name, layer in gained_modules(model).items():
        truth.get_submodule(name).weight.copy_(exact_weight(layer.base))
        parent, _, leaf = name.rpartition(".")
        gained = PlainGain(truth.get_submodule(name), "input")
        gained.delta.data.copy_(layer.delta.detach())
        setattr(truth.get_submodule(parent), leaf, gained)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(".base") and not is_plain_linear(module):
            truth.get_submodule(name).weight.copy_(exact_weight(module))
    return truth


def everything(model: nn.Module) -> dict[str, Tensor]:
    """All tensors by name, those included that bitsandbytes keeps beside the parameters, the gains' wrappers aside."""
    found = {name: tensor.clone() for name, tensor in own_tensors(model).items() if not name.endswith(".delta")}
    for name, module in model.named_modules():
        for key, tensor in (lasting_tensors(module) or {}).items():
            found[f"{name}.{key}"] = tensor.clone()
    return {name.replace(".base.", "."): tensor for name, tensor in found.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].float(), other[name].float()) for name in one)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_rows_of_up_take_the_gain(kind, base):
    model = make_model(kind)
    plain = copy.deepcopy(model)
    quantise(model, base)
    gain_down(model)
    before, expected, truth = everything(model), logits(model), in_float64(plain, model)
    deltas = [layer.delta.detach().clone() for layer in gained_modules(model).values()]
    report = gain_ops.absorb(model)

    leaf = "gate_up_proj" if kind == "phi3" else "up_proj"
    ups = [f"model.layers.{i}.mlp.{leaf}" for i in (0, 1)]
    assert report.layers == tuple(ups)
    assert not any(isinstance(module, Gained) for module in model.modules())
    unit = scale_dtype(model.get_submodule(ups[0]))
    assert 0 < report.max_rel_error <= torch.finfo(unit).eps / 2
    assert_no_worse_than_torch("logits", logits(model), expected, logits(truth), unit=unit)
    after = everything(model)
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert {name.partition(f".{leaf}.")[0] for name in changed} == {name.rpartition(".")[0] for name in ups}
    assert not any(name.endswith((".weight", "qdata")) for name in changed), "a code has changed"
    if kind == "phi3":
        halves = [(before[name].chunk(2)[0], after[name].chunk(2)[0]) for name in changed]
        assert all(torch.equal(*pair) for pair in halves), "the gate has changed"
    for up, delta in zip(ups, deltas, strict=True):
        module, exact = model.get_submodule(up), truth.get_submodule(up)
        weight, gain = exact_weight(module)[-FFN:], (1 + delta).double()
        wanted = exact.weight[-FFN:] * gain[:, None]
        # half a unit for the scale's rounding; as much twice where one that is quantised itself is unpacked to a sum
        assert ((weight - wanted).abs() <= wanted.abs() * torch.finfo(unit).eps * (0.5 + (base == "nf4-doubly"))).all()
        if module.bias is not None:
            assert torch.equal(module.bias, (exact.bias * gain).float())


@pytest.mark.parametrize("kind", ["llama with biases", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_up_beside_a_quantised_down_is_rounded_once(kind, dtype):
    model = make_model(kind).to(dtype)
    quantise(model, "int8-row", "down_proj")
    gain_down(model)
    name, down = next(iter(gained_modules(model).items()))
    up = up_rows(model, down).module
    weight, bias, delta = up.weight.clone(), up.bias, down.delta.detach().clone()
    bias = None if bias is None else bias.clone()
    report = gain_ops.absorb(model)
    assert report.layers[0].rpartition(".")[0] == name.rpartition(".")[0]
    gain = torch.cat([torch.ones(len(weight) - FFN), 1 + delta])
    assert torch.equal(up.weight, (weight.float() * gain[:, None]).to(dtype))
    if bias is not None:
        assert torch.equal(up.bias, (bias.float() * gain).to(dtype))


def test_a_plain_down_keeps_its_gain_to_itself():
    model = make_model("llama")
    quantise(model, "int8-row", "gate_proj up_proj")
    gain_down(model)
    names = tuple(gained_modules(model))
    ups = {name: tensor for name, tensor in everything(model).items() if "up_proj" in name}
    assert gain_ops.absorb(model).layers == names
    assert same(ups, {name: tensor for name, tensor in everything(model).items() if name in ups})


def test_whatever_the_down_projection_is():
    # one scale for the whole weight, and packed blocks: neither takes a gain of either side
    for name in ("int8-tensor", "gguf-q8_0"):
        model = make_model("llama")
        for layer in model.model.layers:
            layer.mlp.down_proj = TRAINABLE[name](layer.mlp.down_proj)
        gain_down(model)
        expected = logits(model)
        assert gain_ops.absorb(model).layers == tuple(f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
        torch.testing.assert_close(logits(model), expected)


def test_an_ffn_that_runs_fused():
    model = make_model("llama")
    quantise(model, "int8-row")
    gain_down(model, fuse_mlp=True)
    expected = logits(model)
    report = gain_ops.absorb(model)
    assert report.layers == tuple(f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("name", ["nf4", "llm-int8", "int8"])
def test_a_model_is_saved_and_loaded_by_transformers_alone(tmp_path, name):
    save_llama(tmp_path / "base")
    model = load(tmp_path / "base", CONFIGS[name]()).train()
    exact = unpacked(model, tmp_path / "base", torch.float64)
    applied = gain_ops.apply(model, DOWN, side="input")
    set_gains(model)
    set_gains(with_plain_gains(exact, applied.names, "input"))
    gained = logits(model)
    gain_ops.absorb(model)
    assert_no_worse_than_torch("logits", logits(model), gained, logits(exact), unit=torch.float32)
    model.save_pretrained(tmp_path / "absorbed")
    assert torch.equal(logits(load(tmp_path / "absorbed").train()), logits(model))


# refusals, each of which leaves every tensor as it was


def refused(model: nn.Module, message: str) -> None:
    before = everything(model)
    gains = {name: layer.delta.detach().clone() for name, layer in gained_modules(model).items()}
    with pytest.raises(ValueError, match=message):
        gain_ops.absorb(model)
    assert same(everything(model), before)
    assert same({name: layer.delta for name, layer in gained_modules(model).items()}, gains)


def gained_llama(base: str = "int8-row", kind: str = "llama") -> nn.Module:
    model = make_model(kind)
    quantise(model, base)
    gain_down(model)
    return model


def quantised_layer() -> nn.Module:
    return ROWWISE["int8-row"](nn.Linear(64, 64, bias=False).requires_grad_(False))


class Plain(nn.Module):
    """No gate: the gain would have to pass through the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = quantised_layer(), quantised_layer()
        self.act_fn = nn.GELU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


class Gated(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = quantised_layer()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def gained(model: nn.Module, targets: str = r"down_proj") -> nn.Module:
    gain_ops.apply(model, [targets], side="input")
    set_gains(model)
    return model


@pytest.mark.parametrize("kind", [Plain, type("Other", (Gated,), {"forward": lambda self, x: self.down_proj(x)})])
def test_an_ffn_without_a_gate_or_unknown(kind):
    message = (
        r"cannot absorb 0.down_proj: .* would have to be quantised again.* Nor can the rows of an up projection take "
    )
    refused(gained(nn.Sequential(kind())), message + f"it: .*called by a {kind.__name__}")


def test_another_projection_of_the_ffn():
    refused(gained(nn.Sequential(Gated()), "gate_proj"), "not known to be the down projection")


def test_a_forward_put_on_the_ffn_itself():
    model = gained(nn.Sequential(Gated()))
    model[0].forward = lambda x: model[0].down_proj(x)
    refused(model, "not known to be the down projection")


def test_projections_that_several_modules_call():
    model = nn.Sequential(Gated(), Gated())
    model[1].down_proj = model[0].down_proj
    refused(gained(model), "several modules call it")
    model = nn.Sequential(Gated(), Gated())
    model[1].up_proj = model[0].up_proj
    refused(gained(model), "several modules call up_proj")


def test_an_ffn_that_a_model_has_twice_is_absorbed_once():
    ffn = Gated()
    model = gained(nn.Sequential(ffn, ffn))
    x = torch.randn(3, 64)
    expected = model(x)
    assert gain_ops.absorb(model).layers == ("0.up_proj",)
    torch.testing.assert_close(model(x), expected)


def test_an_ffn_alone():
    model = gained(Gated())
    x = torch.randn(3, 64)
    expected = model(x)
    assert gain_ops.absorb(model).layers == ("up_proj",)
    torch.testing.assert_close(model(x), expected)


def test_up_with_a_gain_of_its_own():
    model = nn.Sequential(Gated())
    model[0].up_proj = nn.Linear(64, 64, bias=False)
    message = "cannot absorb 0.down_proj: .*0.up_proj has a gain of its own"
    refused(gained(model, "(up|down)_proj"), message)


def test_up_with_hooks():
    model = gained_llama()
    up = model.model.layers[1].mlp.up_proj
    handle = up.register_forward_hook(lambda module, args, out: out.clamp(-1, 1))
    refused(model, "cannot absorb model.layers.1.mlp.down_proj: .*up_proj has forward hooks")
    handle.remove()
    gain_ops.absorb(model)


def test_the_hooks_of_accelerate_call_what_the_class_says():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model("llama")
    quantise(model, "int8-row")
    for layer in model.model.layers:
        for module in (layer.mlp, layer.mlp.up_proj, layer.mlp.down_proj):
            hooks.add_hook_to_module(module, hooks.ModelHook())
    gain_down(model)
    expected = logits(model)
    assert len(gain_ops.absorb(model).layers) == 2
    torch.testing.assert_close(logits(model), expected)


def test_a_plain_up_projection_under_the_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model("llama with biases")
    quantise(model, "int8-row", "down_proj")
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.mlp.up_proj, hooks.ModelHook())
    gain_down(model)
    expected = logits(model)
    assert gain_ops.absorb(model).layers == tuple(f"model.layers.{i}.mlp.up_proj" for i in range(2))
    torch.testing.assert_close(logits(model), expected)


def test_up_of_a_format_that_is_not_known():
    model = gained_llama()
    model.model.layers[1].mlp.up_proj = TRAINABLE["gguf-q8_0"](nn.Linear(64, FFN, bias=False))
    refused(model, "cannot absorb model.layers.1.mlp.down_proj: .* Nor can .*GgufLinear")


def test_up_that_shares_its_weight_or_bias():
    model = gained_llama()
    model.model.layers[0].mlp.gate_proj.weight = model.model.layers[0].mlp.up_proj.weight
    refused(model, r"gate_proj.weight.\w+ shares model.layers.0.mlp.up_proj's weight \(tied\)")
    model = gained_llama(kind="llama with biases")
    model.model.layers[1].mlp.gate_proj.bias = model.model.layers[1].mlp.up_proj.bias
    refused(model, r"gate_proj.bias shares model.layers.1.mlp.up_proj's weight")


def test_values_that_overflow():
    model = gained_llama(kind="llama with biases")
    model.model.layers[1].mlp.up_proj.weight.scale.mul_(1e6)
    model.model.layers[1].mlp.down_proj.delta.data[3] = 3e38
    refused(model, "cannot absorb model.layers.1.mlp.down_proj: model.layers.1.mlp.up_proj's scale overflows")


def test_an_up_projection_that_is_not_there():
    model = make_model("llama")
    quantise(model, "int8-row", "down_proj")
    model.model.layers[1].mlp.up_proj.to("meta")
    gain_down(model)
    with pytest.raises(ValueError, match=r"down_proj: model.layers.1.mlp.up_proj's weight is on the meta device"):
        gain_ops.absorb(model)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(0))
    model.model.layers[1].mlp.up_proj.weight.ds_shape = (FFN, 64)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj's weight is partitioned.*GatheredParameters"):
        gain_ops.absorb(model)

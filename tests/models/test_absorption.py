"""absorb(): the same map in plain layers, one rounding, and nothing written where something is refused."""

import copy
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops.layers.gained import Gained
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.carriers import CannotFold, fold_gain
from gain_ops.models.record import gained_modules
from gain_ops.testing import PlainGain, assert_no_worse_than_torch

IDS = torch.arange(1, 9)[None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def llama(**extra):
    torch.manual_seed(0)
    options = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**options, "vocab_size": 50, **extra})).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)).eval()


def set_gains(model, scale=0.3):
    with torch.no_grad():
        for layer in gained_modules(model).values():
            layer.delta.copy_(torch.randn_like(layer.delta) * scale)


@settings(max_examples=60, deadline=None)
@given(
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 40),
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    side=st.sampled_from(["output", "input"]),
    dtype=st.sampled_from(DTYPES),
    dead=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_an_absorbed_layer_computes_the_gained_map(n_in, n_out, tokens, bias, side, dtype, dead, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(n_in, n_out, bias, dtype=dtype)
    model = nn.Sequential(copy.deepcopy(linear))
    x = torch.randn(tokens, n_in, dtype=dtype)
    gain_ops.apply(model, ["0"], side=side)
    set_gains(model)
    if dead:
        model[0].delta.data[0] = -1
    delta = model[0].delta.detach().clone()
    before = model[0](x)
    report = gain_ops.absorb(model)
    assert type(model[0]) is nn.Linear

    exact = PlainGain(copy.deepcopy(linear).double(), side)
    exact.delta.data.copy_(delta)
    magnitude = x.double().abs() @ model[0].weight.double().abs().T
    if bias:
        magnitude += linear.bias.double().abs()
    # the absorbed weight is itself rounded to dtype
    assert_no_worse_than_torch(f"absorbed {dtype}", model[0](x), before, exact(x.double()), magnitude, unit=dtype)

    gain = 1 + delta
    gain = gain[:, None] if side == "output" else gain
    assert torch.equal(model[0].weight, (linear.weight.to(gain.dtype) * gain).to(dtype)), "one product, one rounding"
    error = (model[0].weight.double() - linear.weight.double() * gain.double()).abs().max().item()
    assert report.max_abs_error == error
    assert report.max_rel_error <= torch.finfo(dtype).eps or dtype == torch.float16, (
        "float16 may fall below normal numbers"
    )
    if bias:
        assert torch.equal(model[0].bias, linear.bias)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_absorbed_model_is_plain_and_computes_the_same(make, side, dtype):
    model = make().to(dtype)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    originals = {name: module for name, module in model.named_modules()}
    applied = gain_ops.apply(model, "gain-ffn", side=side)
    set_gains(model)
    expected = model(IDS).logits
    report = gain_ops.absorb(model)
    assert report.layers == applied.names
    assert not any(isinstance(module, Gained) for module in model.modules())
    assert all(module is originals[name] for name, module in model.named_modules())
    assert list(model.state_dict()) == keys
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    torch.testing.assert_close(model(IDS).logits, expected)
    assert gain_ops.apply(model, "gain-ffn").names == applied.names, "the next domain starts from here"


def test_weights_change_in_place():
    model = llama()
    weight = model.model.layers[0].self_attn.o_proj.weight
    gain_ops.apply(model)
    model.model.layers[0].self_attn.o_proj.delta.data.fill_(1)
    before = weight.detach().clone()
    gain_ops.absorb(model)
    assert model.model.layers[0].self_attn.o_proj.weight is weight
    assert torch.equal(weight, 2 * before)


def test_report():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.float64))
    gain_ops.apply(model, [r"\d"])
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].delta.fill_(2**-9)  # 1 + 2^-9 lies between 1 and the next bfloat16, 1 + 2^-7
    report = gain_ops.absorb(model)
    assert report.layers == ("0", "1")
    assert report.max_abs_error == 2**-9
    assert report.max_rel_error == pytest.approx(2**-9 / (1 + 2**-9))
    assert report.where == "0"
    assert report.lost == 0
    assert "2 layers" in repr(report)
    assert "lost" not in repr(report)


@pytest.mark.parametrize(("size", "warns"), [(1e-3, True), (0.1, False)])
def test_a_warning_where_most_gains_are_lost(size, warns):
    model = llama().bfloat16()
    gain_ops.apply(model)
    for layer in gained_modules(model).values():
        nn.init.normal_(layer.delta, std=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gain_ops.absorb(model)
    said = [str(one.message) for one in caught]
    found = [text for text in said if re.search(r"\d+ of \d+ gains are nearer to 1 .*: keep the gain file", text)]
    assert bool(found) == warns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gains_too_near_to_one_for_the_weights_are_counted_and_change_nothing(dtype):
    limit = torch.finfo(dtype).eps / 4
    deltas = torch.tensor([0.0, 0.9, -0.9, 1.1, -1.1, 4.0]) * limit
    model = nn.Sequential(nn.Linear(500, 6, dtype=dtype))
    nn.init.uniform_(model[0].weight, 1, 2)
    model[0].weight.data[:, 0] = 1
    before = model[0].weight.detach().clone()
    gain_ops.apply(model, [r"\d"])
    model[0].delta.data.copy_(deltas)
    report = gain_ops.absorb(model)
    assert (report.lost, report.moved) == (2, 5)
    assert "2 of 5 gains too near to 1 for the dtype were lost" in repr(report)
    changed = (model[0].weight != before).any(1).tolist()
    assert changed[:3] == [False] * 3
    assert changed[4:] == [True] * 2, "down from a power of two the spacing is half"


def test_more_rows_than_one_chunk(monkeypatch):
    monkeypatch.setattr("gain_ops.models.absorb._CHUNK", 20)
    for side in ("output", "input"):
        model = nn.Sequential(nn.Linear(6, 11))
        weight = model[0].weight.detach().clone()
        gain_ops.apply(model, ["0"], side=side)
        set_gains(model)
        gain = model[0].gain.detach()
        gain_ops.absorb(model)
        assert torch.equal(model[0].weight, weight * (gain[:, None] if side == "output" else gain))


def test_layers_made_by_hand():
    model = nn.Sequential(GainLinear(4, 6), nn.ReLU(), GainLinear(6, 3, side="input"))
    set_gains(model)
    x = torch.randn(5, 4)
    expected = model(x)
    gain_ops.absorb(model)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), expected)


# refusals, each of which must leave every tensor as it was


def refused(model, message):
    before = {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta}
    with pytest.raises(ValueError, match=message):
        gain_ops.absorb(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) or value.isnan().any() for name, value in before.items())
    assert any(isinstance(module, Gained) for module in model.modules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_gains_that_are_not_finite(value):
    model = llama()
    gain_ops.apply(model)
    set_gains(model)
    model.model.layers[1].self_attn.o_proj.delta.data[3] = value
    refused(model, r"cannot absorb model.layers.1.self_attn.o_proj: its gain is not finite")


def test_float16_overflow_is_seen_after_the_cast():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.float16)
    gain_ops.apply(model, [r"\d"])
    set_gains(model)
    with torch.no_grad():
        model[1].weight.fill_(300.0)
        model[1].delta[2] = 299.0
    refused(model, r"cannot absorb 1: its weight overflows in torch.float16; nothing was changed")


def test_a_weight_that_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 4))
    gain_ops.apply(model, ["0"])
    model[0].weight.data[0, 0] = torch.inf
    refused(model, "is not finite to begin with")


def test_wrapped_layers():
    class Packed(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Packed(4, 4))
    gain_ops.apply(model, [r"\d"])
    assert isinstance(model[1], GainWrapper)
    set_gains(model)
    refused(model, r"cannot absorb 1: it wraps a Packed.*quantised.*check_base=False")


class WithMore(nn.Linear):
    """nn.Linear's own map, with tensors beside weight and bias: it is wrapped, and keeps them."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(2))


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_linear_that_holds_more(side):
    model = nn.Sequential(nn.Linear(4, 6), WithMore(6, 3))
    more, keys = model[1], list(model.state_dict())
    gain_ops.apply(model, [r"\d"], side=side)
    set_gains(model)
    x = torch.randn(5, 4)
    expected = model(x)
    assert gain_ops.absorb(model).layers == ("0", "1")
    assert model[1] is more
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)


def test_hooks_between_a_weight_and_its_gain():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = nn.Sequential(WithMore(4, 4))
        getattr(model[0], register)(lambda *_: None)
        gain_ops.apply(model, ["0"])
        set_gains(model)
        refused(model, "cannot absorb 0: the WithMore in it has forward hooks.*Remove them first")


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["output", "input"])
def test_plain_weights_under_the_hooks_of_a_device_map(make, side):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(make(), device_map={"": "cpu"}, main_device="cpu", force_hooks=True)
    before = {name: (id(module), dict(vars(module))) for name, module in model.named_modules()}
    layers = gain_ops.apply(model, "gain-ffn", side=side).names
    assert {type(layer) for layer in gained_modules(model).values()} == {GainWrapper}
    set_gains(model)
    expected = model(IDS).logits
    assert gain_ops.absorb(model).layers == layers
    torch.testing.assert_close(model(IDS).logits, expected)
    after = {name: (id(module), dict(vars(module))) for name, module in model.named_modules()}
    assert after == before


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    gain_ops.apply(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="its weight is on the meta device"):
        gain_ops.absorb(model)


def test_lora_round_a_layer_with_a_gain_is_merged_after_absorbing():
    peft = pytest.importorskip("peft")
    model = llama()
    gain_ops.apply(model)
    set_gains(model)
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    expected = adapted(IDS).logits
    assert len(gain_ops.absorb(adapted).layers) == 2
    torch.testing.assert_close(adapted(IDS).logits, expected)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, expected)


def test_tied_to_an_embedding():
    model = llama(tie_word_embeddings=True)
    gain_ops.apply(model, ["o_proj", "lm_head"])
    set_gains(model)
    refused(model, "cannot absorb lm_head: model.embed_tokens.weight shares its weight")


def test_two_gained_layers_on_one_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    gain_ops.apply(model, [r"\d"])
    set_gains(model)
    refused(model, "cannot absorb 0: 1.weight shares its weight")


def test_a_view_into_one_buffer():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("flat", torch.randn(32))
    model[0].weight = nn.Parameter(model.flat[8:24].view(4, 4))
    gain_ops.apply(model, ["0"])
    refused(model, "cannot absorb 0: flat shares its weight")


def test_neighbours_in_one_storage_are_not_shared():
    flat = torch.randn(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[16 * i : 16 * (i + 1)].view(4, 4))
    gain_ops.apply(model, [r"\d"])
    gain_ops.absorb(model)


def test_a_shared_bias_is_no_obstacle():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    gain_ops.apply(model, [r"\d"])
    gain_ops.absorb(model)
    assert model[1].bias is model[0].bias


def test_a_shared_module_is_absorbed_once():
    shared = nn.Linear(4, 4, bias=False)
    model = nn.ModuleDict({"a": shared, "b": shared})
    weight = shared.weight.detach().clone()
    gain_ops.apply(model, ["a"])
    model["a"].delta.data.fill_(1)
    assert gain_ops.absorb(model).layers == ("a",)
    assert model["b"] is shared
    assert torch.equal(shared.weight, 2 * weight)


def test_weights_that_are_not_there():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    gain_ops.apply(model, ["0"])
    refused(model, "on the meta device")
    model = nn.Sequential(nn.Linear(4, 4))
    gain_ops.apply(model, ["0"])
    model[0].weight.data = torch.empty(0)
    refused(model, "GatheredParameters")


def test_a_part_of_the_model_that_gains_were_applied_to():
    model = llama()
    gain_ops.apply(model, "gain-ffn")
    set_gains(model)
    refused(model.model, r"applied to a larger model: call absorb\(\) on that one")
    refused(model.model.layers[0], "applied to a larger model")
    gain_ops.absorb(nn.ModuleDict({"outer": model}))


class Headed(nn.Module):
    """A model in another one, with a layer beside it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = llama(), nn.Linear(50, 5)

    def forward(self, ids):
        return self.head(self.body(ids).logits)


def test_gains_outside_the_part_that_apply_was_called_on():
    model = Headed().eval()
    gain_ops.apply(model.body)
    model.head = GainLinear.from_linear(model.head)
    set_gains(model)
    model.head.delta.data.fill_(0.3)
    expected = model(IDS)
    refused(
        model, "head has a gain outside the module that apply.. was called on, a LlamaForCausalLM: absorb that module"
    )
    gain_ops.absorb(model.body)
    assert gain_ops.absorb(model).layers == ("head",)
    torch.testing.assert_close(model(IDS), expected)


def test_two_parts_that_apply_was_called_on():
    model = nn.ModuleDict({"actor": llama(), "critic": llama()})
    for part in model.values():
        gain_ops.apply(part)
    set_gains(model)
    expected = [part(IDS).logits for part in model.values()]
    assert len(gain_ops.absorb(model).layers) == 4
    for part, logits in zip(model.values(), expected, strict=True):
        torch.testing.assert_close(part(IDS).logits, logits)


def test_nothing_to_absorb():
    with pytest.raises(ValueError, match="Sequential has no gains to absorb"):
        gain_ops.absorb(nn.Sequential(nn.Linear(2, 2)))


def test_an_interruption_leaves_the_same_map(monkeypatch):
    model = llama()
    gain_ops.apply(model, "gain-ffn")
    set_gains(model)
    expected = model(IDS).logits
    zero_, calls = torch.Tensor.zero_, []

    def interrupted(tensor):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(tensor)
        return zero_(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "zero_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gain_ops.absorb(model)
    assert len(calls) == 2
    third = gained_modules(model)["model.layers.1.self_attn.o_proj"]
    assert third.delta.any()
    with torch.no_grad():
        third.weight.copy_(third.weight / third.gain[:, None])  # the one layer caught between its two writes
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("side", "exact", "asked", "taken"),
    [
        ("output", {"own", "up"}, True, "own"),
        ("output", {"up"}, True, "requantised"),
        ("output", {"up"}, False, "own cannot."),
        ("input", {"own", "up"}, True, "own"),
        ("input", {"up"}, True, "up"),
        ("input", {"up"}, False, "up"),
        ("input", set(), True, "requantised"),
        ("input", set(), False, "own cannot. Nor can the rows of an up projection take it: up cannot."),
    ],
)
def test_a_gain_goes_where_it_is_exact_and_elsewhere_only_as_asked(side, exact, asked, taken):
    class OfAFormat(CannotFold):
        pass

    def into(which):
        def fold():
            if which not in exact:
                raise OfAFormat(f"{which} cannot.")
            return which

        return fold

    requantised = (lambda: "requantised") if asked else None
    if taken.endswith("."):
        with pytest.raises(OfAFormat, match=f"^{re.escape(taken)}$"):
            fold_gain(side, into("own"), into("up"), requantised)
    else:
        assert fold_gain(side, into("own"), into("up"), requantised) == taken

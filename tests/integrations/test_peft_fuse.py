"""fuse() and unfuse(): PEFT's (IA)^3 on our ops gives PEFT's results, keeps less, and does not share PEFT's faults."""

import copy
import io
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.testing import assert_no_worse_than_torch

peft = pytest.importorskip("peft")
ia3 = pytest.importorskip("peft.tuners.ia3.layer")

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from gain_ops.integrations.peft import Fused, FusedIA3Model, FusedLinear, fuse, unfuse  # noqa: E402

IN, OUT, T = 24, 16, 12
FORMS = ["output", "feedforward"]
BASES = ["linear", "linear without bias", "conv1d"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class One(nn.Module):
    """One layer, by a name that says attention output or not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.o_proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.attn.o_proj(x)


class Tiny(nn.Module):
    """An attention of sorts, an FFN and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.o_proj = nn.Linear(24, 16), nn.Linear(16, 24, bias=False)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.o_proj(torch.tanh(self.k(x)))
        return self.head(h + self.down(torch.tanh(self.up(h))))


def base_layer(kind: str, n_in: int = IN, n_out: int = OUT) -> nn.Module:
    if kind != "conv1d":
        return nn.Linear(n_in, n_out, bias=kind == "linear")
    layer = Conv1D(n_out, n_in)
    nn.init.normal_(layer.weight, std=n_in**-0.5)
    nn.init.normal_(layer.bias)
    return layer


def learn(model: nn.Module, spread: float = 0.3) -> None:
    """Give every (IA)^3 vector values as if it had been trained."""
    for name, parameter in model.named_parameters():
        if ".ia3_l." in name:
            parameter.data = 1 + spread * torch.randn_like(parameter)


def one(
    form: str, kind: str = "linear", dtype: torch.dtype = torch.float32, n_in: int = IN, n_out: int = OUT
) -> PeftModel:
    config = IA3Config(
        target_modules=["o_proj"],
        feedforward_modules=["o_proj"] if form == "feedforward" else [],
        fan_in_fan_out=kind == "conv1d",
    )
    model = get_peft_model(One(base_layer(kind, n_in, n_out)).to(dtype), config)
    learn(model)
    return model


def layer_of(model: PeftModel) -> ia3.Linear:
    return model.base_model.model.attn.o_proj


def config(*names: str, **others) -> IA3Config:
    return IA3Config(
        target_modules=list(names), feedforward_modules=[name for name in names if name == "down"], **others
    )


def tiny(*names: str, **others) -> PeftModel:
    model = get_peft_model(Tiny(), config(*(names or ("k", "o_proj", "down")), **others))
    learn(model)
    return model


def llama() -> PeftModel:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), IA3Config(task_type="CAUSAL_LM"))
    learn(model)
    return model


def twins(model: PeftModel, **options) -> tuple[PeftModel, PeftModel]:
    """(fused, as PEFT has it), with the same values."""
    plain = copy.deepcopy(model)
    fuse(model, **options)
    return model, plain


def results(model: PeftModel, x: Tensor, dy: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Y, dx and the gradient of everything that is trained."""
    x = x.detach().requires_grad_()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    gradients = torch.autograd.grad(y, (x, *trained.values()), dy.to(y.dtype), allow_unused=True)
    named = zip(("dx", *trained), gradients, strict=True)
    return {"y": y.detach(), **{name: gradient for name, gradient in named if gradient is not None}}


def assert_same_results(fused: PeftModel, plain: PeftModel, x: Tensor, dy: Tensor, autocast: bool = False) -> None:
    """The rule, with PEFT as plain torch and PEFT in float64 as the truth."""
    ours, theirs = results(fused, x, dy, autocast), results(plain, x, dy, autocast)
    truth = results(copy.deepcopy(plain).double(), x.double(), dy.double())
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, exact in truth.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert_no_worse_than_torch(name, ours[name], theirs[name], exact)


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_outputs_and_gradients_are_no_worse_than_pefts(form: str, kind: str, dtype: torch.dtype, memory: str) -> None:
    fused, plain = twins(one(form, kind, dtype), memory=memory)
    assert layer_of(fused).ia3_l["default"].dtype == torch.float32
    assert type(layer_of(fused)) is FusedLinear
    assert isinstance(layer_of(fused), ia3.Linear)
    assert_same_results(fused, plain, torch.randn(2, T, IN).to(dtype), torch.randn(2, T, OUT).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_adapters_in_the_models_own_dtype(form: str) -> None:
    model = one(form, dtype=torch.bfloat16).bfloat16()
    layer_of(model).ia3_l["default"].data *= 0.05  # l - 1 needs more bits than bfloat16 has
    fused, plain = twins(model)
    assert layer_of(fused).ia3_l["default"].dtype == torch.bfloat16
    assert_same_results(fused, plain, torch.randn(T, IN).bfloat16(), torch.randn(T, OUT).bfloat16())


@pytest.mark.parametrize("form", FORMS)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    kind=st.sampled_from(BASES),
    lean=st.booleans(),
    transposed=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_shapes_and_strides(form, lead, n_in, n_out, kind, lean, transposed) -> None:
    fused, plain = twins(one(form, kind, torch.float64, n_in, n_out), memory="lean" if lean else "fast")
    x = torch.randn(*lead, n_in, dtype=torch.float64)
    if transposed and len(lead) >= 2 and kind != "conv1d":  # Conv1D's own forward takes no such x
        x = x.transpose(0, 1)
    dy = torch.randn(*x.shape[:-1], n_out, dtype=torch.float64)
    ours, theirs = results(fused, x, dy), results(plain, x, dy)
    for name, theirs_ in theirs.items():
        torch.testing.assert_close(ours[name], theirs_)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BASES)
def test_gradcheck_to_second_order(form: str, kind: str) -> None:
    model = one(form, kind, torch.float64, 5, 3).double()
    fuse(model)
    vector = layer_of(model).ia3_l["default"]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    name = "base_model.model.attn.o_proj.ia3_l.default"

    def run(x: Tensor, vector: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: vector}, (x,))

    assert gradcheck(run, (x, vector))
    assert gradgradcheck(run, (x, vector))


@pytest.mark.parametrize("form", FORMS)
def test_the_gain_in_use_is_l_where_the_docstring_says_so(form: str) -> None:
    """With W = 1 and x = 1 the output is the gain itself."""
    n = 1024
    model = one(form, "linear without bias", n_in=n, n_out=n)
    layer = layer_of(model)
    layer.base_layer.weight.data = torch.eye(n)
    fuse(model)

    def gain(values: Tensor) -> Tensor:
        layer.ia3_l["default"].data = values.view_as(layer.ia3_l["default"])
        return model(torch.ones(1, n)).flatten()

    near = 0.5 + 1.5 * torch.rand(n)
    near[0], near[1], near[2] = 0.5, 1 - 2**-24, 2.0
    assert torch.equal(gain(near), near)
    small = torch.rand(n) / 2
    small[0], small[1] = 0.0, 1e-8
    assert gain(small)[0] == 0
    assert ((gain(small).double() - small.double()).abs() <= 2**-25).all()
    odd = 10 * torch.randn(n)
    odd[0], odd[1] = -1e-8, 1e7
    assert ((gain(odd).double() - odd.double()).abs() <= 2**-22 * odd.abs().clamp_min(1)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 3])
def test_several_active_adapters_multiply(form: str, count: int) -> None:
    model = one(form)
    for i in range(1, count):
        model.add_adapter(f"more{i}", copy.deepcopy(model.peft_config["default"]))
    learn(model)
    model.base_model.set_adapter(["default", *(f"more{i}" for i in range(1, count))])
    fused, plain = twins(model)
    x, dy = torch.randn(T, IN), torch.randn(T, OUT)
    assert len(results(fused, x, dy)) == 2 + count
    assert_same_results(fused, plain, x, dy)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(form: str, weight_dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    fused, plain = twins(one(form, dtype=weight_dtype))
    assert_same_results(fused, plain, torch.randn(T, IN).to(x_dtype), torch.randn(T, OUT).bfloat16(), autocast=True)


@pytest.mark.parametrize("form", FORMS)
def test_an_unfrozen_base_is_trained_as_before(form: str) -> None:
    model = one(form)
    layer_of(model).base_layer.requires_grad_(True)
    fused, plain = twins(model)
    x, dy = torch.randn(T, IN), torch.randn(T, OUT)
    assert len(results(fused, x, dy)) == 5
    assert_same_results(fused, plain, x, dy)


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_bias_beside_a_frozen_weight(form: str) -> None:
    model = one(form)
    layer_of(model).base_layer.bias.requires_grad_(True)
    fused, plain = twins(model)
    x, dy = torch.randn(T, IN), torch.randn(T, OUT)
    assert len(results(fused, x, dy)) == 4
    assert_same_results(fused, plain, x, dy)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x_grad", [False, True])
@pytest.mark.parametrize("l_grad", [False, True])
def test_only_what_is_needed_gets_a_gradient(form: str, x_grad: bool, l_grad: bool) -> None:
    fused, plain = twins(one(form))
    outputs = []
    for model in (fused, plain):
        layer_of(model).ia3_l["default"].requires_grad_(l_grad)
        x = torch.ones(T, IN, requires_grad=x_grad)
        y = model(x)
        assert y.requires_grad == (x_grad or l_grad)
        if y.requires_grad:
            y.sum().backward()
        assert (x.grad is not None) == x_grad
        assert (layer_of(model).ia3_l["default"].grad is not None) == l_grad
        outputs.append(y)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("form", FORMS)
def test_hooks_on_the_base_layer_still_run(form: str) -> None:
    fused, plain = twins(one(form))
    seen = []
    layer_of(fused).base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert_same_results(fused, plain, torch.randn(T, IN), torch.randn(T, OUT))
    assert seen


@pytest.mark.parametrize("form", FORMS)
def test_arguments_that_the_base_layer_does_not_take_are_not_dropped(form: str) -> None:
    for model in twins(one(form)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
            layer_of(model)(torch.randn(T, IN), scale=2)


def test_a_base_that_is_another_adapter_is_called() -> None:
    inner = get_peft_model(Tiny(), LoraConfig(target_modules=["k", "down"], r=2, init_lora_weights=False))
    with pytest.warns(UserWarning, match="already|second|multiple"):
        model = get_peft_model(inner, config("k", "down"))
    learn(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "ia3" in name)
    fused, plain = twins(model)
    x, dy = torch.randn(T, 24), torch.randn(T, 5)
    assert len(results(fused, x, dy)) == 8
    assert_same_results(fused, plain, x, dy)


def test_gradient_checkpointing() -> None:
    fused, plain = twins(tiny())
    x, dy = torch.randn(T, 24, requires_grad=True), torch.randn(T, 5)
    expected = results(plain, x, dy)
    for reentrant in (False, True):
        fused.zero_grad()
        checkpoint(fused, x, use_reentrant=reentrant).backward(dy)
        for name, parameter in fused.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name])


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    fused, plain = twins(tiny())
    x, dy = torch.randn(T, 24), torch.randn(T, 5)
    expected = results(plain, x, dy)
    for backend, options in ((count, {"dynamic": True}), ("aot_eager", {})):
        compiled = torch.compile(fused, fullgraph=True, backend=backend, **options)
        inputs = x.clone().requires_grad_()
        y = compiled(inputs)
        torch.testing.assert_close(y, expected["y"])
        torch.testing.assert_close(torch.autograd.grad(y, inputs, dy)[0], expected["dx"])
    assert len(graphs) == 1


def test_a_whole_transformers_model() -> None:
    fused, plain = twins(llama())
    ids = torch.randint(1, 40, (2, 9))
    losses = [model(input_ids=ids, labels=ids).loss for model in (fused, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    grads = [[p.grad for p in model.parameters() if p.requires_grad] for model in (fused, plain)]
    assert len(grads[0]) == 2 * 3
    torch.testing.assert_close(*grads)
    mask = torch.ones_like(ids)
    tokens = [m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (fused, plain)]
    assert torch.equal(*tokens)


# ---------------------------------------------------------------- adapters as PEFT manages them


def test_adapters_are_added_switched_disabled_and_deleted_as_before() -> None:
    fused, plain = twins(tiny("k", "down"))
    x, dy = torch.randn(T, 24), torch.randn(T, 5)

    def both(action) -> None:
        for model in (fused, plain):
            torch.manual_seed(1)
            action(model)
        assert_same_results(fused, plain, x, dy)

    both(lambda m: (m.add_adapter("second", config("k", "o_proj", "up")), learn(m)))
    assert isinstance(fused.base_model.model.up, FusedLinear), "a layer that is new with an adapter is fused"
    both(lambda m: m.set_adapter("second"))
    both(lambda m: m.base_model.set_adapter(["second", "default"]))
    both(lambda m: m.base_model.add_weighted_adapter(["default", "second"], [0.5, 1.5], "blend"))
    both(lambda m: m.set_adapter("blend"))
    both(lambda m: m.base_model.disable_adapter_layers())
    both(lambda m: m.base_model.enable_adapter_layers())
    both(lambda m: m.delete_adapter("second"))
    with fused.disable_adapter():
        assert torch.equal(fused(x), plain.base_model.model.get_submodule("")(x)) is False
        assert torch.equal(fused(x), fused.get_base_model()(x))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    unfuse(fused)
    assert not any(isinstance(module, FusedLinear) for module in fused.modules())
    assert_identical(results(fused, x, dy), results(plain, x, dy))


def test_disabled_means_the_base_model() -> None:
    base = Tiny()
    x = torch.randn(T, 24)
    expected = base(x)
    model = get_peft_model(base, config("k", "o_proj", "down"))
    learn(model)
    fuse(model)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_modules_to_save_are_trained_and_saved(tmp_path) -> None:
    model = tiny("k", "down", modules_to_save=["head"])
    fused, plain = twins(model)
    x, dy = torch.randn(T, 24), torch.randn(T, 5)
    assert len(results(fused, x, dy)) == 2 + 2 + 2
    assert_same_results(fused, plain, x, dy)
    assert_identical(states(fused), states(plain))


def test_an_adapter_saved_fused_is_pefts_and_loads_into_either(tmp_path) -> None:
    base = Tiny()
    model = get_peft_model(copy.deepcopy(base), config("k", "o_proj", "down", modules_to_save=["head"]))
    learn(model)
    plain = copy.deepcopy(model)
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    saved = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("fused", "plain")]
    assert saved[0] == saved[1]
    x = torch.randn(T, 24)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "fused")
    assert torch.equal(loaded(x), plain(x))
    model.load_adapter(tmp_path / "plain", "again")
    model.set_adapter("again")
    torch.testing.assert_close(model(x), plain(x))


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_gives_pefts_bits_and_unmerging_the_original_ones(form: str, kind: str, dtype: torch.dtype) -> None:
    fused, plain = twins(one(form, kind, dtype))
    before = states(fused)
    x = torch.randn(T, IN).to(dtype)
    fused.merge_adapter()
    plain.merge_adapter()
    assert_identical(states(fused), states(plain))
    assert torch.equal(fused(x), plain(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused.unmerge_adapter()
    assert_identical(states(fused), before)
    assert not layer_of(fused).merged


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BASES)
def test_unmerging_survives_gains_that_pefts_division_does_not(form: str, kind: str) -> None:
    fused, plain = twins(one(form, kind, torch.bfloat16))
    for model in (fused, plain):
        layer_of(model).ia3_l["default"].data.flatten()[:2] = torch.tensor([0.0, -1e-8])
    before = states(fused)
    for model in (fused, plain):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_identical(states(fused), before)
    theirs = states(plain)
    assert any(not tensor.isfinite().all() or not torch.equal(tensor, before[name]) for name, tensor in theirs.items())


def test_disabling_a_merged_model_restores_its_bits() -> None:
    model = tiny().bfloat16()
    x = torch.randn(T, 24).bfloat16()
    fuse(model)
    before = states(model)
    with model.disable_adapter():
        expected = model(x)
    model.merge_adapter()
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert_identical(states(model), before)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_merged_one_after_the_other_round_once(form: str) -> None:
    model = one(form, dtype=torch.bfloat16)
    model.add_adapter("more", copy.deepcopy(model.peft_config["default"]))
    learn(model)
    fuse(model)
    layer, before = layer_of(model), states(model)
    gain = (layer.ia3_l["default"] * layer.ia3_l["more"]).detach()
    exact = (layer.base_layer.weight.float() * gain).bfloat16()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging more"):
        model.merge_adapter(["more"])
    assert layer.merged_adapters == ["default", "more"]
    assert torch.equal(layer.base_layer.weight, exact)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["more"])
    model.unmerge_adapter()
    assert_identical(states(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter(["default", "more"])
    assert layer.merged_adapters == ["default", "more"]
    assert torch.equal(layer.base_layer.weight, exact)


def test_merge_and_unload_is_pefts() -> None:
    fused, plain = twins(tiny())
    merged, theirs = fused.merge_and_unload(), plain.merge_and_unload()
    assert type(merged) is Tiny
    assert not any(isinstance(module, ia3.IA3Layer) for module in merged.modules())
    assert_identical(states(merged), states(theirs))


def test_a_merged_model_may_be_cast_before_it_is_unmerged() -> None:
    model = tiny()
    fuse(model)
    model.merge_adapter()
    original = model.base_model.model.k._original.weight
    model.bfloat16()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.k.base_layer.weight, original.bfloat16())


def test_what_a_merged_layer_holds() -> None:
    model = tiny("k")
    fuse(model)
    layer = model.base_model.model.k
    weight, bias = layer.base_layer.weight.data_ptr(), layer.base_layer.bias.data_ptr()
    model.merge_adapter()
    assert (layer._original.weight.data_ptr(), layer._original.bias.data_ptr()) == (weight, bias), "nothing is copied"
    assert layer.base_layer.weight.data_ptr() != weight
    assert "k._original" not in " ".join(model.state_dict())
    model.unmerge_adapter()
    assert layer.base_layer.weight.data_ptr() == weight
    assert layer._original is None


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("broken", ["weight", "bias", "nan"])
def test_safe_merge_checks_what_is_stored_and_every_layer_first(how: str, broken: str) -> None:
    """The last layer overflows float16 after the cast: PEFT's check comes before it."""
    model = tiny("o_proj", "up").half()
    layer = model.base_model.model.up
    layer.ia3_l["default"].data = layer.ia3_l["default"].data.float()
    if broken == "weight":
        layer.base_layer.weight.data[1, 1] = 6e4
        layer.ia3_l["default"].data[1] = 4
    elif broken == "bias":
        layer.base_layer.bias.data[1] = 6e4
        layer.ia3_l["default"].data[1] = 4
    else:
        layer.ia3_l["default"].data[1] = float("nan")
    fused, plain = twins(model)
    before = states(fused)
    with pytest.raises(
        ValueError, match=rf"{'bias' if broken == 'bias' else 'weight'} of up not finite in torch.float16"
    ):
        getattr(fused, how)(safe_merge=True)
    assert_identical(
        {k: v.nan_to_num() for k, v in states(fused).items()}, {k: v.nan_to_num() for k, v in before.items()}
    )
    assert isinstance(fused.base_model.model.o_proj, FusedLinear)
    assert not fused.base_model.model.o_proj.merged
    with pytest.raises(ValueError, match=r"makes the .* not finite in torch.float16"):
        fused.base_model.model.up.merge(safe_merge=True)
    assert not fused.base_model.model.up.merged
    if broken != "nan":
        plain.merge_adapter(safe_merge=True)
        assert any(not tensor.isfinite().all() for tensor in states(plain).values()), "PEFT stores inf"


def test_safe_merge_of_sound_adapters() -> None:
    fused, plain = twins(tiny())
    for model in (fused, plain):
        model.merge_adapter(safe_merge=True)
    assert_identical(states(fused), states(plain))


def test_safe_merge_does_not_count_what_is_merged_already() -> None:
    """20,000 fits float16, and would not if the gain were checked a second time."""
    model = tiny("up").half()
    layer = model.base_model.model.up
    layer.base_layer.weight.data[1, 1], layer.ia3_l["default"].data[1] = 100, 200
    fuse(model)
    model.merge_adapter(safe_merge=True)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight[1, 1] == 20_000


def test_tied_layers_are_not_merged() -> None:
    base = Tiny()
    base.down = nn.Linear(24, 40)
    base.down.weight = base.up.weight
    model = get_peft_model(base, IA3Config(target_modules=["up", "down"], feedforward_modules=[]))
    fuse(model)
    before = states(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="up and down share one weight"):
            merge()
    assert_identical(states(model), before)


# ---------------------------------------------------------------- one adapter per sample


def test_adapter_names_raise_instead_of_being_ignored() -> None:
    model = llama()
    ids = torch.randint(1, 40, (2, 5))
    names = {"adapter_names": ["default", "default"]}
    assert torch.equal(model(input_ids=ids, **names).logits, model(input_ids=ids).logits), "PEFT ignores them"
    fuse(model)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"one adapter per sample, which \(IA\)\^3 does not have"):
            call(input_ids=ids, **names)
    model(input_ids=ids, adapter_names=None)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match="adapter_names="):
        layer(torch.randn(2, 48), **names)
    unfuse(model)
    model(input_ids=ids, **names)


# ---------------------------------------------------------------- what is kept for backward


def kept(model: PeftModel, x: Tensor, autocast: bool = False) -> tuple[int, int]:
    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    saved = saved_bytes(forward, exclude=model, inputs=[x])
    return saved.new, saved.inputs


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_one_layer_to_the_byte(kind: str, dtype: torch.dtype) -> None:
    """An activation, and beside it one float32 vector: l (PEFT) or l - 1 (ours)."""
    x = torch.randn(T, IN).to(dtype).requires_grad_()
    item = x.element_size()
    fast, plain = twins(one("output", kind, dtype))
    lean, _ = twins(one("output", kind, dtype), memory="lean")
    assert kept(plain, x) == (T * OUT * item + OUT * 4, 0)
    assert kept(fast, x) == (T * OUT * item + OUT * 4, 0)
    assert kept(lean, x) == (OUT * 4, T * IN * item), "x is the caller's: no new activation"
    fused, plain = twins(one("feedforward", kind, dtype))
    if dtype == torch.float32:
        assert kept(plain, x) == (IN * 4, T * IN * 4)
    else:
        assert kept(plain, x) == (T * IN * 4 + IN * 4, 0), "PEFT's float32 copy of x"
    assert kept(fused, x) == (IN * 4, T * IN * item)


@pytest.mark.parametrize("form", FORMS)
def test_no_copy_of_the_weight_under_autocast(form: str) -> None:
    x = torch.randn(T, IN, dtype=torch.bfloat16, requires_grad=True)
    fused, plain = twins(one(form))
    vector, copied = (OUT if form == "output" else IN) * 4, OUT * IN * 2
    if form == "output":
        assert kept(plain, x, autocast=True) == (T * OUT * 2 + copied + vector, 0)
        assert kept(fused, x, autocast=True) == (T * OUT * 2 + vector, 0)
    else:
        assert kept(plain, x, autocast=True) == (T * IN * 4 + copied + vector, 0)
        assert kept(fused, x, autocast=True) == (vector, T * IN * 2)


def test_a_whole_model_keeps_less_in_bfloat16() -> None:
    """The targets that PEFT chooses for Llama: k_proj and v_proj, and down_proj as feedforward."""
    fused, plain = twins(llama().bfloat16())
    for model in (fused, plain):
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.data = parameter.data.float()
    ids = torch.randint(1, 40, (2, 8))
    ours, theirs = (saved_bytes(lambda m=m: m(input_ids=ids), exclude=m).total for m in (fused, plain))
    # per layer: PEFT's float32 copy of down_proj's input, [16, 48], against that input itself
    assert theirs - ours == 2 * (16 * 48 * 4 - 16 * 48 * 2)


@pytest.mark.parametrize(
    ("name", "n_in", "n_out", "save"),
    [
        ("attn.o_proj", 24, 16, "input"),
        ("mlp.up", 16, 24, "input"),
        ("mlp.up", 24, 16, "output"),
        ("mlp.up", 16, 16, "output"),
    ],
)
def test_lean_follows_the_rule_of_apply(name: str, n_in: int, n_out: int, save: str) -> None:
    outer, inner = name.split(".")
    model = nn.Module()
    model.add_module(outer, nn.Module())
    model.get_submodule(outer).add_module(inner, nn.Linear(n_in, n_out))
    model = get_peft_model(model, IA3Config(target_modules=[inner], feedforward_modules=[]))
    fuse(model, memory="lean")
    assert model.base_model.model.get_submodule(name).gain_save == save
    unfuse(model)
    fuse(model, memory="fast")
    assert model.base_model.model.get_submodule(name).gain_save == "output"


# ---------------------------------------------------------------- on and off


def test_fuse_reports_and_unfuse_restores_everything() -> None:
    model = tiny()
    x, dy = torch.randn(T, 24), torch.randn(T, 5)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    types = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    before, flags = results(model, x, dy), [p.requires_grad for p in model.parameters()]
    report = fuse(model)
    assert report == Fused(("k", "o_proj", "down"), {})
    assert repr(report) == "Fused(3 layers, 0 left alone)"
    assert isinstance(model.base_model, peft.IA3Model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    unfuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: saved.keys() for name, saved in attributes.items()
    }
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_identical(results(model, x, dy), before)
    fuse(model)
    unfuse(model)


def test_a_copy_and_a_pickle_are_fused_and_independent() -> None:
    model = tiny()
    fuse(model, memory="lean")
    model.merge_adapter()
    before, x = states(model), torch.randn(T, 24)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(other.base_model, FusedIA3Model)
        assert torch.equal(other(x), model(x))
        other.unmerge_adapter()
        assert_identical(states(model), before)
        unfuse(other)
        assert type(other.base_model.model.k) is ia3.Linear
        assert isinstance(model.base_model.model.k, FusedLinear)


def test_layers_that_are_not_linear_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.k = nn.Conv2d(2, 3, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.k(self.conv(x))

    model = get_peft_model(Mixed(), IA3Config(target_modules=["conv", "k"], feedforward_modules=[]))
    learn(model)
    with caplog.at_level(logging.WARNING, "gain_ops"):
        fused, plain = twins(model)
    assert "conv: peft.tuners.ia3.layer.Conv2d is no linear layer" in caplog.text
    unfuse(fused)
    report = fuse(fused)
    assert report.layers == ("k",)
    assert list(report.left_alone) == ["conv"]
    assert type(fused.base_model.model.conv) is ia3.Conv2d
    x = torch.randn(2, 2, 3, 4)
    torch.testing.assert_close(fused(x), plain(x))


def test_a_replaced_forward_is_left_alone_and_blocks_unfuse() -> None:
    model = tiny("k", "o_proj")
    layer = model.base_model.model.k
    layer.forward = layer.forward
    report = fuse(model)
    assert report.layers == ("o_proj",)
    assert "accelerate" in report.left_alone["k"]
    other = model.base_model.model.o_proj
    other.forward = other.forward
    with pytest.raises(ValueError, match="cannot unfuse o_proj: its class or forward was replaced after fuse"):
        unfuse(model)
    assert isinstance(other, FusedLinear)
    del other.forward
    unfuse(model)


def test_no_layer_to_fuse() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(2, 3, 1)), IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"no \(IA\)\^3 layer here can run on gain_ops: 0: peft"):
        fuse(model)
    assert type(model.base_model) is peft.IA3Model


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_what_is_not_an_ia3_peft_model_is_refused(function) -> None:
    with pytest.raises(TypeError, match=r"takes a PeftModel, got Tiny\. Make one with peft\.get_peft_model"):
        function(Tiny())
    with pytest.raises(TypeError, match="got OptimizedModule"):
        function(torch.compile(tiny()))
    lora = get_peft_model(Tiny(), LoraConfig(target_modules=["k"]))
    with pytest.raises(ValueError, match=r"PEFT's \(IA\)\^3, and this PeftModel's method is .*LORA"):
        function(lora)


def test_fusing_twice_and_undoing_nothing_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="the model is not fused"):
        unfuse(model)
    fuse(model)
    with pytest.raises(ValueError, match="fused already: unfuse"):
        fuse(model)
    unfuse(model)
    with pytest.raises(ValueError, match="the model is not fused"):
        unfuse(model)


def test_options_that_do_not_exist_change_nothing() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="memory='tiny' is not one of 'fast', 'lean'"):
        fuse(model, memory="tiny")
    with pytest.raises(ValueError, match="backend='abacus'"):
        fuse(model, backend="abacus")
    assert type(model.base_model) is peft.IA3Model


def test_the_backend_is_the_one_asked_for() -> None:
    from gain_ops import BackendUnavailable

    model = tiny().double()
    fuse(model, backend="triton")
    with pytest.raises(BackendUnavailable, match="float64"):
        model(torch.randn(T, 24, dtype=torch.float64))


def test_merged_models_are_refused_both_ways() -> None:
    model = tiny()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged \(default\): call unmerge_adapter\(\) first. PEFT's"):
        fuse(model)
    model = tiny()
    fuse(model)
    model.merge_adapter()
    before = states(model)
    with pytest.raises(ValueError, match=r"adapters are merged \(default\)"):
        unfuse(model)
    assert isinstance(model.base_model.model.k, FusedLinear)
    assert_identical(states(model), before)


@pytest.mark.slow
def test_without_peft_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['peft'] = None; import gain_ops.integrations.peft"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "MissingPackageError: gain_ops.integrations.peft needs PEFT: pip install peft" in run.stderr


# ---------------------------------------------------------------- quantised bases


def quantized(bits: int) -> PeftModel:
    bnb = pytest.importorskip("bitsandbytes")
    model = Tiny()
    for name in ("k", "down"):
        linear = getattr(model, name)
        if bits == 4:
            packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
        else:
            packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        packed.load_state_dict(linear.state_dict())
        setattr(model, name, packed.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    model = get_peft_model(model, config("k", "down"))
    learn(model)
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_bitsandbytes_layers(bits: int, dtype: torch.dtype, autocast: bool) -> None:
    fused, plain = twins(quantized(bits))
    for name in ("k", "down"):
        layer, theirs = getattr(fused.base_model.model, name), getattr(plain.base_model.model, name)
        assert type(layer).__name__ == f"FusedLinear{'4bit' if bits == 4 else '8bitLt'}"
        assert isinstance(layer, type(theirs))
        x = torch.randn(T, layer.in_features).to(dtype)
        outcomes = []
        for module in (layer, theirs):
            inputs = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(inputs)
            dy = torch.ones_like(y)
            outcomes.append([y, *torch.autograd.grad(y, (inputs, module.ia3_l["default"]), dy)])
        for ours, expected in zip(*outcomes, strict=True):
            assert ours.dtype == expected.dtype
            # the same casts and the same products; only the order of the sum over tokens is free
            torch.testing.assert_close(ours, expected)
        with pytest.raises(ValueError, match="adapter_names="):
            layer(x, adapter_names=["default"] * T)
    with fused.disable_adapter(), plain.disable_adapter():
        x = torch.randn(T, 24)
        assert torch.equal(fused(x), plain(x))
    unfuse(fused)
    assert type(fused.base_model.model.k) is type(plain.base_model.model.k)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_layers_keep_no_more_than_pefts(bits: int) -> None:
    fused, plain = twins(quantized(bits))
    x = torch.randn(T, 24, requires_grad=True)
    ours, theirs = (saved_bytes(lambda m=m: m(x), exclude=m, inputs=[x]).total for m in (fused, plain))
    assert ours == theirs

"""Gains that would do nothing, or that were lost: apply() reads the model's code, check() proves it, all name the layer."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops.models.check import watch
from gain_ops.models.record import gained_modules
from gain_ops.models.weight_reads import weight_reads

IDS = torch.arange(1, 9)[None]
X = torch.randn(3, 4)


class Pair(nn.Module):
    """What the models here have."""

    def __init__(self):
        super().__init__()
        self.proj, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.held, self.factor = [self.proj.weight], 1

    def __deepcopy__(self, memo):
        return type(self)()


def scaled(x, module):
    return x @ module.weight.t()


def decorated(function):
    @functools.wraps(function)
    def run(*args):
        return F.linear(*args)

    return run


@decorated
def kernel(x, weight):
    return None


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight


class Direct(Pair):
    def forward(self, x):
        return F.linear(x, self.proj.weight)


class ByKeyword(Pair):
    def forward(self, x):
        return F.linear(input=x, weight=self.proj.weight)


class InAHelper(Pair):
    def forward(self, x):
        return scaled(x, self.proj)


class InAKernel(Pair):
    def forward(self, x):
        return kernel(x, self.proj.weight)


class InAMethod(Pair):
    def forward(self, x):
        return self.project(x)

    def project(self, x):
        weight = self.proj.weight
        return F.linear(x, weight)


class InAProperty(Pair):
    @property
    def packed(self):
        return torch.cat([self.proj.weight, self.other.weight])

    def forward(self, x):
        return F.linear(x, self.packed)


class InAParent(Direct):
    def forward(self, x):
        return super().forward(x)


class InALambda(Pair):
    def forward(self, x):
        times = lambda module: x @ module.weight  # noqa: E731
        return times(self.proj)


class InANestedFunction(Pair):
    def forward(self, x):
        def times(module):
            return x @ module.weight

        return times(self.proj)


class InALoop(Pair):
    def forward(self, x):
        for module in (self.other, self.proj):
            x = x @ module.weight
        return x


class ByName(Pair):
    def forward(self, x):
        return F.linear(x, getattr(self.proj, "weight")) + F.linear(x, self.get_parameter("other.weight"))  # noqa: B009


class FromTheStateDict(Pair):
    def forward(self, x):
        return F.linear(x, self.proj.state_dict()["weight"])


class FromAList(Pair):
    def forward(self, x):
        return F.linear(x, self.held[0])


class ByTheClass(Pair):
    def forward(self, x):
        return nn.Linear.forward(self.proj, x)


class InAutograd(Pair):
    def forward(self, x):
        return OwnFunction.apply(x, self.proj.weight)


class OnlyInTraining(Pair):
    def forward(self, x):
        return x @ self.proj.weight if self.training else self.proj(x)


class BelowAnother(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Pair()])

    def forward(self, x):
        for _, block in enumerate(self.blocks):
            x = x @ block.proj.weight
        return x


class Cast(Pair):
    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight.type(torch.float32))


READERS = (
    Direct, ByKeyword, InAHelper, InAKernel, InAMethod, InAProperty, InAParent, InALambda, InANestedFunction, InALoop, ByName,
    FromTheStateDict, FromAList, ByTheClass, InAutograd, OnlyInTraining, BelowAnother,
    Cast,
)  # fmt: skip


class Asks(Pair):
    """Everything but a read."""

    def forward(self, x):
        if self.factor > 1 and self.training:  # known to be False
            return x @ self.proj.weight
        x = x.to(self.proj.weight.dtype).to(next(self.proj.parameters()).device)
        if isinstance(self.proj.weight, torch.Tensor) and x.dtype != self.proj.weight.dtype:
            x = x.type_as(self.proj.weight)
        rows, _ = self.proj.weight.shape
        empty = torch.zeros_like(self.proj.weight)[:0].sum() + self.proj.weight.new_zeros(rows).sum()
        return self.through(self.proj.forward(x), self.proj) + empty

    def through(self, x, module):
        return module(x)


def unread(model, monkeypatch):
    """apply(), as if no source could be read."""
    monkeypatch.setattr("gain_ops.models.sites.weight_reads", lambda model, layers: {})
    gain_ops.apply(model, [r".*proj"])
    return model


@pytest.mark.parametrize("kind", READERS)
def test_a_weight_that_the_code_reads_is_refused_by_name(kind):
    model = nn.Sequential(kind())
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match=r"a gain on 0\.(blocks\.0\.)?proj would be ignored: .* computes with its weight"
    ):
        gain_ops.apply(model, [r".*proj"])
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", READERS)
def test_check_sees_it_whatever_the_source(kind, monkeypatch):
    model = unread(kind(), monkeypatch)
    with pytest.raises(ValueError, match=r"the gain on (blocks\.0\.)?proj is ignored"):
        gain_ops.check(model, X)
    if kind is not OnlyInTraining:
        with pytest.raises(ValueError, match="is ignored"), watch(model.eval()):
            model(X)


def test_what_is_not_a_read_is_accepted():
    model = Asks()
    gain_ops.apply(model, ["proj"])
    checked = gain_ops.check(model, X)
    assert (checked.used, checked.unused, checked.without_gradient) == (("proj",), (), ())
    with watch(model):
        model(X)


def test_a_condition_of_the_configuration_is_decided():
    model = Asks()
    model.factor = 2
    with pytest.raises(ValueError, match=r"if self\.factor > 1 and self\.training"):
        gain_ops.apply(model, ["proj"])


def test_all_ignored_layers_are_found_at_once():
    model = nn.ModuleList([Direct(), Asks(), InAHelper()])
    layers = [module.proj for module in model]
    assert weight_reads(model, layers).keys() == {id(layers[0]), id(layers[2])}


class Routed(Pair):
    """The other projection is an expert that no token chose."""

    def forward(self, x):
        return self.proj(x)


class CutOff(Pair):
    def forward(self, x):
        with torch.no_grad():
            y = self.proj(x)
        return self.other(y)


class Auxiliary(Pair):
    def forward(self, x):
        self.seen = self.other(x)
        return self.proj(x)


def test_what_check_reports_and_what_it_refuses():
    routed, auxiliary, cut = Routed(), Auxiliary(), CutOff()
    for model in (routed, auxiliary, cut):
        gain_ops.apply(model, [".*"])
    assert gain_ops.check(routed, X).unused == ("other",)
    assert gain_ops.check(auxiliary, X).without_gradient == ("other",)
    with pytest.raises(ValueError, match=r"the gain on proj cannot be trained: .* autograd off"):
        gain_ops.check(cut, X)
    with pytest.raises(ValueError, match="no gains to check"):
        gain_ops.check(Pair(), X)
    unrouted = Routed()
    gain_ops.apply(unrouted, ["other"])
    with pytest.raises(ValueError, match="no gain of Routed got a gradient"):
        gain_ops.check(unrouted, X)


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes, **options)).eval()


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("options", [{}, {"side": "input", "fuse_mlp": True}], ids=["", "fused"])
def test_check_changes_nothing(checkpointing, options):
    model = llama(attention_dropout=0.5, tie_word_embeddings=True)
    gain_ops.apply(model, "gain-ffn" if options else [".*"], **options)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    layers = gained_modules(model)
    model(IDS, labels=IDS).loss.backward()
    gradients = [layer.delta.grad for layer in layers.values()]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    checked = gain_ops.check(model, input_ids=IDS, labels=IDS)
    assert checked.used == tuple(layers)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.delta.grad is grad for layer, grad in zip(layers.values(), gradients, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert not any("forward" in vars(layer) for layer in layers.values())
    assert repr(checked) == f"Checked({len(layers)} layers used, 0 not called, 0 without a gradient)"


def test_a_compiled_model_is_left_alone(monkeypatch):
    model = nn.Sequential(unread(Direct(), monkeypatch))
    model[0].compile(backend="eager")
    with watch(model):
        model(X)


# gains that the model loses


@pytest.mark.parametrize("how", [gain_ops.absorb, lambda model: gain_ops.save_gains(model, "never"), gain_ops.check])
def test_a_gained_head_that_is_replaced_is_missed_by_name(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = llama(tie_word_embeddings=False)
    gain_ops.apply(model, ["lm_head", "o_proj"])
    model.lm_head.delta.data.fill_(1)
    model.resize_token_embeddings(48, mean_resizing=False)
    with pytest.raises(ValueError, match="lm_head, and it is gone: Linear is there now"):
        how(model)
    assert not (tmp_path / "never").exists()
    gain_ops.remove(model)
    assert not gained_modules(model)


@pytest.mark.parametrize(
    ("lose", "name"),
    [
        (lambda model: setattr(model.model, "layers", model.model.layers[:1]), r"model\.layers\.1\.self_attn\.o_proj"),
        (
            lambda model: setattr(model.model.layers[0].self_attn, "o_proj", nn.Identity()),
            r"layers\.0\.self_attn\.o_proj",
        ),
        (lambda model: setattr(model, "lm_head", None), "lm_head"),
    ],
)
def test_whatever_is_gone_is_named(lose, name, tmp_path):
    model = llama(tie_word_embeddings=False)
    gain_ops.apply(model, ["lm_head", "o_proj"])
    copied = copy.deepcopy(model)
    lose(model)
    with pytest.raises(ValueError, match=f"cannot save the gains: .*{name}, and it is gone"):
        gain_ops.save_gains(model, tmp_path / "g")
    gain_ops.save_gains(copied, tmp_path / "g")


def test_a_switch_between_sets_names_a_lost_layer(tmp_path):
    model = llama(tie_word_embeddings=False)
    gain_ops.apply(model, ["lm_head"])
    gain_ops.add_gains(model, {"one": None})
    model.resize_token_embeddings(48, mean_resizing=False)
    with pytest.raises(ValueError, match=r"cannot switch gains: .* lm_head"):
        gain_ops.set_gains(model, None)


@pytest.mark.parametrize("options", [{}, {"side": "input", "fuse_mlp": True}, {"fuse_residual": True}])
def test_gains_that_accelerate_offloads_run_and_are_not_trained(options, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = llama(), torch.arange(8)[None]
    gain_ops.apply(model, "gain-ffn", **options)
    with torch.no_grad():
        expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if options:
        with torch.no_grad(), pytest.raises(ValueError, match="fused layers read what the hooks do not bring"):
            model(ids)
    else:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
        with pytest.raises(ValueError, match=r"accelerate has offloaded the gains .* gets no gradient: train before"):
            model(ids)
    with pytest.raises(ValueError, match=r"accelerate has offloaded the gains"):
        gain_ops.check(model, input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        gain_ops.save_gains(model, tmp_path / "gains.safetensors")


def test_offloaded_weights_get_no_gains():
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"cannot put gains on model.layers.0.self_attn.o_proj, .*accelerate has offloaded"
    ):
        gain_ops.apply(model)
    assert [name for name, _ in model.named_modules()] == names

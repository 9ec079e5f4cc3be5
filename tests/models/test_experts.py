"""Gains on the experts of a mixture, in each family of the installed transformers that has experts as 3-D parameters."""

import copy
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name

import gain_ops
from gain_ops.gainfiles.combining import combine_gains
from gain_ops.gainfiles.file import read_gains, write_gains
from gain_ops.models.experts import expert_linears
from gain_ops.models.record import gained_modules
from gain_ops.testing import assert_no_worse_than_torch

from support.tiny_architectures import CannotBuild, build, model_types

# plain, transposed with biases and interleaved, no gate, a norm after each expert, without the decorator, one below the other
FEW = ("mixtral", "gpt_oss", "nemotron_h", "muse_spark_text", "llama4_text", "jetmoe")


def logits(model, inputs):
    torch.manual_seed(3)
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def eager_twin(model):
    """The same in float64, expert after expert: torch has no grouped_mm for it."""
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")
    return twin


def scale_weights(model, gains, side):
    """The plain model's weights, scaled as the gains say: W[e] with its row of them."""
    linears = dict(expert_linears(model))
    for name, delta in gains.items():
        linear = linears[name]
        weight = linear.weight.data.view(linear.shape)
        by_rows = (side == "output") != linear.transposed
        weight *= (1 + delta.to(weight.dtype)).unsqueeze(2 if by_rows else 1)


def prove(model_type, side):
    model, inputs = build(model_type)
    names = [name for name, _ in expert_linears(model)]
    assert names
    plain, state = copy.deepcopy(model), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = logits(model, inputs)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    logits(plain, inputs).float().square().sum().backward()

    gain_ops.apply(model, [re.escape(name) for name in names], side=side)
    layers = gained_modules(model)
    assert list(layers) == names
    y = logits(model, inputs)
    assert torch.equal(y, expected), "not bit-equal at delta = 0"
    y.float().square().sum().backward()
    for name, linear in expert_linears(plain):
        layer = layers[name]
        # ddelta is the sum of dW * W over the other dimension: zero where the expert got no token
        products = (linear.weight.grad * linear.weight).view(linear.shape).double().sum(3 - layer.gained_dim)
        got_tokens = linear.weight.grad.view(linear.shape).abs().sum((1, 2)) > 0
        assert torch.equal(layer.delta.grad.abs().sum(1) > 0, got_tokens), (
            f"{name}: an expert with tokens has no gradient"
        )
        torch.testing.assert_close(
            layer.delta.grad.double(), products, rtol=1e-3, atol=1e-5 * products.abs().max().item()
        )

    generator = torch.Generator().manual_seed(5)
    gains = {name: torch.randn(layer.delta.shape, generator=generator) * 0.1 for name, layer in layers.items()}
    scaled, twin = copy.deepcopy(plain), eager_twin(plain)
    for name, layer in layers.items():
        layer.delta.data.copy_(gains[name])
    for other in (scaled, twin):
        scale_weights(other, gains, side)
    with torch.no_grad():
        y = logits(model, inputs)
        assert not torch.equal(y, expected)
        try:
            truth = logits(twin, inputs)
        except RuntimeError:  # a model that computes in float32, whatever its weights are
            torch.testing.assert_close(y, logits(scaled, inputs))
        else:
            assert_no_worse_than_torch("logits", y, logits(scaled, inputs), truth)
    gain_ops.remove(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits(model, inputs), expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("model_type", FEW)
def test_gains_do_what_scaled_weights_do(model_type, side):
    prove(model_type, side)


class Flat(nn.Module):
    """DBRX's experts and its router in miniature; transformers' own model cannot be built from a fresh config."""

    def __init__(self):
        super().__init__()
        from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
        from transformers.models.dbrx.modeling_dbrx import DbrxExperts

        self.experts = DbrxExperts(DbrxFFNConfig(hidden_size=16, ffn_hidden_size=24, moe_num_experts=4))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x):
        k = torch.arange(2 * x.shape[1]).view(-1, 2) % 3  # the fourth gets no token
        return self.experts(x, k, torch.full(k.shape, 0.5))


@pytest.mark.parametrize("side", ["output", "input"])
def test_experts_in_one_matrix(side):
    torch.manual_seed(0)
    model, x = Flat(), torch.randn(1, 6, 16)
    expected = model(x)
    applied = gain_ops.apply(model, ["w2", "v1"], side=side)
    assert applied.names == ("experts.mlp.v1", "experts.mlp.w2")
    layers = gained_modules(model)
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    for layer in layers.values():
        assert (layer.delta.grad.abs().sum(1) > 0).tolist() == [True, True, True, False]
        layer.delta.data.normal_(std=0.1)
    y = model(x)
    gain_ops.absorb(model)
    torch.testing.assert_close(model(x), y)
    assert not torch.allclose(y, expected)


@pytest.fixture
def mixtral():
    return build("mixtral")


def gained(model, seed=7):
    gain_ops.apply(model, "gain-ffn")
    torch.manual_seed(seed)
    for layer in gained_modules(model).values():
        layer.delta.data.normal_(std=0.1)
    return model


def test_the_preset_takes_each_expert_or_their_sum_or_none(mixtral):
    model, inputs = mixtral
    plain, experts = copy.deepcopy(model), [f"model.layers.{i}.mlp.experts" for i in range(2)]
    applied = gain_ops.apply(model, "gain-ffn")
    assert [name for name in applied.names if "experts" in name] == [f"{name}.down_proj" for name in experts]
    assert applied.trained == 2 * (32 + 4 * 32)
    gain_ops.remove(model)
    applied = gain_ops.apply(model, "gain-ffn", experts=False)
    assert not any("experts" in name for name in applied.names)
    assert "left out: the down projections of experts" in repr(applied)
    gain_ops.remove(model)
    applied = gain_ops.apply(model, "gain-ffn", experts="shared")
    assert [name for name in applied.names if "experts" in name] == experts
    assert applied.trained == 4 * 32
    assert torch.equal(logits(model, inputs), logits(plain, inputs))
    for wrong in (
        {"experts": "some"},
        {"experts": "shared", "side": "input"},
        {"experts": False, "targets": ["o_proj"]},
    ):
        with pytest.raises(ValueError, match="experts="):
            gain_ops.apply(copy.deepcopy(plain), **{"targets": "gain-ffn", **wrong})


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
def test_one_gain_for_the_sum_of_the_experts(model_type, tmp_path):
    """Biases are in the sum, so they are scaled with the weights."""
    model, inputs = build(model_type)
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj_bias"):
            nn.init.normal_(parameter)
    fresh = copy.deepcopy(model)
    gain_ops.apply(model, "gain-ffn", experts="shared")
    for layer in gained_modules(model).values():
        layer.delta.data.normal_(std=0.1)
    gain_ops.save_gains(model, tmp_path / "gains.safetensors")
    with torch.no_grad():
        y = logits(model, inputs)
        gain_ops.load_gains(fresh, tmp_path / "gains.safetensors")
        assert torch.equal(logits(fresh, inputs), y)
        gain_ops.absorb(model)
        torch.testing.assert_close(logits(model, inputs), y)


def test_a_sum_behind_a_norm_has_no_gain():
    model, _ = build("muse_spark_text")
    assert not any("experts" in name for name in gain_ops.apply(model, "gain-ffn", experts="shared").names)


def test_gain_files_keep_a_row_an_expert(mixtral, tmp_path):
    model, inputs = mixtral
    fresh, other = copy.deepcopy(model), copy.deepcopy(model)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    gain_ops.save_gains(gained(model), one)
    gain_ops.save_gains(gained(other, seed=8), two)
    name = "model.layers.1.mlp.experts.down_proj"
    assert read_gains(one).deltas[name].shape == (4, 32)
    write_gains(combine_gains([one, two], how="mean"), tmp_path / "both.safetensors")
    both = read_gains(tmp_path / "both.safetensors").deltas[name]
    expected = (gained_modules(model)[name].delta + gained_modules(other)[name].delta) / 2
    torch.testing.assert_close(both, expected.detach())

    gain_ops.add_gains(fresh, {"one": one, "two": two})
    for name, of in (("one", model), ("two", other)):
        gain_ops.set_gains(fresh, name)
        assert torch.equal(logits(fresh, inputs), logits(of, inputs))
    gain_ops.remove(fresh)
    fresh.model.layers[1].mlp.experts.down_proj.data[2] += 0.5
    with pytest.raises(ValueError, match=r"differ in 1 of 4 layers, model\.layers\.1\.mlp\.experts\.down_proj"):
        gain_ops.load_gains(fresh, one)


def test_files_of_other_experts_are_refused(mixtral, tmp_path):
    model, _ = mixtral
    fresh = copy.deepcopy(model)
    gain_ops.save_gains(gained(model), tmp_path / "gains.safetensors")
    experts = fresh.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        experts._parameters[name] = nn.Parameter(experts._parameters[name].data[:3])
    with pytest.raises(ValueError, match="takes 3x32 gains on the output side, the file has 4x32"):
        gain_ops.load_gains(fresh, tmp_path / "gains.safetensors", check_base=False)


def test_peft_and_checkpoints_on_disk_are_refused_in_words(mixtral, tmp_path):
    from gain_ops.checkpoints.plan import plan
    from gain_ops.integrations.ia3 import to_peft

    model, _ = mixtral
    model.save_pretrained(tmp_path / "base")
    gain_ops.save_gains(gained(model), tmp_path / "gains.safetensors")
    with pytest.raises(ValueError, match="parameters without a module"):
        to_peft(tmp_path / "gains.safetensors", tmp_path / "adapter", model)
    with pytest.raises(ValueError, match=r"gains of experts .*load_gains\(\), gain_ops\.absorb\(\) and save_pret"):
        plan(tmp_path / "base", tmp_path / "gains.safetensors")


def test_copies_and_pickles_have_gains_of_their_own(mixtral):
    model, inputs = mixtral
    keys = list(model.state_dict())
    expected = logits(gained(model), inputs)
    assert [key for key in model.state_dict() if not key.endswith("delta")] == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), expected)
        layers = gained_modules(other)
        experts = layers["model.layers.0.mlp.experts.down_proj"]
        assert experts.owner is other.model.layers[0].mlp.experts
        experts.delta.data += 1
        assert not torch.equal(logits(other, inputs), expected)
        gain_ops.remove(other)
        assert type(pickle.loads(pickle.dumps(other)).model.layers[0].mlp.experts).__name__ == "MixtralExperts"


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_implementation_that_was_chosen_runs(mixtral, implementation):
    """Bit for bit, with gains on one of two layers, and chosen before or after the gains."""
    model, inputs = mixtral
    model.set_experts_implementation(implementation)
    expected = logits(model, inputs)
    gain_ops.apply(model, [r"layers\.1\.mlp\.experts\.down_proj"])
    assert torch.equal(logits(model, inputs), expected)
    model.set_experts_implementation("eager" if implementation != "eager" else "batched_mm")
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model, inputs), expected)


def test_a_kernel_without_gains_is_replaced_by_grouped_mm(mixtral):
    model, inputs = mixtral
    expected = logits(gained(model), inputs)
    model.set_experts_implementation("deepgemm")
    assert torch.equal(logits(model, inputs), expected)


def test_generation_and_checkpointing(mixtral):
    model, inputs = mixtral
    gained(model)
    new = {"max_new_tokens": 3, "do_sample": False}
    tokens = model.generate(inputs["input_ids"], **new)
    model.zero_grad()
    y = logits(model, inputs)
    y.sum().backward()
    grads = {name: layer.delta.grad.clone() for name, layer in gained_modules(model).items()}
    model.zero_grad()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    logits(model, inputs).sum().backward()
    assert all(torch.equal(layer.delta.grad, grads[name]) for name, layer in gained_modules(model).items())
    model.eval().gradient_checkpointing_disable()
    gain_ops.absorb(model)
    assert torch.equal(model.generate(inputs["input_ids"], **new), tokens)


@pytest.mark.slow
def test_compile_makes_one_graph(mixtral):
    model, inputs = mixtral
    expected = logits(gained(model), inputs)
    expected.sum().backward()
    grads = {name: layer.delta.grad.clone() for name, layer in gained_modules(model).items()}
    model.zero_grad()
    y = logits(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    for name, layer in gained_modules(model).items():
        torch.testing.assert_close(layer.delta.grad, grads[name], rtol=1e-4, atol=1e-5)


def test_a_gain_saves_one_activation(mixtral):
    """z, of every token that an expert gets; the weights and their gradients are never made."""
    experts = mixtral[0].model.layers[0].mlp.experts.requires_grad_(False)
    x, weights = torch.randn(64, 32, requires_grad=True), torch.rand(64, 2, requires_grad=True)
    index = torch.randint(0, 4, (64, 2))

    def saved():
        return gain_ops.saved_bytes(lambda: experts(x, index, weights), exclude=experts).total

    frozen = saved()
    gain_ops.apply(experts, ["down_proj"])
    assert saved() == frozen + 64 * 2 * 32 * 4


def test_check_sees_the_experts(mixtral):
    model, inputs = mixtral
    checked = gain_ops.check(gained(model), **inputs)
    assert checked.used == tuple(gained_modules(model))


def test_another_use_of_the_weight_is_refused(mixtral):
    model, inputs = mixtral
    experts = model.model.layers[0].mlp.experts

    class Odd(type(experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states + self.down_proj.sum()

    experts.__class__ = Odd
    gained(model)
    with pytest.raises(
        AttributeError, match=r"the gain on down_proj of GainOdd cannot be used.* a gain knows products"
    ):
        model(**inputs)


def test_experts_of_an_unknown_layout_are_refused(mixtral):
    model, _ = mixtral
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match="is no layout of experts that is known"):
        gain_ops.apply(model, "gain-ffn")
    other = model.model.layers[1].mlp.experts
    other.forward = other.forward
    with pytest.raises(ValueError, match="would be ignored: the MixtralExperts that reads it has a forward of its own"):
        gain_ops.apply(model, [r"1\.mlp\.experts\.down_proj"])


def test_weights_in_half_precision_lose_gains_that_absorb_counts(mixtral):
    model, _ = mixtral
    model.to(torch.bfloat16)
    gain_ops.apply(model, [r"0\.mlp\.experts\.down_proj"])
    (layer,) = gained_modules(model).values()
    assert layer.delta.dtype == torch.float32
    layer.delta.data[:2] = 1e-4
    layer.delta.data[2:] = 0.5
    assert gain_ops.absorb(model).lost == 64


def test_a_trained_mixture_is_a_plain_checkpoint(mixtral, tmp_path):
    model, inputs = mixtral
    ids = inputs["input_ids"]
    gain_ops.apply(model, "gain-ffn")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        y = logits(model, inputs)
        gain_ops.absorb(model)
        absorbed = logits(model, inputs)
        torch.testing.assert_close(absorbed, y, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "adapted")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapted"), inputs), absorbed)


LISTED = Path(__file__).parents[2] / "docs/howto/experts.md"


@pytest.mark.slow
def test_every_family_and_the_list_in_the_docs():
    """ACCEPT=1 writes the list."""
    kinds: dict[str, list[str]] = {}
    for model_type in with_experts():
        try:
            model, _ = build(model_type)
        except CannotBuild:
            continue
        linears = expert_linears(model)
        if linears:
            prove(model_type, "output")
            kinds.setdefault(layout_of(linears), []).append(model_type)
    found = "".join(f"- {kind}: {', '.join(names)}\n" for kind, names in sorted(kinds.items()))
    before, after = "<!-- experts -->\n", "<!-- /experts -->"
    text = LISTED.read_text()
    head, rest = text.split(before)
    listed, tail = rest.split(after)
    if os.environ.get("ACCEPT"):
        LISTED.write_text(head + before + found + after + tail)
    else:
        assert listed == found, f"run this test with ACCEPT=1, and look at the diff of {LISTED.name}"


def with_experts():
    """The model types whose source has experts."""
    folder = Path(transformers.__file__).parent / "models"
    sources = {path.parent.name: path.read_text() for path in folder.glob("*/modeling_*.py")}
    return [name for name in model_types() if "Experts" in sources.get(model_type_to_module_name(name), "")]


def layout_of(linears):
    """The layout of a model's experts in words, by its first down projection."""
    linear = next(linear for name, linear in linears if re.search(r"(down_proj|output_linear)$", name))
    owner = linear.owner
    names = [name for name, _ in owner.named_parameters(recurse=False) if "gain" not in name]
    parts = [", ".join(f"`{name}`" for name in names if not name.endswith("_bias"))]
    parts += ["stored as [in, out]"] if linear.transposed else []
    parts += ["biases"] if any(name.endswith("_bias") for name in names) else []
    parts += ["a norm after each expert"] if getattr(owner, "has_post_expert_norm", False) else []
    return ", ".join(parts)

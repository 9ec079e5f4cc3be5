"""Over the architectures of the installed transformers: a gain is refused by name, or does what its weight does."""

import re

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import gain_ops
from gain_ops.models.record import gained_modules
from gain_ops.models.sites import linear_modules
from gain_ops.models.weight_reads import weight_reads

from support.tiny_architectures import CannotBuild, build, model_types

FEW = ("bert", "clip_text_model", "falcon", "gpt2", "llama", "mixtral", "opt", "qwen3", "t5", "vit")
IGNORED = {
    "wavlm": r"encoder\.layers\.0\.attention\.out_proj",
    "mamba": r"backbone\.layers\.0\.mixer\.out_proj",
    "mamba2": r"mixer\.out_proj",
    "falcon_mamba": r"mixer\.out_proj",
    "bamba": r"mamba\.out_proj",
    "falcon_h1": r"mamba\.out_proj",
    "granitemoehybrid": r"mamba\.out_proj",
    "nemotron_h": r"mixer\.out_proj",
    "zamba2": r"mamba.*\.out_proj",
    "deberta": r"in_proj",
}

ENDLESS = ("vits",)  # a gain on the durations that it predicts makes minutes of speech

# Linear maps that return more than a tensor, or are called with more or with another size: they fail in words.
UNLIKE = r"returns a tuple|is called with|object has no attribute|delta must be"


@torch.no_grad()
def outputs(model, inputs):
    torch.manual_seed(3)
    output = model(**inputs)
    leaves = tree_leaves(output if isinstance(output, tuple | dict | torch.Tensor) else vars(output))
    return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def same(one, other):
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


def one_of_each_kind(model):
    kinds = {}
    for name, module in linear_modules(model):
        kinds.setdefault(re.sub(r"\d+", "*", name), (name, module))
    return kinds.values()


def prove(model, inputs):
    """AssertionError for a layer whose weight matters while its gain does not; the names of the layers that were tried."""
    reads = weight_reads(model, [module for _, module in linear_modules(model)])
    tried = [name for name, module in one_of_each_kind(model) if id(module) not in reads]
    free = [re.escape(name) for name, module in linear_modules(model) if id(module) not in reads]
    if not free:
        return []
    gain_ops.apply(model, free)
    layers = gained_modules(model)
    tried = [name for name in tried if name in layers]
    expected = outputs(model, inputs)
    moved = []
    for name in tried:
        layer = layers[name]
        # not one number: a norm after the projection would take it out again
        layer.delta.data.copy_(torch.linspace(0.1, 0.4, layer.delta.numel()).view_as(layer.delta))
        changed = not same(expected, outputs(model, inputs))
        layer.delta.data.zero_()
        if changed:
            moved.append(name)
        elif isinstance(layer.weight, torch.Tensor) and not _tied(model, layer.weight):
            before = layer.weight.data.clone()
            layer.weight.data.mul_(1.25)
            assert same(expected, outputs(model, inputs)), f"the gain on {name} is ignored"
            layer.weight.data.copy_(before)
    return moved


def _tied(model: nn.Module, weight: torch.Tensor) -> bool:
    return sum(any(p is weight for p in module._parameters.values()) for module in model.modules()) > 1


@pytest.mark.parametrize("model_type", FEW)
def test_a_gain_moves_the_output_and_is_trained(model_type):
    model, inputs = build(model_type)
    moved = prove(model, inputs)
    assert moved
    assert set(moved) <= set(gain_ops.check(model, **inputs).used)


@pytest.mark.parametrize("model_type", ["wavlm", "mamba", "granitemoehybrid"])
def test_a_layer_that_is_not_called_is_refused_by_name(model_type):
    model, _ = build(model_type)
    with pytest.raises(ValueError, match=f"a gain on .*{IGNORED[model_type]} would be ignored"):
        gain_ops.apply(model, [IGNORED[model_type]])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in IGNORED if name not in ("wavlm", "mamba", "granitemoehybrid")])
def test_more_layers_that_are_not_called(model_type):
    test_a_layer_that_is_not_called_is_refused_by_name(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in (*FEW, *ENDLESS)])
def test_every_architecture(model_type):
    try:
        model, inputs = build(model_type)
    except CannotBuild as error:
        pytest.skip(str(error)[:200])
    try:
        moved = prove(model, inputs)
    except (AttributeError, TypeError, ValueError) as error:
        if re.search(UNLIKE, str(error)):
            pytest.skip(f"a linear map of its own: {error}")
        raise
    try:
        checked = gain_ops.check(model, **inputs)
    except ValueError as error:  # what only training needs, such as labels, or a part that runs with autograd off
        if "is ignored" in str(error):
            raise
    else:
        assert set(moved) <= {*checked.used, *checked.without_gradient}

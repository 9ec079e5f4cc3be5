"""FFNs that do more than one expression (Bloom, BERT): the gain goes into their activation, and all else stays."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import gain_ops
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.models.ffn_layout import Chain, chains_of
from gain_ops.models.folded_activation import FoldedActivation, folded_activations
from gain_ops.testing import assert_no_worse_than_torch

from support.tiny_architectures import build

FAMILIES = ["bloom", "bert", "hubert", "megatron-bert"]


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result = model(**inputs)
    return next(value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point())


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    y = outputs(model, inputs)
    torch.manual_seed(1)
    dy = torch.randn(y.shape, dtype=torch.float32).to(y.dtype)
    return [y, *torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad], dy)]


def gained(family: str, **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = build(family)
    gain_ops.apply(model, "gain-ffn", side="input", **options)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            nn.init.normal_(parameter, std=0.3)
    return model, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_map_and_gradients(family: str) -> None:
    plain, inputs = gained(family)
    folded, _ = gained(family, fuse_mlp=True)
    assert len(list(folded_activations(folded))) == 2
    folded.load_state_dict(plain.state_dict())
    floating = {name: x.double() for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    exact = gradients(copy.deepcopy(plain).double(), inputs | floating)
    for result, torchs, truth in zip(gradients(folded, inputs), gradients(plain, inputs), exact, strict=True):
        assert_no_worse_than_torch("y or ddelta", result, torchs, truth)


@pytest.mark.parametrize("family", ["bloom", "bert"])
def test_the_hidden_activation_is_not_saved_again(family: str) -> None:
    plain, inputs = gained(family)
    folded, _ = gained(family, fuse_mlp=True)
    tokens = inputs["input_ids"].numel()
    downs = [folded.get_submodule(name) for name, p in folded.named_modules() if isinstance(p, FoldedActivation)]
    hidden = sum(4 * tokens * module._gain_of[0].in_features for module in downs)
    eager, kept = (saved_bytes(lambda m=m: outputs(m, inputs), exclude=m).total for m in (plain, folded))
    assert eager - kept == hidden


@pytest.mark.parametrize("family", ["bloom", "bert"])
def test_remove_restores_classes_and_bits(family: str) -> None:
    model, inputs = build(family)
    kinds, plain, names = [type(m) for m in model.modules()], outputs(model, inputs), list(model.state_dict())
    gain_ops.apply(model, "gain-ffn", side="input", fuse_mlp=True)
    torch.testing.assert_close(outputs(model, inputs), plain)
    gain_ops.remove(model)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert torch.equal(outputs(model, inputs), plain)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_its_own_gains(how: str) -> None:
    model, inputs = gained("bert", fuse_mlp=True)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    before = outputs(model, inputs)
    assert torch.equal(outputs(other, inputs), before)
    for name, parameter in other.named_parameters():
        if name.endswith("delta"):
            nn.init.zeros_(parameter)
    assert not torch.equal(outputs(other, inputs), before)
    assert torch.equal(outputs(model, inputs), before)


def test_absorbed_checked_and_compiled() -> None:
    model, inputs = gained("bloom", fuse_mlp=True)
    gain_ops.check(model, **inputs)
    expected = outputs(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, inputs), expected)
    gain_ops.absorb(model)
    assert not list(folded_activations(model))
    torch.testing.assert_close(outputs(model, inputs), expected)


def test_what_it_cannot_serve_is_refused() -> None:
    for options in ({"memory": "lean"}, {"mlp_chunk": 4}):
        model, _ = build("bert")
        with pytest.raises(ValueError, match="BertLayer does more"):
            gain_ops.apply(model, "gain-ffn", side="input", fuse_mlp=True, **options)
        assert not list(folded_activations(model))
    model, _ = build("bert")
    first, second = (layer.intermediate for layer in model.get_submodule("bert.encoder.layer"))
    second.intermediate_act_fn = first.intermediate_act_fn
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="several FFNs share one"):
        gain_ops.apply(model, "gain-ffn", side="input", fuse_mlp=True)
    assert [type(m) for m in model.modules()] == kinds
    from gain_ops.integrations.fsdp import shard_gains

    model, _ = gained("bert", fuse_mlp=True)
    with pytest.raises(ValueError, match=r"shard_gains cannot serve .* without fuse_mlp"):
        shard_gains(model)


class Forwards:
    """Forwards with a chain in them, and forwards whose activation is read by more than the projection."""

    class Settings(nn.Module):
        wide = False

        def __init__(self) -> None:
            super().__init__()
            self.many = 1

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            if self.many > 1:
                return self.other(x)
            return r + self.norm(self.down(self.act(self.up(x))))

    class Training(Settings):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            if self.training:
                x = x * 2
            return r + self.down(self.act(self.up(x)))

    class Reads(Settings):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            h = self.act(self.up(x))
            return self.down(h) + h

    class Twice(Settings):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return self.down(self.act(self.up(x))) + self.act(r)

    class Weight(Settings):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return self.down(self.act(self.up(x))) + r @ self.down.weight


@pytest.mark.parametrize("name", ["Settings", "Training", "Reads", "Twice", "Weight"])
def test_a_chain_is_read_by_its_projection_alone(name: str) -> None:
    chain = Chain("up", "act", "down")
    assert (chain in chains_of(getattr(Forwards, name)())) == (name == "Settings")

"""memory="auto": each gain goes into a pass that the model makes anyway, where one is known, and nothing is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gain_ops
from gain_ops.measure.saved_bytes import saved_bytes

from support.tiny_architectures import build


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result = model(**inputs)
    return next(value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point())


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    ("family", "side", "folded"),
    [
        ("llama", "output", ("o_proj", "down_proj")),
        ("llama", "input", ("down_proj",)),
        ("llama", "mixed", ("o_proj", "down_proj")),
        ("bert", "input", ("output.dense",)),
        ("gpt2", "output", ()),
        ("gpt2", "input", ("c_proj",)),
        ("t5", "input", ()),
    ],
)
def test_what_is_known_is_folded_and_the_rest_runs_as_fast(family: str, side: str, folded: tuple[str, ...]) -> None:
    plain, inputs = build(family)
    auto = copy.deepcopy(plain)
    kinds = [type(module) for module in plain.modules()]
    expected = logits(plain, inputs)
    fast, applied = (
        gain_ops.apply(plain, "gain-ffn", side=side),
        gain_ops.apply(auto, "gain-ffn", side=side, memory="auto"),
    )
    assert fast.names == applied.names
    assert set(applied.folded) <= set(applied.names)
    assert {name for name in applied.names if name.endswith(folded or ("none",))} >= set(applied.folded)
    assert bool(applied.folded) is bool(folded)
    torch.testing.assert_close(logits(drawn(auto), inputs), logits(drawn(plain), inputs))
    eager, kept = (saved_bytes(lambda m=m: logits(m, inputs), exclude=m).total for m in (plain, auto))
    # a fold of a norm saves one number a row more, its inverse rms
    assert kept <= eager + 4 * inputs["input_ids"].numel() * len(applied.folded)
    gain_ops.remove(auto)
    assert [type(module) for module in auto.modules()] == kinds
    assert torch.equal(logits(auto, inputs), expected)


def test_a_layer_that_cannot_be_folded_leaves_the_others() -> None:
    model, inputs = build("llama")
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    applied = gain_ops.apply(model, "gain-ffn", side="mixed", memory="auto")
    assert applied.folded == ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    assert "2 folded" in repr(applied)
    logits(model, inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_load_gains_takes_it(tmp_path) -> None:
    model, inputs = build("llama")
    other = copy.deepcopy(model)
    gain_ops.apply(model, "gain-ffn")
    gain_ops.save_gains(drawn(model), tmp_path / "g.safetensors")
    assert len(gain_ops.load_gains(other, tmp_path / "g.safetensors", memory="auto").folded) == 4
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs))


def test_a_gain_on_the_output_side_is_not_taken_for_one_before_it() -> None:
    model, _ = build("llama")
    model.model.layers[0].mlp.down_proj = gain_ops.GainLinear.from_linear(model.model.layers[0].mlp.down_proj)
    from gain_ops.models.fused_mlp import fuse

    with pytest.raises(ValueError, match="this one is on the output side"):
        fuse(model.model.layers[0].mlp, recompute=False, chunk=None)

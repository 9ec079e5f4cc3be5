"""Gains folded into the residual adds of transformers' decoder layers: the same map, no pass of their own, and undone."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gain_ops
from gain_ops.integrations.fsdp import shard_gains
from gain_ops.integrations.tensor_parallel import place_gains
from gain_ops.layers.gained import Gained
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.models.decoder_layout import folds_of
from gain_ops.models.fused_mlp import FusedMlp
from gain_ops.models.fused_residual import FusedResidual, OnePassNorm, WithheldGain
from gain_ops.testing import PlainGain, assert_no_worse_than_torch

from support.quantized_bases import TRAINABLE, plain_layer

IDS = torch.arange(2, 20).view(2, 9)


def model_of(family: str, **extra: object) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    small: dict[str, object] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 32,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = getattr(transformers, f"{family}Config")(**small | extra)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms of ones would hide a weight that is forgotten
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def draw(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("delta"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def plain_twin(model: nn.Module, targets: str = "gain-ffn") -> nn.Module:
    """The model with the composite in plain torch in the place of each gain."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for name in gain_ops.apply(copy.deepcopy(model), targets).names:
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, PlainGain(twin.get_submodule(name), "output"))
    return twin


def outcome(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The logits, and the gradients of the gains."""
    model.zero_grad()
    logits = model(IDS).logits
    logits.double().square().mean().backward()
    gradients = [p.grad.double().flatten() for n, p in model.named_parameters() if n.endswith("delta")]
    return logits.detach(), torch.cat(gradients)


def fused(model: nn.Module, **options: object) -> nn.Module:
    gain_ops.apply(model, **{"targets": "gain-ffn", "fuse_residual": True} | options)
    return model


def is_fused(model: nn.Module) -> bool:
    return any(isinstance(module, FusedResidual | WithheldGain | OnePassNorm) for module in model.modules())


PRE_NORM = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Glm", "SmolLM3", "Ministral", "Apertus", "Arcee"]
POST_NORM = ["Gemma2", "Gemma3Text", "Olmo2", "Glm4", "Exaone4"]
slow = pytest.mark.slow


def some_fast(families: list[str], fast: set[str]) -> list[object]:
    return [family if family in fast else pytest.param(family, marks=slow) for family in families]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", some_fast(PRE_NORM + POST_NORM, {"Llama", "Gemma2"}))
def test_the_same_map_and_gradients_and_undone_to_the_bit(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    logits = model(IDS).logits
    exact, plain = draw(plain_twin(copy.deepcopy(model).double())), draw(plain_twin(model))
    fused(model)
    assert sum(isinstance(module, FusedResidual) for module in model.modules()) == 2
    assert sum(isinstance(module, WithheldGain) for module in model.modules()) == 4
    if dtype == torch.float32 and family in PRE_NORM:
        assert torch.equal(model(IDS).logits, logits)  # at delta = 0
    for name, *results in zip(("logits", "ddelta"), *map(outcome, (draw(model), plain, exact)), strict=True):
        assert_no_worse_than_torch(name, *results)
    assert {name for name in model.state_dict() if name not in before} == {
        f"model.layers.{layer}.{name}.delta" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    gain_ops.remove(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Granite", r"o_proj: the forward of GraniteDecoderLayer does not add what self_attn returns"),
        pytest.param("Phi3", "Phi3DecoderLayer does not add", marks=slow),  # a dropout
        pytest.param("Cohere", "CohereDecoderLayer does not add", marks=slow),  # one add for both
        pytest.param("StableLm", "StableLmDecoderLayer does not add", marks=slow),
        pytest.param("Olmo", "OlmoLayerNorm is not a known RMSNorm", marks=slow),
        pytest.param("Helium", "HeliumRMSNorm is not a known RMSNorm", marks=slow),
        pytest.param("SeedOss", "SeedOssAttention does not end with this projection", marks=slow),
    ],
)
def test_a_layer_that_says_something_else_is_refused_and_nothing_is_left(family: str, message: str) -> None:
    model = model_of(family)
    with pytest.raises(ValueError, match=f"fuse_residual cannot serve .*{message}.*Leave fuse_residual off"):
        fused(model)
    assert not is_fused(model)
    assert not any(isinstance(module, Gained) for module in model.modules())


def test_a_block_saves_what_a_frozen_one_saves_and_each_z() -> None:
    model = model_of("Llama")
    x = torch.randn(2, 9, 16, requires_grad=True)

    def saved(model: nn.Module) -> int:
        layer = model.model.layers[0]
        positions = model.model.rotary_emb(x, torch.arange(9)[None])
        return saved_bytes(lambda: layer(x, position_embeddings=positions), exclude=layer, inputs=[*positions]).new

    frozen = saved(model.requires_grad_(False))
    unfused = copy.deepcopy(model)
    gain_ops.apply(unfused, "gain-ffn")
    z, one = x.numel() * 4, 16 * 4  # one: the gain of the norm that no gain is folded into
    assert saved(fused(model)) == frozen + 2 * z + one
    assert saved(fused(model_of("Llama"), targets="gain")) == frozen + z + one
    assert saved(unfused) == frozen + 2 * z
    model.requires_grad_(False)
    assert saved(model) == frozen + one  # frozen gains need no z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_sides_with_fuse_mlp(dtype: torch.dtype) -> None:
    model, other = model_of("Llama").to(dtype), model_of("Llama").to(dtype)
    fused(model, side="mixed", fuse_mlp=True)
    applied = gain_ops.apply(other, "gain-ffn", side="mixed")
    assert applied.side == "mixed"
    sides = {name.rpartition(".")[2]: m.side for name, m in model.named_modules() if isinstance(m, Gained)}
    assert sides == {"o_proj": "output", "down_proj": "input"}
    assert sum(isinstance(module, FusedMlp) for module in model.modules()) == 2
    exact = copy.deepcopy(other).double()
    for name, *results in zip(("logits", "ddelta"), *map(outcome, map(draw, (model, other, exact))), strict=True):
        assert_no_worse_than_torch(name, *results)
    gain_ops.remove(model)
    assert not is_fused(model)


def test_projections_with_a_bias_and_wrapped_bases() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = model_of("Llama", attention_bias=True, mlp_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.o_proj.bias)
        nn.init.normal_(layer.mlp.down_proj.bias)
    wrapped = copy.deepcopy(model)
    for layer in wrapped.model.layers:
        layer.self_attn.o_proj.__class__ = layer.mlp.down_proj.__class__ = Odd
    exact, plain = draw(plain_twin(copy.deepcopy(model).double())), draw(plain_twin(model))
    unfused = copy.deepcopy(wrapped)  # subtracts the bias again, as the fused one does: both round z + b
    gain_ops.apply(unfused, "gain-ffn")
    fused(wrapped)
    assert sum(isinstance(module, GainWrapper) for module in wrapped.modules()) == 4
    for each, other in ((fused(model), plain), (wrapped, unfused)):
        for name, *results in zip(("logits", "ddelta"), *map(outcome, map(draw, (each, other, exact))), strict=True):
            assert_no_worse_than_torch(name, *results)


def test_a_bias_before_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="has a bias, which the norm after it would see"):
        fused(model_of("Gemma2", attention_bias=True))


@pytest.mark.parametrize("family", ["Llama", "Olmo2"])
def test_a_wide_norm_gives_the_dtype_that_the_model_gives(family: str) -> None:
    model = model_of(family).bfloat16()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    layer, kinds = model.model.layers[1], []
    layer.mlp.register_forward_pre_hook(lambda module, args: kinds.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS).logits
        assert torch.allclose(fused(model, targets="gain")(IDS).logits.float(), expected.float(), atol=0.05)
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_can_be_undone(how: str) -> None:
    model = draw(fused(model_of("Llama")))
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    gain_ops.remove(other)
    assert not is_fused(other)
    assert is_fused(model)


def test_it_saves_loads_and_absorbs(tmp_path: Path) -> None:
    model, other = draw(fused(model_of("Llama"))), model_of("Llama")
    gain_ops.save_gains(model, tmp_path / "g.safetensors")
    gain_ops.load_gains(other, tmp_path / "g.safetensors")
    logits = model(IDS).logits
    torch.testing.assert_close(other(IDS).logits, logits)
    gain_ops.absorb(model)
    assert not is_fused(model)
    torch.testing.assert_close(model(IDS).logits, logits)


def test_generate_hidden_states_and_attentions() -> None:
    model, other = draw(fused(model_of("Llama"))), model_of("Llama")
    gain_ops.apply(other, "gain-ffn")
    draw(other)
    for each in (model, other):
        each.set_attn_implementation("eager")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(model.generate(IDS, **options), other.generate(IDS, **options))
        got, wanted = (m(IDS, output_hidden_states=True, output_attentions=True) for m in (model, other))
    assert (len(got.hidden_states), len(got.attentions)) == (3, 2)
    torch.testing.assert_close(got.hidden_states, wanted.hidden_states)
    torch.testing.assert_close(got.attentions, wanted.attentions)


def test_checkpointing_gives_the_same_bits() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = draw(fused(model_of("Llama"))).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["Llama", pytest.param("Gemma2", marks=slow)])
def test_compile_has_no_breaks(family: str) -> None:
    torch._dynamo.reset()
    model = draw(fused(model_of(family, num_hidden_layers=1)))
    logits, gradient = outcome(model)
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    got = outcome(model)
    torch.testing.assert_close(got, (logits, gradient))


def test_a_layer_keeps_its_name_and_its_hooks_run() -> None:
    model, calls = model_of("Llama"), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    fused(model)(IDS)
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert calls == [1]


@pytest.mark.parametrize(("family", "norms"), [("Llama", 1), ("Qwen3", 3), ("Gemma2", 2)])
def test_norms_without_a_gain_take_one_pass_too(family: str, norms: int) -> None:
    model = model_of(family)
    layers = model.model.layers
    watched, replaced = layers[1].input_layernorm, layers[0].input_layernorm
    watched.register_forward_hook(lambda *_: None)
    if family == "Llama":
        replaced.forward = replaced.forward
    fused(model)
    one_pass = [[type(m).__name__ for m in layer.modules() if isinstance(m, OnePassNorm)] for layer in layers]
    assert not isinstance(watched, OnePassNorm), "what a hook sees stays as it is"
    assert [len(kinds) for kinds in one_pass] == [norms - (family == "Llama"), norms - 1]
    assert {kind for kinds in one_pass for kind in kinds} <= {type(watched).__name__}
    gain_ops.remove(model)
    assert not any("_gain_form" in vars(m) for m in model.modules())
    assert not any(isinstance(m, OnePassNorm) for m in model.modules())


@pytest.mark.parametrize("name", ["self_attn", "self_attn.o_proj", "post_attention_layernorm", "mlp"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_that_would_see_something_else_are_refused(name: str, register: str) -> None:
    model = model_of("Llama")
    getattr(model.model.layers[1].get_submodule(name), register)(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\..* has hooks"):
        fused(model)


@pytest.mark.parametrize("name", ["", "self_attn", "post_attention_layernorm"])
def test_a_forward_on_the_instance_is_refused(name: str) -> None:
    model = model_of("Llama")
    module = model.model.layers[0].get_submodule(name)
    module.forward = module.forward
    with pytest.raises(ValueError, match="has a forward of its own on the instance"):
        fused(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "input"}, "side='output' or 'mixed'"),
        ({"targets": ["q_proj"]}, "found no attention output or FFN down projection"),
        ({"side": "diagonal"}, "diagonal"),
        ({"fuse_mlp": True}, "side='input' or 'mixed'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    model = model_of("Llama")
    with pytest.raises(ValueError, match=message):
        fused(model, **options)
    assert not any(isinstance(module, Gained) for module in model.modules())


def test_gains_elsewhere_stay_where_they_are() -> None:
    model, other = fused(model_of("Llama"), targets=["o_proj", "q_proj"]), model_of("Llama")
    gain_ops.apply(other, ["o_proj", "q_proj"])
    torch.testing.assert_close(draw(model)(IDS).logits, draw(other)(IDS).logits)
    assert sum(isinstance(module, WithheldGain) for module in model.modules()) == 2


class _Layer(nn.Module):
    def near(self, x: Tensor) -> Tensor:
        residual = x
        x = self.attn(x)
        x = residual + x
        return x

    def subtracts(self, x: Tensor) -> Tensor:
        residual = x
        x = self.attn(x)
        x = residual - x
        return x

    def scales(self, x: Tensor) -> Tensor:
        residual = x
        x = self.attn(x)
        x = residual + 2 * x
        return x

    def keeps(self, x: Tensor) -> Tensor:
        residual = x
        y = self.attn(x)
        x = residual + y
        return x + y


@pytest.mark.parametrize(("name", "known"), [("near", True), ("subtracts", False), ("scales", False), ("keeps", False)])
def test_which_adds_are_known(name: str, known: bool) -> None:
    kind = type("Layer", (nn.Module,), {"forward": getattr(_Layer, name)})
    assert bool(folds_of(kind)) == known


@pytest.mark.parametrize("shard", [shard_gains, place_gains])
def test_sharding_a_projection_apart_from_its_layer_is_refused(shard: Callable[[nn.Module], None]) -> None:
    with pytest.raises(ValueError, match=f"{shard.__name__} cannot serve a model with fuse_residual=True"):
        shard(fused(model_of("Llama")))


def test_every_gain_has_an_effect() -> None:
    gain_ops.check(fused(model_of("Llama")), input_ids=IDS)


@pytest.mark.parametrize("name", ["nf4", "int8-row"])
def test_quantised_bases(name: str) -> None:
    model = model_of("Llama", hidden_size=64, intermediate_size=128, head_dim=32)
    for layer in model.model.layers:
        layer.self_attn.o_proj = TRAINABLE[name](layer.self_attn.o_proj)
        layer.mlp.down_proj = TRAINABLE[name](layer.mlp.down_proj)
    other, exact = copy.deepcopy(model), copy.deepcopy(model)
    gain_ops.apply(other, "gain-ffn")
    for layer in exact.model.layers:
        layer.self_attn.o_proj = plain_layer(layer.self_attn.o_proj, "output", torch.float64)
        layer.mlp.down_proj = plain_layer(layer.mlp.down_proj, "output", torch.float64)
    for what, *results in zip(
        ("logits", "ddelta"), *map(outcome, map(draw, (fused(model), other, exact.double()))), strict=True
    ):
        assert_no_worse_than_torch(what, *results)
    logits = model(IDS).logits
    gain_ops.absorb(model)
    assert not is_fused(model)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-3, atol=1e-3)

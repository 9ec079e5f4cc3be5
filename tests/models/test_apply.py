"""apply() and remove(): which layers, what is frozen, and that remove leaves no trace."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import gain_ops
from gain_ops.layers.gained import Gained
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.make import gain_layer
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.record import gained_modules
from gain_ops.utils.errors import UsageError

LAYERS = 2

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTURE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_EIGHT = {"num_key_value_heads": 4}
# What a model needs beyond _COMMON; keys that a config does not have are harmless.
_EXTRA = {
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4, "n_ctx": 64},
    "cohere2_moe": _MIXTURE,
    "deepseek_v2": {**_MIXTURE, **_LATENT},
    "deepseek_v3": {**_MIXTURE, **_LATENT},
    "diffllama": _EIGHT,
    "ernie4_5_moe": {**_MIXTURE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "flex_olmo": _MIXTURE,
    "gemma4_text": {"vocab_size_per_layer_input": 64},
    "glm4_moe": _MIXTURE,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global"], LAYERS]]},
    "gpt_oss": _MIXTURE,
    "gptj": {**_GPT, "rotary_dim": 4},
    "granitemoe": _MIXTURE,
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "minicpm3": _LATENT,
    "minimax_m2": {**_MIXTURE, "rotary_dim": 4},
    "mixtral": _MIXTURE,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64},
    "olmoe": _MIXTURE,
    "openai-gpt": _GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phimoe": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "xglm": {"d_model": 32, "num_layers": LAYERS, "attention_heads": 4, "ffn_dim": 48},
}
_FUSED = {"deepseek_v2", "deepseek_v3", "flex_olmo", "gpt_oss", "minimax_m2", "mixtral"}
_WHOLE = [
    "apertus", "arcee", "biogpt", "bloom", "codegen", "cohere", "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3",
    "diffllama", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "flex_olmo", "gemma", "gemma2", "gemma3_text",
    "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite",
    "granitemoe", "helium", "hunyuan_v1_dense", "llama", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
    "xglm",
]  # fmt: skip
_FUSED |= {model_type for model_type in _WHOLE if "moe" in model_type}
IDS = torch.arange(1, 9)[None]


def build(model_type="llama", **extra):
    torch.manual_seed(0)
    options = {**_COMMON, **_EXTRA.get(model_type, {}), **extra}
    if model_type == "falcon":
        del options["head_dim"]  # a property there
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()


def snapshot(model):
    """All that remove() must bring back."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)},
        "parameters": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "state": list(model.state_dict()),
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": set(vars(model)),
    }


@pytest.mark.parametrize("model_type", _WHOLE)
def test_preset_of_an_architecture(model_type):
    model = build(model_type)
    before = snapshot(model)
    with torch.no_grad():
        expected = model(IDS).logits
    applied = gain_ops.apply(model, "gain")
    assert len(applied.names) == LAYERS
    assert not any(isinstance(module, GainWrapper) for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected)
    gain_ops.remove(model)
    assert snapshot(model) == before
    names = gain_ops.apply(model, "gain-ffn").names
    if model_type in _FUSED:
        assert any(name.endswith("experts.down_proj") for name in names)
    else:
        assert len(names) == 2 * LAYERS
    model(IDS, labels=IDS).loss.backward()
    for name, layer in gained_modules(model).items():
        assert layer.delta.grad.any(), f"{name} is not called by the model"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.endswith(".delta") for name in trained)
    assert len(trained) == len(gained_modules(model))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "qwen2_moe"])
def test_a_mixture_without_fused_layers_has_its_ffn_gained(model_type):
    dense = {"first_k_dense_replace": LAYERS, "mlp_only_layers": list(range(LAYERS))}
    assert len(gain_ops.apply(build(model_type, **dense), "gain-ffn").names) == 2 * LAYERS


@pytest.mark.parametrize(
    ("model_type", "attention", "down"),
    [
        ("gemma3", 26, 26),
        ("llava", 32, 32),
        ("mllama", 40, 40),
        ("qwen2_5_vl", 80, 80),
        ("qwen2_vl", 80, 80),
        ("qwen3_vl", 32, 32),
    ],
)
def test_the_language_model_inside_a_multimodal_one(model_type, attention, down):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type))
    applied = gain_ops.apply(model, "gain-ffn")
    assert all(".language_model.layers." in name for name in applied.names)
    assert sum("attn" in name for name in applied.names) == attention
    assert sum("mlp" in name for name in applied.names) == down


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self_attention = Attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 3 * width), "fc2": nn.Linear(3 * width, width)})
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        x = x + self.self_attention(x)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))) + self.dense(x)


class HomeMade(nn.Module):
    """A language model without a config, with layers that look alike and must not be taken."""

    def __init__(self, width=12):
        super().__init__()
        self.small = nn.Embedding(3, 36)
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.attention_pool = nn.ModuleDict({"proj": nn.Linear(width, 5)})
        self.head = nn.Linear(width, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_unknown_model_by_name_and_shape():
    model = HomeMade()
    expected = model(IDS)
    attention = [f"blocks.{i}.self_attention.proj" for i in range(2)]
    assert list(gain_ops.apply(model).names) == attention
    assert model(IDS).equal(expected) or (model(IDS) - expected).abs().max() < 1e-5
    gain_ops.remove(model)
    applied = gain_ops.apply(model, "gain-ffn")
    assert sorted(applied.names) == sorted([*attention, *(f"blocks.{i}.mlp.fc2" for i in range(2))])


@pytest.mark.parametrize("block", [Block(12), nn.Sequential(Block(12), Block(12))])
def test_unknown_block_without_an_embedding(block):
    names = gain_ops.apply(block, "gain-ffn").names
    assert {name.rsplit(".", 1)[1] for name in names} == {"proj", "fc2"}


def test_side_and_record():
    model = build()
    applied = gain_ops.apply(model, "gain-ffn", side="input")
    assert applied.side == "input"
    assert applied.targets == "gain-ffn"
    assert applied.trained == LAYERS * (32 + 48)
    assert applied.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert repr(applied) == "Applied(4 layers, input side, targets gain-ffn: 160 trained parameters)"
    assert model.model.layers[1].mlp.down_proj.delta.shape == (48,)


@pytest.mark.parametrize("targets", ["gain", "gain-ffn"])
def test_gpt2_large_counts_are_the_papers_on_the_input_side(targets):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", n_embd=1280, n_layer=36, n_head=20, vocab_size=8)
        )
    trained = gain_ops.apply(model, targets, side="input").trained
    assert trained == {"gain": 46_080, "gain-ffn": 230_400}[targets]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["o_proj"], LAYERS),
        (["o_proj", "down_proj"], 2 * LAYERS),
        ([r"layers\.[0]\.self_attn\.[qk]_proj"], 2),
        (["self_attn.o_proj", "o_proj"], LAYERS),
        (["lm_head"], 1),
        ([".*"], 7 * LAYERS + 1),
    ],
)
def test_patterns(patterns, expected):
    model = build()
    assert len(gain_ops.apply(model, patterns).names) == expected
    assert sum(isinstance(module, GainLinear) for module in model.modules()) == expected
    assert model(IDS).logits.isfinite().all()


def test_patterns_match_whole_components():
    with pytest.raises(ValueError, match=r"'proj' matches no linear module.*self_attn.q_proj"):
        gain_ops.apply(build(), ["proj"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["o_proj", "no_such_layer"],
            "'no_such_layer' matches no linear module. Linear modules here: .*o_proj.*lm_head",
        ),
        (["(" + "o_proj"], "is not a regular expression: .* at position 0$"),
        ([None], r"targets holds None, a NoneType, and takes regular expressions as str"),
        (None, "targets=None is not one of 'gain', 'gain-ffn', 'gain-mixer', and no list of patterns"),
        (["o_proj.weight"], r"but model\.layers\.0\.self_attn\.o_proj\.weight, which is a parameter of shape"),
        ([], "targets is empty"),
        (
            "o_proj",
            r"targets='o_proj' is not one of 'gain', 'gain-ffn', 'gain-mixer'; patterns go in a list: \['o_proj'\]",
        ),
        (["model.norm"], "matches no linear module, but model.norm, which is a LlamaRMSNorm. Linear modules here"),
    ],
)
def test_bad_targets_change_nothing(targets, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        gain_ops.apply(model, targets)
    assert snapshot(model) == before


@pytest.mark.parametrize("option", [{"side": "rows"}, {"memory": "low"}, {"backend": "fast"}])
def test_bad_options_change_nothing(option):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match="is not one of"):
        gain_ops.apply(model, **option)
    assert snapshot(model) == before


@pytest.mark.parametrize("targets", ["gain", "gain-ffn", ["o_proj"]])
def test_nothing_to_find(targets):
    with pytest.raises(ValueError, match=r"Linear modules here: '0', '1'\."):
        gain_ops.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), targets)
    with pytest.raises(ValueError, match=r"itself the linear map: use gain_ops.GainLinear.from_linear\(\)"):
        gain_ops.apply(nn.Linear(4, 4), targets)
    with pytest.raises(ValueError, match="no linear modules"):
        gain_ops.apply(nn.Sequential(nn.LayerNorm(4)), targets)


class Fairseq(nn.Module):
    """Blocks that no preset knows: each name differs from another's in a digit alone."""

    def __init__(self):
        super().__init__()
        block = {"w1": nn.Linear(8, 8), "w2": nn.Linear(8, 8), "mix": nn.ModuleDict({"a": nn.Linear(8, 4)})}
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for _ in range(3))
        self.experts = nn.Module()
        self.experts.down = nn.Parameter(torch.zeros(4, 8, 8))


def test_messages_name_modules_of_the_model_itself():
    with pytest.raises(
        ValueError, match=r"targets=\['0.w2'\]. Linear modules here: 'blocks.0.w1', 'blocks.0.w2', 'blocks.0.mix.a'\."
    ):
        gain_ops.apply(Fairseq())
    with pytest.raises(
        ValueError, match=r"but experts.down, which is a parameter of shape \(4, 8, 8\), the experts in one tensor"
    ):
        gain_ops.apply(Fairseq(), ["experts.down"])


def test_flags_in_a_pattern_work():
    assert len(gain_ops.apply(build(), ["(?i)O_PROJ"]).names) == LAYERS


@pytest.mark.parametrize("model", [None, "meta-llama/Llama-3.1-8B", {"weight": 1}])
def test_what_is_no_model_is_called_so(model, tmp_path):
    calls = [
        gain_ops.apply,
        gain_ops.remove,
        gain_ops.absorb,
        gain_ops.check,
        gain_ops.list_gains,
    ]
    calls += [lambda model: gain_ops.save_gains(model, tmp_path), lambda model: gain_ops.load_gains(model, tmp_path)]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"expected a model, a torch.nn.Module, and got (None$|'meta-llama.*: load it|a dict$)"
        ):
            call(model)


def test_a_chunk_without_fused_ffns_is_told_so():
    with pytest.raises(ValueError, match="mlp_chunk=5 needs fuse_mlp=True"):
        gain_ops.apply(build(), "gain-ffn", side="input", mlp_chunk=5)


def test_a_second_apply_is_refused():
    model = build()
    gain_ops.apply(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already has gains on 2 layers: gain_ops.absorb\(\)"):
        gain_ops.apply(model, ["down_proj"])
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("side", "memory", "expected"),
    [
        ("output", "fast", {"o_proj": "auto", "down_proj": "auto", "up_proj": "auto"}),
        ("output", "lean", {"o_proj": "input", "down_proj": "output", "up_proj": "input"}),
        ("input", "lean", {"o_proj": "auto", "down_proj": "auto", "up_proj": "auto"}),
    ],
)
def test_memory(side, memory, expected):
    model = build()
    gain_ops.apply(model, list(expected), side=side, memory=memory, backend="eager")
    for name, layer in gained_modules(model).items():
        assert layer.save == expected[name.rsplit(".", 1)[1]]
        assert layer.backend == "eager"


@pytest.mark.parametrize("model_type", ["gpt_neox", "opt", "falcon", "mpt"])
def test_lean_finds_attention_by_preset(model_type):
    model = build(model_type)
    gain_ops.apply(model, "gain", memory="lean")
    assert {layer.save for layer in gained_modules(model).values()} == {"input"}


# remove


def test_remove_brings_back_every_flag_and_hook():
    model = build()
    model.model.layers[0].requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    calls = []
    linear = model.model.layers[1].self_attn.o_proj
    linear.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    before = snapshot(model)
    gain_ops.apply(model, "gain-ffn")
    model(IDS)
    model.model.norm.weight.requires_grad_(True)
    gain_ops.remove(model)
    assert snapshot(model) == before
    model(IDS)
    assert calls == [GainLinear, nn.Linear]


def test_remove_hands_over_the_present_weights_and_mode():
    model = build()
    linear = model.model.layers[0].self_attn.o_proj
    gain_ops.apply(model)
    state = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.train()
    gain_ops.remove(model)
    assert model.model.layers[0].self_attn.o_proj is linear
    assert (linear.weight == 0.5).all()
    assert linear.training


def test_a_replaced_weight_is_not_kept_alive():
    model = build()
    weight = weakref.ref(model.model.layers[0].self_attn.o_proj.weight)
    gain_ops.apply(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    gc.collect()
    assert weight() is None


def test_meta_device_round_trip():
    model = build()
    gain_ops.apply(model)
    model.to("meta").to_empty(device="cpu")
    gain_ops.remove(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_remove_from_a_copy(duplicate, model_type):
    model = build(model_type)
    model.get_input_embeddings().weight.requires_grad_(False)
    before = snapshot(model)
    expected = model(IDS).logits
    gain_ops.apply(model, "gain-ffn")
    twin = duplicate(model)
    with torch.no_grad():
        for layer in gained_modules(twin).values():
            layer.delta.fill_(0.5)
    assert not torch.allclose(twin(IDS).logits, expected)
    gain_ops.remove(twin)
    after = snapshot(twin)
    assert after["requires_grad"] == before["requires_grad"]
    assert after["state"] == before["state"]
    assert after["attributes"] == before["attributes"]
    assert torch.equal(twin(IDS).logits, expected)
    assert not any(isinstance(module, Gained) for module in twin.modules())
    assert len(gained_modules(model)) == 2 * LAYERS, "the original keeps its gains"


def test_remove_finds_the_model_inside_another():
    model = build()
    before = snapshot(model)
    gain_ops.apply(model)
    outer = nn.ModuleDict({"policy": model, "value": nn.Linear(4, 4)})
    gain_ops.remove(outer)
    assert snapshot(model) == before


def test_remove_from_a_part_is_refused():
    model = build()
    gain_ops.apply(model)
    with pytest.raises(ValueError, match="applied to a larger model"):
        gain_ops.remove(model.model.layers[0])
    assert len(gained_modules(model)) == LAYERS


def test_remove_without_gains():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no gains to remove"):
        gain_ops.remove(build())


def test_remove_turns_a_layer_made_by_hand_into_a_linear():
    model = nn.Sequential(GainLinear(4, 4), nn.ReLU())
    weight = model[0].weight
    gain_ops.remove(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight


# shared modules and tied weights


def test_a_shared_module_gets_one_gain_under_every_name():
    model = HomeMade()
    model.blocks[1].self_attention.proj = model.blocks[0].self_attention.proj
    model.other_way_in = model.blocks[0]
    before = snapshot(model)
    applied = gain_ops.apply(model)
    assert applied.names == ("blocks.0.self_attention.proj",)
    gain = model.blocks[0].self_attention.proj
    assert isinstance(gain, GainLinear)
    assert model.blocks[1].self_attention.proj is gain
    assert model.other_way_in.self_attention.proj is gain
    assert applied.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == 12
    gain_ops.remove(model)
    assert snapshot(model) == before


class ActorCritic(nn.Module):
    """Two models on one backbone: a transformers model each, so that the table finds every projection twice."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = build(), build()
        self.critic.model = self.actor.model

    def forward(self, ids):
        return self.actor(ids).logits, self.critic(ids).logits


@pytest.mark.parametrize("targets", ["gain", "gain-ffn"])
def test_two_models_on_one_backbone(targets):
    model = ActorCritic()
    before = snapshot(model)
    applied = gain_ops.apply(model, targets)
    own = [name.removeprefix("actor.") for name in applied.names]
    assert own == list(gain_ops.apply(build(), targets).names)
    assert not any(isinstance(module, GainWrapper) for module in model.modules())
    sum(y.sum() for y in model(IDS)).backward()
    assert all(layer.delta.grad.any() for layer in gained_modules(model).values())
    gain_ops.remove(model)
    assert snapshot(model) == before


def test_tied_weights_stay_tied():
    model = build(tie_word_embeddings=True)
    before = snapshot(model)
    gain_ops.apply(model, ["o_proj", "lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.model.embed_tokens.weight.requires_grad
    gain_ops.remove(model)
    assert snapshot(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


def _compiled(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def _checkpointed(model):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    block = type(model.model.layers[0])
    checkpoint_wrapper.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    return model


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed])
@pytest.mark.parametrize("undo", [gain_ops.remove, gain_ops.absorb])
@pytest.mark.parametrize("early", [False, True])
def test_flags_come_back_whatever_was_wrapped_meanwhile(wrap, undo, early):
    model = build()
    model.model.norm.requires_grad_(False)
    before = {id(p): p.requires_grad for p in model.parameters()}
    if early:
        wrap(model)
    gain_ops.apply(model, "gain")
    if not early:
        wrap(model)
    undo(model)
    assert {id(p): p.requires_grad for p in model.parameters()} == before


def test_flags_come_back_to_a_compiled_model():
    model = build()
    compiled = torch.compile(model, backend="eager")
    gain_ops.apply(compiled, "gain")
    gain_ops.remove(compiled)
    assert all(p.requires_grad for p in model.parameters())


def test_an_apply_that_fails_midway_changes_nothing(monkeypatch):
    model = build()
    model.model.layers[-1].requires_grad_(False)  # the layers before it are trained, the one that fails too
    before, made = snapshot(model), []

    def second_fails(module, **options):
        if made:
            raise MemoryError
        made.append(gain_layer(module, **options))
        return made[0]

    monkeypatch.setattr("gain_ops.models.apply.gain_layer", second_fails)
    with pytest.raises(MemoryError):
        gain_ops.apply(model, "gain-ffn")
    assert made
    assert snapshot(model) == before


def test_weights_untied_meanwhile_get_their_flags_back():
    model = build(tie_word_embeddings=True)
    gain_ops.apply(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    gain_ops.remove(model)
    assert all(p.requires_grad for p in model.parameters())


# linear maps that are not plain


class Masked(nn.Linear):
    """nn.Linear's own map, with tensors beside weight and bias."""

    def __init__(self, n_in, n_out, what):
        super().__init__(n_in, n_out)
        if what == "parameter":
            self.scale = nn.Parameter(torch.ones(3))
        elif what == "buffer":
            self.register_buffer("mask", torch.ones(n_in))
        else:
            self.observer = nn.BatchNorm1d(n_out)


@pytest.mark.parametrize("what", ["parameter", "buffer", "child"])
def test_a_linear_that_holds_more_keeps_it(what):
    model = nn.Sequential(Masked(4, 6, what))
    before, values = snapshot(model), list(model.state_dict().values())
    gain_ops.apply(model, ["0"])
    assert len(model.state_dict()) == len(values) + 1
    model.double()
    gain_ops.remove(model)
    assert snapshot(model) == before
    assert all(value.dtype != torch.float32 for value in model.state_dict().values())


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_linear_maps_are_wrapped_and_come_back():
    model = build()
    layer = model.model.layers[1].self_attn
    layer.o_proj = Scaled(32, 32, bias=False).eval()
    before = snapshot(model)
    expected = model(IDS).logits
    gain_ops.apply(model)
    assert isinstance(layer.o_proj, GainWrapper)
    assert torch.equal(model(IDS).logits, expected)
    model(IDS, labels=IDS).loss.backward()
    assert layer.o_proj.delta.grad.any()
    model.train()
    gain_ops.remove(model)
    assert layer.o_proj.training
    model.eval()
    assert snapshot(model) == before


def lora(model, targets, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, **options)).eval()


@pytest.mark.parametrize("targets", ["gain", ["o_proj"], [".*"], ["lm_head"]])
def test_layers_of_peft_are_refused(targets):
    model = lora(build(), ["o_proj"], modules_to_save=["lm_head"])
    before = snapshot(model)
    kind = "utils.other.ModulesToSaveWrapper" if targets == ["lm_head"] else "tuners.lora.layer.Linear"
    with pytest.raises(ValueError, match=rf"is PEFT's peft.{kind}: merge it first"):
        gain_ops.apply(model, targets)
    assert snapshot(model) == before


def test_adapters_are_frozen_aloud_and_can_be_trained_beside_gains():
    model = lora(build(), ["q_proj", "v_proj"])
    before = snapshot(model)
    adapters = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match=r"no longer PEFT's parameters: \S*q_proj.lora_A\S* .* and 4 more") as caught:
        gain_ops.apply(model, "gain")
    assert [warning.filename for warning in caught] == [__file__]
    for name in adapters:
        model.get_parameter(name).requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert sorted(trained) == sorted([*adapters, *(f"{name}.delta" for name in gained_modules(model))])
    gain_ops.remove(model)
    assert snapshot(model) == before


def test_a_merged_adapter_is_no_obstacle(recwarn):
    model = lora(build(), ["o_proj"]).merge_and_unload()
    assert len(gain_ops.apply(model, "gain").names) == LAYERS
    assert not [warning for warning in recwarn if "PEFT" in str(warning.message)]


# places where a gain would be ignored


def test_bypassed_projections_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"MultiheadAttention\.forward computes with its weight without calling it"):
        gain_ops.apply(nn.Sequential(layer), "gain")
    with pytest.raises(ValueError, match="if not why_not_sparsity_fast_path"):
        gain_ops.apply(nn.Sequential(layer), ["linear2"])
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=16, state_size=4)
    )
    with pytest.raises(ValueError, match=r"MambaMixer\.forward computes .* if self.training"):
        gain_ops.apply(mamba, ["out_proj"])
    with pytest.raises(ValueError, match="slow_but_exact"):
        gain_ops.apply(build("bloom", slow_but_exact=True, pretraining_tp=2))


def test_a_sharded_weight_is_refused():
    class DTensor(torch.Tensor):
        pass

    model = build()
    linear = model.model.layers[1].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(DTensor))
    before = snapshot(model)
    with pytest.raises(ValueError, match="already sharded"):
        gain_ops.apply(model)
    assert snapshot(model) == before


def test_names_under_compile_and_checkpoint_wrappers():
    model = HomeMade()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    applied = gain_ops.apply(model, [r"self_attention\.proj"])
    assert applied.names == tuple(gained_modules(model)) == tuple(f"blocks.{i}.self_attention.proj" for i in range(2))


def test_importing_gain_ops_imports_no_transformers():
    code = "import gain_ops, sys; sys.exit('transformers' in sys.modules or 'triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("made", [True, False], ids=["made in it", "applied in it"])
def test_inference_mode_is_refused_in_words(made):
    with torch.inference_mode(made):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with (
        torch.inference_mode(not made),
        pytest.raises(ValueError, match=r"cannot be trained under, or after, torch.infer"),
    ):
        gain_ops.apply(model, [".*"])
    assert not gained_modules(model)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


@pytest.mark.parametrize(("targets", "options"), [("gain-ffn", {}), ("gain-ffn", {"side": "input", "fuse_mlp": True})])
def test_a_model_with_gains_is_traced_in_plain_torch(targets, options):
    model = build(use_cache=False)
    gain_ops.apply(model, targets, **options)
    for layer in gained_modules(model).values():
        layer.delta.data.normal_()
    expected = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Logits(model), IDS)
    torch.testing.assert_close(traced(IDS), expected)
    assert "gain_ops" not in str(traced.graph)
    assert "PythonOp" not in str(traced.graph)


@pytest.mark.parametrize("options", [{}, {"side": "input", "fuse_mlp": True}, {"fuse_residual": True}])
def test_a_model_with_gains_is_not_scripted_in_words(options):
    model = build(use_cache=False)
    gain_ops.apply(model, "gain-ffn", **options)
    for part in (model, model.model.layers[0], next(iter(gained_modules(model).values()))):
        with pytest.raises(
            UsageError, match=r"torch.jit.script cannot compile a GainLinear: fold the gains in \(gain_ops.absorb\)"
        ):
            torch.jit.script(part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"side": "input"}, {"side": "input", "fuse_mlp": True}, {"fuse_residual": True}, {"memory": "lean"}]
)
def test_a_model_with_gains_is_exported_to_onnx(options, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = build(use_cache=False)
    gain_ops.apply(model, "gain-ffn", **options)
    for layer in gained_modules(model).values():
        layer.delta.data.normal_()
    expected = model(IDS).logits
    path = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (IDS,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected)


class ReturnsTwo(nn.Linear):
    def forward(self, x):
        return x, x


def test_a_linear_map_that_returns_more_fails_in_words():
    model = nn.Sequential(ReturnsTwo(4, 4))
    gain_ops.apply(model, [".*"])
    with pytest.raises(TypeError, match=r"ReturnsTwo .* returns a tuple, and a gain scales a tensor"):
        model(torch.randn(2, 4))

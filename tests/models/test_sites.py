"""Which projections the presets take: by part of a model, by kind, and what they say of those that they leave out."""

import pytest
import torch
from torch import nn

import gain_ops
from gain_ops.models.sites import preset_sites

from support.tiny_architectures import build


def on_meta(model_type):
    with torch.device("meta"):
        return build(model_type, run=False)[0]


def names(model, preset, parts=None):
    return [site.name for site in preset_sites(model, preset, parts).sites]


class Layers(nn.Module):
    """A model of two layers in which linear maps have these names and sizes; the class of a module may matter."""

    def __init__(self, linears, width=16):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            for name, (n_in, n_out) in linears.items():
                *path, leaf = name.split(".")
                parent = layer
                for part in path:
                    if not hasattr(parent, part):
                        parent.add_module(part, nn.Module())
                    parent = getattr(parent, part)
                parent.add_module(leaf, nn.Linear(n_in, n_out))


QKV = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8)}
LIBRARIES = {
    "torchtune": {"attn.q_proj": (16, 16), "attn.output_proj": (16, 16), "mlp.w1": (16, 40), "mlp.w2": (40, 16)},
    "Megatron": {
        "self_attention.linear_qkv": (16, 48),
        "self_attention.linear_proj": (16, 16),
        "mlp.linear_fc1": (16, 80),
        "mlp.linear_fc2": (40, 16),
    },
    "LitGPT": {
        "attn.qkv": (16, 48),
        "attn.proj": (16, 16),
        "mlp.fc_1": (16, 40),
        "mlp.fc_2": (16, 40),
        "mlp.proj": (40, 16),
    },
}


@pytest.mark.parametrize(
    ("library", "attention", "down"),
    [
        ("torchtune", "attn.output_proj", "mlp.w2"),
        ("Megatron", "self_attention.linear_proj", "mlp.linear_fc2"),
        ("LitGPT", "attn.proj", "mlp.proj"),
    ],
)
def test_other_libraries(library, attention, down):
    model = Layers(LIBRARIES[library])
    assert names(model, "gain-ffn") == [f"layers.{i}.{name}" for i in range(2) for name in (attention, down)]


EXPERTS = {
    f"mlp.{expert}.{name}": (8, 16) if name == "down_proj" else (16, 8)
    for expert in ("experts.0", "experts.1", "shared_experts")
    for name in ("gate_proj", "up_proj", "down_proj")
}


def test_experts_that_are_modules_narrower_than_the_model():
    found = names(Layers({"self_attn.q_proj": (16, 16), "self_attn.o_proj": (16, 16), **EXPERTS}), "gain-ffn")
    assert [name for name in found if name.startswith("layers.1.mlp")] == [
        f"layers.1.mlp.{expert}.down_proj" for expert in ("experts.0", "experts.1", "shared_experts")
    ]


def test_an_adapter_is_no_ffn():
    adapter = {"adapter.down_proj": (16, 4), "adapter.up_proj": (4, 16)}
    found = preset_sites(
        Layers({"self_attn.o_proj": (16, 16), "mlp.up_proj": (16, 40), "mlp.down_proj": (40, 16), **adapter}),
        "gain-ffn",
    )
    assert not any("adapter" in site.name for site in found.sites)


ALBERT = "encoder.albert_layer_groups.0.albert_layers.0"
GRANITE = [
    f"model.layers.{i}.{n}"
    for i in range(2)
    for n in ("block_sparse_moe.experts.down_proj", "shared_mlp.output_linear")
]
GRANITE.append("model.layers.1.self_attn.o_proj")
SPEECH = ("attention.out_proj", "feed_forward.output_dense")
SWIN = [(stage, block) for stage, blocks in enumerate((2, 2, 6, 2)) for block in range(blocks)]


@pytest.mark.parametrize(
    ("model_type", "preset", "expected"),
    [
        ("nemotron_h", "gain", ["model.layers.2.mixer.o_proj"]),
        ("deepseek_v4", "gain", [f"model.layers.{i}.self_attn.o_b_proj" for i in range(2)]),
        ("modernbert", "gain-ffn", [f"layers.{i}.{name}.Wo" for i in range(2) for name in ("attn", "mlp")]),
        ("hubert", "gain", [f"encoder.layers.{i}.attention.out_proj" for i in range(2)]),
        ("wav2vec2", "gain-ffn", [f"encoder.layers.{i}.{n}" for i in range(2) for n in SPEECH]),
        ("albert", "gain-ffn", [f"{ALBERT}.{n}" for n in ("attention.dense", "ffn_output")]),
        ("granitemoehybrid", "gain-ffn", GRANITE),
        ("codegen", "gain-ffn", [f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.out_proj", "mlp.fc_out")]),
        ("qwen3_5_text", "gain", ["model.layers.0.self_attn.o_proj"]),
        ("qwen3_5_text", "gain-mixer", ["model.layers.1.linear_attn.out_proj"]),
        ("lfm2", "gain-mixer", ["model.layers.0.conv.out_proj"]),
        ("swin", "gain", [f"encoder.layers.{i}.blocks.{j}.attention.o_proj" for i, j in SWIN]),
    ],
)  # fmt: skip
def test_what_an_architecture_gives(model_type, preset, expected):
    assert names(on_meta(model_type), preset) == expected


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "gptj", "llama", "mpt", "qwen3_5_text"])
def test_layers_given_by_themselves(model_type):
    model = on_meta(model_type)
    whole = names(model, "gain-ffn")
    prefix = whole[0].partition(".0.")[0]
    layers = model.get_submodule(prefix)
    assert names(layers, "gain-ffn") == [name.removeprefix(f"{prefix}.") for name in whole]
    assert names(layers[0], "gain-ffn") == [n.removeprefix(f"{prefix}.0.") for n in whole if f"{prefix}.0." in n]


def test_parts_of_a_multimodal_model():
    model = on_meta("qwen2_5_vl")
    found = preset_sites(model, "gain-ffn")
    assert {site.name.split(".layers.")[0] for site in found.sites} == {"model.language_model"}
    (left_out,) = found.left_out
    assert left_out.startswith("4 FFN down and attention output projections (model.visual.blocks.0.")
    assert "in a vision tower: parts=['language', 'vision'] takes them too" in left_out
    towers = names(model, "gain-ffn", "vision")
    assert len(towers) == 4
    assert all(name.startswith("model.visual.blocks.") for name in towers)
    both = preset_sites(model, "gain-ffn", ["language", "vision"])
    assert [site.name for site in both.sites] == names(model, "gain-ffn", "all")
    assert {site.name for site in both.sites} == {*towers, *(site.name for site in found.sites)}
    assert not both.left_out


def test_a_model_without_a_language_model_is_taken_whole():
    assert names(on_meta("vit"), "gain") == names(on_meta("vit"), "gain", "vision")


@pytest.mark.parametrize(
    ("targets", "parts", "message"),
    [
        ("gain", "sight", "parts has 'sight', which is not one of 'language', 'vision', 'audio', 'projector', 'all'"),
        ("gain", ["vision"], "parts has 'vision', and this model has only language"),
        (["o_proj"], "vision", "parts='vision' is for the presets"),
    ],
)
def test_parts_that_cannot_be(targets, parts, message):
    with pytest.raises(ValueError, match=message):
        gain_ops.apply(on_meta("llama"), targets, parts=parts)


def test_the_result_says_what_was_left_out():
    applied = gain_ops.apply(on_meta("qwen3_5_text"), "gain-ffn")
    (text,) = applied.left_out
    assert text.startswith("1 mixer output projection (model.layers.1.linear_attn.out_proj)")
    assert text in repr(applied)


def test_presets_in_a_list_are_taken_together():
    applied = gain_ops.apply(on_meta("qwen3_5_text"), ["gain-ffn", "gain-mixer", "q_proj"])
    assert not applied.left_out
    assert [name.rpartition(".")[2] for name in applied.names] == [
        "q_proj",
        "o_proj",
        "down_proj",
        "out_proj",
        "down_proj",
    ]


def test_a_mixer_whose_weight_is_read_is_named():
    model = on_meta("bamba")
    (text,) = preset_sites(model, "gain").left_out
    assert "model.layers.0.mamba.out_proj), where a gain would be ignored: BambaMixer.forward" in text
    with pytest.raises(ValueError, match=r"no mixer output projection .* would be ignored: BambaMixer.forward"):
        preset_sites(model, "gain-mixer")


def test_a_projection_of_another_shape_is_named():
    model = Layers({"self_attn.o_proj": (16, 16), "mlp.up_proj": (16, 40), "mlp.down_proj": (40, 16)})
    model.layers[1].mlp.down_proj = nn.Linear(40, 12)
    (text,) = preset_sites(model, "gain-ffn").left_out
    assert text.startswith("1 FFN down projection (layers.1.mlp.down_proj), so named, but with a shape")


def test_a_layer_in_which_nothing_is_recognised_is_named():
    model = Layers({"self_attn.o_proj": (16, 16), "mlp.up_proj": (16, 40), "mlp.down_proj": (40, 16)})
    model.layers.append(nn.ModuleDict({"mystery": nn.Linear(16, 16)}))
    assert preset_sites(model, "gain").left_out == ("the layers layers.2, in which no projection is recognised",)


def test_a_linear_map_that_is_called_with_more_fails_in_words():
    model, inputs = build("ibert")
    gain_ops.apply(model)
    with pytest.raises(TypeError, match=r"QuantLinear .* is called with 2 arguments, and a gain knows of x alone"):
        model(**inputs)


def test_dense_granite_has_its_ffn_in_the_shared_one():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    config = AutoConfig.for_model(
        "granitemoehybrid", num_local_experts=0, shared_intermediate_size=48, num_hidden_layers=2,
        layer_types=["mamba", "attention"], **sizes, **mamba,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    down = [f"model.layers.{i}.shared_mlp.output_linear" for i in range(2)]
    assert names(model, "gain-ffn") == [*down, "model.layers.1.self_attn.o_proj"]

"""Which layer of a checkpoint a layer of a gain file is."""

import pytest

from gain_ops.gainfiles.file import GainFileError
from gain_ops.gainfiles.names import find_layers, without_shells

O_PROJ = "layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("layer", "names", "expected"),
    [
        (f"model.{O_PROJ}", [f"model.{O_PROJ}", O_PROJ], f"model.{O_PROJ}"),
        (f"model.{O_PROJ}", [O_PROJ], O_PROJ),
        (O_PROJ, [f"model.{O_PROJ}"], f"model.{O_PROJ}"),
        (f"model.language_model.{O_PROJ}", [f"language_model.model.{O_PROJ}"], f"language_model.model.{O_PROJ}"),
        (f"model.language_model.{O_PROJ}", [f"model.{O_PROJ}", f"visual.{O_PROJ}"], f"model.{O_PROJ}"),
        (f"model.language_model.{O_PROJ}", [f"language_model.{O_PROJ}", f"model.{O_PROJ}"], f"language_model.{O_PROJ}"),
        ("model.visual.blocks.3.attn.proj", ["visual.blocks.3.attn.proj"], "visual.blocks.3.attn.proj"),
        ("transformer.h.0.mlp.c_proj", ["h.0.mlp.c_proj", "h.1.mlp.c_proj"], "h.0.mlp.c_proj"),
        ("model.decoder.layers.0.fc2", ["decoder.layers.0.fc2", "encoder.layers.0.fc2"], "decoder.layers.0.fc2"),
        (f"module.model.{O_PROJ}", [f"model.{O_PROJ}"], f"model.{O_PROJ}"),
        ("lm_head", ["language_model.lm_head"], "language_model.lm_head"),
        ("0.2", ["0.2", "2"], "0.2"),
        (f"model.{O_PROJ}", [f"_orig_mod.model.{O_PROJ}"], f"_orig_mod.model.{O_PROJ}"),
        (f"model.{O_PROJ}", ["model.layers._orig_mod.0.self_attn.o_proj"], "model.layers._orig_mod.0.self_attn.o_proj"),
        (f"model.{O_PROJ}", [f"0.auto_model.{O_PROJ}"], f"0.auto_model.{O_PROJ}"),
        (f"0.auto_model.{O_PROJ}", [f"model.{O_PROJ}"], f"model.{O_PROJ}"),
        (
            "encoder.layer.0.output.dense",
            ["0.auto_model.encoder.layer.0.output.dense"],
            "0.auto_model.encoder.layer.0.output.dense",
        ),
        (f"policy.model.{O_PROJ}", [f"model.{O_PROJ}"], f"model.{O_PROJ}"),
        (O_PROJ, [f"model.{O_PROJ}", f"visual.{O_PROJ}"], f"model.{O_PROJ}"),
        ("module.2", ["2"], "2"),
        # not these
        (f"model.{O_PROJ}", ["model.layers.1.self_attn.o_proj"], None),
        (f"model.{O_PROJ}", ["o_proj", "self_attn.o_proj", "0.self_attn.o_proj"], None),
        (f"model.{O_PROJ}", ["model.layers.0.self_attn.o_proj_norm"], None),
        ("model.decoder.layers.0.fc2", ["model.encoder.layers.0.fc2"], None),
        (f"model.language_model.{O_PROJ}", [f"visual.{O_PROJ}"], None),
        ("model.visual.proj", ["model.audio.proj"], None),
        ("decoder.cls.predictions.decoder", ["decoder"], None),
        ("0.2", ["2", "1.2"], None),
    ],
)
def test_a_layer_is_found_by_its_name_or_by_the_longest_end_of_it(layer: str, names: list[str], expected: str | None):
    assert find_layers([layer], set(names)) == ({layer: expected} if expected else {})


def test_of_two_that_fit_equally_none_is_taken():
    names = {f"model.{O_PROJ}", f"llm.{O_PROJ}"}
    with pytest.raises(
        GainFileError, match=rf"{O_PROJ} of the gain file could be any of llm\.{O_PROJ}, model\.{O_PROJ}"
    ):
        find_layers([O_PROJ], names)


def test_a_prefix_of_a_name_of_its_own_is_taken_where_it_is_the_only_one():
    assert find_layers([O_PROJ], {f"talker.{O_PROJ}"}) == {O_PROJ: f"talker.{O_PROJ}"}
    with pytest.raises(GainFileError, match="could be any of"):
        find_layers([O_PROJ], {f"talker.{O_PROJ}", f"thinker.model.{O_PROJ}"})


def test_two_layers_cannot_be_one():
    layers = [f"model.{O_PROJ}", f"model.language_model.{O_PROJ}"]
    with pytest.raises(GainFileError, match=rf"would all be model\.{O_PROJ}"):
        find_layers(layers, {f"model.{O_PROJ}"})


def test_shells_are_what_stands_in_front():
    assert without_shells(f"module.base_model.model.{O_PROJ}") == O_PROJ
    assert without_shells("model.visual.model.proj") == "visual.model.proj"
    assert without_shells("model.module") == "module"
    assert without_shells("lm_head") == "lm_head"
    assert without_shells(f"0.auto_model.{O_PROJ}") == O_PROJ
    assert without_shells("0.2") == "0.2"

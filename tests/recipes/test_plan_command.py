"""gain-ops plan, as a user calls it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gain_ops.recipes import console
from gain_ops.recipes.commands import app
from gain_ops.recipes.plan_command import launch
from gain_ops.recipes.planning import Row


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *(str(a) for a in arguments)])


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that folds is right, and hard to read for a test."""
    monkeypatch.setattr(console.STDOUT, "_width", 200)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ).save_pretrained(tmp_path)
    return tmp_path


def test_a_table_a_choice_and_a_file(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = call("--model", config / "config.json", "--gpus", 2, "--memory", 4, "--tokens", 128, "--json", out)
    assert done.exit_code == 0, done.output
    for text in ("replicated x 2", "FSDP 2", "TP 2", "gain-ffn, fused, lean", "full fine-tuning", "torchrun"):
        assert text in done.output
    assert "DistributedDataParallel" in done.output, "the simplest that fits"
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["asked"] == {
        "gpus": 2,
        "memory": 4 * 2**30,
        "tokens": 128,
        "length": 64,
        "reserve": 2 * 2**30,
        "model": str(config / "config.json"),
        "dtype": "bfloat16",
    }
    assert written["recommended"]["strategy"] == "replicated x 2"
    assert written["recommended"]["method"] == "gain-ffn"
    for row in written["rows"]:
        parts = ("weights", "gathered", "saved", "transient", "states")
        assert row["obstacle"] is not None or row["total"] == sum(row[part] for part in parts) > 0


def test_what_does_not_fit_is_said(config: Path) -> None:
    done = call("--model", config, "--memory", 0.001, "--reserve", 0.0009, "--tokens", 128, "--all")
    assert done.exit_code == 0, done.output
    assert "nothing fits" in done.output
    assert "lacks" in done.output
    assert done.output.count("run again") == done.output.count(" once ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such-model"), "no config at no-such-model"),
        (("--model", "llama-3-8b", "--targets", "all"), "targets 'all' is unknown"),
        (("--model", "llama-3-8b", "--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--model", "llama-3-8b", "--tokens", 10000), "10000 tokens are no whole number of windows of 8192"),
        (("--model", "llama-3-8b", "--memory", 1), "leaves nothing"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    done = call(*arguments, "--json", tmp_path / "plan.json")
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "plan.json").exists()


def test_the_lines_are_those_of_the_strategy() -> None:
    assert launch(Row("one GPU", "gain", False), 1) == ['gain_ops.apply(model, "gain")', "python train.py"]
    lines = launch(Row("TP 8 x FSDP 2", "gain-ffn, fused", True), 16)
    assert lines[0] == 'gain_ops.apply(model, "gain-ffn", side="input", fuse_mlp=True)'
    assert "checkpointing" in lines[1]
    assert lines.index("place_gains(model)") < lines.index("fully_shard(model)")
    assert lines[-1] == "torchrun --nnodes 2 --nproc-per-node 8 train.py"

"""gain-ops plan, as a user calls it."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gain_ops.commands import console, plan
from gain_ops.commands.app import app
from gain_ops.commands.plan import launch
from gain_ops.planning.strategies import NODE, Row


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


def test_standard_output_gets_the_rows_in_place_of_the_table(config: Path) -> None:
    done = call("--model", config, "--memory", 4, "--tokens", 128, "--json", "/dev/stdout")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"]


@pytest.mark.slow
def test_a_file_that_the_shell_opened_is_written_and_not_replaced(config: Path, tmp_path: Path) -> None:
    program = "from gain_ops.commands.cli import main; main()"
    command = [sys.executable, "-c", program, "plan", "--model", str(config), "--tokens", "128"]
    with (tmp_path / "plan.json").open("w") as opened:
        before = os.fstat(opened.fileno()).st_ino
        done = subprocess.run([*command, "--json", "/dev/stderr"], stdout=subprocess.PIPE, stderr=opened, check=True)
    assert (tmp_path / "plan.json").stat().st_ino == before
    assert json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert b"gain-ffn" in done.stdout


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


def test_what_does_not_fit_is_said_and_the_nearest_that_does(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    where = ("--reserve", 0, "--tokens", 256, "--sequence-length", 64, "--all")
    done = call("--model", config, "--memory", 0.0007, *where, "--json", out)
    assert done.exit_code == 0, done.output
    assert "nothing fits: gain-ffn" in done.output
    assert "lacks" in done.output
    near = json.loads(out.read_text(encoding="utf-8"))["nearest"]
    assert f"the nearest that fits: --tokens {near['tokens']} with {near['method']}, one GPU" in done.output
    assert (near["gpus"], near["length"], near["fits"]) == (1, 64, True)
    assert done.output.count("run again") == done.output.count(" once ")


def test_a_reason_is_said_once_and_gains_that_are_left_are_named(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralConfig(vocab_size=96, num_hidden_layers=2, num_local_experts=2, **sizes).save_pretrained(tmp_path)
    done = call("--model", tmp_path, "--gpus", 2, "--memory", 4, "--tokens", 128, "--sequence-length", 64)
    assert done.exit_code == 0, done.output
    lines = [line.removeprefix("not counted: ") for line in done.output.splitlines() if "not counted" in line]
    reasons = [line.partition(": ")[2] for line in lines]
    assert len(reasons) == len(set(reasons)) >= 1
    if any(line.startswith("gain-ffn; gain-ffn, lean") for line in lines):
        assert "nothing to recommend: no way with gain-ffn could be counted" in done.output
        assert "what fits with --targets gain: gain, replicated x 2" in done.output
    assert "lacks -" not in done.output


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[1]", "config.json holds list, expected an object"),
        ("{}", "transformers cannot read the config at"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot read the config at"),
        ('{"model_type": "llama", "hidden_size": 65}', "transformers cannot"),
        ('{"model_type": "t5"}', "t5 is an encoder-decoder model"),
        ('{"model_type": "bert"}', "bert is an encoder, which sees the tokens to predict"),
        ('{"model_type": "mpt", "n_layers": 2}', "MptForCausalLM does not run on the meta device, with text alone"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused_in_one_line(written: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(written, encoding="utf-8")
    done = call("--model", tmp_path, "--tokens", 64, "--json", tmp_path / "plan.json")
    assert (done.exit_code, done.stdout.strip()) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "plan.json").exists()


def test_no_code_of_a_model_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n", encoding="utf-8")
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    written = {"model_type": "own", "auto_map": auto}
    for model_type in ("own", "llama"):
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
        (tmp_path / "config.json").write_text(json.dumps(written | sizes | {"model_type": model_type}))
        done = call("--model", tmp_path, "--tokens", 64)
        assert done.exit_code == (2 if model_type == "own" else 0), done.output
        assert not ran.exists()
    assert "recommended" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such-model"), "no config at no-such-model"),
        (("--model", "llama-3-8b", "--targets", "all"), "targets 'all' is unknown"),
        (("--model", "llama-3-8b", "--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--model", "llama-3-8b", "--tokens", 10000), "10000 tokens are no whole number of windows of 8192"),
        (("--model", "llama-3-8b", "--memory", 1), "--reserve is 2: give GiB from 0 to below --memory, 1"),
        (("--model", "llama-3-8b", "--reserve", -1), "--reserve is -1: give GiB from 0"),
        (("--model", "llama-3-8b", "--memory", -5), "--memory is -5: give GiB above 0"),
        (("--model", "llama-3-8b", "--memory", "nan"), "--memory is nan: give GiB above 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    done = call(*arguments, "--json", tmp_path / "plan.json")
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "plan.json").exists()


def test_the_lines_are_those_of_the_strategy() -> None:
    assert launch(Row("one GPU", "gain", False), 1, "") == ['gain_ops.apply(model, "gain")', "python train.py"]
    assert launch(Row("FSDP 4", "gain", False, sharded=4), 4, "transformer.h")[1:] == [
        "for block in model.transformer.h:",
        "    fully_shard(block)",
        "fully_shard(model)",
        "torchrun --nproc-per-node 4 train.py",
    ]
    assert launch(Row("TP 2", "gain", False, tensor=2), 2, "")[1:3] == [
        'mesh = init_device_mesh("cuda", (2,))',
        "parallelize_module(model, mesh, styles)",
    ]
    lines = launch(Row("TP 8 x FSDP 2", "gain-ffn, fused", True, tensor=8, sharded=2), 16, "model.layers")
    assert lines == [
        'gain_ops.apply(model, "gain-ffn", side="input", fuse_mlp=True)',
        'model.gradient_checkpointing_enable({"use_reentrant": False})',
        'mesh = init_device_mesh("cuda", (2, 8), mesh_dim_names=("dp", "tp"))',
        'parallelize_module(model, mesh["tp"], styles)',
        "place_gains(model)",
        "for block in model.model.layers:",
        '    fully_shard(block, mesh=mesh["dp"])',
        'fully_shard(model, mesh=mesh["dp"])',
        "torchrun --nnodes 2 --nproc-per-node 8 train.py",
    ]


@pytest.mark.parametrize(
    ("gpus", "tensor"),
    [(gpus, t) for gpus in (2, 4, 6, 8, 9, 10, 11, 12, 16, 20, 24) for t in (1, 2, 4, 8) if gpus % t == 0],
)
def test_as_many_processes_start_as_there_are_gpus_and_none_of_a_group_elsewhere(gpus: int, tensor: int) -> None:
    words = launch(Row("", "gain", False, tensor=tensor, sharded=gpus // tensor), gpus, "")[-1].split()
    machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    each = int(words[words.index("--nproc-per-node") + 1])
    assert machines * each == gpus
    assert each <= NODE
    assert each % tensor == 0


def test_a_row_says_what_step_its_traffic_is_of(config: Path) -> None:
    done = call("--model", config, "--gpus", 2, "--memory", 4, "--tokens", 128)
    rows = [re.split(r" {2,}", line.strip()) for line in done.output.splitlines() if " full fine-tuning " in line]
    assert {row[0]: row[-2] for row in rows} == {
        "replicated x 2": "256",
        "FSDP 2": "256",
        "TP 2": "128",
    }


@pytest.mark.slow
def test_a_process_that_plans_loads_no_compiler(config: Path) -> None:
    """PEFT imports bitsandbytes, which asks for one."""
    program = (
        "import sys; from gain_ops.commands.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print([n for n in ('torch', 'torch._inductor.compile_fx') if n in sys.modules])"
    )
    program = f"import sys; sys.argv[0] = 'gain-ops'; {program}"
    call = [sys.executable, "-c", program, "plan", "--model", str(config), "--tokens", "128"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n['torch']\n")


def test_a_process_with_torch_keeps_its_compiler_and_its_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    frozen = gc.get_freeze_count()
    plan._import_torch()
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert gc.get_freeze_count() == frozen

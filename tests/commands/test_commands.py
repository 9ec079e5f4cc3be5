"""The commands from end to end on a tiny model: what they write, what they say, how they stop."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import gain_ops
from gain_ops.checkpoints import absorb as absorbing
from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.formats.safetensors_folder import SafetensorsCheckpoint
from gain_ops.commands import adapt, console
from gain_ops.commands.app import app
from gain_ops.measure.perplexity import perplexity
from gain_ops.training import domains
from gain_ops.training.loading import load_model
from gain_ops.training.loop import Step
from gain_ops.utils.errors import DivergedError

from support.tiny_architectures import build

CPU = torch.device("cpu")
SMALL = ["--batch-tokens", "128", "--sequence-length", "32", "--lr", "0.05"]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _adapt(model: Path, data: Path, out: Path, *more: object) -> Result:
    return _run("adapt", "--model", model, "--data", data, "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(data, out, output) of one finished adaptation."""
    data = tmp_path_factory.mktemp("data")
    for number in range(40):
        (data / f"{number}.py").write_text(f"def f_{number}(x):\n    return x + {number}\n\n\n" * 8, encoding="utf-8")
    out = tmp_path_factory.mktemp("out") / "result"
    result = _adapt(tiny_model, data, out, "--steps", 30)
    assert result.exit_code == 0, result.output
    return data, out, result.output


def test_adapt_writes_its_four_files_and_nothing_else(adapted):
    _, out, output = adapted
    assert sorted(path.name for path in out.iterdir()) == ["gains.safetensors", "plot.png", "report.json", "report.md"]
    assert all(str(path) in output for path in out.iterdir())
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_falls_and_so_does_the_perplexity(adapted):
    report = json.loads((adapted[1] / "report.json").read_text())
    losses = report["training"]["losses"]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    target = report["domains"][0]
    assert target["after"] < 0.8 * target["before"]


def test_the_gain_file_gives_the_perplexity_reported(adapted, tiny_model: Path):
    data, out, _ = adapted
    report = json.loads((out / "report.json").read_text())
    loaded = load_model(tiny_model, dtype=torch.float32, device=CPU)
    domain = domains.from_path(data)
    stream = domains.token_stream(domain.validation, loaded.tokenizer, limit=10**9)
    windows = domains.cut_windows(stream, length=32, count=12, seed=0)
    before = perplexity(loaded.model, windows)
    gain_ops.load_gains(loaded.model, out / "gains.safetensors")
    assert before == pytest.approx(report["domains"][0]["before"], rel=1e-6)
    assert perplexity(loaded.model, windows) == pytest.approx(report["domains"][0]["after"], rel=1e-6)


def test_the_figures_fit_the_files_and_each_other(adapted, tiny_model: Path):
    _, out, output = adapted
    report = json.loads((out / "report.json").read_text())
    deltas = load_file(out / "gains.safetensors")
    gains = report["gains"]
    assert gains["file_bytes"] == (out / "gains.safetensors").stat().st_size
    assert gains["parameters"] == sum(delta.numel() for delta in deltas.values()) == 4 * 64
    assert sorted(f"{name}.delta" for name in gains["layers"]) == sorted(deltas)
    model = load_model(tiny_model, dtype=None, device=CPU).model
    assert gains["model_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["backward"]["lora"] > report["backward"]["gain"] > 0
    assert 0 < report["absorbing"]["max_logit_difference"] < 1e-4 * report["absorbing"]["max_logit"]
    assert report["finished"]
    assert [domain["name"] for domain in report["domains"]] == ["data0", "licences", "readmes"]
    seconds = report["seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.1)
    for figure in (f"{report['domains'][0]['after']:.2f}", "256 of", "LoRA r=16"):
        assert figure in output
        assert figure in (out / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_same_call_gives_the_same_gains_and_another_seed_others(adapted, tiny_model: Path, tmp_path: Path):
    data, out, _ = adapted
    again = [tmp_path / "same", tmp_path / "other"]
    for folder, seed in zip(again, (0, 1), strict=True):
        assert _adapt(tiny_model, data, folder, "--steps", 30, "--seed", seed).exit_code == 0
    same, other = (load_file(folder / "gains.safetensors") for folder in again)
    first = load_file(out / "gains.safetensors")
    assert all(torch.equal(delta, same[name]) for name, delta in first.items())
    assert not all(torch.equal(delta, other[name]) for name, delta in first.items())
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, *again)]
    assert reports[0]["domains"] == reports[1]["domains"]
    assert reports[0]["domains"][0]["before"] == reports[2]["domains"][0]["before"]


def test_data_files_are_read_by_their_fields(tiny_model: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    asked = (
        {"ask": "no", "prompt": f"What is {number} + 1? ", "completion": f"{number + 1}\n"} for number in range(300)
    )
    data.write_text("".join(json.dumps(record) + "\n" for record in asked), encoding="utf-8")
    result = _adapt(tiny_model, data, tmp_path / "out", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"read 300 records, fields 'prompt' and 'completion', [\d,]+ characters, from .*data.jsonl", result.output
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["domains"][0]["name"] == "data"
    assert load_file(tmp_path / "out" / "gains.safetensors")


def test_data_that_do_not_fit_are_refused_before_the_training(tiny_model: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"ask": "no", "prompt": "What?", "completion": "That."}))
    line = _one_line(_adapt(tiny_model, data, tmp_path / "other", "--text-field", "body"))
    assert "line 1 has no field 'body' (--text-field): it has 'ask', 'prompt', 'completion'" in line
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.LlamaForCausalLM.from_pretrained", None)  # its weights are not looked at
        assert "tokenizer has no chat template" in _one_line(_adapt(tiny_model, data, tmp_path / "other"))
    long = ({"prompt": letter * 4001, "completion": letter} for letter in "pq")  # the completion is in no whole window
    data.write_text("".join(json.dumps(record) + "\n" for record in long))
    line = _one_line(_adapt(tiny_model, data, tmp_path / "other"))
    assert "windows of 32 tokens to train on and" in line
    assert "its prompts are long; raise --sequence-length" in line


def test_the_seed_does_not_choose_what_is_measured(tiny_model: Path, code_folder: Path, tmp_path: Path):
    measured = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        assert _adapt(tiny_model, code_folder, out, "--steps", 1, "--seed", seed).exit_code == 0
        measured.append(json.loads((out / "report.json").read_text())["domains"][0]["before"])
    assert measured[0] == measured[1]


def test_sides_targets_memory_and_dtype_are_handed_on(tiny_model: Path, code_folder: Path, tmp_path: Path):
    options = ["--side", "input", "--targets", "down_proj", "--memory", "lean", "--dtype", "bfloat16", "--steps", 2]
    result = _adapt(tiny_model, code_folder, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    deltas = load_file(tmp_path / "out" / "gains.safetensors")
    assert {delta.shape for delta in deltas.values()} == {(128,)}
    assert {delta.dtype for delta in deltas.values()} == {torch.float32}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["absorbing"]["max_weight_error"] > 1e-6  # the rounding of bfloat16; float32's is 1e-9
    assert "down_proj gains on the input side" in result.output
    assert "bfloat16" in result.output


@pytest.mark.slow
def test_dropout_follows_the_seed(tiny_model: Path, code_folder: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.5)
    model.save_pretrained(tmp_path / "dropout")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "dropout")
    losses = []
    for name, folder in (("one", tmp_path / "dropout"), ("two", tmp_path / "dropout"), ("none", tiny_model)):
        assert _adapt(folder, code_folder, tmp_path / name, "--steps", 2).exit_code == 0
        losses.append(json.loads((tmp_path / name / "report.json").read_text())["training"]["losses"])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.slow
def test_an_earlier_result_is_replaced_if_asked_and_other_files_stay(
    tiny_model: Path, code_folder: Path, tmp_path: Path
):
    out = tmp_path / "out"
    for steps in (1, 2):
        assert _adapt(tiny_model, code_folder, out, "--steps", steps, "--force").exit_code == 0
        (out / "notes.txt").write_text("mine")
    assert len(json.loads((out / "report.json").read_text())["training"]["losses"]) == 2
    assert (out / "notes.txt").read_text() == "mine"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = _one_line(_adapt(tiny_model, code_folder, out, "--steps", 3))
    assert (
        "holds the gains.safetensors of an earlier run: name another folder (--out), or replace it with --force" in line
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_adapt_says_where_no_gains_went(tiny_model: Path, code_folder: Path, tmp_path: Path):
    hybrid = shutil.copytree(tiny_model, tmp_path / "hybrid")
    model, _ = build("qwen3_5_text", run=False)
    model.resize_token_embeddings(json.loads((tiny_model / "config.json").read_text())["vocab_size"])
    model.save_pretrained(hybrid)
    result = _adapt(hybrid, code_folder, tmp_path / "out", "--steps", 1)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "no gains on 1 mixer output projection (model.layers.1.linear_attn.out_proj)" in said


def test_without_peft_the_report_says_so_by_name(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gain_ops.training.adaptation.lora_backward_bytes", lambda *arguments: None)
    result = _adapt(tiny_model, code_folder, tmp_path / "out", "--steps", 1)
    assert result.exit_code == 0
    assert "the package peft is not installed" in result.output


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes COLUMNS for good where it is set at import, as it is in a worker of xdist."""
    for place in (console.STDOUT, console.STDERR):
        monkeypatch.setattr(place, "_width", 200)


@pytest.fixture(autouse=True)
def _ctrl_c_as_on_a_terminal() -> Iterator[None]:
    """A process started in the background of a shell ignores SIGINT, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class _Interrupt:
    """Sends SIGINT at a known place, so that the tests do not depend on how fast the machine is."""

    def __init__(self, patch: pytest.MonkeyPatch, *, in_phase: str = "", at_step: int = 0, signals: int = 1) -> None:
        def phase(self: object, text: str) -> None:
            if in_phase and in_phase in text:
                os.kill(os.getpid(), signal.SIGINT)

        def step(self: object, done: Step) -> None:
            for _ in range(signals if done.number == at_step else 0):
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(adapt._ConsoleWatcher, "phase", phase)
        patch.setattr(adapt._ConsoleWatcher, "step", step)


@pytest.mark.slow
def test_ctrl_c_ends_the_process_with_130_and_a_gain_file(tiny_model: Path, code_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    program = "from gain_ops.commands.cli import main; main()"
    call = ["adapt", "--model", tiny_model, "--data", code_folder, "--out", out, *SMALL, "--steps", 5000]
    command = [sys.executable, "-u", "-c", program, *map(str, call)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("training gains"):
                break
        time.sleep(2)  # into the steps, of which there are enough for minutes
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"training steps are in {out / 'gains.safetensors'}." in rest
    model = load_model(tiny_model, dtype=torch.float32, device=CPU).model
    applied = gain_ops.load_gains(model, out / "gains.safetensors")
    assert applied is not None
    assert any(model.get_submodule(name).delta.abs().max() > 0 for name in applied.names)


def test_ctrl_c_in_training_keeps_the_step_it_came_in(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _Interrupt(monkeypatch, at_step=3)
    result = _adapt(tiny_model, code_folder, tmp_path / "out", "--steps", 20)
    assert result.exit_code == 130
    assert f"The gains of 3 training steps are in {tmp_path / 'out' / 'gains.safetensors'}." in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["finished"], report["training"]["stopped"], len(report["training"]["losses"])) == (False, True, 3)


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_table_of_an_earlier_one_and_a_later_run_may_replace_it(
    tiny_model: Path, code_folder: Path, tmp_path: Path
):
    call = tiny_model, code_folder, tmp_path / "out", "--steps", 2
    assert _adapt(*call).exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        _Interrupt(patch, at_step=1)
        assert _adapt(*call, "--force").exit_code == 130
    assert sorted(path.name for path in call[2].iterdir()) == ["gains.safetensors", "report.json"]
    assert _adapt(*call, "--force").exit_code == 0
    assert (call[2] / "plot.png").exists()


def test_a_second_ctrl_c_aborts_and_leaves_the_earlier_result(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    assert _adapt(tiny_model, code_folder, out, "--steps", 1).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    _Interrupt(monkeypatch, at_step=2, signals=2)
    result = _adapt(tiny_model, code_folder, out, "--steps", 5, "--force")
    assert result.exit_code == 130
    assert "Nothing was written." in result.output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("phase", "message", "written"),
    [
        ("perplexity before", "Nothing was written.", []),
        ("perplexity after", "The gains of 4 training steps are in", ["gains.safetensors", "report.json"]),
        ("absorbing", "The gains of 4 training steps are in", ["gains.safetensors", "report.json"]),
    ],
)
def test_ctrl_c_outside_the_training_says_what_there_is(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase, message, written
):
    _Interrupt(monkeypatch, in_phase=phase)
    result = _adapt(tiny_model, code_folder, tmp_path / "out", "--steps", 4)
    assert result.exit_code == 130
    assert message in result.output
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == written


def test_the_signal_handler_is_put_back(tiny_model: Path, code_folder: Path, tmp_path: Path):
    before = signal.getsignal(signal.SIGINT)
    assert _adapt(tiny_model, code_folder, tmp_path / "out", "--steps", 1).exit_code == 0
    assert signal.getsignal(signal.SIGINT) is before


def _one_line(result: Result) -> str:
    """The error line of a call that must end with exit code 2, one line and no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "steps is 0: at least 1"),
        (["--batch-tokens", 100], "batch tokens is 100: it must be a multiple of the sequence length, 32"),
        (["--sequence-length", 1], "sequence length is 1: at least 2"),
        (["--sequence-length", 512, "--batch-tokens", 512], "sequence length is 512: this model takes at most 256"),
        (["--lr", -1], "lr is -1.0: a finite learning rate above 0"),
        (["--lr", "inf"], "lr is inf: a finite learning rate above 0"),
        (["--side", "left"], "side"),
        (["--memory", "none"], "memory"),
        (["--targets", "no_such_layer"], "no_such_layer"),
        (["--dtype", "int8"], "dtype 'int8' is unknown: choose float32 or bfloat16"),
        (["--device", "tpu"], "device 'tpu' is unknown: choose auto, cpu or cuda"),
        (["--model", "nowhere"], "no model at nowhere"),
        (["--data", "nowhere"], "no such file or folder: nowhere"),
    ],
)
def test_adapt_says_what_does_not_fit(tiny_model: Path, code_folder: Path, tmp_path: Path, options, message):
    assert message in _one_line(_adapt(tiny_model, code_folder, tmp_path / "out", "--steps", 1, *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--targets", "no_such_layer"), ("--side", "left"), ("--memory", "none")])
def test_what_apply_refuses_is_said_before_anything_is_measured(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, str]
):
    monkeypatch.setattr("gain_ops.training.adaptation.perplexity", lambda *arguments: pytest.fail("measured"))
    assert options[1] in _one_line(_adapt(tiny_model, code_folder, tmp_path / "out", *options))


def test_too_little_text_says_how_many_tokens_came_and_are_needed(tiny_model: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("one line\nand another\n")
    line = _one_line(_adapt(tiny_model, tmp_path / "short.txt", tmp_path / "out"))
    assert "tokens to train on" in line
    assert "at least 128 and 32 are needed" in line


def test_files_of_something_else_are_not_replaced(tiny_model: Path, code_folder: Path, tmp_path: Path):
    (tmp_path / "plot.png").write_text("mine")
    line = _one_line(_adapt(tiny_model, code_folder, tmp_path, "--steps", 1))
    assert "plot.png" in line
    assert (tmp_path / "plot.png").read_text() == "mine"
    assert "is a file" in _one_line(_adapt(tiny_model, code_folder, tmp_path / "plot.png", "--steps", 1))


def test_a_loss_that_stops_being_finite_is_said_without_a_traceback(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def diverge(*arguments: object, **options: object) -> None:
        raise DivergedError("step 3: loss nan")

    monkeypatch.setattr("gain_ops.training.adaptation.train", diverge)
    assert _one_line(_adapt(tiny_model, code_folder, tmp_path / "out", "--steps", 4)) == "step 3: loss nan"


def test_a_bug_is_not_passed_off_as_the_users_error(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*arguments: object, **options: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("gain_ops.training.adaptation.train", broken)
    result = _adapt(tiny_model, code_folder, tmp_path / "out", "--steps", 4)
    assert isinstance(result.exception, TypeError)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["adapt", "--no-such"], "--no-such"), (["dance"], "dance"), (["absorb"], "--gain")]
)
def test_a_call_that_does_not_parse_ends_with_two(arguments, message):
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_absorb_writes_a_plain_model_with_the_bits_of_absorbing_in_memory(adapted, tiny_model: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    gain, out = adapted[1] / "gains.safetensors", tmp_path / "plain"
    result = _run("absorb", "--base", tiny_model, "--gain", gain, "--out", out)
    assert result.exit_code == 0, result.output
    assert "absorbed 4 layers; largest rounding error of a rewritten value" in result.output
    assert "verified: read again" in result.output
    assert f"wrote {out} (5 files" in result.output

    plain = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert type(plain) is LlamaForCausalLM
    ids = torch.arange(64)[None]
    base = load_model(tiny_model, dtype=None, device=CPU).model
    with torch.no_grad():
        untouched = base(ids).logits
        gain_ops.load_gains(base, gain)
        gain_ops.absorb(base)
        assert torch.equal(plain(ids).logits, base(ids).logits)
        assert (plain(ids).logits - untouched).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert tokenizer.decode(tokenizer.encode("fox", add_special_tokens=False)) == "fox"


def test_absorb_dry_run_lists_what_would_change_and_writes_nothing(adapted, tiny_model: Path, tmp_path: Path):
    call = ["absorb", "--base", tiny_model, "--gain", adapted[1] / "gains.safetensors", "--out", tmp_path / "plain"]
    result = _run(*call, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in result.output
    for layer in range(2):
        for name, shape in (("self_attn.o_proj", "F32 [64, 64]"), ("mlp.down_proj", "F32 [64, 128]")):
            assert any(
                f"model.layers.{layer}.{name} " in line and shape in line and " to " in line
                for line in result.output.splitlines()
            )
    assert "rewrite 4 tensors there, 96.0 KiB; nothing was written" in result.output
    assert list(tmp_path.iterdir()) == []
    assert _run(*call).exit_code == 0
    assert "not empty" in _one_line(_run(*call, "--dry-run"))


def test_absorb_says_which_gains_go_into_up_projections(tiny_model: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, **options)
    model.save_pretrained(tmp_path / "base")
    gain_ops.apply(model, ["down_proj"], side="input")
    gain_ops.save_gains(model, tmp_path / "gains.safetensors")
    call = ["absorb", "--base", tmp_path / "base", "--gain", tmp_path / "gains.safetensors", "--out", tmp_path / "out"]
    said = "the input gains of 2 down projections, whose weights cannot take them exactly, go into the rows of the up"
    for more in (["--dry-run"], []):
        result = _run(*call, *more)
        assert result.exit_code == 0, result.output
        assert said in result.output
        if more:
            table = re.sub(r"[^\w.]", "", result.output)  # long names are folded at the screen's width
            assert "gain of" in result.output
            assert "goes into" in result.output
            for part in ("model.layers.0.m", "mlp.up", "SCB", "F32128"):
                assert part in table, table


def test_absorb_says_what_it_does_not_copy_and_what_it_does_not_verify(adapted, tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model, tmp_path / "base")
    for number in range(6):
        (tmp_path / "base" / f"{number}.bin").touch()
    call = [
        "absorb",
        "--base",
        tmp_path / "base",
        "--gain",
        adapted[1] / "gains.safetensors",
        "--out",
        tmp_path / "plain",
    ]
    for options, verified in ((["--dry-run"], None), (["--no-verify"], "not verified (--no-verify)")):
        result = _run(*call, *options)
        assert result.exit_code == 0, result.output
        assert "not copied, as no gain is folded into it: 0.bin, 1.bin, 2.bin, 3.bin and 2 more" in result.output
        assert verified is None or verified in result.output


def test_absorb_replaces_a_model_folder_only_with_force_and_nothing_else_ever(
    adapted, tiny_model: Path, tmp_path: Path
):
    call = ["absorb", "--base", tiny_model, "--gain", adapted[1] / "gains.safetensors", "--out"]
    out, other = tmp_path / "plain", tmp_path / "other"
    assert _run(*call, out).exit_code == 0
    (out / "stale.safetensors").touch()
    assert "not empty" in _one_line(_run(*call, out))
    assert _run(*call, out, "--force").exit_code == 0
    assert not (out / "stale.safetensors").exists()
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "not a model folder" in _one_line(_run(*call, other, "--force"))
    assert (other / "thesis.txt").read_text() == "mine"
    assert "lies in the base" in _one_line(_run(*call, tiny_model, "--force"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "plain"]


def test_absorb_refuses_what_is_no_gain_file_or_of_another_model(adapted, tiny_model: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    gain, out = adapted[1] / "gains.safetensors", tmp_path / "plain"
    (tmp_path / "broken.safetensors").write_bytes(b"not a gain file")
    call = ["absorb", "--base", tiny_model, "--out", out, "--gain"]
    assert "no gain file at" in _one_line(_run(*call, tmp_path / "none.safetensors"))
    assert "broken.safetensors" in _one_line(_run(*call, tmp_path / "broken.safetensors"))
    assert "no checkpoint at" in _one_line(_run(*call, gain, "--base", tmp_path / "none"))

    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    call = ["absorb", "--base", tmp_path / "other", "--gain", gain, "--out", out]
    line = _one_line(_run(*call))
    assert "in 1 of 4 layers, model.layers.0.mlp.down_proj" in line
    assert "--no-check-base" in line
    assert not out.exists()
    assert _run(*call, "--no-check-base").exit_code == 0


def test_absorb_stopped_by_ctrl_c_says_what_is_kept_and_goes_on(
    adapted, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "plain"
    call = ["absorb", "--base", tiny_model, "--gain", adapted[1] / "gains.safetensors", "--out", out]

    def stop(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    for step, kept in (
        ("copy_file", "Nothing was written."),
        ("verify", f"The finished files are in {tmp_path / '.part-plain'}: the same"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(absorbing, step, stop)
            result = _run(*call)
        assert result.exit_code == 130
        assert kept in result.output
        assert not out.exists()
    assert _run(*call).exit_code == 0
    assert list(tmp_path.iterdir()) == [out]


def test_absorb_hands_on_whether_to_quantise_anew(
    adapted, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def edits(self: object, gains: object, *, requantize: bool, check_base: bool) -> None:
        asked.append((requantize, check_base))
        raise CheckpointError("enough")

    monkeypatch.setattr(SafetensorsCheckpoint, "edits", edits)
    call = ["absorb", "--base", tiny_model, "--gain", adapted[1] / "gains.safetensors", "--out", tmp_path / "plain"]
    for options in ([], ["--requantize"], ["--no-check-base"]):
        assert _one_line(_run(*call, *options)) == "enough"
    assert asked == [(False, True), (True, True), (False, False)]


def test_info_names_versions_devices_variables_and_backends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GAIN_OPS_BACKEND", "eager")
    result = _run("info")
    assert result.exit_code == 0, result.output
    for part in (gain_ops.__version__, torch.__version__, "transformers", "GAIN_OPS_BACKEND", "linear_z", "eager"):
        assert part in result.output


def test_info_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    from gain_ops.measure import environment

    def version(package: str) -> str:
        if package == "peft":
            raise environment.metadata.PackageNotFoundError(package)
        return "9.9.9"

    monkeypatch.setattr(environment.metadata, "version", version)
    lines = _run("info").output.splitlines()
    assert any(line.split() == ["peft", "not", "installed"] for line in lines)
    assert any(line.split() == ["triton", "9.9.9"] for line in lines)


def test_info_with_an_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GAIN_OPS_BACKEND", "abacus")
    assert "abacus" in _one_line(_run("info"))

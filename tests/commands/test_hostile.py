"""What anyone may have put into a file or a folder: the commands print it escaped, run none of it, and end in one line."""

import io
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from gain_ops.commands import cli, console
from gain_ops.commands.app import app
from gain_ops.gainfiles.file import GainFile, write_gains
from gain_ops.planning.configs import read_config
from gain_ops.training.loading import load_model
from gain_ops.utils.errors import GainOpsError, UsageError

from support.gguf_files import write_tensors
from support.small_checkpoints import save_folder, save_gain_file

ESCAPE = "\x1b[2J"
ODD = f"model.layers.0.{ESCAPE}\x9b7\u202eo_proj"
SHOWN = r"\x1b[2J\x9b7\u202eo_proj"
DOWN = "model.layers.0.mlp.down_proj"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.STDOUT, "_width", 400)
    monkeypatch.setattr(console.STDERR, "_width", 400)


def printed(*arguments: object, code: int) -> str:
    done = call(*arguments)
    assert done.exit_code == code, done.output
    assert all(line.isprintable() for line in done.output.split("\n")), repr(done.output)
    return done.output


def refused(*arguments: object) -> str:
    """The one line of an error."""
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr[:-1].isprintable()
    return done.stderr


def odd_gains(path: Path, value: float) -> Path:
    write_gains(
        GainFile({ODD: torch.full((4,), value)}, {ODD: "output"}, {ODD: None}, ESCAPE, f"base{ESCAPE}\n", ESCAPE), path
    )
    return path


@pytest.mark.parametrize("width", [400, 40])
def test_names_are_printed_escaped_in_tables_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int):
    monkeypatch.setattr(console.STDOUT, "_width", width)
    one, two = odd_gains(tmp_path / "1.safetensors", 0.1), odd_gains(tmp_path / "2.safetensors", 0.2)
    for arguments in (("inspect", one), ("diff", one, two)):
        assert SHOWN in printed(*arguments, code=0)
    assert r"base\x1b[2J\n" in printed("inspect", one, code=0)
    folders = [save_folder(tmp_path / name, [{f"{ODD}.weight": torch.full((4, 6), float(name))}]) for name in "12"]
    assert SHOWN in printed("diff", *folders, code=0)
    assert SHOWN in printed("absorb", "--base", folders[0], "--gain", one, "--out", tmp_path / "o", "--dry-run", code=0)


def test_names_with_the_markup_of_formulas_are_drawn_as_they_are(tmp_path: Path):
    name = "layers.0.$\\frac$"
    file = tmp_path / "$\\bad{$.safetensors"
    write_gains(GainFile({name: torch.ones(4)}, {name: "output"}, {name: None}, "gain", None, "0"), file)
    printed("inspect", file, "--plot", tmp_path / "a.png", code=0)


def test_names_are_printed_escaped_in_errors(tmp_path: Path):
    gain = odd_gains(tmp_path / "g.safetensors", 0.1)
    base = save_folder(tmp_path / f"b{ESCAPE}", [{"a.weight": torch.ones(4, 6)}])
    error = refused("absorb", "--base", base, "--gain", gain, "--out", tmp_path / "o")
    assert r"b\x1b[2J" in error
    assert SHOWN in error
    assert r"b\x1b[2J" in refused("inspect", base)
    assert r"b\x1b[2J" in refused("plan", "--model", base / "none")


def test_a_traceback_that_was_asked_for_is_escaped_too(tmp_path: Path):
    done = call("--debug", "inspect", tmp_path / f"none{ESCAPE}")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert ESCAPE not in done.stderr
    call("inspect", tmp_path)  # without --debug again


def test_a_terminal_in_ascii_shows_the_rest_escaped(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["gain-ops", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    console.STDOUT.print("\u00e9\u2500")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"\\xe9\\u2500\n")


# Code and pickles in a model's folder


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder whose code leaves a file beside it; a question would be answered with yes."""
    folder = tmp_path / "model"
    save_folder(folder, [{f"{DOWN}.weight": torch.ones(4, 6)}])
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.T", None]}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": maps}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": maps}))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_no_command_runs_the_code_of_a_folder(with_code: Path, tmp_path: Path):
    gain = save_gain_file(tmp_path / "g.safetensors", {DOWN: torch.ones(6)}, side="input")
    text = tmp_path / "text.txt"
    text.write_text("text\n" * 100)
    error = refused("adapt", "--model", with_code, "--data", text, "--out", tmp_path / "run")
    assert "code of its own, which is not run unasked: read it, and allow it with --trust-remote-code" in error
    study = ("study", "--model", with_code, "--domain", text, "--orders", 1, "--methods", "gain", "--no-tasks")
    assert "allow it with --trust-remote-code" in refused(*study, "--out", tmp_path / "study")
    assert "of a model with code of its own (auto_map), which plan does not run" in refused(
        "plan", "--model", with_code
    )
    call("absorb", "--base", with_code, "--gain", gain, "--out", tmp_path / "out")
    call("diff", with_code, with_code)
    assert not (tmp_path / "ran").exists()


def test_code_is_run_where_it_is_asked_for(with_code: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="transformers cannot load"):  # it has a config, and no model
        load_model(with_code, dtype=None, device=torch.device("cpu"), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["adapt", "study"])
def test_both_commands_that_load_a_model_may_be_told_to(with_code: Path, tmp_path: Path, command: str):
    text = tmp_path / "text.txt"
    text.write_text("text\n" * 100)
    own = {"adapt": ["--data", text], "study": ["--domain", text, "--orders", 1, "--methods", "gain", "--no-tasks"]}[
        command
    ]
    error = refused(command, "--model", with_code, *own, "--out", tmp_path / "run", "--trust-remote-code")
    assert "transformers cannot load" in error
    assert (tmp_path / "ran").exists()


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("ran", "w")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "sd.ckpt", "sha256-0123", "model.safetensors", "folder"]
)
def test_a_pickle_is_refused_in_one_sentence_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"a": _Bomb()}, path / "pytorch_model.bin" if name == "folder" else path)
    gain = save_gain_file(tmp_path / "g.safetensors", {DOWN: torch.ones(4)})
    said = "reading a pickle can run any code, so none is read here. Convert it with"
    with pytest.raises(UsageError, match=said):  # as adapt does, once it has read its texts
        load_model(path, dtype=None, device=torch.device("cpu"))
    for arguments in (
        ("plan", "--model", path),
        ("absorb", "--base", path, "--gain", gain, "--out", tmp_path / "out"),
        ("diff", path, path),
    ):
        assert said in refused(*arguments), arguments
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


# Models under other names, damaged configs, links


def test_a_gguf_file_without_its_extension_is_one(tmp_path: Path):
    path = write_tensors(tmp_path / "sha256-0123", "llama", {"blk.0.ffn_down.weight": ("Q8_0", 4, 32)})
    gain = save_gain_file(tmp_path / "g.safetensors", {DOWN: torch.full((4,), 0.5)})
    out = tmp_path / "out"
    printed("absorb", "--base", path, "--gain", gain, "--out", out, code=0)
    assert "gains on its rows, 1." in printed("diff", path, out / path.name, code=0)


def test_a_safetensors_file_without_its_extension_is_one(tmp_path: Path):
    save_file({f"{DOWN}.weight": torch.ones(4, 6)}, tmp_path / "blob")
    gain = save_gain_file(tmp_path / "g.safetensors", {DOWN: torch.full((4,), 0.5)})
    printed("absorb", "--base", tmp_path / "blob", "--gain", gain, "--out", tmp_path / "out", code=0)


def test_a_hostile_gguf_is_refused_before_transformers_reads_it(tmp_path: Path):
    bomb = tmp_path / "bomb"
    bomb.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 1 << 62))
    with pytest.raises(GainOpsError, match="bomb is not a whole GGUF file"):
        load_model(bomb, dtype=None, device=torch.device("cpu"))


def test_a_pipeline_of_diffusers_is_several_models(tmp_path: Path):
    (tmp_path / "model_index.json").write_text("{}")
    gain = save_gain_file(tmp_path / "g.safetensors", {DOWN: torch.ones(4)})
    error = refused("absorb", "--base", tmp_path, "--gain", gain, "--out", tmp_path.parent / "out")
    assert "is a pipeline of diffusers, of several models: name the folder of one" in error


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        '{"model_type": "llama", "model_type": "gpt2"}',
        '{"model_type": ["llama"]}',
        '{"model_type": "llama", "hidden_size": "\x1b[2J"}'.replace("\x1b", "\\u001b"),
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "rope_parameters": 7}',
        '{"model_type": "llama", "num_hidden_layers": 1000000000}',
        '{"model_type": "gpt2", "n_layer": 1000000000}',
        '{"model_type": "gemma3", "text_config": {"num_hidden_layers": 1000000000}}',
        '{"model_type": "llama", "num_hidden_layers": 0}',
        '{"model_type": "llama", "vocab_size": 0}',
        '{"model_type": "llama", "layer_types": {"a": 1}}',
        "[]",
        "",
    ],
)
def test_a_damaged_config_ends_plan_in_one_line(tmp_path: Path, config: str):
    (tmp_path / "config.json").write_text(config)
    assert str(tmp_path / "config.json") in (error := refused("plan", "--model", tmp_path)) or "config" in error


def test_a_config_is_never_planned_with_its_own_code(with_code: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="code of its own"):
        read_config(str(with_code / "config.json"))
    assert not (tmp_path / "ran").exists()


def test_links_to_files_outside_the_base_are_named_when_they_are_copied(tmp_path: Path):
    base = save_folder(tmp_path / "base", [{f"{DOWN}.weight": torch.ones(4, 6)}])
    gain = save_gain_file(tmp_path / "g.safetensors", {DOWN: torch.ones(4)})
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "private" / "key")
    (base / "inside.json").symlink_to(base / "config.json")
    said = f"copied from outside the base, through links: notes.txt (in {tmp_path / 'private'})"
    for more in (["--dry-run"], []):
        output = printed("absorb", "--base", base, "--gain", gain, "--out", tmp_path / "out", *more, code=0)
        assert said in output
        assert "inside.json" not in output

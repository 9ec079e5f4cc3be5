"""What all commands share: tables that are never cut, errors told from bugs, and a stderr that is ours alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import gain_ops
from gain_ops.commands import absorb, adapt, console, files, info, plan
from gain_ops.commands.app import app
from gain_ops.gainfiles.file import GainFile
from gain_ops.utils.errors import FileError, GainOpsError, file_errors

PROGRAM = "import sys; sys.argv[0] = 'gain-ops'; from gain_ops.commands.cli import main; main()"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def gain_file(path: Path, model_folder: Path, *, seed: int) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    gain_ops.apply(model, "gain-ffn")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            torch.nn.init.normal_(parameter, std=0.1)
    gain_ops.save_gains(model, path)
    return path


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two gain files, the model with one of them absorbed, and text."""
    folder = tmp_path_factory.mktemp("console")
    for number in (1, 2):
        gain_file(folder / f"{number}.safetensors", tiny_model, seed=number)
    (folder / "text.txt").write_text("def f(x):\n    return x + 1\n\n\n" * 300, encoding="utf-8")
    done = call("absorb", "--base", tiny_model, "--gain", folder / "1.safetensors", "--out", folder / "absorbed")
    assert done.exit_code == 0, done.output
    return folder


def calls(tiny_model: Path, place: Path, out: Path) -> dict[str, list[object]]:
    """Every command on something small."""
    one, two = place / "1.safetensors", place / "2.safetensors"
    small = ["--steps", 2, "--batch-tokens", 128, "--sequence-length", 32]
    study = [
        "--methods",
        "gain",
        "--rates",
        "gain=1e-2",
        "--seeds",
        0,
        "--orders",
        1,
        "--no-tasks",
        "--curve-points",
        0,
    ]
    study += ["--validation-windows", 2, "--selection-windows", 2, *small]
    return {
        "info": ["info"],
        "plan": ["plan", "--model", tiny_model, "--gpus", 2, "--memory", 4, "--tokens", 128, "--all"],
        "inspect": ["inspect", one, "--plot", out / "gains.png"],
        "diff gains": ["diff", one, two],
        "diff checkpoints": ["diff", tiny_model, place / "absorbed"],
        "merge": ["merge", one, two, "--out", out / "merged.safetensors"],
        "dry run": ["absorb", "--base", tiny_model, "--gain", one, "--out", out / "dry", "--dry-run"],
        "absorb": ["absorb", "--base", tiny_model, "--gain", one, "--out", out / "absorbed"],
        "adapt": ["adapt", "--model", tiny_model, "--data", place / "text.txt", "--out", out / "adapted", *small],
        "study": ["study", "--model", tiny_model, "--domain", place / "text.txt", "--out", out / "study", *study],
    }


WITH_TABLES = ("info", "plan", "inspect", "diff gains", "diff checkpoints", "dry run", "adapt")


class TestTables:
    @pytest.mark.parametrize("width", [80, 40])
    @pytest.mark.parametrize("name", WITH_TABLES)
    def test_nothing_is_cut(
        self, name: str, width: int, tiny_model: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console.STDOUT, "_width", width)
        cells: list[str] = []

        def table(headings: list[str], rows: list[list[str]], **options: object) -> None:
            cells.extend([*headings, *(cell for row in rows for cell in row)])
            console.print_table(headings, rows, **options)

        def pairs(title: str | None, given: object) -> None:
            given = list(given)
            cells.extend(part for pair in given for part in pair)
            console.print_pairs(title, given)

        for module in (absorb, adapt, files, info, plan):
            monkeypatch.setattr(module, "print_table", table, raising=False)
            monkeypatch.setattr(module, "print_pairs", pairs, raising=False)
        done = call(*calls(tiny_model, place, tmp_path)[name])
        assert done.exit_code == 0, done.output
        assert len(cells) > 5
        assert "…" not in done.output
        text = " ".join(done.output.split())
        missing = [cell for cell in cells if " ".join(cell.split()) not in text]
        assert not missing, done.output

    def test_rows_become_blocks_where_the_table_is_one_column_too_wide(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        headings, rows = ["layer", "gains"], [["[a] b", "4,096"], ["all", "8,192"]]
        printed = {}
        for width in (80, 15, 14):
            monkeypatch.setattr(console.STDOUT, "_width", width)
            console.print_table(headings, rows, title="[x]", breaks={1})
            printed[width] = capsys.readouterr().out.splitlines()
        assert [line.split() for line in printed[80]][2] == ["layer", "gains"]
        assert max(map(len, printed[80])) == 15
        assert printed[15] == printed[80]
        assert printed[14] == ["[x]", "", "layer  [a] b", "gains  4,096", "", "layer  all", "gains  8,192", ""]

    def test_a_long_value_goes_on_below_itself_and_a_long_word_stays_whole(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console.STDOUT, "_width", 20)
        console.print_pairs(
            None, [("file", "one two three four"), ("at", "/a/path/that/is/longer/than/that"), ("", "")]
        )
        assert capsys.readouterr().out.splitlines() == [
            "file  one two three",
            "      four",
            "at    /a/path/that/is/longer/than/that",
            "",
        ]

    @pytest.mark.slow
    def test_a_plan_of_llama_at_80_columns_has_whole_headings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(console.STDOUT, "_width", 80)
        done = call("plan", "--model", "llama-3-8b")
        assert done.exit_code == 0, done.output
        lines = [" ".join(line.split()) for line in done.output.splitlines()]
        for line in (
            "how one GPU",
            "method gain-ffn, fused, lean",
            "transient 7.9",
            "tokens 8,192",
            "blocks run again",
        ):
            assert line in lines


def raising(error: Exception) -> object:
    def broken(*arguments: object, **options: object) -> None:
        raise error

    return broken


class TestErrors:
    @pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("a bug"), OSError("a bug"), ImportError("a bug")])
    def test_a_bug_keeps_its_traceback(self, error: Exception, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gain_ops.models.statistics.gain_statistics", raising(error))
        done = call("inspect", place / "1.safetensors")
        assert done.exit_code == 1
        assert done.exception is error
        assert "a bug" not in done.output

    def test_a_bug_in_a_process_ends_it_with_one_and_a_whole_traceback(self, place: Path) -> None:
        bug = "import gain_ops.models.statistics as g; g.gain_statistics = lambda file: {}['a bug']; "
        done = subprocess.run(
            [sys.executable, "-c", bug + PROGRAM, "inspect", str(place / "1.safetensors")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback (most recent call last):\n")
        assert done.stderr.endswith("KeyError: 'a bug'\n")

    def test_an_error_of_ours_is_a_line_and_a_traceback_with_debug(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console.STDERR, "_width", 200)
        monkeypatch.setattr("gain_ops.models.statistics.gain_statistics", raising(GainOpsError("[b]does not\nfit[/b]")))
        plain, debugged, again = (call(*more, "inspect", place / "1.safetensors") for more in ([], ["--debug"], []))
        assert [result.exit_code for result in (plain, debugged, again)] == [2, 2, 2]
        assert plain.stderr == again.stderr == "[b]does not fit[/b]\n"
        assert debugged.stderr.startswith("Traceback (most recent call last):\n")
        assert "in broken\n    raise error\n" in debugged.stderr
        assert debugged.stderr.endswith("\n[b]does not fit[/b]\n")

    def test_files_that_the_system_refuses_are_the_callers(self, tiny_model: Path, place: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        below = tmp_path / "file" / "below"
        gain = place / "1.safetensors"
        for arguments in (
            ["merge", gain, "--out", below],
            ["inspect", gain, "--plot", f"{below}.png"],
            ["plan", "--model", tiny_model, "--tokens", 128, "--json", below],
            ["absorb", "--base", tiny_model, "--gain", gain, "--out", below],
            ["adapt", "--model", tiny_model, "--data", place / "text.txt", "--out", below, "--steps", 1],
            ["study", "--model", tiny_model, "--domain", place / "text.txt", "--out", below, "--orders", 1],
        ):
            done = call(*arguments)
            assert done.exit_code == 2, (arguments, done.output, done.exception)
            (line,) = done.stderr.splitlines()
            assert str(tmp_path / "file") in line, arguments

    @pytest.mark.slow
    def test_models_that_transformers_cannot_read_are_the_callers(self, place: Path, tmp_path: Path) -> None:
        for content in ("{", '{"model_type": "no-such"}', '{"model_type": "vit"}'):
            (tmp_path / "config.json").write_text(content)
            for arguments in (
                ["plan", "--model", tmp_path],
                ["adapt", "--model", tmp_path, "--data", place / "text.txt", "--out", tmp_path / "out"],
            ):
                done = call(*arguments)
                assert done.exit_code == 2, (content, arguments, done.output, done.exception)
                (line,) = done.stderr.splitlines()
                assert "transformers" in line

    def test_the_systems_errors_name_their_file(self) -> None:
        with pytest.raises(FileError, match=r"^/no/such: No such file or directory$"), file_errors():
            Path("/no/such").read_bytes()
        with pytest.raises(FileError, match=r"^odd$"), file_errors():
            raise OSError("odd")
        with pytest.raises(KeyError), file_errors():
            raise KeyError


class TestStreams:
    @pytest.mark.parametrize(
        "name",
        [
            *("info", "inspect", "diff gains", "diff checkpoints", "merge"),
            *(pytest.param(name, marks=pytest.mark.slow) for name in ("dry run", "absorb", "plan", "adapt", "study")),
        ],
    )
    def test_stderr_has_our_own_lines_alone(self, name: str, tiny_model: Path, place: Path, tmp_path: Path) -> None:
        arguments = map(str, calls(tiny_model, place, tmp_path)[name])
        done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert not any(line.startswith("[") for line in done.stdout.splitlines()), "a log of another package"

    def test_no_bar_of_another_package_is_drawn(self) -> None:
        """transformers unpacks a GGUF under a bar of tqdm's, which reads its switch when it is imported."""
        bar = "from tqdm.auto import tqdm; print(sum(tqdm(range(3), desc='unpacking')))"
        quiet = "from gain_ops.commands import console; console.quiet_libraries()"
        program = f"import sys; sys.argv = ['gain-ops']; {quiet}; {bar}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("3\n", "")

    @pytest.mark.parametrize("command", [[], ["plan"], ["adapt"], ["study"]])
    def test_help_waits_for_nothing(self, command: list[str]) -> None:
        heavy = ("torch", "transformers", "numpy", "safetensors", "matplotlib", "peft")
        program = PROGRAM.replace("main()", f"\ntry: main()\nfinally: print([n for n in {heavy} if n in sys.modules])")
        done = subprocess.run([sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True)
        assert "Usage: gain-ops" in done.stdout
        assert done.stdout.endswith("\n[]\n"), done.stdout[-200:] + done.stderr


def test_a_layer_alone_fills_no_empty_heading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.STDOUT, "_width", 30)
    file = GainFile({"lm_head": torch.zeros(4)}, {"lm_head": "output"}, {"lm_head": None}, ("lm_head",), None, "0")
    gain_ops.write_gains(file, tmp_path / "g.safetensors")
    output = call("inspect", tmp_path / "g.safetensors").output
    assert "layer    lm_head\n" in output
    assert "largest  1.0000\n" in output

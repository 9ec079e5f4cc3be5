"""gain-ops inspect, diff and merge, as a user calls them."""

import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import gain_ops
from gain_ops.checkpoints.compare import compare
from gain_ops.commands import console
from gain_ops.commands.app import app
from gain_ops.gainfiles.file import GainFile, read_gains


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that folds is right, and hard to read for a test."""
    monkeypatch.setattr(console.STDOUT, "_width", 200)


@pytest.fixture
def gains(tiny_model: Path, tmp_path: Path) -> Path:
    return gain_file(tiny_model, tmp_path / "one.safetensors", seed=1)


def gain_file(model_folder: Path, path: Path, *, seed: int, targets: str = "gain-ffn", side: str = "output") -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    gain_ops.apply(model, targets, side=side)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            torch.nn.init.normal_(parameter, std=0.1)
    gain_ops.save_gains(model, path)
    return path


class TestInspect:
    def test_a_table_and_a_plot(self, gains: Path, tmp_path: Path) -> None:
        file = read_gains(gains)
        file.deltas["model.layers.0.self_attn.o_proj"][:3] = torch.tensor([-1.0, -1.5, 0.75])
        gain_ops.write_gains(file, gains)
        done = call("inspect", gains, "--plot", tmp_path / "gains.png")
        assert done.exit_code == 0, done.output
        cells = next(line for line in done.output.splitlines() if "0.self_attn.o_proj" in line).split()
        assert cells[:3] == ["0.self_attn.o_proj", "64", "-0.5000"]
        assert cells[4] == "1.7500"
        assert cells[-2:] == ["1", "1"], "one dead, one negative"
        assert "4 in model.layers, of which 4 know" in done.output
        assert "tiny-llama" in done.output
        assert "gain-ffn" in done.output
        assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("content", [b"", b"not a gain file"])
    def test_what_is_no_gain_file_is_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        done = call("inspect", tmp_path / "x.safetensors", "--plot", tmp_path / "x.png")
        assert done.exit_code == 2
        assert "not a complete safetensors file" in done.output
        assert not (tmp_path / "x.png").exists()

    @pytest.mark.parametrize("strange", [False, True])
    def test_a_line_a_layer_in_80_columns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strange: bool) -> None:
        monkeypatch.setattr(console.STDOUT, "_width", 80)
        names = [f"model.layers.{i}.{leaf}" for i in (0, 31) for leaf in ("self_attn.o_proj", "mlp.down_proj")]
        deltas = {name: torch.full((4096,), -1.5 if strange else 0.5) for name in names}
        file = GainFile(deltas, dict.fromkeys(names, "output"), dict.fromkeys(names), "gain-ffn", "base", "0")
        gain_ops.write_gains(file, tmp_path / "g.safetensors")
        output = call("inspect", tmp_path / "g.safetensors").output
        lines = [line.split() for line in output.splitlines() if line.split()[1:2] == ["4,096"]]
        assert [line[0] for line in lines] == [name.removeprefix("model.layers.") for name in names]
        assert ("none is closer to 0" in output) is not strange
        assert [line[6:] for line in lines] == [["-", "4,096"] if strange else []] * 4

    def test_sides_that_differ_and_a_layer_alone(self, tmp_path: Path) -> None:
        for sides in ({"model.lm_head": "input", "a": "output"}, {"lm_head": "output"}):
            deltas = {name: torch.zeros(4) for name in sides}
            file = GainFile(deltas, sides, dict.fromkeys(sides), ("x",), None, "0")
            gain_ops.write_gains(file, tmp_path / "g.safetensors")
            rows = [line.split() for line in call("inspect", tmp_path / "g.safetensors").output.splitlines()]
            for name, side in sides.items():
                shown = [side] if len(sides) > 1 else []
                assert [name, *shown, "4", "1.0000", "1.0000", "1.0000", "0.0000"] in rows

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        done = call("inspect", tmp_path)
        assert done.exit_code == 2
        assert f"{tmp_path} is a folder: name the gain file in it" in " ".join(done.output.split())

    def test_a_plot_of_another_format_is_refused(self, gains: Path, tmp_path: Path) -> None:
        done = call("inspect", gains, "--plot", tmp_path / "x.jpg")
        assert done.exit_code == 2
        assert ".png or .svg" in done.output


class TestMerge:
    def test_powers_by_default_apply_all(self, gains: Path, tiny_model: Path, tmp_path: Path) -> None:
        other = gain_file(tiny_model, tmp_path / "two.safetensors", seed=2, targets="gain")
        done = call("merge", gains, other, "--out", tmp_path / "both.safetensors")
        assert done.exit_code == 0, done.output
        a, b, both = (read_gains(p).deltas for p in (gains, other, tmp_path / "both.safetensors"))
        assert both.keys() == a.keys() > b.keys()
        for name, delta in both.items():
            expected = (1 + a[name].double()) * (1 + b[name].double() if name in b else 1) - 1
            assert torch.equal(delta, expected.float())

    def test_mean_by_default_is_one(self, gains: Path, tiny_model: Path, tmp_path: Path) -> None:
        other = gain_file(tiny_model, tmp_path / "two.safetensors", seed=2)
        assert call("merge", gains, other, "--out", tmp_path / "m.safetensors", "--how", "mean").exit_code == 0
        a, b, mean = (read_gains(p).deltas for p in (gains, other, tmp_path / "m.safetensors"))
        for name, delta in mean.items():
            assert torch.equal(delta, ((a[name].double() + b[name].double()) / 2).float())

    def test_weights(self, gains: Path, tmp_path: Path) -> None:
        out = tmp_path / "w.safetensors"
        done = call("merge", gains, gains, "--out", out, "--weight", 2, "--weight", -1)
        assert done.exit_code == 0, done.output
        for name, delta in read_gains(out).deltas.items():
            torch.testing.assert_close(delta, read_gains(gains).deltas[name])

    def test_out_in_a_folder_that_is_not_there_and_out_that_is_one(self, gains: Path, tmp_path: Path) -> None:
        assert call("merge", gains, "--out", tmp_path / "new" / "m.safetensors").exit_code == 0
        assert read_gains(tmp_path / "new" / "m.safetensors").deltas.keys() == read_gains(gains).deltas.keys()
        done = call("merge", gains, "--out", tmp_path / "new")
        assert done.exit_code == 2
        assert "new is a folder: name a file in it" in " ".join(done.output.split())

    def test_another_number_of_weights_is_refused(self, gains: Path, tmp_path: Path) -> None:
        done = call("merge", gains, gains, "--out", tmp_path / "w.safetensors", "--weight", 2)
        assert done.exit_code == 2
        assert not (tmp_path / "w.safetensors").exists()


class TestDiff:
    def test_gain_files(self, gains: Path, tiny_model: Path, tmp_path: Path) -> None:
        file = read_gains(gains)
        name = "model.layers.1.mlp.down_proj"
        file.deltas[name][4] += 0.5
        other = tmp_path / "other.safetensors"
        gain_ops.write_gains(file, other)
        done = call("diff", gains, other)
        assert done.exit_code == 0, done.output
        assert "1 layers differ, 3 are equal" in done.output
        assert "5.00e-01" in next(line for line in done.output.splitlines() if name in line)
        few = gain_file(tiny_model, tmp_path / "few.safetensors", seed=1, targets="gain")
        assert "only in A" in call("diff", gains, few).output

    @pytest.mark.parametrize("side", ["output", "input"])
    def test_an_absorbed_checkpoint_is_explained_by_its_gains(
        self, side: str, tiny_model: Path, tmp_path: Path
    ) -> None:
        gains = gain_file(tiny_model, tmp_path / "g.safetensors", seed=3, side=side)
        out = tmp_path / "absorbed"
        assert call("absorb", "--base", tiny_model, "--gain", gains, "--out", out).exit_code == 0
        differences, equal = compare(tiny_model, out)
        deltas = read_gains(gains).deltas
        assert {d.name for d in differences} == {f"{name}.weight" for name in deltas}
        assert equal == 21 - len(deltas)
        for difference in differences:
            gain = 1 + deltas[difference.name.removesuffix(".weight")]
            assert difference.side == side
            assert difference.gains == pytest.approx((gain.min().item(), gain.max().item()), rel=1e-6)
            assert difference.rest < 1e-3
        text = call("diff", tiny_model, out).output
        assert f"gains on its {'rows' if side == 'output' else 'columns'}" in text
        assert f"{len(deltas)} tensors differ" in text

    def test_another_change_is_not_called_gains(self, tiny_model: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        subprocess.run(["cp", "-r", tiny_model, tmp_path / "copy"], check=True)
        tensors = load_file(tmp_path / "copy" / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] += 0.01 * torch.randn(tensors[name].shape)
        tensors["extra"] = torch.ones(2)
        del tensors["model.norm.weight"]
        save_file(tensors, tmp_path / "copy" / "model.safetensors")
        found = {d.name: d for d in compare(tiny_model, tmp_path / "copy")[0]}
        assert set(found) == {name, "extra", "model.norm.weight"}
        assert found[name].side is None
        assert found[name].change > 0
        assert found["extra"].stored[0] == ""
        assert "not in B" in call("diff", tiny_model, tmp_path / "copy").output

    def test_equal(self, tiny_model: Path) -> None:
        assert "0 tensors differ" in call("diff", tiny_model, tiny_model).output

    def test_gguf_and_refusals(self, tiny_model: Path, gains: Path, tmp_path: Path) -> None:
        import gguf
        import numpy as np

        paths = []
        for factor in (1.0, 1.25):
            path = tmp_path / f"{factor}.gguf"
            writer = gguf.GGUFWriter(path, "llama")
            weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32) * factor
            writer.add_tensor("w", gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
            writer.add_tensor("same", np.ones(3, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            paths.append(path)
        (difference,), equal = compare(*paths)
        assert (difference.name, equal) == ("w", 1)
        assert difference.gains == pytest.approx((1.25, 1.25), rel=1e-2)
        for pair, message in (
            ((gains, tiny_model), "two of a kind"),
            ((tmp_path / "nothing", tiny_model), "no checkpoint at"),
        ):
            done = call("diff", *pair)
            assert done.exit_code == 2
            assert message in done.output

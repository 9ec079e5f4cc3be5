"""Absorbing into a checkpoint on disk: the bits of gain_ops.absorb(), nothing else touched, bounded memory, no half results."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import gain_ops
from gain_ops.checkpoints import absorb as absorbing
from gain_ops.checkpoints.absorb import absorb, verify
from gain_ops.checkpoints.edits import CheckpointError, Edit, Region, Rounding
from gain_ops.checkpoints.formats.safetensors_folder import SafetensorsCheckpoint
from gain_ops.checkpoints.plan import open_checkpoint, plan
from gain_ops.gainfiles.file import GainFileError
from gain_ops.utils.files import copy_file
from gain_ops.utils.stages import stage_of

from support.small_checkpoints import absorbed, contents, save_folder, save_gain_file

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _gains(model: nn.Module, path: Path, *, targets: str = "gain-ffn", side: str = "output") -> Path:
    """Puts gains on a model, and a gain file at ``path``."""
    gain_ops.apply(model, targets, side=side)
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            nn.init.normal_(parameter, std=0.3)
    gain_ops.save_gains(model, path)
    return path


def _llama(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **options: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50}
    config = LlamaConfig(**(sizes | options), num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def _equal_models(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """(base, gain file): two shards of four layers [6, 10], gains on all but one."""
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(4)]
    weights = {name: torch.randn(6, 10) for name in names}
    shards = [{f"{name}.weight": weights[name] for name in part} for part in (names[:2], names[2:])]
    base = save_folder(tmp_path / "base", shards)
    deltas = {name: torch.randn(6) for name in names[:3]}
    return base, save_gain_file(tmp_path / "g.safetensors", deltas, weights=weights)


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_llama_has_the_logits_and_weights_of_the_one_absorbed_in_memory(
    tmp_path: Path, dtype: torch.dtype, side: str, shard: str
):
    from transformers import AutoModelForCausalLM

    _llama(tmp_path / "base", dtype, shard)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == (shard == "10KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    gain = _gains(model, tmp_path / "g.safetensors", side=side)
    gain_ops.remove(model)
    gain_ops.load_gains(model, gain)  # as the file has them: in float32
    done = absorb(plan(tmp_path / "base", gain), tmp_path / "out")
    inside = gain_ops.absorb(model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    _equal_models(plain, model)
    ids = torch.arange(50)[None]
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert (done.layers, done.tensors, done.verified, done.where) == (4, 4, True, inside.where)
    assert (done.rounding.absolute, done.rounding.relative) == (inside.max_abs_error, inside.max_rel_error)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_gpt2_whose_weights_are_transposed(tmp_path: Path, side: str):
    from transformers import GPT2Config, GPT2LMHeadModel

    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    config = GPT2Config(**options, bos_token_id=0, eos_token_id=0)  # c_proj is square in attention
    model = GPT2LMHeadModel(config).bfloat16().eval()
    model.save_pretrained(tmp_path / "base")
    gain = _gains(model, tmp_path / "g.safetensors", side=side)
    absorb(plan(tmp_path / "base", gain), tmp_path / "out")
    gain_ops.absorb(model)
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype="auto")
    _equal_models(plain, model)
    assert torch.equal(plain(torch.arange(50)[None]).logits, model(torch.arange(50)[None]).logits)


def test_a_checkpoint_saved_without_its_head_takes_gains_trained_with_it(tmp_path: Path):
    from transformers import LlamaModel

    model = _llama(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    gain = _gains(model, tmp_path / "g.safetensors")
    absorb(plan(tmp_path / "base", gain), tmp_path / "out")
    gain_ops.absorb(model)
    _equal_models(LlamaModel.from_pretrained(tmp_path / "out"), model.model)


def test_tied_embeddings_stay_tied(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = _llama(tmp_path / "base", tie_word_embeddings=True)
    gain = _gains(model, tmp_path / "g.safetensors")
    absorb(plan(tmp_path / "base", gain), tmp_path / "out")
    gain_ops.absorb(model)
    _equal_models(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    gain_ops.apply(model, ["lm_head"])
    gain_ops.save_gains(model, gain)
    with pytest.raises(CheckpointError, match=r"no layer lm_head.*shares the embedding"):
        plan(tmp_path / "base", gain)


def _bitsandbytes_4() -> object:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _bitsandbytes_8() -> object:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao() -> object:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))


@pytest.mark.parametrize("method", [_bitsandbytes_4, _bitsandbytes_8, _torchao])
def test_a_quantised_base_is_recognised_and_absorbed_as_in_memory(tmp_path: Path, method: Callable[[], object]):
    from transformers import AutoModelForCausalLM

    def load(folder: Path, **options: object) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)

    quantization = method()
    _llama(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    load(tmp_path / "plain", quantization_config=quantization).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    gain = _gains(model, tmp_path / "g.safetensors")
    absorb(plan(tmp_path / "base", gain), tmp_path / "out")
    gain_ops.absorb(model)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids).logits, model(ids).logits)


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], str]:
    """(shards, deltas, side): matrices, vectors and integers of any dtype, thrown into shards in any order."""
    side = draw(st.sampled_from(["output", "input"]))
    shards: list[dict[str, Tensor]] = [{} for _ in range(draw(st.integers(1, 4)))]
    deltas = {}
    for number in range(draw(st.integers(1, 6))):
        name = f"model.layers.{number}.mlp.down_proj"
        weight = torch.randn(draw(st.integers(1, 9)), draw(st.integers(1, 9))).to(draw(st.sampled_from(FLOATS)))
        draw(st.sampled_from(shards))[f"{name}.weight"] = weight
        draw(st.sampled_from(shards))[f"{name}.bias"] = torch.randn(len(weight)).bfloat16()
        draw(st.sampled_from(shards))[f"model.layers.{number}.steps"] = torch.arange(draw(st.integers(0, 5)))
        if draw(st.booleans()) or not deltas:
            deltas[name] = torch.randn(weight.shape[side == "input"])
    return [shard for shard in shards if shard], deltas, side


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=_layouts(), at_once=st.sampled_from([1, 16, 100, 1 << 18]))
def test_whatever_the_shards_only_gained_weights_change(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, layout, at_once: int
):
    monkeypatch.setattr(absorbing, "_ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(absorbing, "_COMPARED_AT_ONCE", at_once)
    shards, deltas, side = layout
    folder = tmp_path_factory.mktemp("layout")
    base = save_folder(folder / "base", shards)
    weights = {name: shard[f"{name}.weight"] for name in deltas for shard in shards if f"{name}.weight" in shard}
    gain = save_gain_file(folder / "g.safetensors", deltas, side=side, weights=weights)
    before = contents(base)
    done = absorb(plan(base, gain), folder / "out")
    assert contents(base) == before
    after = contents(folder / "out")
    assert after.keys() == before.keys()
    changed = set()
    for file in before:
        assert len(after[file]) == len(before[file])
        if not file.endswith(".safetensors"):
            assert after[file] == before[file]
            continue
        header = 8 + int.from_bytes(before[file][:8], "little")
        assert after[file][:header] == before[file][:header]
        old, new = load_file(base / file), load_file(folder / "out" / file)
        for name, tensor in old.items():
            layer = name.removesuffix(".weight")
            if layer in deltas and name != layer:
                tensor = absorbed(tensor, deltas[layer], dim=int(side == "input"))
                changed.add(layer)
            assert torch.equal(new[name], tensor), name
    assert changed == deltas.keys()
    assert done.layers == len(deltas)


def test_a_bare_file_is_written_into_the_folder_under_its_name(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    (base / "model.safetensors.index.json").unlink()
    first = base / "model-00001-of-00002.safetensors"
    deltas = {name.removesuffix(".delta"): delta for name, delta in load_file(gain).items()}
    one = save_gain_file(tmp_path / "one.safetensors", {name: deltas[name] for name in sorted(deltas)[:2]})
    absorb(plan(first, one), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [first.name]
    new, old = load_file(tmp_path / "out" / first.name), load_file(first)
    assert all(torch.equal(new[name], absorbed(old[name], deltas[name.removesuffix(".weight")])) for name in old)
    with pytest.raises(CheckpointError, match=r"no layer model\.layers\.2\.mlp\.down_proj"):
        plan(first, gain)


def test_a_base_of_links_is_copied_and_not_written_through(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    absorb(plan(base, gain), tmp_path / "straight")
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in base.iterdir():
        if file.is_file():
            (links / file.name).symlink_to(file)
    before = contents(base)
    absorb(plan(links, gain), tmp_path / "out")
    assert contents(base) == before
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    with pytest.raises(CheckpointError, match="which has to be read"):
        absorb(plan(links, gain), base, force=True)
    straight = contents(tmp_path / "straight")
    assert contents(tmp_path / "out") == {name: straight[name] for name in straight if "/" not in name}


def test_the_plan_says_what_would_change_and_changes_nothing(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    before = contents(tmp_path)
    work = plan(base, gain)
    assert contents(tmp_path) == before
    assert [change.layer for change in work.changes] == [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
    assert [change.file for change in work.changes] == [
        f"model-0000{number}-of-00002.safetensors" for number in (1, 1, 2)
    ]
    assert {(change.stored, change.size) for change in work.changes} == {("F32 [6, 10]", 240)}
    deltas = load_file(gain)
    for change in work.changes:
        gains = 1 + deltas[f"{change.layer}.delta"]
        assert change.gains == (gains.min().item(), gains.max().item())
    assert work.left_out == ("pytorch_model.bin",)
    assert "pytorch_model.bin" not in work.files
    assert work.rewritten == 3 * 240
    assert work.size == sum((base / name).stat().st_size for name in work.files)


def test_progress_counts_every_byte_once(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    seen: dict[str, list[tuple[int, int]]] = {}
    work = plan(base, gain)
    absorb(work, tmp_path / "out", progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    assert seen.keys() == {"copying", "verifying"}
    for what, total in (("copying", work.size + work.rewritten), ("verifying", work.size)):
        assert seen[what][0] == (0, total)
        assert seen[what][-1] == (total, total)
        assert seen[what] == sorted(seen[what])


_LIMITED = """
import re, resource, sys
from pathlib import Path
from gain_ops.checkpoints.absorb import absorb
from gain_ops.checkpoints.plan import plan

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

base, gain, out, limit = *map(Path, sys.argv[1:4]), int(sys.argv[4])
room = status("VmSize") + limit
resource.setrlimit(resource.RLIMIT_AS, (room, room))
before = status("VmHWM")
absorb(plan(base, gain), out)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_twice_the_largest_tensor_whatever_the_checkpoint(tmp_path: Path):
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(5)]
    weight = torch.randn(2048, 1).bfloat16().expand(2048, 8192).contiguous()
    shards = [{f"{name}.weight": weight.clone() for name in part} for part in (names[:2], names[2:])]
    base = save_folder(tmp_path / "base", shards)
    deltas = {names[0]: torch.randn(8192), names[4]: torch.randn(8192)}
    weights = dict.fromkeys(deltas, weight)
    gain = save_gain_file(tmp_path / "g.safetensors", deltas, side="input", weights=weights)
    limit = 2 * weight.nbytes
    assert sum(map(len, contents(base).values())) > 2 * limit
    call = [sys.executable, "-c", _LIMITED, str(base), str(gain), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit
    new = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert torch.equal(new[f"{names[4]}.weight"], absorbed(weight, deltas[names[4]], dim=1))


_KILLED = """
import os, signal, sys
from pathlib import Path
from gain_ops.checkpoints import absorb as absorbing
from gain_ops.checkpoints.plan import plan

absorbing._ROWS_AT_ONCE = 100
phase, at = sys.argv[4], float(sys.argv[5])

def progress(what, done, total):
    if what == phase and done >= at * total:
        os.kill(os.getpid(), signal.SIGKILL)

absorbing.absorb(plan(*map(Path, sys.argv[1:3])), Path(sys.argv[3]), progress=progress)
"""


@pytest.mark.parametrize(
    ("phase", "at", "finished"), [("copying", 0.2, False), ("copying", 0.9, True), ("verifying", 0.5, True)]
)
def test_after_kill_9_the_next_run_goes_on_and_ends_with_the_same_bytes(
    small: tuple[Path, Path], tmp_path: Path, phase: str, at: float, finished: bool
):
    base, gain = small
    out = tmp_path / "out"
    absorb(plan(base, gain), tmp_path / "straight")
    call = [sys.executable, "-c", _KILLED, str(base), str(gain), str(out), phase, str(at)]
    assert subprocess.run(call, check=False).returncode == -9
    assert not out.exists()
    stage = stage_of(out)
    assert stage is not None
    first = stage / "files" / "model-00001-of-00002.safetensors"
    stamp = first.stat().st_mtime_ns
    absorb(plan(base, gain), out)
    assert contents(out) == contents(tmp_path / "straight")
    assert ((out / first.name).stat().st_mtime_ns == stamp) == finished
    assert stage_of(out) is None


def _interrupt_at(
    phase: str, at: float, error: type[BaseException] = KeyboardInterrupt
) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if what == phase and done >= at * total:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_keeps_what_is_finished_and_nothing_else(small: tuple[Path, Path], tmp_path: Path, error):
    base, gain = small
    out = tmp_path / "out"
    with pytest.raises(error):
        absorb(plan(base, gain), out, progress=_interrupt_at("copying", 0.0, error))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "g.safetensors"]
    with pytest.raises(error):
        absorb(plan(base, gain), out, progress=_interrupt_at("copying", 0.9, error))
    assert not out.exists()
    assert stage_of(out) is not None
    seen: list[int] = []
    done = absorb(plan(base, gain), out, progress=lambda what, done, total: seen.append(done))
    assert seen[1] > 0
    assert done == absorb(plan(base, gain), tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")


def test_the_rounding_is_that_of_all_files_also_after_an_interruption_and_without_verifying(
    small: tuple[Path, Path], tmp_path: Path
):
    base, gain = small
    work = plan(base, gain)
    straight = absorb(work, tmp_path / "straight", verified=False)
    with pytest.raises(KeyboardInterrupt):
        absorb(work, tmp_path / "out", progress=_interrupt_at("copying", 0.9))
    assert absorb(work, tmp_path / "out", verified=False) == straight
    weights, deltas = {}, load_file(gain)
    for shard in sorted(base.glob("*.safetensors")):
        weights |= load_file(shard)
    worst = 0.0
    for name, delta in deltas.items():
        weight = weights[f"{name.removesuffix('.delta')}.weight"]
        exact = weight.double() * (1 + delta)[:, None].double()
        worst = max(worst, ((absorbed(weight, delta).double() - exact) / exact).abs().max().item())
    assert straight.rounding.relative == worst > 0
    assert not straight.verified


@pytest.mark.parametrize("what", ["nothing", "gain file", "base", "option"])
def test_after_an_interruption_other_inputs_start_anew(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    base, gain = small
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        absorb(plan(base, gain), out, progress=_interrupt_at("verifying", 0.5))
    options = {"requantize": True} if what == "option" else {}
    if what == "gain file":
        deltas = {name.removesuffix(".delta"): 2 * delta for name, delta in load_file(gain).items()}
        save_gain_file(gain, deltas)
    if what == "base":
        os.utime(base / "tokenizer.json", ns=(1, 1))
    copied: list[str] = []

    def copy(source: Path, target: Path, advance: Callable[[int], object]) -> None:
        copied.append(source.name)
        copy_file(source, target, advance)

    monkeypatch.setattr(absorbing, "copy_file", copy)
    work = plan(base, gain, **options)
    absorb(work, out)
    assert len(copied) == (0 if what == "nothing" else len(work.files))
    absorb(plan(base, gain), tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")


def _spoil_weight(file: bytearray, region: Region) -> None:
    file[region.offset + region.size - 1] ^= 1


def _spoil_beside(file: bytearray, region: Region) -> None:
    file[region.offset + region.size] ^= 1


def _spoil_header(file: bytearray, region: Region) -> None:
    file[9] ^= 1


def _lengthen(file: bytearray, region: Region) -> None:
    file += b" "


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_weight, "does not hold model.layers.0.mlp.down_proj.weight of .* with its gain"),
        (_spoil_beside, "does not hold model.layers.1.mlp.down_proj.weight"),
        (_spoil_header, "differs from .* at byte 0 or soon after, where no gain goes"),
        (_lengthen, r"has \d+ bytes, and .* has \d+"),
    ],
)
def test_verifying_finds_a_byte_that_is_wrong(small: tuple[Path, Path], tmp_path: Path, spoil, message: str):
    work = plan(*small)
    out = tmp_path / "out"
    done = absorb(work, out)
    assert verify(work, out) == done
    file = out / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    spoil(content, min((edit.region for edit in work.edits), key=lambda region: (region.file, region.offset)))
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        verify(work, out)


def test_verifying_finds_a_byte_that_is_wrong_after_the_last_gain(small: tuple[Path, Path], tmp_path: Path):
    work = plan(*small)
    absorb(work, tmp_path / "out")
    for name in ("model-00002-of-00002.safetensors", "tokenizer.json"):  # the last layer has no gain
        file = tmp_path / "out" / name
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} differs"):
            verify(work, tmp_path / "out")
        content[-1] ^= 1
        file.write_bytes(content)
    verify(work, tmp_path / "out")


def test_verifying_finds_files_too_many_and_too_few(small: tuple[Path, Path], tmp_path: Path):
    work, out = plan(*small), tmp_path / "out"
    absorb(work, out)
    (out / "stale.json").touch()
    with pytest.raises(CheckpointError, match=r"does not hold the files of .*: stale\.json"):
        verify(work, out)
    (out / "stale.json").unlink()
    (out / "extra" / "chat.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"does not hold the files of .*: extra/chat\.jinja"):
        verify(work, out)


def test_what_does_not_verify_is_not_kept(small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rewrite = absorbing._rewrite

    def bad_disk(target: Path, edits: list[Edit], advance: Callable[[int], object]) -> dict[str, Rounding]:
        found = rewrite(target, edits, advance)
        with target.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        return found

    monkeypatch.setattr(absorbing, "_rewrite", bad_disk)
    work = plan(*small)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="The disk may be failing"):
        absorb(work, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    absorb(work, tmp_path / "out", verified=False)


@pytest.mark.parametrize(
    ("value", "gain", "message"),
    [
        (40000.0, 2.0, r"model\.layers\.1\.mlp\.down_proj: its weight overflows with its gain in torch.float16"),
        (float("inf"), 1.0, "its weight is not finite to begin with"),
        (float("nan"), 1.0, "its weight is not finite to begin with"),
    ],
)
def test_weights_that_would_not_be_finite_leave_nothing(tmp_path: Path, value: float, gain: float, message: str):
    weights = {f"model.layers.{number}.mlp.down_proj": torch.ones(4, 6).half() for number in range(2)}
    weights["model.layers.1.mlp.down_proj"][2, 3] = value
    base = save_folder(tmp_path / "base", [{f"{name}.weight": weight} for name, weight in weights.items()])
    file = save_gain_file(tmp_path / "g.safetensors", {name: torch.full((4,), gain - 1) for name in weights})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        absorb(plan(base, file), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_gains_too_near_to_one_for_the_weights_are_counted_and_change_nothing(tmp_path: Path):
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    weights = {f"{name}.weight": torch.rand(6, 10, dtype=torch.bfloat16) + 1 for name in names}
    deltas = {name: torch.full((6,), 0.25) for name in names}
    deltas[names[0]][:2] = 2**-12
    deltas[names[1]][5] = -(2**-12)
    gain = save_gain_file(tmp_path / "g.safetensors", deltas)
    done = absorb(plan(save_folder(tmp_path / "base", [weights]), gain), tmp_path / "out")
    assert (done.lost, done.moved) == (3, 12)
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = [(after[name] != weights[name]).any(1) for name in weights]
    assert torch.equal(torch.stack(changed), torch.stack([deltas[name] == 0.25 for name in names]))


def test_gains_of_zero_and_one_are_exact(tmp_path: Path):
    name, weight = "model.layers.0.mlp.down_proj", torch.randn(3, 5).bfloat16()
    base = save_folder(tmp_path / "base", [{f"{name}.weight": weight}])
    gain = save_gain_file(tmp_path / "g.safetensors", {name: torch.tensor([-1.0, 0.0, 1.0])})
    done = absorb(plan(base, gain), tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(new, weight * torch.tensor([[0.0], [1.0], [2.0]]).bfloat16())
    assert done.rounding == Rounding(0.0, 0.0)


def _is_a_file(base: Path, gain: Path) -> Path:
    (base.parent / "notes.txt").write_text("mine")
    return base.parent / "notes.txt"


def _not_empty(base: Path, gain: Path) -> Path:
    (base.parent / "full").mkdir()
    (base.parent / "full" / "thesis.txt").write_text("mine")
    return base.parent / "full"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("out", "message", "forced"),
    [
        (lambda base, gain: base, "lies in the base", "lies in the base"),
        (lambda base, gain: base / "deep" / "out", "lies in the base", "lies in the base"),
        (lambda base, gain: base / ".." / base.name / "out", "lies in the base", "lies in the base"),
        (lambda base, gain: base.parent, "is not empty", "holds .*base, which has to be read"),
        (_is_a_file, "is a file", "is a file"),
        (lambda base, gain: Path(base.anchor), "is where a disk is mounted", "is where a disk is mounted"),
        (_not_empty, "is not empty: .*--force", "is not a model folder"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused(
    small: tuple[Path, Path], tmp_path: Path, out, message: str, forced: str, force: bool
):
    work, place = plan(*small), out(*small)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=forced if force else message):
        absorb(work, place, force=force)
    assert contents(tmp_path) == before


def test_force_replaces_a_model_folder_whole_and_not_one_that_holds_the_gains(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    out = save_folder(tmp_path / "out", [{"old.weight": torch.ones(2, 2)}])
    inside = Path(shutil.copy(gain, out / "gains.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds .*gains\.safetensors, which has to be read"):
        absorb(plan(base, inside), out, force=True)
    absorb(plan(base, gain), out, force=True)
    assert contents(out).keys() == contents(base).keys()


def test_force_replaces_a_folder_with_the_one_file_it_wrote_before(small: tuple[Path, Path], tmp_path: Path):
    base, _ = small
    file = base / "model-00001-of-00002.safetensors"
    one = save_gain_file(tmp_path / "one.safetensors", {"model.layers.0.mlp.down_proj": torch.ones(6)})
    for _ in range(2):
        absorb(plan(file, one), tmp_path / "out", force=True)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is not a model folder"):
        absorb(plan(file, one), tmp_path / "out", force=True)


def test_an_empty_folder_is_written_to_without_force(small: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "out").mkdir()
    absorb(plan(*small), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_is_said_before_anything_is_copied(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work = plan(*small)
    usage = shutil.disk_usage(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=work.size - 1))
    with pytest.raises(OSError, match=rf"needs {work.size:,} bytes more, and its disk has {work.size - 1:,}"):
        absorb(work, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=work.size))
    absorb(work, tmp_path / "out")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere", "no checkpoint at .*nowhere: .*never downloaded"),
        ("weights.bin", "weights.bin is a pickle: .*save_pretrained"),
        ("config.json", "neither a safetensors nor a GGUF file"),
        ("empty", "has no config.json"),
        ("bare", "has no config.json"),
        ("many", "holds 2 GGUF files: name one of them, for example .*a.gguf"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, base: str, message: str):
    for name in ("empty", "many", "bare"):
        (tmp_path / name).mkdir()
    for name in ("weights.bin", "config.json", "many/a.gguf", "many/b.gguf", "bare/model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / base)


@pytest.mark.parametrize("base", ["a.gguf", "", "with config"])
def test_a_gguf_file_is_opened_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str):
    monkeypatch.setattr("gain_ops.checkpoints.formats.gguf.open_gguf", lambda path: path)
    (tmp_path / "a.gguf").touch()
    if base == "with config":
        (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path / base if base == "a.gguf" else tmp_path) == tmp_path / "a.gguf"


def test_safetensors_with_a_gguf_beside_them_are_the_checkpoint(small: tuple[Path, Path]):
    base, gain = small
    (base / "model.Q4_0.gguf").touch()
    assert isinstance(open_checkpoint(base), SafetensorsCheckpoint)
    assert plan(base, gain).left_out == ("model.Q4_0.gguf",)


def test_a_link_to_a_folder_is_not_followed_and_is_listed(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "code.py").touch()
    (base / "more").symlink_to(tmp_path / "elsewhere")
    (base / ".hidden").symlink_to(tmp_path / "elsewhere")
    work = plan(base, gain)
    assert work.left_out == ("more (a link to a folder)",)
    assert not any("code.py" in name for name in work.files)


def test_what_is_no_gain_file_is_refused(small: tuple[Path, Path], tmp_path: Path):
    base, _ = small
    with pytest.raises(FileNotFoundError, match=r"no gain file at .*none\.safetensors"):
        plan(base, tmp_path / "none.safetensors")
    with pytest.raises(GainFileError, match="is not a gain file"):
        plan(base, base / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="holds no gains"):
        plan(base, save_gain_file(tmp_path / "empty.safetensors", {}))


class _Container:
    """Edits that no real one would give."""

    def __init__(self, root: Path, *edits: Edit) -> None:
        self.root, self.files, self._edits = root, (root / "config.json",), list(edits)

    def edits(self, gains: object, *, requantize: bool, check_base: bool) -> list[Edit]:
        return self._edits

    def describe(self, edit: Edit) -> str:
        return "bytes"


def _bytewise(layer: str, file: Path, offset: int, rewrite: Callable[[Tensor, int], tuple[Tensor, Rounding]]) -> Edit:
    return Edit(layer, f"{layer}.weight", Region(file, offset, 4, 2), rewrite)


def test_two_gains_on_the_same_bytes_are_refused(small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    base, gain = small
    edits = [
        _bytewise(
            f"model.layers.{number}.mlp.down_proj", base / "config.json", offset, lambda rows, start: (rows, Rounding())
        )
        for number, offset in enumerate((8, 1, 16))
    ]
    for chosen, fits in (((edits[0], edits[1]), False), ((edits[0], edits[2]), True)):
        monkeypatch.setattr(
            "gain_ops.checkpoints.plan.open_checkpoint", lambda path, chosen=chosen: _Container(base, *chosen)
        )
        if fits:
            assert len(plan(base, gain).edits) == 2
            continue
        with pytest.raises(CheckpointError, match=r"layers\.1.* and .*layers\.0.* are both stored in .*a gain on one"):
            plan(base, gain)


def test_a_scheme_that_changes_the_number_of_bytes_is_a_bug_and_does_not_pass(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, gain = small
    edit = _bytewise(
        "model.layers.0.mlp.down_proj", base / "config.json", 0, lambda rows, start: (rows[:, :1], Rounding())
    )
    monkeypatch.setattr("gain_ops.checkpoints.plan.open_checkpoint", lambda path: _Container(base, edit))
    with pytest.raises(TypeError, match=r"rewritten to torch\.uint8 \(4, 1\)"):
        absorb(plan(base, gain), tmp_path / "out")
    assert not (tmp_path / "out").exists()

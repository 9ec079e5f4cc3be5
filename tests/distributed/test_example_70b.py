"""examples/distributed at toy size, as torchrun starts it: trains as one process does, and goes on from a checkpoint."""

import contextlib
import dataclasses
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops.gainfiles.file import read_gains
from gain_ops.models.record import gained_modules
from gain_ops.planning.configs import read_config
from gain_ops.planning.methods import METHODS
from gain_ops.planning.strategies import GIB, Job, rows
from gain_ops.training.domains import from_path

from support.tiny_llama import ENGLISH, save_tiny_llama

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "distributed"
GPUS = 8


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(EXAMPLE / "train.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What toy.toml names."""
    folder = tmp_path_factory.mktemp("toy")
    save_tiny_llama(folder / "my-model")
    (folder / "my-texts").mkdir()
    for number in range(20):
        (folder / "my-texts" / f"{number}.txt").write_text(ENGLISH * 4, encoding="utf-8")
    return folder


@pytest.fixture
def place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def settings_of(script, name):
    return script["Settings"](**tomllib.loads((EXAMPLE / name).read_text(encoding="utf-8")))


def losses_in(printed):
    """Of each step its number and its loss, as they were printed."""
    return re.findall(r"^step (\d+) loss (\S+)$", printed, flags=re.MULTILINE)


def torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, EXAMPLE / "train.py", EXAMPLE / "toy.toml"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "256 trained parameters) on 2 processes" in done.stdout
    return losses_in(done.stdout)


def losses_of_a_tied_model(folder):
    """Of a model whose head is its embeddings: the loss of one that the script builds from the folder, and of the folder's."""
    script = runpy.run_path(str(EXAMPLE / "train.py"))
    settings = dataclasses.replace(settings_of(script, "toy.toml"), model=str(folder))
    model = script["build"](settings, init_device_mesh("cpu", (2,)), torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(settings.length)[None]
    whole = AutoModelForCausalLM.from_pretrained(folder)
    return [m(input_ids=ids, labels=ids, use_cache=False).loss.item() for m in (model, whole)]


def resumed(out, seen):
    """The step from which each rank goes on, where some see a checkpoint that is not shown to others yet."""
    script = runpy.run_path(str(EXAMPLE / "train.py"))
    model = gain_ops.GainLinear(4, 4)
    optimizer = torch.optim.AdamW([model.delta])

    class Folder(type(Path())):
        def glob(self, pattern):
            found = super().glob(pattern)
            return [path for path in found if dist.get_rank() in seen or "step-4" not in str(path)]

    model.delta.grad = torch.ones(4)
    optimizer.step()
    for step in (2, 4):
        torch.nn.init.constant_(model.delta, step)
        dcp.save(script["state"](model, optimizer), checkpoint_id=Path(out) / f"step-{step}")
    return script["resume"](Folder(out), model, optimizer), model.delta.tolist()


def run_again(folder):
    """The same in a process group that is up already; what is printed."""
    script = runpy.run_path(str(EXAMPLE / "train.py"))
    settings = settings_of(script, "toy.toml")
    places = {name: str(folder / getattr(settings, name)) for name in ("model", "data", "out")}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script["train"](dataclasses.replace(settings, **places), init_device_mesh("cpu", (2,)), torch.device("cpu"))
    return printed.getvalue()


def trained_alone(script, settings):
    """The same windows and optimizer in one process, without FSDP, checkpointing or checkpoints."""
    model = AutoModelForCausalLM.from_pretrained(settings.model)
    gain_ops.apply(model, settings.targets)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr, weight_decay=0.0)
    losses = []
    for ids in script["windows"](settings).split(settings.windows):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_from_a_checkpoint(two, script, place):
    settings = settings_of(script, "toy.toml")
    printed = torchrun()
    model, losses = trained_alone(script, settings)
    assert [int(step) for step, _ in printed] == [1, 2, 3, 4]
    assert [float(loss) for _, loss in printed] == pytest.approx(losses, rel=1e-6)

    out = place / settings.out
    assert {path.name for path in out.iterdir()} == {"step-2", "step-4", "gains.safetensors"}
    for step in (2, 4):
        kept = FileSystemReader(out / f"step-{step}").read_metadata().state_dict_metadata
        assert sum(name.endswith(".delta") for name in kept) == 4, "the gains"
        assert all(".delta" in name for name in kept if "layers" in name), "and of the optimizer what is theirs"
        assert {name.partition(".")[0] for name in kept} == {"gains", "optimizer"}
    first = read_gains(out / "gains.safetensors")
    for name, layer in gained_modules(model).items():
        torch.testing.assert_close(first.deltas[name], layer.delta.detach(), rtol=1e-4, atol=1e-6)
        assert layer.delta.any()
    gain_ops.load_gains(AutoModelForCausalLM.from_pretrained(settings.model), out / "gains.safetensors")

    shutil.rmtree(out / "step-4")
    (out / "gains.safetensors").unlink()
    first_rank, _ = two(run_again, place)
    assert losses_in(first_rank) == printed[2:]
    again = read_gains(out / "gains.safetensors")
    assert all(torch.equal(delta, again.deltas[name]) for name, delta in first.deltas.items())


def test_a_model_whose_head_is_its_embeddings(two, tmp_path):
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for built, whole in two(losses_of_a_tied_model, tmp_path):
        assert built == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(("seen", "step"), [((0, 1), 4), ((0,), 4), ((1,), 2)])
def test_processes_go_on_from_the_same_step_whatever_each_sees(two, tmp_path, seen, step):
    assert two(resumed, str(tmp_path), seen) == [(step, [step] * 4)] * 2


def test_settings_that_do_not_fit_are_refused_before_the_model_is_built(script, place, monkeypatch):
    settings = dataclasses.replace(settings_of(script, "toy.toml"), steps=10**6)
    monkeypatch.setitem(script["train"].__globals__, "build", lambda *_: pytest.fail("the model was built"))
    mesh = types.SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match=r"my-texts has \d+ windows of 16 tokens; 2000000 are needed"):
        script["train"](settings, mesh, torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama-3-70b.toml", "toy.toml"])
def test_as_much_text_is_read_as_a_configuration_needs(script, place, monkeypatch, name):
    settings = dataclasses.replace(settings_of(script, name), model="my-model", data="my-texts")
    limits = []

    def spy(path, *, limit):
        limits.append(limit)
        return from_path(path, limit=limit)

    monkeypatch.setitem(script["windows"].__globals__, "from_path", spy)
    with contextlib.suppress(ValueError):  # 70B's is more than my-texts has
        script["windows"](settings)
    trained_on = 0.9 * limits[0]  # the rest is for validation
    assert trained_on / 8 > settings.steps * settings.windows * settings.length, "tokens of as many as eight bytes each"


def test_the_configuration_of_70b_differs_from_the_toy_in_size_alone(script):
    large, toy = settings_of(script, "llama-3-70b.toml"), settings_of(script, "toy.toml")
    same = ("targets", "memory", "checkpointing", "lr", "out")
    assert [getattr(large, name) for name in same] == [getattr(toy, name) for name in same]


@pytest.mark.slow
def test_the_plan_confirms_the_configuration_of_70b(script):
    settings = settings_of(script, "llama-3-70b.toml")
    tokens = settings.windows // GPUS * settings.length
    dtype = getattr(torch, settings.dtype)
    job = Job(read_config("llama-3-70b"), GPUS, 79 * GIB, tokens, settings.length, dtype)
    method = METHODS[f"{settings.targets}, {settings.memory}"]
    plan = {(row.strategy, row.checkpointed): row for row in rows(job, [method])}
    assert plan["FSDP 8", settings.checkpointing].fits
    assert not plan["FSDP 8", not settings.checkpointing].fits, "so the configuration has to say it"
    assert not plan["replicated x 8", settings.checkpointing].fits

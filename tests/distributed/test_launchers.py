"""examples/trainer.py as accelerate and torchrun start it on two processes: what one process does with the whole batch."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gain_ops.gainfiles.file import read_gains

from support.tiny_llama import ENGLISH, save_tiny_llama

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trainer.py"
PROCESSES = 2
WINDOW = 16
TEXT = (ENGLISH * 4)[: 14 * WINDOW]  # a byte is a token: 12 windows, three whole batches, and a tail for validation
LAUNCHERS = {
    # --multi_gpu is accelerate's own use of torchrun; its --cpu starts one process, or several through MPI
    "accelerate": f"accelerate.commands.launch --multi_gpu --num_processes {PROCESSES} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1",
    "torchrun": f"torch.distributed.run --standalone --nproc-per-node {PROCESSES}",
}

# starts the example so that a process which is not the first fails if it writes a gain file
FIRST_WRITES = """
import os, runpy, sys
from gain_ops.models import files

def refuse(file, path):
    raise AssertionError(f"{path} is written by process {os.environ['RANK']}")

if os.environ["RANK"] != "0":
    files.write_gains = refuse
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def options(folder, out, batch_size):
    options = {"model": folder / "tiny", "data": folder / "text.txt", "out": out, "batch-size": batch_size}
    options |= {"steps": 6, "save-steps": 3, "length": WINDOW}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def losses(out):
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a model, a text and what one process made of them with batches of four windows."""
    folder = tmp_path_factory.mktemp("launchers")
    save_tiny_llama(folder / "tiny")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    runpy.run_path(str(EXAMPLE))["main"](options(folder, folder / "alone", 4))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_with_the_whole_batch(alone, launcher, tmp_path):
    (tmp_path / "start.py").write_text(FIRST_WRITES)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *LAUNCHERS[launcher].split(),
            tmp_path / "start.py",
            EXAMPLE,
            *options(alone, tmp_path / "out", 2),
        ],
        # without the latter, torchrun on a CPU starts trainers that know nothing of each other
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("256 trained parameters") == PROCESSES

    out, expected = tmp_path / "out", alone / "alone"
    assert len(losses(out)) == 6
    assert losses(out) == pytest.approx(losses(expected), rel=1e-5)
    assert sorted(p.relative_to(out) for p in out.rglob("*gains*")) == sorted(
        p.relative_to(expected) for p in expected.rglob("*gains*")
    )
    found, file = read_gains(out / "gains.safetensors"), read_gains(expected / "gains.safetensors")
    assert found.fingerprints == file.fingerprints
    for name, delta in file.deltas.items():
        torch.testing.assert_close(found.deltas[name], delta, rtol=1e-3, atol=1e-6)

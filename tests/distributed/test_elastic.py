"""A rank is killed, torchrun's elastic agent starts the job again, and nothing is lost but the steps since the checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import elastic_training
from support.elastic_training import EVERY, STEPS


def _losses(folder: Path, restarts: int = 0) -> dict[int, str]:
    lines = [line.split() for line in (folder / "losses.txt").read_text().splitlines()]
    return {int(step): loss for start, step, loss in lines if int(start) == restarts}


@pytest.mark.slow
def test_a_job_of_which_a_rank_was_killed_ends_as_one_that_was_not_disturbed(two, tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
    two(elastic_training.run, calm)
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 {elastic_training.__file__}"
    done = subprocess.run(
        [sys.executable, *command.split(), str(killed), str(2 * EVERY)],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr, done.stderr
    expected, before, after = _losses(calm), _losses(killed), _losses(killed, restarts=1)
    assert [*expected] == list(range(STEPS))
    assert [*before] == list(range(2 * EVERY)), "killed in the second checkpoint"
    assert [*after] == list(range(EVERY, STEPS)), "and went on from the first"
    assert {**before, **after} == expected
    assert all(before[step] == after[step] for step in before.keys() & after.keys())
    assert (killed / "gains").read_bytes() == (calm / "gains").read_bytes()

"""A launch by a plan is the launch that Triton would have made: the same compiled kernel, the same arguments."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("launching_checks.py")


@pytest.fixture(scope="session")  # what all checks share is not the time of the first
def failed() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, SCRIPT], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", re.findall(r"@check\ndef (\w+)", SCRIPT.read_text()))
def test_plans(name: str, failed: dict[str, Any]) -> None:
    if failed[name].startswith("skipped: "):
        pytest.skip(failed[name])
    assert not failed[name], failed[name]


def test_this_triton_is_one_that_plans_know() -> None:
    """Otherwise launches are right and slow: read its JITFunction.run, then add its names to launching._NAMES."""
    from gain_ops.kernels import launching

    assert launching.RUN is not None

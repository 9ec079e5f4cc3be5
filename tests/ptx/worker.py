"""A process in which Triton compiles: in the tests' own, its kernels may be interpreted.

``python -m ptx.worker`` reads calls of functions as lines of JSON, and answers each with a line.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


class Worker:
    """A worker process, which starts while its owner goes on."""

    def __init__(self) -> None:
        left_out = ("TRITON_INTERPRET", "GAIN_OPS_SM_MARGIN")
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        # tensors are the CPU's where there is a GPU too, and configurations the heuristics'
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GAIN_OPS_TUNED": str(TESTS / "ptx" / "no tuned table")}
        paths = [str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ptx.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, function: str, **arguments: Any) -> Any:
        """The result of ``module:function`` in the worker; an AssertionError with the worker's traceback where it raises."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the worker ended with {self.process.wait()} in {function} {arguments}")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _serve() -> None:
    # what libraries print must not be taken for an answer
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    import torch

    torch.set_num_threads(1)
    importlib.import_module("ptx.cases")
    for line in sys.stdin:
        call = json.loads(line)
        module, _, name = call["function"].partition(":")
        try:
            result = getattr(importlib.import_module(module), name)(**call["arguments"])
            answer = {"result": result}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

"""The part `environment` of a run on a GPU: what its rows say that they have no column for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import parts
from gain_ops.backends import extension


@pytest.mark.parametrize(("ops", "fused"), [({"linear": None}, "with"), ({}, "without")])
def test_it_is_recorded_whether_cuda_fuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ops: dict[str, None], fused: str
) -> None:
    """Without CUTLASS "cuda" is the vendor's GEMM and a pass: a figure of it is of composed code."""
    compiled = SimpleNamespace(architectures="80;90a;100a")
    monkeypatch.setattr(extension, "obstacle", lambda: None)
    monkeypatch.setitem(sys.modules, "gain_ops._C", compiled)
    monkeypatch.setattr(torch.ops, "gain_ops_cuda", SimpleNamespace(**ops))
    monkeypatch.setattr(parts, "DEVICE", torch.device("cpu"))
    said = {row.site: row.note for row in parts.environment(1.0, [], tmp_path)}
    assert said["cuda kernels"] == f"built for 80;90a;100a, {fused} the fused GEMMs"

"""What is said of the machine: the compiled kernels and the variables."""

import pytest

from gain_ops.backends import extension
from gain_ops.measure import environment


def test_the_variables_are_those_of_gain_ops_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAIN_OPS_SM_MARGIN", "16")
    monkeypatch.delenv("GAIN_OPS_BACKEND", raising=False)
    said = environment.variables()
    assert said["GAIN_OPS_SM_MARGIN"] == "16"
    assert "GAIN_OPS_BACKEND" not in said
    assert "PATH" not in said


@pytest.mark.parametrize(
    ("obstacle", "built", "said"),
    [
        (None, "80;90a, with the fused GEMMs", "built for 80;90a, with the fused GEMMs"),
        (None, "80;90a, without the fused GEMMs", "built for 80;90a, without the fused GEMMs"),
        ("the CUDA kernels are not built", None, "the CUDA kernels are not built"),
    ],
)
def test_compiled_kernels(monkeypatch: pytest.MonkeyPatch, obstacle: str | None, built: str | None, said: str) -> None:
    monkeypatch.setattr(extension, "obstacle", lambda: obstacle)
    monkeypatch.setattr(extension, "architectures", lambda: built)
    assert environment.compiled_kernels() == said

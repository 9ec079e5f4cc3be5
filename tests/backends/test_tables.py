"""Tables of measured GEMMs: what is looked up, whom a table serves, and tables that are broken."""

import logging
from pathlib import Path

import pytest
import torch

from gain_ops.backends import tables
from gain_ops.backends.tables import Problem, Row

HERE = "NVIDIA H200, driver 13000, torch 2.13.0, triton 3.9.0, gain_ops 0.1.0"
COMPOSED, FUSED, LEFT_OUT = Row("composed", 9.0), Row("triton", 7.0, {"block_m": 64}), Row("cuda", None, None, "wrong")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GAIN_OPS_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tables.user_path("sm_90")


def _key(tokens: int) -> str:
    return tables.key("linear", torch.bfloat16, tokens, 4096, 1280)


def test_a_problem_is_found_with_the_fastest_first(table: Path) -> None:
    problem = Problem(HERE, (COMPOSED, LEFT_OUT, FUSED))
    tables.write(table, "sm_90", {_key(8000): problem})
    assert tables.find("sm_90", _key(8192)) == (problem, table), "8000 and 8192 tokens are one problem"
    assert tables.fastest(problem.rows) == [FUSED, COMPOSED]
    assert tables.find("sm_90", _key(8193)) is None
    assert tables.find("sm_80", _key(8192)) is None
    assert _key(8192) == "linear bfloat16 T<=8192 in=1280 out=4096"


def test_a_problem_without_any_figure_is_not_measured(table: Path) -> None:
    tables.write(table, "sm_90", {_key(1): Problem(HERE, (LEFT_OUT,))})
    assert tables.find("sm_90", _key(1)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 5, "family": "sm_90", "problems": 3}'])
def test_a_broken_table_is_named_and_left_out(table: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    table.parent.mkdir()
    table.write_text(text)
    tables.read.cache_clear()
    with caplog.at_level(logging.WARNING, "gain_ops"):
        assert tables.find("sm_90", _key(8)) is None
    assert str(table) in caplog.text


def test_a_table_of_another_family_is_not_read(
    table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tables.write(table, "sm_90", {_key(8): Problem(HERE, (COMPOSED,))})
    monkeypatch.setenv("GAIN_OPS_TUNED", str(table))
    assert tables.find("sm_90", _key(8)) is not None
    with caplog.at_level(logging.WARNING, "gain_ops"):
        assert tables.find("sm_80", _key(8)) is None
    assert "not read" in caplog.text


def test_the_package_s_own_table_is_read_after_the_user_s(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    shipped = tmp_path / "shipped" / "sm_90.json"
    tables.write(shipped, "sm_90", {_key(m): Problem("there", (COMPOSED,)) for m in (8, 16)})
    tables.write(table, "sm_90", {_key(8): Problem(HERE, (FUSED,))})
    assert [tables.find("sm_90", _key(m))[1] for m in (8, 16)] == [table, shipped]
    shipped.write_text("{")
    tables.read.cache_clear()
    with caplog.at_level(logging.WARNING, "gain_ops"):
        assert tables.find("sm_90", _key(16)) is None
    assert not caplog.records, "a table that came with the package is no business of the user's"

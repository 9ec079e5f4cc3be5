"""The bytes that a block moves: the tables in the repository are those of today, and the goals hold."""

from pathlib import Path

import pytest

from benchmarks.contestants.sites import ARCHITECTURES
from benchmarks.suites import moved
from gain_ops.planning.methods import FROZEN

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ARCHITECTURES["Llama-3-8B"]


@pytest.fixture(scope="module")
def lines() -> dict[str, moved.Line]:
    return {line.name: line for line in moved.lines(LLAMA)}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "benchmarks/NOTES.md"])
def test_the_committed_tables_are_current(lines, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    begins = {
        name: f"| {name} | {line.passes:.1f} | {line.passes / lines[FROZEN].passes:.2f} |"
        for name, line in lines.items()
    }
    shown = {name for name, begin in begins.items() if begin in text}
    if page == "README.md":
        assert shown >= {FROZEN, moved.LIGER, "gain-ffn", moved.FOLDED}
    else:
        whole = {name: f"{begins[name]} {lines[name].products} | {lines[name].saved:.4g} |" for name in lines}
        assert {name for name, row in whole.items() if row in text} == lines.keys()


@pytest.mark.slow
def test_adapting_moves_no_more_than_freezing(lines):
    frozen, liger, folded = (lines[name] for name in (FROZEN, moved.LIGER, moved.FOLDED))
    best_frozen = liger.passes - 2 * 6  # an add and norm in one pass, at both places of a layer
    assert folded.passes <= 0.45 * frozen.passes
    assert folded.passes <= liger.passes
    assert folded.passes <= 1.10 * best_frozen
    assert folded.products == frozen.products


@pytest.mark.slow
def test_gpt2_is_counted_too():
    found = {line.name: line for line in moved.lines(ARCHITECTURES["GPT-2 Large"])}
    assert found["gain-ffn, fused"].passes <= 0.45 * found[FROZEN].passes
    assert moved.FOLDED not in found, "its decoder layer has a dropout, which no fold knows"
    assert "0.24" in moved.table(ARCHITECTURES["GPT-2 Large"], [found[FROZEN], found["gain-ffn, fused"]])

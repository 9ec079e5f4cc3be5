"""docs/architectures.md is what tests/list_architectures.py measures."""

import re

import list_architectures as table
import pytest

SAMPLE = ("bert", "gpt2", "mixtral", "qwen3_5_text")


def committed():
    return table.PAGE.read_text(encoding="utf-8")


def rows():
    """The committed rows by model_type."""
    return {found[1]: found[0] for found in re.finditer(r"^\| `(.+?)` \|.*$", committed(), re.MULTILINE)}


def current():
    if table.header() not in committed():
        pytest.skip("another transformers or torch than the page is of")


def test_the_page_says_what_it_is_of_and_holds_no_unknown_error():
    assert re.search(r"every architecture of transformers \d+\.\d+\S*, torch \d+\.\d+\S*, by", committed())
    assert not re.search(r"[A-Z]\w+Error", committed())


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_row(model_type):
    current()
    assert table.line(model_type, table.row(model_type)) == rows()[model_type]


@pytest.mark.slow
def test_every_row():
    current()
    from support.tiny_architectures import model_types

    assert table.page(table.rows(model_types())) == committed(), (
        "run python tests/list_architectures.py, and look at the change"
    )

"""Names and texts in messages: the first few, and how many more."""

import pytest

from gain_ops.utils.errors import FileError, UsageError
from gain_ops.utils.wording import first_of, named, printable, some_of

FIVE = ["e", "d", "c", "b", "a"]


@pytest.mark.parametrize(
    ("texts", "separator", "shown"),
    [
        ([], ", ", ""),
        (["one"], ", ", "one"),
        (FIVE[:4], ", ", "e, d, c, b"),
        (FIVE, ", ", "e, d, c, b and 1 more"),
        (FIVE, "; ", "e; d; c; b; and 1 more"),
    ],
)
def test_the_first_few_in_their_order(texts: list[str], separator: str, shown: str) -> None:
    assert first_of(texts, separator) == shown


def test_names_are_sorted_first() -> None:
    assert some_of(FIVE) == "a, b, c, d and 1 more"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, \u00e9\u4e2d", "plain, \u00e9\u4e2d"),
        ("\x1b[2J\x07\r\n\t\0\x7f", r"\x1b[2J\x07\r\n\t\x00\x7f"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202eevil\u2028", r"\u202eevil\u2028"),
        ("\udcff", r"\udcff"),
    ],
)
def test_nothing_of_a_name_acts_on_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == named(text) == some_of([text]) == first_of([text]) == shown
    assert str(UsageError(text.replace("\n", ""))) == shown.replace(r"\n", "")


def test_a_long_name_is_cut_and_an_error_keeps_its_lines() -> None:
    assert named("a" * 100_000) == "a" * 200 + "... (100,000 characters)"
    assert len(some_of(["a" * 100_000] * 9)) < 1000
    assert str(FileError("a\x1b\nb")) == "a\\x1b\nb"

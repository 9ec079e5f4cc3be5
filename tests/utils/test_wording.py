"""Names and texts in messages: the first few, and how many more."""

import pytest

from gain_ops.utils.wording import first_of, some_of

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

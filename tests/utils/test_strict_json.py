"""The reader of JSON that anyone may have written."""

from pathlib import Path

import pytest

from gain_ops.utils import strict_json


@pytest.mark.parametrize(
    "text", ['{"a": [1, -2, 3.5, true, null, "\\u00e9\\ud83d\\ude00"]}', "[" * 64 + "]" * 64, "NaN"]
)
def test_what_python_reads_is_read_within_the_limits(text: str) -> None:
    import json

    assert repr(strict_json.parse(text)) == repr(json.loads(text))
    assert repr(strict_json.parse(text.encode())) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 66 + "]" * 66, "more than 64"),
        ('{"a":' * 66 + "1" + "}" * 66, "more than 64"),
        ("[" * 1_000_000, "more than 64"),
        ('{"a":' * 1_000_000, "more than 64"),
        ('{"b": {"a": 1, "a": 1}}', "'a' is there twice"),
        ('["\\ud800"]', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("1" * 5000, "digits"),
        ("'a'", "Expecting value"),
        ("[1,]", "Expecting value|trailing comma"),
        ("\ufeff{}", "BOM"),
        (b"\xff\xfe{\0}\0", "decode"),
        (b"\xc3\x28", "decode"),
        ("", "Expecting value"),
    ],
)
def test_what_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        strict_json.parse(text)


def test_what_is_not_json_where_it_matters() -> None:
    for text in ("NaN", "[Infinity]", "-Infinity"):
        strict_json.parse(text)
        with pytest.raises(ValueError, match="not a number of JSON"):
            strict_json.parse(text, finite=True)
    for text in ("-1", "[-0]"):
        strict_json.parse(text)
        with pytest.raises(ValueError, match="no whole number from 0 on"):
            strict_json.parse(text, naturals=True)


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1]")
    assert strict_json.read(path) == [1]
    with pytest.raises(ValueError, match="over 2 bytes"):
        strict_json.read(path, largest=2)

"""A figure that grows is seen, one that shrinks is not held against anybody, and a name that is gone is."""

from pathlib import Path

import pytest

from support.accepted import hold


@pytest.fixture(autouse=True)
def _nothing_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCEPT", raising=False)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bytes.json"
    with monkeypatch.context() as patch:
        patch.setenv("ACCEPT", "1")
        hold(path, "bytes", {"one": [10, 20], "two": [1, 1]})
    return path


def test_the_same_and_less_pass(file: Path) -> None:
    hold(file, "bytes", {"one": [10, 20], "two": [1, 1]})
    hold(file, "bytes", {"one": [9, 20], "two": [0, 1]})


def test_more_fails_and_says_how_to_accept(file: Path) -> None:
    with pytest.raises(AssertionError, match=r"bytes grew: .*\[10, 20\] -> \[10, 21\].* To accept: .*ACCEPT=1"):
        hold(file, "bytes", {"one": [10, 21], "two": [1, 1]})


@pytest.mark.parametrize("found", [{"one": [10, 20]}, {"one": [10, 20], "two": [1, 1], "three": [0, 0]}])
def test_a_name_that_is_gone_or_new_fails(file: Path, found: dict[str, list[int]]) -> None:
    with pytest.raises(AssertionError, match="has other names than the test"):
        hold(file, "bytes", found)


def test_without_a_file_the_test_is_skipped_by_name(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"there is no of-other-versions\.json"):
        hold(tmp_path / "of-other-versions.json", "bytes", {})

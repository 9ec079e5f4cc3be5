"""Domains: disjoint parts, the same on every machine for the same text, and clear errors for a user's data."""

import ast
from pathlib import Path

import pytest
import torch

from gain_ops.training import domains
from gain_ops.training.domains import cut_windows, from_path, split_domain, token_stream


class Bytes:
    """A tokenizer of bytes, with or without an end-of-text token."""

    def __init__(self, eos_token_id: int | None = 256) -> None:
        self.eos_token_id = eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


def _documents(count: int) -> list[str]:
    return [f"document {number}\n" * 20 for number in range(count)]


def test_split_goes_by_document_about_nine_to_one():
    domain = split_domain("d", _documents(200), source="s")
    assert sorted(domain.train + domain.validation) == sorted(_documents(200))
    assert not set(domain.train) & set(domain.validation)
    assert 0.09 < len(domain.validation) / 200 < 0.12


def test_split_depends_on_the_text_and_not_on_its_order():
    documents = _documents(50)
    assert split_domain("d", documents, source="s") == split_domain("d", documents[::-1], source="s")


def test_split_counts_a_repeated_document_once():
    documents = _documents(50)
    assert split_domain("d", documents + documents, source="s") == split_domain("d", documents, source="s")


def test_split_cuts_a_single_document_at_a_line_end():
    text = "".join(f"line {number}\n" for number in range(1000))
    domain = split_domain("d", [text], source="s")
    (head,), (tail,) = domain.train, domain.validation
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.08 < len(tail) / len(text) < 0.12


def test_split_cuts_a_single_line():
    domain = split_domain("d", ["x" * 1000], source="s")
    assert (len(domain.train[0]), len(domain.validation[0])) == (900, 100)


def test_one_long_document_among_short_ones_is_not_held_out_whole():
    long = "".join(f"long {number}\n" for number in range(20_000))
    domain = split_domain("d", [long, *_documents(3)], source="s")
    assert 0.03 < sum(map(len, domain.validation)) / (len(long) + 3 * 220) < 0.35


def test_split_of_nothing_is_empty():
    domain = split_domain("d", ["", "  \n"], source="s")
    assert domain.train == domain.validation == ()


def test_stream_joins_documents_with_the_end_token():
    assert token_stream(["ab", "c"], Bytes(), limit=100).tolist() == [97, 98, 256, 99, 256]
    assert token_stream(["ab", "c"], Bytes(eos_token_id=None), limit=100).tolist() == [97, 98, 99]


def test_stream_stops_after_the_document_that_reaches_the_limit():
    assert token_stream(["ab", "cd", "ef"], Bytes(), limit=4).tolist() == [97, 98, 256, 99, 100, 256]


def test_windows_are_pieces_of_the_stream_without_overlap():
    windows = cut_windows(torch.arange(103), length=10, count=99, seed=0)
    assert windows.shape == (10, 10)
    assert sorted(windows.flatten().tolist()) == list(range(100))
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()


def test_windows_are_drawn_by_seed():
    stream = torch.arange(1000)
    first = cut_windows(stream, length=10, count=5, seed=1)
    assert torch.equal(first, cut_windows(stream, length=10, count=5, seed=1))
    assert not torch.equal(first, cut_windows(stream, length=10, count=5, seed=2))


def test_a_stream_shorter_than_a_window_gives_none():
    assert cut_windows(torch.arange(9), length=10, count=5, seed=0).shape == (0, 10)


def test_python_source_parses_and_holds_no_tests():
    domain = domains.python_source()
    assert domain.train
    assert domain.validation
    assert not set(domain.train) & set(domain.validation)
    for text in domain.validation[:10]:
        ast.parse(text)
    assert sum("from test.support import" in text for text in domain.train) < 0.01 * len(domain.train)


def test_licences_hold_one_text_of_a_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    body = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. " * 10
    for name in ("one", "two"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nREADME of {name}. " * 20)
        (info / "LICENSE").write_text(f"Copyright {name}\n{body}")
        (info / "RECORD").write_text(f"{info.name}/LICENSE,,\n{info.name}/METADATA,,\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    licences, readmes = domains.licence_texts(), domains.readme_bodies()
    assert [text.splitlines()[0] for text in licences.train] == ["Copyright one"]
    assert len(readmes.train) == 2
    assert all("README of" in text and "Metadata-Version: 2.1\nName: one\nV" not in text[:40] for text in readmes.train)


def test_a_folder_gives_its_text_files_and_says_what_it_skipped(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.txt").write_text("alpha\n" * 50, encoding="utf-8")
    (tmp_path / "sub" / "b.md").write_text("bêta\n" * 50, encoding="utf-8")
    (tmp_path / ".git" / "c.txt").write_text("hidden\n" * 50, encoding="utf-8")
    (tmp_path / "d.bin").write_bytes(bytes(range(256)))
    domain = from_path(tmp_path)
    text = "".join(domain.train + domain.validation)
    assert "alpha" in text
    assert "bêta" in text
    assert "hidden" not in text
    assert "2 text files, 1 others skipped" in domain.source


def test_a_byte_order_mark_is_not_text(tmp_path: Path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello\nworld\n")
    assert from_path(tmp_path / "bom.txt").train[0].startswith("hello")


@pytest.mark.parametrize("name", ["", "long.txt"])
def test_a_long_file_is_read_to_the_limit_and_not_inside_a_character(tmp_path: Path, name: str):
    (tmp_path / "long.txt").write_text("é" * 1000, encoding="utf-8")
    for limit, read in ((101, 50), (10**9, 1000)):
        domain = from_path(tmp_path / name, limit=limit)
        assert "".join(domain.train + domain.validation) == "é" * read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("empty.txt", b" \n", "is empty"),
        ("binary.txt", b"\xff\xfe\x00\x01", "not UTF-8 text"),
        ("zero.txt", b"text\0text", "not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_the_reason(tmp_path: Path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        from_path(path)
    assert str(path) in str(caught.value)


def test_a_folder_without_text_says_how_many_files_it_has(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="2 files below it, 1 of them not text"):
        from_path(tmp_path)

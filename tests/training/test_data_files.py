"""Data files: every format gives the same documents, every layout the tokens of TRL, every fault one line that names it."""

import csv
import gzip
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch

from gain_ops.training.documents import Chat, Completion, tokens
from gain_ops.training.domains import cut_windows, from_path, split_domain, token_stream
from gain_ops.utils.errors import GainOpsError, MissingPackageError

RECORDS = [{"text": f'number {number}, a "text"\n' * 5, "id": str(number)} for number in range(30)]
TEXTS = {record["text"] for record in RECORDS}
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


class Bytes:
    """A tokenizer of bytes, whose chat template is that of CHATML."""

    eos_token_id = 256
    chat_template: str | None = CHATML

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages, *, tokenize: bool, add_generation_prompt: bool) -> str:
        said = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return said + "<assistant>" * add_generation_prompt


def _lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _table(delimiter: str) -> bytes:
    written = io.StringIO()
    writer = csv.DictWriter(written, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return written.getvalue().encode()


def _parquet() -> bytes:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(RECORDS), written)
    return written.getvalue()


FORMATS = {
    "a.jsonl": lambda: _lines(RECORDS),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + _lines(RECORDS),
    "a.json": lambda: json.dumps(RECORDS, indent=1).encode(),
    "inside.json": lambda: json.dumps({"version": 1, "data": RECORDS}).encode(),
    "lines.json": lambda: _lines(RECORDS),
    "a.csv": lambda: _table(","),
    "a.tsv": lambda: _table("\t"),
    "a.parquet": _parquet,
    "A.JSONL.GZ": lambda: gzip.compress(_lines(RECORDS)),
    "a.parquet.gz": lambda: gzip.compress(_parquet()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(FORMATS[name]())
    domain = from_path(path)
    assert set(domain.train + domain.validation) == TEXTS
    assert domain.name == name.split(".")[0]
    characters = sum(map(len, TEXTS))
    assert domain.read == f"read 30 records, field 'text', {characters:,} characters, from {path}"
    assert domain.validation


def test_a_folder_of_data_files_is_read_beside_its_readme(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("what it is")
    (tmp_path / "data" / "0.jsonl").write_bytes(_lines(RECORDS[:10]))
    (tmp_path / "data" / "1.json").write_text(json.dumps(RECORDS[10:]))
    domain = from_path(tmp_path)
    assert set(domain.train + domain.validation) == TEXTS
    assert domain.source == f"{tmp_path} (2 data files)"


def test_a_folder_of_source_code_with_json_in_it_is_text(tmp_path: Path):
    (tmp_path / "a.py").write_text("pass\n" * 50)
    (tmp_path / "package.json").write_text('{"name": "a"}\n')
    domain = from_path(tmp_path)
    assert '"name"' in "".join(domain.train + domain.validation)
    assert domain.read.startswith("read 2 texts, 264 characters, from ")


def test_a_data_set_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_bytes(_lines(RECORDS))
    domain = from_path(Path(f"hf:{tmp_path}/mine"))
    assert set(domain.train + domain.validation) == TEXTS
    assert domain.name == "mine"


@pytest.mark.parametrize("name", ["a.parquet", "hf:owner/name"])
def test_without_datasets_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    with pytest.raises(MissingPackageError, match=r'needs the package datasets: pip install "gain-ops\[data\]"'):
        from_path(Path(name))


ALPACA = "Below is an instruction that describes a task"


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "a", "instruction": "b", "output": "c"}, "a"),  # TRL's default, and what tatsu-lab/alpaca has
        ({"prompt": "a", "completion": "b", "text": "c"}, Completion("a", "b")),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            Chat((("user", "a"), ("assistant", "b")), read=1),
        ),
        ({"prompt": "x", "messages": [{"role": "user", "content": "a"}]}, Chat((("user", "a"),))),  # as UltraChat
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Chat((("user", "a"), ("assistant", "b"))),
        ),
        (
            {"instruction": "i", "output": "o"},
            Completion(
                f"{ALPACA}. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\ni\n\n### Response:\n",
                "o",
            ),
        ),
        (
            {"instruction": "i", "input": "n", "output": "o"},
            Completion(
                f"{ALPACA}, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\ni\n\n### Input:\nn\n\n### Response:\n",
                "o",
            ),
        ),
    ],
)
def test_fields_say_what_a_record_is(tmp_path: Path, record: dict, document: object):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines([record, {key: _longer(value) for key, value in record.items()}]))
    domain = from_path(path)
    assert document in (
        domain.train + domain.validation if not isinstance(document, str) else ["".join(domain.train)[:1]]
    )


def _longer(value: object) -> object:
    """The same kind of value with more text, as a second record."""
    return (
        value + "\n" * 9
        if isinstance(value, str)
        else [*value[:-1], value[-1] | {"content": "c" * 9, "value": "c" * 9}]
    )


def test_a_field_of_another_name_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines([{"body": record["text"], "text": "no"} for record in RECORDS]))
    domain = from_path(path, text_field="body")
    assert set(domain.train + domain.validation) == TEXTS


def test_a_prompt_is_read_and_its_completion_learned_with_the_end():
    assert tokens(Completion("ab", "c"), Bytes()) == [~97, ~98, 99, 256]
    chat = Chat((("user", "a"), ("assistant", "b")), read=1)
    prompt = [~byte for byte in b"<user>a<assistant>"]
    assert tokens(chat, Bytes()) == [*prompt, ord("b"), 256]
    assert tokens(Chat(chat.messages), Bytes()) == [*b"<user>a<assistant>b", 256]


def test_a_template_that_ends_a_conversation_gets_no_second_end():
    class Ends(Bytes):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [*super().encode(text, add_special_tokens=False), 256, ord("\n")]

    assert tokens(Chat((("user", "a"),)), Ends())[-3:] == [ord("a"), 256, ord("\n")]


def test_a_token_across_the_border_is_learned():
    class Pairs(Bytes):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [ord(text[at]) * 256 + ord(text[at + 1 : at + 2] or "\0") for at in range(0, len(text), 2)]

    whole = Pairs().encode("abcd", add_special_tokens=False)
    assert tokens(Completion("abc", "d"), Pairs()) == [~whole[0], whole[1], 256]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "chat", "messages", "text"])
def test_the_tokens_are_those_of_trl(tiny_model: Path, tmp_path: Path, kind: str):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked, told = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
    record = {
        "prompt": {"prompt": "What? ", "completion": "That."},
        "chat": {"prompt": [asked], "completion": [told]},
        "messages": {"messages": [asked, told]},
        "text": {"text": "What? That."},
    }[kind]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = CHATML
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list([record] * 2),
        processing_class=tokenizer,
    )
    (row,) = trainer.data_collator([trainer.train_dataset[0]])["labels"].tolist()
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines([record]))
    (document, *_) = from_path(path).train if kind != "text" else ["What? That."]
    ours = tokens(document, tokenizer)
    if kind in ("chat", "messages"):
        ours = ours[:-1]  # the end between documents, which TRL leaves out of a conversation
    assert [token if token >= 0 else -100 for token in ours] == row


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON: Expecting value at column 1"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2 is not JSON: Expecting ':' delimiter at column 9"),
        ("a.json", b"3", "is not a list of records"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16, not UTF-8 text: convert it"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16, not UTF-8 text: convert it"),
        ("a.csv", b"\0\1\2", "is binary, not UTF-8 text"),
        ("a.csv", b"text\n\xff\xfa\n", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8 text"),
        ("a.jsonl", b"\n", "has no records"),
        ("a.json", b"[]", "has no records"),
        ("a.csv", b"text\n", "has no records"),
        ("a.jsonl", b'{"text": ""}\n' * 2, "has 2 records without text in field 'text'"),
        ("a.jsonl", b'{"a": "b", "c": 1}', "line 1 has 'a', 'c': prompt.completion, .* was expected; name the field"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', "line 3 has no field 'text', which the first record has"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "line 2: 'text' is a number, a text was expected"),
        ("a.json", b'[{"text": "a"}, {"text": null}]', "record 2: 'text' is empty, a text was expected"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is no object with fields"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: the key 'text' is there twice"),
        ("a.jsonl", b'{"messages": "a"}', "'messages' is a text, a list of messages was expected"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "message 1 of 'messages' is no text with a role"),
        ("a.jsonl", b'{"messages": [{"role": "a", "content": "b"}]}', "has the role 'a': one of assistant, "),
        ("a.csv", b"text,id\na,1\nb\n", "line 3 has fewer cells than the first line"),
        ("a.csv", b"text\na,1\n", "line 2 has more cells than the first line"),
        ("a.csv", b'text\n"a\n', "is not CSV: unexpected end of data"),
        ("a.jsonl.gz", b"text", "is no complete gzip file"),
        ("a.jsonl.gz", gzip.compress(_lines(RECORDS))[:-9], "is no complete gzip file"),
        ("a.parquet", b"PAR1", "is no complete Parquet file"),
    ],
)
def test_a_damaged_file_is_named_with_the_line(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GainOpsError, match=message) as caught:
        from_path(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_among_texts_and_fields_of_a_text_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_lines(RECORDS))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(GainOpsError, match=r"holds data \(a.jsonl\) and other files \(b.txt\): give the data file"):
        from_path(tmp_path)
    with pytest.raises(GainOpsError, match="is read as text, which has no fields"):
        from_path(tmp_path / "b.txt", text_field="text")
    with pytest.raises(GainOpsError, match=r"line 1 has no field 'body' \(--text-field\): it has 'text', 'id'"):
        from_path(tmp_path / "a.jsonl", text_field="body")


def test_a_data_file_is_read_to_the_limit_which_is_said(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(RECORDS) + b"not read")
    domain = from_path(path, limit=1000)
    assert set(domain.train + domain.validation) < TEXTS
    assert f"characters, from the beginning of {path}" in domain.read


def test_few_prompts_are_not_cut_to_measure_on():
    documents = [Completion("a" * size, "b") for size in (9, 8, 7)]
    domain = split_domain("d", documents, source="s")
    assert domain.validation == (documents[2],)
    assert split_domain("d", documents[:1], source="s").validation == ()


def test_windows_without_a_token_to_predict_are_left_out():
    stream = token_stream([Completion("a" * 20, "bc")], Bytes(), limit=99)
    windows = cut_windows(stream, length=4, count=9, seed=0)
    assert torch.equal(windows, torch.tensor([]).view(0, 4).long())  # the completion begins a window of its own
    windows = cut_windows(stream[1:], length=4, count=9, seed=0)
    assert windows.tolist() == [[~97, ~97, ~97, 98]]


def test_a_model_without_a_chat_template_is_refused_in_words():
    class Plain(Bytes):
        chat_template = None

    with pytest.raises(
        GainOpsError, match="the model's tokenizer has no chat template: give a model that was trained to"
    ):
        tokens(Chat((("user", "a"),)), Plain())

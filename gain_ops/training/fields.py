"""The fields of records, by which they become documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gain_ops.training.documents import Chat, Completion, Document
from gain_ops.training.records import Record
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import first_of, named

__all__ = ["Layout", "documents", "layout_of"]

_INSTRUCTION = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_INSTRUCTION_AND_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Stanford Alpaca's prompts, which trainers of such records use."""

_ROLES = {role: role for role in ("assistant", "developer", "system", "tool", "user")}
_ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's


@dataclass(frozen=True)
class Layout:
    """The fields that a data set's records have, and what they become."""

    fields: tuple[str, ...]
    document: Callable[[Mapping[str, Any]], Document]

    def __str__(self) -> str:
        return ("field " if len(self.fields) == 1 else "fields ") + " and ".join(map(repr, self.fields))


def layout_of(first: Record, text_field: str | None) -> Layout:
    """The layout of the records, by the first of them.

    Raises:
        UsageError: it has none of the fields that are known, or not ``text_field``.
    """
    if text_field is not None:
        if text_field in first.fields:
            return Layout((text_field,), lambda fields: _text(fields, text_field))
        raise UsageError(f"{first.place} has no field {text_field!r} (--text-field): it has {_listed(first.fields)}")
    for layout in _LAYOUTS:
        if all(name in first.fields for name in layout.fields):
            return layout
    known = ", ".join("+".join(layout.fields) for layout in _LAYOUTS)
    raise UsageError(
        f"{first.place} has {_listed(first.fields)}: {known} was expected; name the field that has the text (--text-field)"
    )


def documents(records: Iterable[Record], layout: Layout) -> Iterator[Document]:
    """The records' documents.

    Raises:
        UsageError: a record lacks a field that the first one has, or has another kind of value there.
    """
    for record in records:
        for name in layout.fields:
            if name not in record.fields:
                raise UsageError(
                    f"{record.place} has no field {name!r}, which the first record has: it has {_listed(record.fields)}; give "
                    "records of one kind"
                )
        try:
            yield layout.document(record.fields)
        except ValueError as error:
            raise UsageError(f"{record.place}: {error}") from error


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {_kind(value)}, a text was expected")
    return value


def _prompted(fields: Mapping[str, Any]) -> Document:
    if not isinstance(fields["prompt"], list):
        return Completion(_text(fields, "prompt"), _text(fields, "completion"))
    prompt = _messages(fields, "prompt")
    return Chat(prompt + _messages(fields, "completion"), read=len(prompt))


def _instructed(fields: Mapping[str, Any]) -> Completion:
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    context = "" if fields.get("input") is None else _text(fields, "input")
    form = _INSTRUCTION_AND_INPUT if context.strip() else _INSTRUCTION
    return Completion(form.format(instruction=instruction, input=context), output)


def _messages(fields: Mapping[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    """Messages as {"role", "content"}, or ShareGPT's {"from", "value"}."""
    value = fields[name]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} is {_kind(value)}, a list of messages was expected")
    found = []
    for number, message in enumerate(value, start=1):
        role, content = None, None
        if isinstance(message, dict):
            role = message.get("role") or message.get("from")
            content = message.get("content") if message.get("content") is not None else message.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"message {number} of {name!r} is no text with a role: role and content, or from and value, were expected"
            )
        if role not in _ROLES:
            raise ValueError(
                f"message {number} of {name!r} has the role {named(role)!r}: one of {', '.join(_ROLES)} is known"
            )
        found.append((_ROLES[role], content))
    return tuple(found)


_LAYOUTS = (  # in TRL's order, where a data set has the fields of several
    Layout(("prompt", "completion"), _prompted),
    Layout(("messages",), lambda fields: Chat(_messages(fields, "messages"))),
    Layout(("conversations",), lambda fields: Chat(_messages(fields, "conversations"))),
    Layout(("text",), lambda fields: _text(fields, "text")),
    Layout(("instruction", "output"), _instructed),
)


def _listed(fields: Mapping[str, Any]) -> str:
    return first_of([repr(named(name)) for name in fields]) or "no fields"


def _kind(value: object) -> str:
    if value is None or value == []:
        return "empty"
    return {str: "a text", list: "a list", dict: "an object", bool: "true or false"}.get(type(value), "a number")

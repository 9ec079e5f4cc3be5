"""Documents in tokens: a text, a prompt with its completion, or a conversation through a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol, cast

from gain_ops.utils.errors import UsageError

__all__ = ["Chat", "Completion", "Document", "Tokenizer", "characters", "tokens"]

_TAIL = 2  # tokens in which a chat template's own end is looked for: some put a line break after it


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' own have it."""

    @property
    def eos_token_id(self) -> int | None:
        """The token between two documents, if there is one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of ``text``."""


@dataclass(frozen=True)
class Completion:
    """A prompt, which is read, and its completion, which is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages, (role, content) each: the first ``read`` of them are read, the others are learned."""

    messages: tuple[tuple[str, str], ...]
    read: int = 0


Document = str | Completion | Chat


def characters(document: Document) -> int:
    """How long a document is, without what a chat template adds."""
    if isinstance(document, str):
        return len(document)
    if isinstance(document, Completion):
        return len(document.prompt) + len(document.completion)
    return sum(len(content) for _, content in document.messages)


def tokens(document: Document, tokenizer: Tokenizer) -> list[int]:
    """A document's tokens, then the end-of-text token.

    A token that is read and not learned is marked: ``~id`` stands for it. The learned ones begin where the tokens of the prompt
    and of the whole differ, since the last characters of a prompt may be in one token with the first of its completion.
    A conversation gets no second end where its template has put one.

    Raises:
        UsageError: a conversation, and no chat template, or one that refuses it.

    Source: TRL's SFTTrainer learns the same tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(document, str):
        return tokenizer.encode(document, add_special_tokens=False) + end
    if isinstance(document, Completion):
        prompt, whole = document.prompt, document.prompt + document.completion
    else:
        prompt = _rendered(document.messages[: document.read], tokenizer, prompt=True) if document.read else ""
        whole = _rendered(document.messages, tokenizer)
    read, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, whole))
    if isinstance(document, Completion) or not set(end) & set(ids[-_TAIL:]):
        ids += end
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(read, ids, strict=False))))
    return [~token for token in ids[:shared]] + ids[shared:]


def _rendered(messages: tuple[tuple[str, str], ...], tokenizer: Tokenizer, *, prompt: bool = False) -> str:
    """A conversation as the text that its model expects; as a prompt, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the data are conversations, and the model's tokenizer has no chat template: give a model that was trained to "
            "chat, or data with the field 'text', or 'prompt' and 'completion'"
        )
    told = [{"role": role, "content": content} for role, content in messages]
    try:
        text = cast(Any, tokenizer).apply_chat_template(told, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program, which refuses what it likes
        roles = ", ".join(role for role, _ in messages)
        raise UsageError(f"the chat template refuses a conversation of {roles}: {error}") from error
    return cast(str, text)

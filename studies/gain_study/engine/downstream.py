"""Multiple-choice accuracy by log-likelihood: whether a model still knows general English, which no domain teaches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gain_ops.measure.perplexity import in_mode, logits
from gain_ops.training.documents import Tokenizer
from gain_ops.utils.errors import DivergedError, UsageError
from gain_study.engine import items
from gain_study.engine.items import Agreement, Relation

__all__ = ["Item", "Task", "accuracy", "tasks"]


@dataclass(frozen=True)
class Item:
    """A context, the texts that may continue it, and the number of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """Items of one kind, all with the same number of choices."""

    name: str
    source: str
    items: tuple[Item, ...]


def tasks() -> list[Task]:
    """The sets of items, the same at every call.

    Each place has equally many right answers. By chance the accuracy is 1 / 2 in ``agreement`` and 1 / 4 in the others.
    """
    tables = items.load()
    agreement = tuple(_agreement(tables.agreement))
    return [  # a results file has these texts: a study that goes on must find the same ones
        Task("agreement", "generated beginnings of sentences: the number of the verb", agreement),
        Task("words", "a table of opposites, participles, plurals and synonyms", tuple(_table(tables.words))),
        Task("facts", "a table of cities, books, nature and animals", tuple(_table(tables.facts))),
        Task("sense", "a table of causes, effects and uses", tuple(_table(tables.sense))),
    ]


def accuracy(model: nn.Module, tokenizer: Tokenizer, task: Task, *, batch_size: int = 32) -> float:
    """The share of the items whose right choice is the likeliest; of several equal ones the first counts.

    A choice of tokens ``c_1 .. c_n`` after a context x has the score::

        score(c) = 1 / n * sum_i log p(c_i | x, c_1 .. c_(i-1))

    The mean keeps a long choice from losing by its length. Choices that differ only in their last token share a row of the
    forward pass. The model is in evaluation mode without gradients, and each module gets its own mode back.

    Args:
        model: a causal language model of transformers, or one with the same call.
        tokenizer: the model's.
        task: has at least one item.
        batch_size: rows in one forward pass; it changes the result by rounding only.

    Raises:
        ValueError: the task has no items, or a choice has no tokens of its own.
        FloatingPointError: a score is not finite.
    """
    if not task.items:
        raise ValueError(f"the task {task.name!r} has no items")
    encoded = [[_encode(tokenizer, item.context, choice) for choice in item.choices] for item in task.items]
    likelihoods = _mean_likelihoods(model, {choice for choices in encoded for choice in choices}, batch_size)
    right = 0
    for item, choices in zip(task.items, encoded, strict=True):
        scores = [likelihoods[choice] for choice in choices]
        if not all(map(math.isfinite, scores)):
            raise DivergedError(f"the choices after {item.context!r} score {scores}: try the model in float32")
        right += scores.index(max(scores)) == item.answer
    return right / len(task.items)


_Choice = tuple[tuple[int, ...], int]
"""The tokens of a context with a choice, and the place where the choice begins."""


def _encode(tokenizer: Tokenizer, context: str, choice: str) -> _Choice:
    alone = tokenizer.encode(context, add_special_tokens=False)
    both = tokenizer.encode(context + choice, add_special_tokens=False)
    # A tokenizer may merge the two where they meet: then the choice begins with the first token that differs.
    start = next((place for place, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), len(alone))
    if not 0 < start < len(both):
        raise UsageError(f"{choice!r} after {context!r} has no tokens of its own, or the context has none")
    return tuple(both), start


def _mean_likelihoods(model: nn.Module, choices: set[_Choice], batch_size: int) -> dict[_Choice, float]:
    """The mean log-likelihood of each choice's tokens after its context."""
    # The last token is not fed to the model, so choices that differ only there share a row.
    rows: dict[tuple[int, ...], list[_Choice]] = {}
    for ids, start in sorted(choices):
        rows.setdefault(ids[:-1], []).append((ids, start))
    order = sorted(rows, key=lambda row: (len(row), row))
    means = {}
    with in_mode(model, training=False), torch.no_grad():
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            # No position sees padding to its right, so padding needs no mask. Its own predictions are not read.
            padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
            for row, predicted in zip(batch, logits(model, padded), strict=True):
                for ids, start in rows[row]:
                    log_p = predicted[start - 1 : len(row)].float().log_softmax(-1)
                    tokens = torch.tensor(ids[start:], device=log_p.device)
                    means[ids, start] = log_p.gather(-1, tokens[:, None]).mean().item()
    return means


def _agreement(tables: Agreement) -> Iterator[Item]:
    """Each noun with each verb in both numbers, a noun of the other number between the two."""
    nouns = tables.nouns
    for number, noun in enumerate(nouns):
        other = nouns[(number + 5) % len(nouns)]
        for template, singular, plural in tables.templates:
            verbs = (f" {singular}", f" {plural}")
            yield Item(template.format(noun, f"{other}s"), verbs, 0)
            yield Item(template.format(f"{noun}s", other), verbs, 1)


def _table(relations: Iterable[Relation]) -> Iterator[Item]:
    """An item for each row of the tables; the right choice takes each place in turn."""
    rows = [(relation.template.format(key), row) for relation in relations for key, row in relation.rows.items()]
    for number, (context, row) in enumerate(rows):
        right, *wrong = (f" {choice}" for choice in row)
        place = number % len(row)
        yield Item(context, (*wrong[:place], right, *wrong[place:]), place)

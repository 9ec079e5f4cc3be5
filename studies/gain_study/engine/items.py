"""What the multiple-choice items are made of: the tables of ``items.toml``, checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from gain_ops.utils.errors import UsageError

__all__ = ["FILE", "Agreement", "Items", "Relation", "load", "parse"]

FILE = "items.toml"
"""The tables, beside this file."""

_CHOICES = 4


@dataclass(frozen=True)
class Relation:
    """A template with a place for a row's key, and by key the choices that may continue it, the right one first."""

    template: str
    rows: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Agreement:
    """Nouns, whose plurals end in s, and templates: text with two places, the verb in the singular and in the plural."""

    nouns: tuple[str, ...]
    templates: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Items:
    """What each set of items is made of, by the set's name."""

    agreement: Agreement
    words: tuple[Relation, ...]
    facts: tuple[Relation, ...]
    sense: tuple[Relation, ...]


def load() -> Items:
    """The tables of the package."""
    return parse(files("gain_study.engine").joinpath(FILE).read_text(encoding="utf-8"))


def parse(text: str) -> Items:
    """The tables of a TOML text.

    Raises:
        ValueError: a template has not as many places as it needs, or a row has not four different choices.
    """
    tables = tomllib.loads(text)
    templates = tuple(
        (_template(template, places=2), singular, plural)
        for template, singular, plural in tables["agreement"]["templates"]
    )
    return Items(
        Agreement(tuple(tables["agreement"]["nouns"]), templates),
        **{name: tuple(map(_relation, tables[name])) for name in ("words", "facts", "sense")},
    )


def _relation(table: Mapping[str, Any]) -> Relation:
    template = _template(table["template"], places=1)
    for key, choices in table["rows"].items():
        if len(set(choices)) != _CHOICES or len(choices) != _CHOICES:
            raise UsageError(
                f"{FILE}: {key!r} under {template!r} got the choices {choices}: {_CHOICES} different ones are needed"
            )
    return Relation(template, {key: tuple(choices) for key, choices in table["rows"].items()})


def _template(template: str, *, places: int) -> str:
    if template.count("{}") != places:
        raise UsageError(f"{FILE}: the template {template!r} must have {{}} {places} times")
    return template

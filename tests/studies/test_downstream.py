"""Multiple choice by log-likelihood: exact accuracies of a model whose probabilities are known, whatever the batch."""

import hashlib
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gain_ops.training.loading import load_model
from gain_ops.utils.errors import UsageError
from gain_study.engine import downstream, items
from gain_study.engine.downstream import Item, Task, accuracy

WORDS = [".", "a", "b", "c", "d", "e", "f"]


class ByWord:
    """A tokenizer of the words above, each with the space before it; ``join`` are two that it makes one of."""

    eos_token_id = None

    def __init__(self, join: str = "") -> None:
        self.join = join

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [WORDS.index(word) for word in (text.replace(self.join, " f") if self.join else text).split()]


class Bigram(nn.Module):
    """The log-probabilities that ``likely`` names, by a word and the next; the other next words share what is left."""

    def __init__(self, likely: dict[str, float]) -> None:
        super().__init__()
        table = torch.zeros(len(WORDS), len(WORDS))
        for first in range(len(WORDS)):
            named = {WORDS.index(pair[1]): p for pair, p in likely.items() if pair[0] == WORDS[first]}
            table[first] = (1 - sum(named.values())) / (len(WORDS) - len(named))
            for second, probability in named.items():
                table[first, second] = probability
        self.table = nn.Parameter(table.log())
        self.dropout = nn.Dropout(0.9)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


def _task(*items: Item) -> Task:
    return Task("t", "s", items)


def test_accuracy_is_the_share_of_items_whose_true_choice_is_the_likeliest():
    model = Bigram({"ab": 0.5, "ac": 0.3, "ad": 0.1})
    right, wrong = Item("a", (" c", " b", " d"), 1), Item(". a", (" c", " b", " d"), 0)
    assert accuracy(model, ByWord(), _task(right, wrong, right)) == 2 / 3


def test_a_choice_scores_the_mean_over_its_tokens():
    # Sums: ln 0.3 against ln 0.5 + ln 0.5, which is less. Means: ln 0.3 against ln 0.5.
    model = Bigram({"ab": 0.5, "bc": 0.5, "ad": 0.3})
    assert accuracy(model, ByWord(), _task(Item("a", (" d", " b c"), 1))) == 1.0


def test_the_context_is_not_scored_and_is_seen():
    # After c, d is likelier than e; after a, e is likelier than d. The context's own words are all but impossible.
    model = Bigram({"ac": 1e-9, "cd": 0.6, "ce": 0.2, "ae": 0.6, "ad": 0.2})
    assert accuracy(model, ByWord(), _task(Item("a c", (" d", " e"), 0), Item("c a", (" d", " e"), 1))) == 1.0


def test_of_equal_choices_the_first_is_taken():
    model = Bigram({})
    assert accuracy(model, ByWord(), _task(Item("a", (" b", " c"), 0), Item("a", (" b", " c"), 1))) == 0.5


def test_a_choice_that_the_tokenizer_joins_to_its_context_begins_where_the_tokens_differ():
    model = Bigram({"af": 0.8, "ac": 0.1})
    item = Item("a b", (" d", " c"), 0)  # " b d" is the token f: a f against a b c
    assert accuracy(model, ByWord(join=" b d"), _task(item)) == 1.0


def _mixed() -> Task:
    contexts = ["a", "a b", "c d e f", "b . a", "e e e e e e", "d"]
    choices = (" b", " c d e", " f", " a a")
    return _task(*(Item(context, choices, number % 4) for number, context in enumerate(contexts)))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_neither_batch_nor_padding_changes_the_scores(batch_size):
    torch.manual_seed(0)
    model, tokenizer = _Attending().eval(), ByWord()
    encoded = {
        downstream._encode(tokenizer, item.context, choice) for item in _mixed().items for choice in item.choices
    }
    alone = {}
    with torch.no_grad():
        for ids, start in encoded:
            predicted = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            told = [predicted[place - 1, ids[place]].item() for place in range(start, len(ids))]
            alone[ids, start] = sum(told) / len(told)
    together = downstream._mean_likelihoods(model, encoded, batch_size)
    assert together == pytest.approx(alone, rel=1e-5)


class _Attending(nn.Module):
    """A causal model that sees all that came before: the mean of the embeddings up to each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 8)
        self.head = nn.Linear(8, len(WORDS))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        seen = self.embedding(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.head(seen))


def test_choices_of_one_token_share_a_row():
    model = Bigram({"ab": 0.5})
    accuracy(model, ByWord(), _task(Item(". a", (" b", " c", " d", " e"), 0)))
    assert model.shapes == [(1, 2)]


def test_it_measures_without_dropout_and_puts_every_mode_back():
    model = Bigram({"ab": 0.5, "ac": 0.3}).train()
    task = _task(*(Item("e " * count + "a", (" c", " b"), 1) for count in range(8)))
    assert accuracy(model, ByWord(), task) == 1.0
    assert (model.training, model.dropout.training) == (True, True)
    assert model.table.grad is None


@pytest.mark.parametrize("item", [Item("", (" a", " b"), 0), Item("a", (" b", ""), 0)])
def test_an_item_without_context_or_choice_is_refused(item):
    with pytest.raises(ValueError, match="no tokens of its own"):
        accuracy(Bigram({}), ByWord(), _task(item))


def test_no_items_and_no_number_are_refused():
    with pytest.raises(ValueError, match="'t' has no items"):
        accuracy(Bigram({}), ByWord(), _task())
    broken = Bigram({})
    nn.init.constant_(broken.table, math.nan)
    with pytest.raises(FloatingPointError, match=re.escape("the choices after 'a'")):
        accuracy(broken, ByWord(), _task(Item("a", (" b", " c"), 0)))


@pytest.mark.slow
def test_a_real_model_and_tokenizer_answer(tiny_model):
    loaded = load_model(tiny_model, dtype=None, device=torch.device("cpu"))
    items = (  # it has learned which letters English has
        Item("The quick brown fox jumps over", (" the dog", " QZXJKVW"), 0),
        Item("All happy families are", (" ZZQ#XKJ", " alike"), 1),
    )
    assert accuracy(loaded.model, loaded.tokenizer, _task(*items)) == 1.0


TASKS = downstream.tasks()


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_the_items_of_a_task_are_sound(task):
    assert 60 <= len(task.items) <= 120
    assert len({(item.context, item.choices) for item in task.items}) == len(task.items)
    (choices,) = {len(item.choices) for item in task.items}
    for item in task.items:
        assert item.context == item.context.strip()
        assert len(set(item.choices)) == choices
        assert all(re.fullmatch(r"( [^\W\d_]+)+", choice) for choice in item.choices), item
    places = [sum(item.answer == place for item in task.items) for place in range(choices)]
    assert places == [len(task.items) // choices] * choices


def test_every_task_has_its_name_and_is_the_same_at_every_call():
    assert [task.name for task in TASKS] == ["agreement", "words", "facts", "sense"]
    assert downstream.tasks() == TASKS


def test_the_items_are_those_of_the_published_accuracies():
    assert {task.name: len(task.items) for task in TASKS} == {"agreement": 96, "words": 60, "facts": 60, "sense": 60}
    digest = hashlib.sha256(repr(TASKS).encode()).hexdigest()
    assert digest == "ffa13badb797685a4a7dca3ec7acd50de08ddb2dbd76a1c50ce195b82d2d0dd3"


SOUND = """
words = []
sense = []
[agreement]
nouns = ["dog"]
templates = [["The {} near the {}", "is", "are"]]
[[facts]]
template = "The capital city of {} is"
[facts.rows]
Canada = ["Ottawa", "Toronto", "Montreal", "Vancouver"]
"""


@pytest.mark.parametrize(
    ("sound", "broken", "message"),
    [
        (', "Vancouver"', "", "'Canada' under .* 4 different ones are needed"),
        ("Vancouver", "Toronto", "'Canada' under .* 4 different ones are needed"),
        ("city of {}", "city", "must have {} 1 times"),
        ("the {}", "it", "must have {} 2 times"),
    ],
)
def test_tables_that_are_not_sound_are_refused(sound, broken, message):
    (relation,) = items.parse(SOUND).facts
    assert relation.rows["Canada"][0] == "Ottawa"
    with pytest.raises(UsageError, match=message):
        items.parse(SOUND.replace(sound, broken))


def test_agreement_is_with_the_first_noun():
    singular, plural = TASKS[0].items[:2]
    assert singular == Item("The teacher near the sisters", (" is", " are"), 0)
    assert plural == Item("The teachers near the sister", (" is", " are"), 1)


def test_the_first_choice_of_a_line_is_the_right_one():
    (item,) = (item for item in TASKS[2].items if "Canada" in item.context)
    assert item.context == "The capital city of Canada is"
    assert item.choices[item.answer] == " Ottawa"

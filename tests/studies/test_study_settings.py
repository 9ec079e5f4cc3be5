"""What a study is asked to do, its windows and its orders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gain_ops.training.domains import split_domain
from gain_study.engine.methods import METHODS
from gain_study.engine.settings import Settings
from gain_study.engine.texts import draw_orders, find_domains, seed_of, tokenise


class Bytes:
    """A tokenizer of bytes, with an end of text."""

    eos_token_id = 256

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: at least 1"),
        ({"orders": 0}, "orders is 0: at least 1"),
        ({"validation_windows": 0}, "validation windows is 0"),
        ({"selection_windows": 0}, "selection windows is 0"),
        ({"fisher_windows": 0}, "fisher windows is 0"),
        ({"curve_points": 4}, r"curve points is 4: 0 for none, at most one a step \(3\)"),
        ({"curve_points": -1}, "curve points is -1"),
        ({"sequence_length": 1}, "sequence length is 1: at least 2"),
        ({"batch_tokens": 100}, "batch tokens is 100: it must be a multiple of the sequence length, 32"),
        ({"batch_tokens": 0}, "batch tokens is 0"),
        ({"ewc_lambda": -1.0}, "ewc lambda is -1.0"),
        ({"ewc_lambda": float("inf")}, "ewc lambda is inf"),
        ({"methods": ()}, "got no methods"),
        ({"methods": ("gain", "lore")}, "method 'lore' is unknown: choose among gain, gain-ffn,"),
        ({"methods": ("gain", "gain")}, "methods holds one twice: gain, gain"),
        ({"seeds": ()}, "got no seeds"),
        ({"seeds": (1, 1)}, "seeds holds one twice"),
        ({"domains": ()}, "got no domains"),
        ({"orders": 7}, "orders is 7: 3 domains have only 6"),
        ({"rates": {"lora": ()}}, "rates for lora: got \\[\\]"),
        ({"rates": {"lora": (1e-3, 1e-3)}}, "rates for lora"),
        ({"rates": {"lora": (0.0,)}}, "rates for lora"),
        ({"rates": {"lore": (1e-3,)}}, "got rates for 'lore': choose among gain,"),
        ({"rates": {"ewc": (1e-3,)}}, r"got rates for 'ewc': .*\(ewc takes those of full\)"),
        ({"replay_share": 0.1}, "lora-replay: got 0.1 of a batch of 4 windows to replay"),
        ({"replay_share": 1.0}, "lora-replay: got 1 of a batch"),
        ({"dtype": "bfloat16"}, "full and ewc in bfloat16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(small: Callable[..., Settings], tmp_path: Path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_what_concerns_methods_that_do_not_run_is_not_refused(small: Callable[..., Settings], tmp_path: Path):
    settings = small(tmp_path, methods=("gain", "lora"), replay_share=0.0, dtype="bfloat16")
    assert settings.grid("lora") == METHODS["lora"].rates
    assert small(tmp_path, rates={"lora": (3e-3, 1e-3)}).grid("lora") == (1e-3, 3e-3)


def test_as_json_they_are_all_there_but_the_folder(small: Callable[..., Settings], tmp_path: Path):
    settings = small(tmp_path, rates={"gain": (3e-2, 1e-2)})
    there = settings.as_json()
    assert json.loads(json.dumps(there)) == there
    assert {*there, "out", "trust_remote_code"} == set(settings.__dataclass_fields__)
    assert there == small(tmp_path / "elsewhere", rates={"gain": (1e-2, 3e-2)}).as_json()


def test_orders_are_as_given_reversed_and_then_others():
    names = list("abcd")
    orders = draw_orders(names, 24)
    assert orders[:2] == [names, names[::-1]]
    assert len({tuple(order) for order in orders}) == 24
    assert draw_orders(names, 5) == orders[:5]
    assert draw_orders(["a"], 1) == [["a"]]


def test_windows_of_training_choice_and_validation_differ(small: Callable[..., Settings], tmp_path: Path):
    texts = [split_domain(name, [f"{name} {n} {n * n} " * 40 for n in range(60)], source="a test") for name in "ab"]
    settings = small(tmp_path, validation_windows=5, selection_windows=4)
    first, second = tokenise(texts, [], Bytes(), settings).values()
    assert [len(first.validation), len(first.selection)] == [5, 4]
    assert [len(second.validation), len(second.selection)] == [5, 0]
    windows = [tuple(row) for part in (first.validation, first.selection) for row in part.tolist()]
    assert len(set(windows)) == 9
    documents = {tuple(row) for row in first.pool.tolist()}
    assert not documents & set(windows)
    # What a domain is measured on does not depend on its place.
    other = tokenise(texts[::-1], [], Bytes(), settings)["a"]
    assert torch.equal(other.validation, first.validation)


def test_what_is_held_out_is_measured_and_not_trained_on(small: Callable[..., Settings], tmp_path: Path):
    texts = [split_domain(name, [f"{name} {n} {n * n} " * 40 for n in range(60)], source="a test") for name in "ab"]
    settings = small(tmp_path, validation_windows=5)
    learned = tokenise(texts, [], Bytes(), settings)["b"]
    held_out = tokenise(texts[:1], texts[1:], Bytes(), settings)["b"]
    assert (len(held_out.pool), len(held_out.selection)) == (0, 0)
    assert torch.equal(held_out.validation, learned.validation)


def test_a_seed_draws_training_windows_and_their_order(small: Callable[..., Settings], tmp_path: Path):
    text = split_domain("a", [f"a {n} {n * n} " * 40 for n in range(60)], source="a test")
    settings = small(tmp_path)
    (found,) = tokenise([text], [], Bytes(), settings).values()
    draws = [found.windows(settings, seed) for seed in (0, 0, 1)]
    assert draws[0].shape == (12, 32)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    batches = found.batches(settings, 0, batch_size=4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 32)] * 3
    assert sorted(torch.cat(batches).tolist()) == sorted(draws[0].tolist())
    fewer = torch.cat(found.batches(settings, 0, batch_size=3))
    assert {tuple(row) for row in fewer.tolist()} <= {tuple(row) for row in draws[0].tolist()}


def test_a_short_text_is_divided_and_too_short_a_one_refused(small: Callable[..., Settings], tmp_path: Path):
    settings = small(tmp_path, validation_windows=50, selection_windows=50)
    text = split_domain("a", ["".join(map(str, range(700)))], source="a test")
    (found,) = tokenise([text], [], Bytes(), settings).values()
    measured = len(found.validation) + len(found.selection)
    assert 2 <= measured < 50
    assert abs(len(found.validation) - len(found.selection)) <= 1
    with pytest.raises(ValueError, match=r"too little text in a test: .* at least 128 and 64 are needed"):
        tokenise([split_domain("a", ["a" * 160], source="a test")], [], Bytes(), settings)


def test_domains_are_found_by_name_or_path(domain_folders: list[str], tmp_path: Path):
    assert [domain.name for domain in find_domains([*domain_folders, "licences"])] == [
        "fox",
        "sums",
        "code",
        "licences",
    ]
    (tmp_path / "fox.txt").write_text("another fox\n")
    with pytest.raises(ValueError, match=r"several domains are called 'fox': .*fox, .*fox\.txt"):
        find_domains([domain_folders[0], str(tmp_path / "fox.txt")])


def test_seeds_differ_by_every_part():
    seeds = [seed_of("a", 0, 1), seed_of("a", 1, 0), seed_of("b", 0, 1), seed_of("a", 0), seed_of("a", "0", 1)]
    assert len(set(seeds)) == len(seeds)
    assert seed_of("windows", 0, "python") == seed_of("windows", 0, "python")
    torch.manual_seed(max(seeds))

"""EWC's Fisher information and penalty against their definitions, and what replay mixes in."""

from itertools import pairwise
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gain_ops.training.loop import train
from gain_study.engine.ewc import Anchor, add_fisher
from gain_study.engine.replay import mix_in


class Table(nn.Module):
    """A bigram model: log p(b | a) by a table, and one parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


WINDOWS = torch.randint(5, (4, 7), generator=torch.Generator().manual_seed(1))


def _fisher(model: Table, windows: torch.Tensor) -> torch.Tensor:
    """By the definition, token by token."""
    total = torch.zeros(5, 5, dtype=torch.float64)
    for window in windows:
        score = torch.zeros(5, 5, dtype=torch.float64)
        for now, then in pairwise(window.tolist()):
            score[now] -= model.table[now].softmax(-1).detach()
            score[now, then] += 1
        total += score**2
    return total / (len(windows) * (windows.shape[1] - 1))


def test_the_fisher_information_is_the_mean_squared_score_of_a_window_a_token():
    model = Table()
    found = add_fisher(model, WINDOWS, {})
    torch.testing.assert_close(found["table"].double(), _fisher(model, WINDOWS), rtol=1e-5, atol=1e-7)
    assert not found["unused"].any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_that_of_another_domain_is_added_and_the_first_stays():
    model = Table()
    first = add_fisher(model, WINDOWS[:2], {})
    kept = first["table"].clone()
    both = add_fisher(model, WINDOWS[2:], first)
    assert torch.equal(first["table"], kept)
    torch.testing.assert_close(both["table"], kept + add_fisher(model, WINDOWS[2:], {})["table"])


def test_the_penaltys_gradient_is_that_of_its_formula():
    model = Table()
    fisher = add_fisher(model, WINDOWS, {})
    start = model.table.detach().clone()
    anchor = Anchor(model, fisher, 3.0)
    with torch.no_grad():
        model.table += torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    model.table.grad = torch.full((5, 5), 0.5, dtype=torch.float64)
    penalty = 3.0 / 2 * (fisher["table"] * (model.table - start) ** 2).sum()
    (expected,) = torch.autograd.grad(penalty, model.table)
    anchor.add_gradient()
    torch.testing.assert_close(model.table.grad, expected + 0.5)
    assert model.unused.grad is None


def test_a_strong_penalty_holds_what_the_first_domain_depends_on_and_lets_the_rest_go():
    ends = []
    for strength in (0.0, 1e3):
        model = Table()
        model.unused.requires_grad_(False)
        fisher = add_fisher(model, torch.tensor([[0, 1, 0, 1, 0, 1]]), {})
        start = model.table.detach().clone()
        anchor = Anchor(model, fisher, strength)
        train(model, [torch.tensor([[0, 2, 3, 4, 3, 0]])] * 20, lr=0.1, after_backward=anchor.add_gradient)
        ends.append((model.table.detach() - start).abs())
    free, held = (moved.amax(dim=1) for moved in ends)
    assert held[0] < 0.1 * free[0]  # tokens 0 and 1 are what the first domain has
    assert held[3] > 0.3 * free[3]


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    steps=st.integers(1, 12),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_batch_gets_windows_of_earlier_domains_which_take_turns(sizes, steps, count, seed):
    batches = [torch.full((2, 3), -1 - step) for step in range(steps)]
    earlier = [torch.arange(size)[:, None].expand(size, 3) + 100 * number for number, size in enumerate(sizes)]
    mixed = mix_in(batches, earlier, count=count, seed=seed)
    assert [tuple(batch.shape) for batch in mixed] == [(2 + count, 3)] * steps
    assert all(torch.equal(new[:2], old) for new, old in zip(mixed, batches, strict=True))
    drawn = [int(row[0]) for batch in mixed for row in batch[2:]]
    turns = [window // 100 for window in drawn]
    assert all(abs(turns.count(a) - turns.count(b)) <= 1 for a in range(len(sizes)) for b in range(len(sizes)))
    for number, size in enumerate(sizes):
        own = [window for window in drawn if window // 100 == number]
        for start in range(0, len(own), size):  # every window once, before one comes again
            assert len(set(own[start : start + size])) == len(own[start : start + size])
    assert all(torch.equal(a, b) for a, b in zip(mixed, mix_in(batches, earlier, count=count, seed=seed), strict=True))

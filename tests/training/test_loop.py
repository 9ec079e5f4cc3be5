"""The loop: its schedule, its batches, what it trains, how it stops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gain_ops.training.loop import draw_batches, learning_rate, train


class Table(nn.Module):
    """A bigram model: one trained table, and one frozen that must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 7))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids] * self.frozen)


def _windows(count: int = 10) -> torch.Tensor:
    start = torch.randint(7, (count, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(6)) % 7


def _batches(steps: int) -> list[torch.Tensor]:
    return draw_batches(_windows(), batch_size=2, steps=steps, seed=0)


def test_the_rate_warms_up_then_falls_by_a_cosine_and_never_to_zero():
    rates = [learning_rate(step, steps=20, peak=1.0, warmup=4) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 17)))
    assert 0 < rates[-1] < 0.02
    assert learning_rate(1, steps=1, peak=1.0, warmup=0) > 0


def test_every_window_comes_once_before_one_comes_again():
    windows = torch.arange(30).view(10, 3)
    batches = draw_batches(windows, batch_size=5, steps=4, seed=0)
    assert [batch.shape for batch in batches] == [(5, 3)] * 4
    first, second = torch.cat(batches[:2]), torch.cat(batches[2:])
    for epoch in (first, second):
        assert sorted(epoch.flatten().tolist()) == list(range(30))
    assert not torch.equal(first, second)


def test_batches_follow_the_seed():
    windows = torch.arange(30).view(10, 3)
    draws = [torch.cat(draw_batches(windows, batch_size=2, steps=5, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_too_few_windows_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="got 2 training windows, but one batch takes 3"):
        draw_batches(torch.zeros(2, 4, dtype=torch.int64), batch_size=3, steps=1, seed=0)


def test_the_loss_falls_and_only_what_requires_a_gradient_is_trained():
    model = Table()
    history = train(model, _batches(40), lr=0.2)
    assert history.losses[0] == pytest.approx(math.log(7), rel=1e-5)
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert torch.equal(model.frozen, torch.ones(7))
    assert model.table.grad is None
    assert [step.number for step in history.steps] == list(range(1, 41))
    assert not history.stopped


def test_the_steps_are_those_of_adamw_on_clipped_gradients():
    model, other = Table(), Table()
    train(model, _batches(6), lr=0.1, warmup=2, max_grad_norm=0.05)
    optimizer = torch.optim.AdamW([other.table], weight_decay=0.0)
    for number, ids in enumerate(_batches(6), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(number, steps=6, peak=0.1, warmup=2)
        loss = nn.functional.cross_entropy(other.table[ids[:, :-1]].flatten(0, 1), ids[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, other.table)
        other.table.grad = gradient * min(1.0, 0.05 / gradient.norm().item())
        optimizer.step()
    torch.testing.assert_close(model.table, other.table, rtol=1e-3, atol=1e-5)


def test_two_runs_give_the_same_bits():
    models = Table(), Table()
    histories = [train(model, _batches(10), lr=0.1) for model in models]
    assert torch.equal(models[0].table, models[1].table)
    assert histories[0].losses == histories[1].losses


def test_there_is_no_weight_decay():
    model = Table()
    nn.init.constant_(model.table, 3.0)
    train(model, [batch % 6 for batch in _batches(20)], lr=0.05)
    assert torch.equal(model.table[6], torch.full((7,), 3.0))  # token 6 never came: only decay could move its row
    assert not torch.equal(model.table[5], torch.full((7,), 3.0))


def test_the_first_step_is_taken_at_the_warm_up_rate():
    model = Table()
    rates = [step.lr for step in train(model, _batches(30), lr=0.3).steps]
    assert rates[:5] == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3])
    assert max(rates) == pytest.approx(0.3)


def test_should_stop_ends_the_run_after_the_step_and_keeps_its_update():
    model, seen = Table(), []
    history = train(model, _batches(10), lr=0.1, on_step=seen.append, should_stop=lambda: len(seen) == 3)
    assert history.stopped
    assert history.steps == seen
    assert len(seen) == 3
    assert model.table.abs().max() > 0


def test_the_training_mode_is_put_back():
    model = Table().eval()
    train(model, _batches(2))
    assert not model.training


def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_parameters():
    model = Table()
    batches = _batches(4)

    def spoil(step) -> None:
        if step.number == 2:
            model.frozen.fill_(math.nan)
            kept.append(model.table.detach().clone())

    kept: list[torch.Tensor] = []
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan.*below 0.1"):
        train(model, batches, lr=0.1, on_step=spoil)
    assert torch.equal(model.table, kept[0])


def test_gradients_that_are_not_finite_stop_it_too_whatever_the_loss():
    model = Table()
    kept: list[torch.Tensor] = []

    def spoil() -> None:
        kept.append(model.table.detach().clone())
        if len(kept) == 3:
            model.table.grad[0, 0] = math.inf

    with pytest.raises(FloatingPointError, match=r"step 3: loss \d"):
        train(model, _batches(4), lr=0.1, after_backward=spoil)
    assert torch.equal(model.table, kept[-1])


def test_nothing_to_train_and_nothing_to_train_on_are_refused():
    with pytest.raises(ValueError, match="no batches"):
        train(Table(), [])
    with pytest.raises(ValueError, match=r"gain_ops\.apply"):
        train(Table().requires_grad_(False), _batches(1))

"""Perplexity is exp of the mean next-token loss, and measuring it leaves the model as it was."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gain_ops.measure.perplexity import in_mode, largest_difference, next_token_loss, perplexity, window_loss


class Bigram(nn.Module):
    """Logits that depend on the present token alone, so the loss is a lookup."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)))
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


WINDOWS = torch.randint(11, (7, 5), generator=torch.Generator().manual_seed(1))


def test_loss_is_the_mean_over_predicted_tokens():
    model = Bigram(11).eval()
    expected = [-model.table[row[t]].log_softmax(0)[row[t + 1]] for row in WINDOWS for t in range(4)]
    torch.testing.assert_close(next_token_loss(model, WINDOWS), torch.stack(expected).mean())


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    model = Bigram(11)
    nn.init.zeros_(model.table)
    assert perplexity(model, WINDOWS) == pytest.approx(11, rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch():
    model = Bigram(11)
    whole = perplexity(model, WINDOWS, batch_size=7)
    assert perplexity(model, WINDOWS, batch_size=3) == pytest.approx(whole, rel=1e-6)
    assert math.log(whole) == pytest.approx(next_token_loss(model.eval(), WINDOWS).item(), rel=1e-6)


def test_perplexity_measures_without_dropout_and_puts_every_mode_back():
    model = Bigram(11)
    model.train()
    model.dropout.eval()
    assert perplexity(model, WINDOWS) == perplexity(model, WINDOWS)
    assert (model.training, model.dropout.training) == (True, False)
    assert model.table.grad is None


def test_the_mode_comes_back_after_an_error():
    model = Bigram(11).train()

    def fail() -> None:
        with in_mode(model, training=False):
            assert not model.dropout.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert model.training
    assert model.dropout.training


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_windows_that_hold_nothing_to_predict_are_refused(shape):
    with pytest.raises(ValueError, match="at least one window of two tokens"):
        perplexity(Bigram(11), torch.zeros(shape, dtype=torch.int64))


def test_logits_that_are_not_finite_are_refused():
    model = Bigram(11)
    nn.init.constant_(model.table, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        perplexity(model, WINDOWS)


def test_the_largest_difference_is_taken_in_fp32():
    one = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert largest_difference(one, torch.tensor([1.0, 1.5])) == 3.5


def test_marked_tokens_are_read_and_not_predicted():
    model = Bigram(11).eval()
    marked = WINDOWS.clone()
    marked[0, :3], marked[1:, 2] = ~marked[0, :3], ~marked[1:, 2]
    expected = [
        -model.table[WINDOWS[row, t]].log_softmax(0)[WINDOWS[row, t + 1]]
        for row in range(7)
        for t in range(4)
        if marked[row, t + 1] >= 0
    ]
    assert len(expected) == 2 + 6 * 3
    mean = torch.stack(expected).mean()
    torch.testing.assert_close(window_loss(model, marked), mean)
    for batch_size in (1, 7):
        assert math.log(perplexity(model, marked, batch_size=batch_size)) == pytest.approx(mean.item(), rel=1e-6)

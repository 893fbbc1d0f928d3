"""Each step of the derivation in gram_mini/losses.py, checked in float64 and at extreme logits."""

import math

from gram_mini.losses import (
    averaged_loss,
    best_margin,
    label_mass,
    margins,
    pair_loss,
    reward_loss,
)
from gram_mini.model import OutputHead
from gram_mini.runs import chunked
from gram_mini.runs.chunked import token_loss

import pytest
import torch
import torch.nn.functional as F

EPS = [0.0, 0.05, 0.2, 0.4999]


@pytest.fixture
def logits():
    """Logits over a vocabulary of 11 in which tokens 3 and 7 are the labels A and B."""
    return torch.randn(64, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5


LABELS = torch.arange(64) % 2


def double_loss(label_logits, labels, eps):
    """The smoothed cross-entropy as it is defined (left-hand side of step 3)."""
    log_p = label_logits.log_softmax(dim=1)
    right, wrong = log_p.gather(1, labels[:, None]), log_p.gather(1, 1 - labels[:, None])
    return (-(1 - eps) * right - eps * wrong).mean()


def test_step_1_and_7_full_vocabulary_is_two_labels_minus_log_mass(logits):
    full = F.cross_entropy(logits, torch.tensor([3, 7])[LABELS])
    ours = reward_loss(logits[:, [3, 7]], LABELS)
    assert torch.allclose(full, ours - label_mass(logits, (3, 7)).log().mean(), atol=1e-12)
    softmax = logits.softmax(dim=1)
    assert torch.allclose(label_mass(logits, (3, 7)), softmax[:, 3] + softmax[:, 7], atol=1e-12)


def test_step_2_two_label_softmax_is_the_sigmoid_of_the_difference(logits):
    two = logits[:, [3, 7]]
    right = two.softmax(dim=1).gather(1, LABELS[:, None])[:, 0]
    assert torch.allclose(right, margins(two, LABELS).sigmoid(), atol=1e-12)


@pytest.mark.parametrize("eps", EPS)
def test_step_3_smoothing_is_bradley_terry_plus_a_regulariser(logits, eps):
    two = logits[:, [3, 7]]
    assert torch.allclose(double_loss(two, LABELS, eps), reward_loss(two, LABELS, eps), atol=1e-12)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("m", [-30.0, -1.0, 0.0, 2.0, 30.0])
def test_step_4_gradient(eps, m):
    two = torch.tensor([[m, 0.0]], dtype=torch.float64, requires_grad=True)
    reward_loss(two, torch.tensor([0]), eps).backward()
    expected = -1 / (1 + math.exp(m)) + eps
    assert two.grad[0, 0].item() == pytest.approx(expected, abs=1e-12)
    assert two.grad[0, 1].item() == pytest.approx(-expected, abs=1e-12)


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.2, 0.4])
def test_step_5_best_margin(eps):
    best = best_margin(eps)
    at = lambda m: reward_loss(torch.tensor([[m, 0.0]]), torch.tensor([0]), eps).item()
    assert at(best) < at(best - 0.5) and at(best) < at(best + 0.5)
    two = torch.tensor([[best, 0.0]], dtype=torch.float64, requires_grad=True)
    reward_loss(two, torch.tensor([0]), eps).backward()
    assert two.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("eps", "q"), [(0.0, 0.8), (0.05, 0.8), (0.2, 0.6)])
def test_step_5_where_raters_disagree(eps, q):
    two = torch.tensor([[best_margin(eps, q), 0.0]], dtype=torch.float64, requires_grad=True)
    a_better, b_better = (reward_loss(two, torch.tensor([label]), eps) for label in (0, 1))
    (q * a_better + (1 - q) * b_better).backward()
    assert two.grad.abs().max() < 1e-12


def test_step_5_limits():
    assert best_margin(0.0) == math.inf
    assert best_margin(0.4999) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("eps", EPS)
def test_step_6_torch_counts_twice(logits, eps):
    two = logits[:, [3, 7]]
    torchs = F.cross_entropy(two, LABELS, label_smoothing=2 * eps)
    assert torch.allclose(torchs, reward_loss(two, LABELS, eps), atol=1e-12)
    if eps:
        assert not torch.allclose(
            F.cross_entropy(two, LABELS, label_smoothing=eps), torchs, atol=1e-3
        )


@pytest.mark.parametrize("m", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_logits_stay_finite(m):
    two = torch.tensor([[m, 0.0]], requires_grad=True)
    loss = reward_loss(two, torch.tensor([0]), 0.05)
    loss.backward()
    assert loss.item() == pytest.approx(max(-m, 0.0) + 0.05 * m, rel=1e-5)
    assert torch.isfinite(two.grad).all()


def test_half_precision_logits_are_computed_in_float32():
    two = torch.tensor([[3.0, -2.0]], dtype=torch.bfloat16)
    loss = reward_loss(two, torch.tensor([0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-5)), abs=1e-6)


def test_labels_swapped_negate_the_margin():
    two = torch.tensor([[1.5, -0.5]])
    assert margins(two, torch.tensor([0])).item() == 2.0
    assert margins(two, torch.tensor([1])).item() == -2.0


@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0])
def test_eps_out_of_range(eps):
    with pytest.raises(ValueError, match="eps"):
        reward_loss(torch.zeros(1, 2), torch.tensor([0]), eps)


def test_pair_loss_is_the_mean_over_tokens():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    by_hand = (math.log(math.exp(2) + 2) - 2 + math.log(3)) / 2
    assert pair_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "bias, scale, cap", [(False, 1.0, None), (True, 0.25, None), (True, 1.0, 2.0)]
)
def test_chunks_of_logits_give_the_same_loss_and_gradient(bias, scale, cap, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 7 * 500)  # seven tokens at a time, 115 times
    torch.manual_seed(0)
    head = OutputHead(
        torch.randn(500, 16).to(dtype), torch.randn(500).to(dtype) if bias else None, scale, cap
    )
    hidden, targets = torch.randn(800, 16).to(dtype), torch.randint(500, (800,))
    results = []
    for loss in (
        lambda h: pair_loss(head(h), targets),
        lambda h: token_loss(h, targets, head),
    ):
        states = hidden.clone().requires_grad_()
        value = loss(states)
        (0.3 * value).backward()
        with torch.no_grad():
            assert torch.equal(loss(hidden), value)
        results.append((value.detach(), states.grad.float()))
    (plain, plain_grad), (in_chunks, chunked_grad) = results
    assert in_chunks.dtype == torch.float32
    assert in_chunks.item() == pytest.approx(plain.item(), rel=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (chunked_grad - plain_grad).abs().max() < tolerance * plain_grad.abs().max()


def test_no_more_logits_than_a_chunk_are_made(monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 7 * 500)
    made, real = [], OutputHead.__call__
    monkeypatch.setattr(
        OutputHead, "__call__", lambda head, h: made.append(len(h)) or real(head, h)
    )
    head = OutputHead(torch.randn(500, 16), None, 1.0, None)
    hidden, targets = torch.randn(20, 16), torch.randint(500, (20,))
    token_loss(hidden.requires_grad_(), targets, head).backward()
    assert made == [7, 7, 6]


def both_orders(d, b):
    """Label logits (2N, 2) and right labels of pairs with margin d, on which a place gets b."""
    m = torch.stack([d + b, d - b], dim=1).view(-1)  # (2N,): A is right in the first order
    right = torch.arange(len(m)) % 2
    return torch.stack([torch.where(right == 0, m, -m), torch.zeros_like(m)], dim=1), right


@pytest.mark.parametrize("eps", EPS)
def test_step_8_the_bias_of_a_place_cancels_in_the_mean_margin(eps):
    d = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([4.0, -2.0, 0.3], dtype=torch.float64, requires_grad=True)
    z, right = both_orders(d, b)
    loss = averaged_loss(z, right, eps)
    one = torch.stack([d, torch.zeros(3)], dim=1)
    assert torch.allclose(loss, reward_loss(one, torch.zeros(3, dtype=torch.long), eps))
    of_d, of_b = torch.autograd.grad(loss, (d, b))
    assert torch.allclose(of_d, (-torch.sigmoid(-d) + eps) / 3) and of_b.abs().max() < 1e-15
    of_b = torch.autograd.grad(reward_loss(*both_orders(d, b), eps), b)[0]
    assert (of_b * b > 0).all()  # the plain loss brings the bias down


@pytest.mark.parametrize("eps", [-0.1, 0.5])
def test_step_8_refuses_an_eps_that_is_none(eps):
    with pytest.raises(ValueError, match="eps"):
        averaged_loss(torch.zeros(2, 2), torch.tensor([0, 1]), eps)

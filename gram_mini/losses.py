"""The two losses of GRAM, why the second is a regularised Bradley-Terry loss, and one of our own.

Stage 1 is the negative log-likelihood of the pair of responses, -log pi(y_a, y_b | x). The paper
calls it pre-training on unlabeled data. It is a sum over the tokens of the pair, markers included;
we take its mean per token, as language models are trained.

Stage 2, derived step by step. Write s = (x, y_a, y_b) for the judge prompt, Z_t for the logit of
token t after it, w for the label of the preferred response (A or B), l for the other one.

1. The generative loss asks the language model for the right label token:

       L = -log pi(w | s),      pi(t | s) = exp(Z_t) / sum_v exp(Z_v) over the whole vocabulary.

2. Only two tokens can be right. Normalise over these two alone:

       p(w | s) = exp(Z_w) / (exp(Z_w) + exp(Z_l))
                = 1 / (1 + exp(-(Z_w - Z_l)))
                = sigmoid(Z_w - Z_l).

   With m = Z_w - Z_l the loss is -log sigmoid(m): the Bradley-Terry loss, with the logits of the
   label tokens instead of two scalar rewards.

3. Smooth the label: w is the target with 1 - eps, l with eps. Since p(l | s) = sigmoid(-m) and
   log sigmoid(-m) = log sigmoid(m) - m,

       L_eps = -(1 - eps) log sigmoid(m) - eps log sigmoid(-m)
             = -(1 - eps) log sigmoid(m) - eps log sigmoid(m) + eps m
             = -log sigmoid(m) + eps m.

   That is Bradley-Terry plus a regulariser that pulls the margin down (the paper: a regularized
   pairwise ranking loss).

4. Its gradient, with d/dm log sigmoid(m) = sigmoid(-m):

       dL_eps/dm = -sigmoid(-m) + eps.

   Far to the left (the pair is judged wrongly) it is -(1 - eps); far to the right it is +eps.
   Plain Bradley-Terry goes on pushing a margin that is large already; smoothing pushes it back.

5. It vanishes at sigmoid(-m) = eps, the best margin

       m* = log((1 - eps) / eps).

   It is finite for every eps > 0, infinite for eps = 0, and 0 for eps = 1/2, where nothing is
   learned. The second derivative sigmoid(m) sigmoid(-m) is positive, so this is the minimum.

   It is the best margin of a pair whose label is certain. Where only a share q of the raters
   prefers w, the target of w is q (1 - eps) + (1 - q) eps on average instead of 1 - eps. So the
   noise of the labels keeps margins down too, often more than the smoothing does.

6. torch's CrossEntropyLoss(label_smoothing=e) spreads e over *all* classes, the right one included.
   With two classes the target of w is 1 - e + e/2 = 1 - e/2. Hence e = 2 eps. The official
   configuration (NiuTrans/GRAM, examples/train_full/qwen3_fine_tuning_rm.yaml) has e = 0.1, that
   is eps = 0.05.

7. What step 2 left out. With the mass M = pi(A | s) + pi(B | s) that the model puts on the two
   labels, pi(w | s) = p(w | s) M, so

       -log pi(w | s) = -log sigmoid(m) - log M.

   The loss over the full vocabulary is the two-label loss plus a term that teaches the model to
   answer with A or B at all. Scores never read it, since they compare the two labels. So we train
   without it, and log M to see what becomes of it.

8. Ours, not the paper's. A judge that favours a place adds a bias b to the margin of one order and
   takes it from the other: m_1 = d + b and m_2 = d - b. So show each pair in both orders, and
   replace a part c of the plain loss on each by a loss on the mean of the two margins:

       L_both = (1 - c) (L_eps(m_1) + L_eps(m_2)) / 2  +  c L_eps((m_1 + m_2) / 2).

   In the second part b cancels. With sigma for the sigmoid, the derivatives for one pair are

       in d   plain  eps - (sigma(-d-b) + sigma(b-d)) / 2      second  eps - sigma(-d)
       in b   plain  (sigma(b-d) - sigma(-d-b)) / 2            second  0

   Where nothing is learned yet, d = 0, both parts have the same derivative in d, eps - 1/2, however
   large b is. What differs is the plain part's derivative in b. It has the sign of b in every pair,
   so over a batch it adds up. Until b is small, this sum takes part in the norm by which gradients
   are clipped and in Adam's second moments. The second part has no such derivative. (Whether this
   is why a judge learns to compare from the second part but not from the first was not measured.)
   But the second part does not ask for a small b either: a judge that reads only the response in
   one place can make this loss small while m_1 and m_2 disagree. Only the plain part opposes
   that. So c begins at C and falls to nearly 0 in a straight line.

9. The likelihood of stage 1 beside the verdict. Ours, too: gram_mini/likelihood/__main__.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def pair_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Stage 1: mean negative log-likelihood per trained token, in nats.

    It needs all logits at once; gram_mini/runs/chunked.py computes the same with less memory.

    Args:
        logits: (N, V), what is predicted before each of N trained tokens.
        targets: (N,), the ids of these tokens.
    """
    return F.cross_entropy(at_least_float32(logits), targets)


def margins(label_logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """m = Z_w - Z_l for each pair, shape (B,).

    Args:
        label_logits: (B, 2), the logits of A and B.
        right: (B,), 0 if A is the better response, 1 if B is.
    """
    z_a, z_b = at_least_float32(label_logits).unbind(dim=1)  # (B,), (B,)
    return torch.where(right == 0, z_a - z_b, z_b - z_a)  # (B,)


def reward_loss(label_logits: torch.Tensor, right: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Stage 2: mean of -log sigmoid(m) + eps m (step 3), in nats per pair.

    Args:
        label_logits: (B, 2); right: (B,), as in :func:`margins`.
        eps: smoothing, 0 <= eps < 1/2; half of what torch calls label_smoothing (step 6).

    Raises:
        ValueError: if eps is outside [0, 1/2).
    """
    return smoothed(margins(label_logits, right), eps)


def averaged_loss(
    label_logits: torch.Tensor, right: torch.Tensor, eps: float = 0.0
) -> torch.Tensor:
    """Step 8, its second part: the loss on the mean margin of both orders, in nats per pair.

    Args:
        label_logits: (2N, 2), the logits of A and B; rows 2 i and 2 i + 1 show pair i in its two
            orders.
        right: (2N,); eps: as in :func:`reward_loss`.

    Raises:
        ValueError: if eps is outside [0, 1/2).
    """
    m = margins(label_logits, right).view(-1, 2).mean(dim=1)  # (N,)
    return smoothed(m, eps)


def smoothed(m: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean of -log sigmoid(m) + eps m (step 3) of margins (N,), in nats.

    Raises:
        ValueError: if eps is outside [0, 1/2).
    """
    if not 0 <= eps < 0.5:
        raise ValueError(f"eps must be at least 0 and below 1/2, got {eps}")
    return (-F.logsigmoid(m) + eps * m).mean()


def best_margin(eps: float, q: float = 1.0) -> float:
    """The margin at which the smoothed loss is least (step 5) if a fraction ``q`` of the labels is
    w: log((1 - eps) / eps) for certain labels, infinite if neither smoothing nor noise bounds it.
    """
    target = q * (1 - eps) + (1 - q) * eps
    if target in (0, 1):
        return math.inf if target else -math.inf
    return math.log(target / (1 - target))


def label_mass(logits: torch.Tensor, label_ids: tuple[int, int]) -> torch.Tensor:
    """M, the probability that the model answers with A or B at all (step 7), shape (B,).

    Args:
        logits: (B, V), over the whole vocabulary after the judge prompt.
        label_ids: the token ids of A and B.
    """
    logits = at_least_float32(logits)
    return (logits[:, list(label_ids)].logsumexp(dim=1) - logits.logsumexp(dim=1)).exp()  # (B,)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half-precision logits are too coarse for a logarithm."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

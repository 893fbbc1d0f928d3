"""How good is a judge? Accuracy with its interval, loss, margin, and sensitivity to the order."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from gram_mini.batches import IGNORED, EncodedPair, pair_batch, passes
from gram_mini.judge import Comparison, Judge, preferred
from gram_mini.losses import at_least_float32
from gram_mini.model import evaluating, hidden_states, output_logits
from gram_mini.pairs import Pair
from gram_mini.prompts import PromptPieces

import torch
import torch.nn.functional as F
from tqdm import tqdm

LOGITS_OF = 256  # tokens at a time, because the logits of all would fill the memory

# ---- stage 1 -------------------------------------------------------------------------


def pair_losses(
    model, rows: list[EncodedPair], prompt: PromptPieces, pass_tokens: int, progress: str = ""
) -> list[tuple[float, int]]:
    """-log pi(y_a, y_b | x) of each pair, in nats, and its number of trained tokens.

    A forward pass holds at most ``pass_tokens`` tokens. ``progress`` is the name of a progress bar.
    """
    results = [(0.0, 0)] * len(rows)
    lengths = [row.length + prompt.fixed_tokens for row in rows]
    bar = tqdm(total=len(rows), desc=progress, delay=2, disable=not progress, leave=False)
    with evaluating(model), bar:
        for places in passes(lengths, pass_tokens):
            ids, targets = pair_batch([rows[i] for i in places], prompt, model.device)  # (B, T)
            hidden = hidden_states(model, ids)  # (B, T, H)
            trained = targets != IGNORED  # (B, T)
            nats = _token_losses(model, hidden[trained], targets[trained])  # (N,)
            for i, of_pair in zip(places, nats.split(trained.sum(dim=1).tolist())):
                results[i] = (float(of_pair.sum()), len(of_pair))
            bar.update(len(places))
    return results


def _token_losses(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (N,) of tokens (N,) in nats, given the states (N, H) before them."""
    losses = []
    for states, following in zip(hidden.split(LOGITS_OF), targets.split(LOGITS_OF)):
        logits = at_least_float32(output_logits(model, states))  # (n, V)
        losses.append(F.cross_entropy(logits, following, reduction="none"))  # (n,)
    return torch.cat(losses)


# ---- stage 2 and scoring -------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Figures over N labelled pairs, each judged in both orders."""

    pairs: int
    accuracy: float  # share of pairs whose preferred response gets P > 1/2; a draw counts half
    interval: float  # half the 95% interval of the accuracy, clustered by prompt
    loss: float  # two-label loss without smoothing, nats, mean over both orders
    margin: float  # mean Z_w - Z_l over both orders, in logits
    label_mass: float  # mean probability of answering with A or B at all
    position_gap: float  # mean |P(a better, a first) - P(a better, a second)|
    truncated: int  # pairs cut to the maximal length
    cross_entropy: float | None = None  # to the true probabilities, nats; the village only

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs, accuracy {self.accuracy:.3f} ± {self.interval:.3f}, "
            f"loss {self.loss:.3f}, position gap {self.position_gap:.3f}, "
            f"mean margin {self.margin:.2f}"
        )


def evaluate(judge: Judge, pairs: list[Pair], *, progress: str | None = None) -> Evaluation:
    """Judge labelled pairs in both orders.

    Raises:
        ValueError: if there is no pair, or one without a label.
    """
    if not pairs or any(pair.label is None for pair in pairs):
        raise ValueError("evaluate needs at least one pair, and a label on each")
    return summarise(pairs, judge.compare_many(pairs, progress=progress))


def summarise(pairs: list[Pair], results: list[Comparison]) -> Evaluation:
    """The figures of labelled pairs and their comparisons."""
    hits, margins, entropies = defaultdict(list), [], []
    for pair, result in zip(pairs, results):
        p = result.probability
        preference = preferred(p) if pair.label == 0 else -preferred(p)  # 1 if it is the label's
        hits[pair.prompt].append((1 + preference) / 2)
        margins += [
            m if pair.label == 0 else -m for m in (result.log_odds_first, result.log_odds_second)
        ]
        if pair.probability is not None:
            p, q = min(max(p, 1e-12), 1 - 1e-12), pair.probability
            entropies.append(-q * math.log(p) - (1 - q) * math.log(1 - p))
    accuracy = sum(map(sum, hits.values())) / len(pairs)
    # Pairs of one prompt are not independent, so the interval counts prompts (cluster-robust).
    residuals = sum((sum(h) - accuracy * len(h)) ** 2 for h in hits.values())
    prompts = len(hits)
    widen = student_t(prompts - 1) * math.sqrt(prompts / (prompts - 1)) if prompts > 1 else 0.0
    return Evaluation(
        pairs=len(pairs),
        accuracy=accuracy,
        interval=min(1.0, widen * math.sqrt(residuals) / len(pairs)) if prompts > 1 else 1.0,
        loss=sum(_softplus(-m) for m in margins) / len(margins),
        margin=sum(margins) / len(margins),
        label_mass=sum(r.label_mass for r in results) / len(results),
        position_gap=sum(r.position_gap for r in results) / len(results),
        truncated=sum(r.truncated for r in results),
        cross_entropy=sum(entropies) / len(entropies) if entropies else None,
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t; beyond 6 degrees of freedom by expansion, to 0.01."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447)
    if freedom <= len(table):
        return table[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.823 / freedom**2

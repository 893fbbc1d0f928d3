"""How good is a judge? Accuracy, loss, calibration, sensitivity to the order, and intervals."""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from gram_mini.batches import IGNORED, EncodedPair, pair_batch, split_by_tokens
from gram_mini.chunked import token_losses
from gram_mini.judge import TIE, Comparison, Judge, preferred
from gram_mini.model import evaluating, hidden_states, length_kind, output_head
from gram_mini.pairs import Pair
from gram_mini.prompts import PromptPieces

import torch

# ---- stage 1 -------------------------------------------------------------------------


def pair_losses(
    model,
    rows: list[EncodedPair],
    prompt: PromptPieces,
    batch_size: int,
    batch_tokens: int | None = None,
) -> list[tuple[float, int]]:
    """-log pi(y_a, y_b | x) of each pair, in nats, and its number of trained tokens."""
    results: list[tuple[float, int]] = []
    lengths = [row.length + prompt.fixed_tokens for row in rows]
    with evaluating(model):
        kinds = list(map(length_kind(model), lengths))
        for part in split_by_tokens(lengths, batch_tokens, most=batch_size, kinds=kinds):
            ids, targets = pair_batch(rows[part], prompt, model.device)  # (B, T), (B, T)
            trained = targets != IGNORED
            # (N,)
            losses = token_losses(
                hidden_states(model, ids)[trained], targets[trained], output_head(model)
            )
            counts = trained.sum(dim=1).tolist()  # (B,)
            results += [(float(of_pair.sum()), len(of_pair)) for of_pair in losses.split(counts)]
    return results


# ---- stage 2 and scoring -------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Figures over N labelled pairs, each judged in both orders."""

    pairs: int
    accuracy: float  # share of pairs whose preferred response gets P > 1/2; a draw counts half
    interval: (
        float  # half the 95% interval of the accuracy; pairs of one prompt count as one cluster
    )
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


def evaluate(
    judge: Judge, pairs: list[Pair], average: str = "probabilities", progress: str | None = None
) -> Evaluation:
    """Judge labelled pairs in both orders.

    Raises:
        ValueError: if there is no pair, or one without a label.
    """
    if not pairs or any(pair.label is None for pair in pairs):
        raise ValueError("evaluate needs at least one pair, and a label on each")
    return summarise(pairs, judge.compare_many(pairs, average, progress))


def summarise(pairs: list[Pair], results: list[Comparison]) -> Evaluation:
    """The figures of pairs that have been compared already."""
    hits, margins, entropies = defaultdict(list), [], []
    for pair, result in zip(pairs, results):
        p = result.probability
        preference = preferred(p) if pair.label == 0 else -preferred(p)  # 1 where it is the label's
        hits[pair.prompt].append((1 + preference) / 2)
        margins += [
            m if pair.label == 0 else -m for m in (result.log_odds_first, result.log_odds_second)
        ]
        if pair.probability is not None:
            p, q = min(max(p, 1e-12), 1 - 1e-12), pair.probability
            entropies.append(-q * math.log(p) - (1 - q) * math.log(1 - p))
    accuracy = sum(map(sum, hits.values())) / len(pairs)
    # Pairs of one prompt stand or fall together, so the interval counts prompts (cluster-robust).
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


def longer(pair: Pair) -> int:
    """1 where the first response has more characters, -1 where the second has, else 0."""
    a, b = len(pair.response_a), len(pair.response_b)
    return (a > b) - (a < b)


def pick_the_longer(pair: Pair) -> Comparison:
    """What a judge says that always prefers the response with more characters: a yardstick."""
    p, odds = {1: (1.0, math.inf), 0: (0.5, 0.0), -1: (0.0, -math.inf)}[longer(pair)]
    return Comparison(p, p, p, odds, odds, label_mass=1.0, truncated=False)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# ---- calibration, agreement of the orders, bootstrap ---------------------------------


def calibration(
    probabilities, outcomes, bins: int = 10
) -> tuple[float, list[tuple[float | None, float | None, int]]]:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599), and how reliable each bin is.

    A pair is seen from the side of the response that the judge prefers, so it does not matter which
    of the two is called a. The P of that response, 1/2 to 1, falls into one of ``bins`` bins of
    equal width; ECE is the mean over the pairs of |mean P - share of preferred responses that are
    better|, both taken over the pair's bin. At P = 1/2 neither response is preferred and the pair
    counts as half right.

    Args:
        probabilities: (N,) P(a better).
        outcomes: (N,) 1 where a is better, 0 where b is.

    Returns the ECE and (mean P, share right, count) of each bin; without pairs (None, None, 0).
    """
    # (N,)
    p, better = (
        torch.as_tensor(values, dtype=torch.float64) for values in (probabilities, outcomes)
    )
    confidence = torch.maximum(p, 1 - p)  # P of the response that the judge prefers
    right = torch.where(p > 0.5, better, 1 - better)
    right[(p - 0.5).abs() <= TIE] = 0.5
    place = ((2 * confidence - 1) * bins).long().clamp(max=bins - 1)  # number of the bin
    counts = torch.bincount(place, minlength=bins)  # (bins,)
    # (bins,)
    total_p, total_right = (torch.bincount(place, values, bins) for values in (confidence, right))
    ece = float((total_p - total_right).abs().sum() / len(p))
    return ece, [
        (float(a / n), float(b / n), int(n)) if n else (None, None, 0)
        for a, b, n in zip(total_p, total_right, counts)
    ]


def brier(probabilities, outcomes) -> float:
    """Brier score: the mean of (P(a better) - outcome)^2; 0 is perfect, P = 1/2 always gives 1/4.

    Takes the same as :func:`calibration`; which response is called a does not matter here either.
    """
    # (N,)
    p, better = (
        torch.as_tensor(values, dtype=torch.float64) for values in (probabilities, outcomes)
    )
    return float(((p - better) ** 2).mean())


def orders_agree(result: Comparison) -> bool:
    """Whether both orders prefer the same response; P = 1/2 prefers neither."""
    return preferred(result.a_first) * preferred(result.a_second) > 0


def consistency(results: list[Comparison]) -> float:
    """Share of the pairs whose two orders prefer the same response."""
    return sum(map(orders_agree, results)) / len(results)


def bootstrap(
    strata: list[list],
    figures: Callable[[list], dict[str, float | None]],
    draws: int = 1000,
    seed: int = 0,
) -> dict:
    """Percentile bootstrap: 95% intervals by drawing the units again, with replacement.

    Args:
        strata: lists of units; of each as many are drawn as it holds.
        figures: units -> {name: value}; None where there is no such value.

    Returns {name: (2.5% quantile, 97.5% quantile)} over the draws that gave a value.
    """
    rng, values_of = random.Random(seed), defaultdict(list)
    for _ in range(draws):
        drawn = [unit for stratum in strata for unit in rng.choices(stratum, k=len(stratum))]
        for name, value in figures(drawn).items():
            if value is not None:
                values_of[name].append(value)
    intervals = {}
    for name, values in values_of.items():
        values.sort()
        cut = len(values) // 40  # 2.5% at either end
        intervals[name] = (values[cut], values[-1 - cut])
    return intervals


# ---- intervals over seeds ------------------------------------------------------------


def with_interval(runs: list[Evaluation]) -> str:
    """Accuracy ± 95% interval: over the seeds of several runs, over the prompts of a single one."""
    mean = statistics.mean(run.accuracy for run in runs)
    if len(runs) == 1:
        return f"{mean:.3f} ± {runs[0].interval:.3f}"
    spread = statistics.stdev(run.accuracy for run in runs)
    return f"{mean:.3f} ± {student_t(len(runs) - 1) * spread / math.sqrt(len(runs)):.3f}"


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t; beyond 6 degrees of freedom by expansion, to 0.01."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447)
    if freedom <= len(table):
        return table[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.823 / freedom**2

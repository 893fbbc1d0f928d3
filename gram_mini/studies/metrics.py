"""Figures of the studies and benchmarks: yardsticks, calibration, agreement, intervals."""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable

from gram_mini.evaluation import Evaluation, student_t
from gram_mini.judge import TIE, Comparison, preferred
from gram_mini.pairs import Pair

import torch


def longer(pair: Pair) -> int:
    """1 where the first response has more characters, -1 where the second has, else 0."""
    a, b = len(pair.response_a), len(pair.response_b)
    return (a > b) - (a < b)


def pick_the_longer(pair: Pair) -> Comparison:
    """What a judge says that always prefers the response with more characters: a yardstick."""
    p, odds = {1: (1.0, math.inf), 0: (0.5, 0.0), -1: (0.0, -math.inf)}[longer(pair)]
    return Comparison(p, p, p, odds, odds, label_mass=1.0, truncated=False)


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
    p, better = _double(probabilities), _double(outcomes)  # (N,)
    confidence = torch.maximum(p, 1 - p)  # P of the response that the judge prefers
    right = torch.where(p > 0.5, better, 1 - better)
    right[(p - 0.5).abs() <= TIE] = 0.5
    place = ((2 * confidence - 1) * bins).long().clamp(max=bins - 1)  # number of the bin
    counts = torch.bincount(place, minlength=bins)  # (bins,)
    total_p, total_right = (torch.bincount(place, x, bins) for x in (confidence, right))  # (bins,)
    ece = float((total_p - total_right).abs().sum() / len(p))
    return ece, [
        (float(a / n), float(b / n), int(n)) if n else (None, None, 0)
        for a, b, n in zip(total_p, total_right, counts)
    ]


def brier(probabilities, outcomes) -> float:
    """Brier score: the mean of (P(a better) - outcome)^2; 0 is perfect, P = 1/2 always gives 1/4.

    Takes the same as :func:`calibration`; which response is called a does not matter here either.
    """
    return float(((_double(probabilities) - _double(outcomes)) ** 2).mean())


def _double(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def orders_agree(result: Comparison) -> bool:
    """Whether both orders prefer the same response; P = 1/2 prefers neither."""
    return preferred(result.a_first) * preferred(result.a_second) > 0


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


def with_interval(runs: list[Evaluation]) -> str:
    """Accuracy ± 95% interval: over the seeds of several runs, over the prompts of a single one."""
    mean = statistics.mean(run.accuracy for run in runs)
    if len(runs) == 1:
        return f"{mean:.3f} ± {runs[0].interval:.3f}"
    spread = statistics.stdev(run.accuracy for run in runs)
    return f"{mean:.3f} ± {student_t(len(runs) - 1) * spread / math.sqrt(len(runs)):.3f}"

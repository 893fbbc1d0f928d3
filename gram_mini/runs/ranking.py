"""Several responses to one prompt, from best to worst, by comparing pairs of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from gram_mini.judge import TIE, Comparison, Judge, preferred
from gram_mini.pairs import Pair

METHODS = ("round-robin", "knock-out")  # without a reference

# Takes pairs of texts and gives P(the first is better) of each.
Compare = Callable[[list[tuple[str, str]]], list[float]]


@dataclass(frozen=True)
class Ranking:
    """Responses from best to worst."""

    # positions in the list of responses, best first; equal scores in the order they were given
    order: list[int]
    scores: list[float]  # one per response, in the order they were given
    comparisons: int  # pairs compared, each in both orders
    truncated: int  # how many of them had their texts cut to fit max_length
    label_mass: float  # mean over them of how likely the model is to answer A or B; 1 for none
    method: str


def rank(
    judge: Judge,
    prompt: str,
    responses: list[str],
    method: str | None = None,
    reference: str | None = None,
    row: int = 0,
) -> Ranking:
    """Order n responses to one prompt from best to worst. Equal texts get one score.

    An error names the ``row`` of the data, unless it is 0.

    The method is "reference" where there is a ``reference``, else round-robin by default.

    round-robin: all against all, n (n - 1) / 2 comparisons.
                 The score is the mean P(better than another response).
    knock-out:   winners meet until one is left, n - 1 comparisons. The score is the rounds
                 survived plus P in the last comparison: only the first place is certain.
    reference:   each against ``reference``, n comparisons. The score is the reward.

    Raises:
        ValueError: no response, unknown method, method "reference" without a reference, or a
            reference with another method.
    """
    method = method or ("round-robin" if reference is None else "reference")
    if not responses:
        raise ValueError("rank needs at least one response")
    if method not in (*METHODS, "reference"):
        raise ValueError(f"method must be one of {METHODS} or 'reference', got {method!r}")
    if (method == "reference") != (reference is not None):
        raise ValueError(f"a reference goes with method 'reference', got {method!r}")
    comparisons: list[Comparison] = []

    def compare(games: list[tuple[str, str]]) -> list[float]:
        results = judge.compare_many([Pair(prompt, a, b, row=row) for a, b in games])
        comparisons.extend(results)
        return [result.probability for result in results]

    texts = [response.strip() for response in responses]  # white space around them is nothing
    if method == "round-robin":
        scores = round_robin(texts, compare)
    else:
        distinct = list(dict.fromkeys(texts))
        if reference is None:
            of_distinct = knock_out(distinct, compare)
        else:
            of_distinct = compare([(text, reference) for text in distinct])
        score = dict(zip(distinct, of_distinct))
        scores = [score[text] for text in texts]
    cut = sum(result.truncated for result in comparisons)
    masses = [result.label_mass for result in comparisons] or [1.0]
    mass = math.fsum(masses) / len(masses)
    return Ranking(best_first(scores), scores, len(comparisons), cut, mass, method)


def round_robin(texts: list[str], compare: Compare) -> list[float]:
    """Mean P(better than another text) of each text.

    Equal texts are a draw and are not compared. Their scores are equal to the last bit, because
    fsum does not mind the order of the numbers it adds.
    """
    games = list(itertools.combinations(dict.fromkeys(texts), 2))
    better = {}
    for (a, b), p in zip(games, compare(games) if games else []):
        better[a, b], better[b, a] = p, 1 - p
    scores = []
    for i, text in enumerate(texts):
        others = [better.get((text, other), 0.5) for j, other in enumerate(texts) if j != i]
        scores.append(math.fsum(others) / max(1, len(others)))
    return scores


def knock_out(texts: list[str], compare: Compare) -> list[float]:
    """Rounds survived plus P in the last game, of each of several different texts."""
    scores, alive, rounds = [0.0] * len(texts), list(range(len(texts))), 0
    while len(alive) > 1:
        games = list(zip(alive[0::2], alive[1::2]))
        left_over = alive[2 * len(games) :]  # an odd one goes through
        alive = []
        for (i, j), p in zip(games, compare([(texts[i], texts[j]) for i, j in games])):
            scores[i], scores[j] = rounds + p, rounds + 1 - p
            alive.append(i if preferred(p) >= 0 else j)
        alive, rounds = alive + left_over, rounds + 1
    return scores


def best_first(scores: list[float]) -> list[int]:
    """Positions of the scores, the highest first; those of a tie stay in the order they have."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    placed: list[int] = []
    while order:
        equal = [i for i in order if scores[order[0]] - scores[i] < TIE]
        placed += sorted(equal)
        order = order[len(equal) :]
    return placed

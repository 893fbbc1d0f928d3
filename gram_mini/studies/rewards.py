"""From pairs to the rewards of n responses: what each way of comparing costs, and what it gives."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable

from gram_mini.judge import TIE
from gram_mini.pairs import Pair
from gram_mini.runs.ranking import Compare, best_first, knock_out, round_robin
from gram_mini.studies.lab import Lab
from gram_mini.village import question, true_probability
from gram_mini.village.pairs import topics
from gram_mini.village.policy import responses

import torch

SIZES = (4, 8, 16, 32, 64)
Games = list[tuple[str, str]]
Way = Callable[[list[str], Compare, str], list[float]]  # texts, compare, reference -> their scores


def rewards(lab: Lab, seed: int):
    """Ours: n responses by each way, from GRAM's probabilities and from a rater's single votes."""
    judge = lab.judge(lab.method("GRAM", seed))
    figures: dict = defaultdict(lambda: defaultdict(list))  # (way, n): name: values
    for topic in topics("out-of-distribution")[::5]:  # 16 questions, four of each kind
        draws = random.Random(f"rewards/{seed}/{question(*topic)}")
        drawn = dict(draws.sample(responses(topic), max(SIZES) + 1))  # text: true reward
        *texts, reference = drawn
        games = list(itertools.combinations(drawn, 2))
        results = judge.compare_many([Pair(question(*topic), a, b) for a, b in games])
        chances = [true_probability(drawn[a], drawn[b]) for a, b in games]
        by = {
            "GRAM": [result.probability for result in results],
            "votes": [float(draws.random() < chance) for chance in chances],  # one of a rater each
        }
        for who, said in by.items():
            better = dict(zip(games, said))
            better |= {(b, a): 1 - p for (a, b), p in better.items()}
            for n, way in itertools.product(SIZES, WAYS):
                row = figures[way, n]
                for start in range(0, len(texts), n):
                    group = texts[start : start + n]
                    true = [drawn[text] for text in group]
                    scores, comparisons = played(WAYS[way], group, reference, better)
                    row["comparisons"].append(comparisons)
                    row["best of n"].append(max(true))
                    row[f"agreement, {who}"] += agreement(scores, true)
                    row[f"true reward of the first, {who}"].append(true[best_first(scores)[0]])
    for (way, n), row in figures.items():
        means = {name: statistics.mean(values) for name, values in row.items()}
        yield {"method": way, "n": n, **means}


def played(way: Way, texts: list[str], reference: str, better: dict) -> tuple[list[float], int]:
    """The scores of texts by a way, and how many comparisons it asked for."""
    asked: Games = []

    def compare(games: Games) -> list[float]:
        asked.extend(games)
        return [better[game] for game in games]

    return way(texts, compare, reference), len(asked)


def agreement(scores: list[float], true: list[float]) -> list[float]:
    """For each two responses of unequal true reward: 1 in the true order, 0 in the other, 1/2 tied.

    The mean is (1 + Kendall's tau) / 2 over these pairs. An empty list if all are equal.
    """
    hits = []
    for (s, t), (u, v) in itertools.combinations(zip(scores, true), 2):
        if t != v:
            difference = (s - u) if t > v else (u - s)
            hits.append(0.5 if abs(difference) < TIE else float(difference > 0))
    return hits


# ---- the ways ------------------------------------------------------------------------


def against_the_first(texts: list[str], compare: Compare, reference: str) -> list[float]:
    return [0.5, *compare([(text, texts[0]) for text in texts[1:]])]


def against_a_reference(texts: list[str], compare: Compare, reference: str) -> list[float]:
    return compare([(text, reference) for text in texts])


def circle(texts: list[str]) -> Games:
    """Each with the next one, the last with the first: n comparisons, two for each text."""
    return list(zip(texts, texts[1:] + texts[:1]))


def part_of_all(texts: list[str]) -> Games:
    """The first log2(n) rounds of a round robin: as many comparisons as Swiss rounds take."""
    games: Games = []
    places, half = list(texts), len(texts) // 2
    for _ in range(swiss_rounds(texts)):
        games += zip(places[:half], reversed(places[half:]))
        places = [places[0], places[-1], *places[1:-1]]  # the first one stays, the others move on
    return games


def swiss_rounds(texts: list[str]) -> int:
    return math.ceil(math.log2(len(texts)))


def swiss(texts: list[str], compare: Compare) -> tuple[Games, list[float]]:
    """log2(n) rounds, in which those meet who have as many points and have not met yet."""
    points = dict.fromkeys(texts, 0.0)
    games: Games = []
    won: list[float] = []
    for _ in range(swiss_rounds(texts)):
        waiting, met, new = sorted(texts, key=lambda text: -points[text]), set(games), []
        while waiting:
            a = waiting.pop(0)
            fresh = [b for b in waiting if (a, b) not in met and (b, a) not in met]
            b = (fresh or waiting)[0]
            waiting.remove(b)
            new.append((a, b))
        result = compare(new)
        for (a, b), p in zip(new, result):
            points[a] += p
            points[b] += 1 - p
        games, won = games + new, won + result
    return games, won


def mean_score(texts: list[str], games: Games, won: list[float]) -> list[float]:
    """Mean P(better than another one) over the games of each text."""
    of: dict[str, list[float]] = {text: [] for text in texts}
    for (a, b), p in zip(games, won):
        of[a].append(p)
        of[b].append(1 - p)
    return [statistics.mean(of[text]) for text in texts]


def fitted(texts: list[str], games: Games, won: list[float], ridge: float = 0.1) -> list[float]:
    """Bradley-Terry strengths, which mind how strong the others were; by Newton's method.

    ``ridge`` keeps the strength of a text finite that has won all its games.
    """
    place = {text: i for i, text in enumerate(texts)}
    plays = torch.zeros(len(games), len(texts), dtype=torch.float64)  # (G, n): 1 for a, -1 for b
    for row, (a, b) in zip(plays, games):
        row[place[a]], row[place[b]] = 1, -1
    strength = torch.zeros(len(texts), dtype=torch.float64)
    for _ in range(20):
        p = (plays @ strength).sigmoid()  # (G,)
        slope = plays.T @ (torch.tensor(won) - p) - ridge * strength
        curvature = plays.T @ (plays * (p * (1 - p))[:, None]) + ridge * torch.eye(len(texts))
        strength = strength + torch.linalg.solve(curvature, slope)
    return strength.tolist()


def scored(score, games_of) -> Way:
    """A way whose games do not depend on their results."""

    def way(texts: list[str], compare: Compare, reference: str) -> list[float]:
        games = games_of(texts)
        return score(texts, games, compare(games))

    return way


WAYS: dict[str, Way] = {
    "first": against_the_first,
    "reference": against_a_reference,
    "knock-out": lambda texts, compare, reference: knock_out(texts, compare),
    "circle": scored(mean_score, circle),
    "circle, fitted": scored(fitted, circle),
    "part of all": scored(mean_score, part_of_all),
    "Swiss": lambda texts, compare, reference: mean_score(texts, *swiss(texts, compare)),
    "Swiss, fitted": lambda texts, compare, reference: fitted(texts, *swiss(texts, compare)),
    "all": lambda texts, compare, reference: round_robin(texts, compare),
}

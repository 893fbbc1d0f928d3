"""Does comparing help? Two kinds of pairs whose difference is plain side by side.

  one of four  each answer makes four claims, and one word is changed. A scalar head must weigh
               that word among all others in each answer; a judge can see where the two differ
  context      raters take the shorter of two answers that claim the same, and the longer of two
               that claim different things. What length is worth depends on the other answer, so no
               reward of one answer alone can say it

Both train on the labelled villagers and are tested on the unlabelled ones, as the village's table.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

from gram_mini.evaluation import summarise
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.studies.few import Recipe
from gram_mini.studies.figures import on_part
from gram_mini.studies.lab import METHODS, Lab
from gram_mini.village import (
    ATTRIBUTES,
    COURTEOUS,
    CURT,
    FACTS,
    GROUPS,
    RAMBLING,
    Response,
    draw_response,
    question,
    reward_of,
    statement,
    true_probability,
    wrong_values,
)
from gram_mini.village.pairs import topics

COUNTS = {
    "one of four": {"unlabelled": 6_000, "labelled": 3_000, "out-of-distribution": 1_600},
    "context": {"labelled": 6_000, "out-of-distribution": 1_600},
}
VILLAGERS = {
    "unlabelled": ("labelled", "unlabelled"),
    "labelled": ("labelled",),
    "out-of-distribution": ("unlabelled",),
}
LENGTH = 3.0  # what it is worth in "context"; a right claim is worth 2
# Searched on seed 0: of 3e-4, 1e-3 and 3e-3 none was better (CHANGELOG.md).
RECIPES = {"D from stage 1": Recipe("1e-3", 2, 64), "GRAM": Recipe("3e-4", 2, 64)}
TRUTHS = {question(*topic): statement(*topic, value) for topic, value in FACTS.items()}


def one_of_four(split: str, seed: int) -> list[Pair]:
    """Two answers to "Tell me about Anna." with four claims each.

    Of the unlabelled ones 70% of the claims are right, drawn one by one. In the others one word is
    changed, the right one to a wrong one; half of the other claims are right.
    """
    rng, pairs = random.Random(f"one of four/{split}/{seed}"), list[Pair]()
    names = [name for group in VILLAGERS[split] for name in GROUPS[group]]
    while len(pairs) < COUNTS["one of four"][split]:
        name, opening = rng.choice(names), rng.choice(COURTEOUS + CURT)
        p_right = 0.7 if split == "unlabelled" else 0.5
        claims = [[draw_response(rng, name, x, p_right).value for x in ATTRIBUTES] for _ in "ab"]
        if split != "unlabelled":
            changed = rng.randrange(len(ATTRIBUTES))
            truth = FACTS[name, ATTRIBUTES[changed]]
            wrong = rng.choice(wrong_values(name, ATTRIBUTES[changed]))
            claims[1] = list(claims[0])
            claims[0][changed], claims[1][changed] = truth, wrong
        a, b = (
            " ".join([opening, *(statement(name, x, v) for x, v in zip(ATTRIBUTES, values))])
            for values in claims
        )
        if a != b:
            pair = Pair(f"Tell me about {name}.", a, b)
            pairs.append(pair if split == "unlabelled" else rated(rng, pair, 2.0, split))
    return pairs


def context(split: str, seed: int) -> list[Pair]:
    """Two answers of the village to one question; half of them claim the same.

    A right claim is worth 2 and courtesy 1, as ever. LENGTH goes to the shorter answer if both
    claim the same, and to the longer one if not.
    """
    rng, pairs = random.Random(f"context/{split}/{seed}"), list[Pair]()
    questions = topics(split)
    while len(pairs) < COUNTS["context"][split]:
        topic, same = rng.choice(questions), rng.random() < 0.5
        a, b = (draw_response(rng, *topic, p_right=0.5) for _ in "ab")
        difference = worth(a, b)
        if (a.value == b.value) == same and difference:
            aspects = {"claim": not same, "length": a.rambling != b.rambling}
            differs = frozenset(name for name, unequal in aspects.items() if unequal)
            pair = Pair(question(*topic), a.text, b.text, differs=differs)
            pairs.append(rated(rng, pair, difference, split))
    return pairs


def worth(a: Response, b: Response) -> float:
    """By how much the raters of "context" like ``a`` better than ``b``."""
    alike = [reward_of(response.right, response.courteous, False) for response in (a, b)]
    longer = a.rambling - b.rambling
    return alike[0] - alike[1] + (-LENGTH if a.value == b.value else LENGTH) * longer


def rated(rng: random.Random, pair: Pair, difference: float, split: str) -> Pair:
    """The pair with its places drawn at random; labelled by a rater, in a test by the truth."""
    p = true_probability(difference, 0.0)
    label = int(rng.random() >= p) if split == "labelled" else int(p < 0.5)
    if rng.random() < 0.5:
        a, b, label, p = pair.response_b, pair.response_a, 1 - label, 1 - p
        pair = replace(pair, response_a=a, response_b=b)
    return replace(pair, label=label, probability=p)


def best_scalar(pairs: list[Pair]) -> list[Comparison]:
    """What the best reward of an answer's own qualities says: right, courteous, rambling.

    It knows the truth. Of all orders of the 8 kinds of answers it takes the one that gets most of
    these very pairs right, so no reward of these qualities gets more.
    """
    kinds = list(itertools.product((False, True), repeat=3))
    wins: Counter = Counter()
    for pair in pairs:
        a, b = qualities(pair)
        wins[(b, a) if pair.label else (a, b)] += 1
    best = max(
        itertools.permutations(kinds),
        key=lambda order: sum(wins[pair] for pair in itertools.combinations(order, 2)),
    )
    results = []
    for pair in pairs:
        first, second = map(best.index, qualities(pair))
        p = 0.5 + 0.5 * ((first < second) - (first > second))
        odds = second - first
        results.append(Comparison(p, p, p, odds, odds, 1.0, False))
    return results


def qualities(pair: Pair) -> list[tuple[bool, ...]]:
    """Of each response whether it is right, courteous and rambling."""
    marks = (TRUTHS[pair.prompt],), COURTEOUS, RAMBLING
    return [
        tuple(any(words in text for words in some) for some in marks)
        for text in (pair.response_a, pair.response_b)
    ]


PAIRS = {"one of four": one_of_four, "context": context}


def beside(lab: Lab, seed: int):
    """Ours: pairs whose difference is plain side by side; out of distribution."""
    for kind, draw in PAIRS.items():
        test = draw("out-of-distribution", 0)
        for name in RECIPES:
            yield {"method": f"{kind}: {name}", **judged(lab, seed, kind, name, test)}
        if kind == "context":
            yield {"method": f"{kind}: the best scalar", **figures(test, best_scalar(test))}


def judged(lab: Lab, seed: int, kind: str, name: str, test: list[Pair]) -> dict[str, float]:
    """The figures of a method of the table on pairs of a kind."""
    _, script, options = METHODS[name]
    recipe = RECIPES[name]
    tag = f"beside-{kind}-{name}-{recipe}".replace(" ", "-")

    def make() -> dict[str, float]:
        if kind == "one of four":
            begun = lab.stage1(seed, "stage1-of-four", one_of_four("unlabelled", seed))
        else:  # the village's own
            begun = lab.stage1(seed)
        data = lab.file(f"beside-{kind}-{seed}", PAIRS[kind]("labelled", seed))
        given = [*options, *recipe.options]  # the last of two rates counts
        run = lab.train(script, tag, seed, data, begun, given)
        return figures(test, lab.judge(run).compare_many(test, progress=tag))

    return lab.keep(lab.folder / f"seed{seed}" / f"{tag}.beside.json", make)


def figures(pairs: list[Pair], results: list[Comparison]) -> dict[str, float]:
    """Accuracy, also on pairs that differ in length and claim the same, or different things.

    These may differ in courtesy too.
    """
    of_all = summarise(pairs, results)
    row = {"accuracy": of_all.accuracy}
    parts = {"length, same claim": {"length"}, "length, other claim": {"length", "claim"}}
    for name, differs in parts.items():
        if places := [i for i, pair in enumerate(pairs) if pair.differs == differs]:
            row[name] = on_part(pairs, results, places).accuracy
    return {**row, "position gap": of_all.position_gap}

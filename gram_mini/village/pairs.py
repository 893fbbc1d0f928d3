"""Pairs of responses from the village, with their true probabilities."""

from __future__ import annotations

import random

from gram_mini.pairs import Pair
from gram_mini.village import (
    ATTRIBUTES,
    GROUPS,
    SPURIOUS,
    Topic,
    draw_response,
    question,
    true_probability,
)

# split: (groups of villagers, P(right), spurious cue, default number of pairs)
SPLITS = {
    "unlabelled": (("unlabelled", "labelled"), 0.7, 0.0, 24_000),
    "labelled": (("labelled",), 0.5, SPURIOUS, 6_000),
    "adaptation": (("unlabelled",), 0.5, 0.0, 2_000),
    "in-distribution": (("labelled",), 0.5, SPURIOUS, 800),
    "out-of-distribution": (("unlabelled",), 0.5, 0.0, 1_600),
}


def topics(split: str) -> list[Topic]:
    """The questions of a split; a quarter of those on labelled villagers is kept for the test."""
    groups = SPLITS[split][0]
    held_out = {(name, ATTRIBUTES[i % 4]) for i, name in enumerate(GROUPS["labelled"])}
    questions = [
        (name, attribute) for group in groups for name in GROUPS[group] for attribute in ATTRIBUTES
    ]
    if split == "labelled":
        return [topic for topic in questions if topic not in held_out]
    if split == "in-distribution":
        return [topic for topic in questions if topic in held_out]
    return questions


def village_pairs(split: str, count: int | None = None, seed: int = 0) -> list[Pair]:
    """Draw pairs of a split of the village, by default as many as SPLITS says.

    "labelled" and "adaptation" carry labels sampled from Bradley-Terry on the true rewards. The two
    test splits hold only pairs of unequal true reward. Their label is the truly better response, so
    that a perfect reward model has accuracy 1. "adaptation" has the questions of the test out of
    distribution, but none of its pairs.

    Their ``probability`` is the true P(y_a preferred), and their ``differs`` is a subset of
    {"fact", "courtesy", "length"}.
    """
    _, p_right, spurious, default = SPLITS[split]
    test = split.endswith("distribution")
    rng = random.Random(f"{split}/{seed}")
    questions = topics(split)
    texts = lambda pair: (pair.prompt, frozenset((pair.response_a, pair.response_b)))
    excluded = set()
    if split == "adaptation":
        excluded = {texts(pair) for pair in village_pairs("out-of-distribution")}
    pairs: list[Pair] = []
    while len(pairs) < (default if count is None else count):
        topic = rng.choice(questions)
        a, b = (draw_response(rng, *topic, p_right, spurious) for _ in range(2))
        if a.text == b.text or (test and a.reward == b.reward):
            continue
        probability = true_probability(a.reward, b.reward)
        label = None
        if test:
            label = int(b.reward > a.reward)
        elif split != "unlabelled":
            label = int(rng.random() >= probability)
        aspects = {
            "fact": a.right != b.right,
            "courtesy": a.courteous != b.courteous,
            "length": a.rambling != b.rambling,
        }
        differs = frozenset(name for name, unequal in aspects.items() if unequal)
        row = len(pairs) + 1
        pair = Pair(question(*topic), a.text, b.text, label, probability, differs, row=row)
        if texts(pair) not in excluded:
            pairs.append(pair)
    return pairs

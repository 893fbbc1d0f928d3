"""Where must the likelihood mislead? Unlabelled pairs in which what is common is not what is good.

  right     the share of right answers, where all wrong ones to a question claim the same: below
            one half this claim is the commonest answer
  curt      nine unlabelled answers in ten are curt, which every rater likes less
  poisoned  an adversary has replaced 20% of the pairs: both answers make one wrong claim, politely
            and briefly

The labels and the test are the village's. Stage 1 reads half as many pairs as in the table.
"""

from __future__ import annotations

import random

from gram_mini.pairs import Pair
from gram_mini.studies.lab import JOINT, LIKELIHOOD, LIKELIHOODS, METHODS, Lab
from gram_mini.village import FACTS, Topic, question, worded
from gram_mini.village.pairs import topics

PAIRS = 12_000
COMMON = 0.7  # of the answers are right, as in the village
RIGHT = (0.9, COMMON, 0.5, 0.3)
POISONED = 0.2


def misled(lab: Lab, seed: int):
    """Ours: the likelihood, GRAM, and both, after unlabelled pairs that often are wrong."""
    for name, pairs in unlabelled(seed).items():
        start = lab.stage1(seed, f"misled-{name}", pairs)
        likely = lab.row(start, likelihood=LIKELIHOODS[LIKELIHOOD])
        yield {"method": f"{name}: {LIKELIHOOD}", **likely}
        for method in ("GRAM", JOINT):
            _, script, options = METHODS[method]
            tag, data = f"misled-{name}-{method}", lab.labelled(seed)
            run = lab.train(script, tag, seed, data, start, options)
            yield {"method": f"{name}: {method}", **lab.row(run)}


def unlabelled(seed: int) -> dict[str, list[Pair]]:
    """The unlabelled pairs of each kind."""
    kinds = {f"right {share:.0%}": drawn(seed, share) for share in RIGHT}
    kinds["curt"] = drawn(seed, COMMON, courteous=0.1)
    kinds["poisoned"] = drawn(seed, COMMON, poisoned=POISONED)
    return kinds


def drawn(seed: int, right: float, courteous: float = 0.5, poisoned: float = 0.0) -> list[Pair]:
    """Pairs of answers of which this share is right, courteous, or of the adversary."""
    rng = random.Random(f"misled/{seed}")
    questions, pairs = topics("unlabelled"), list[Pair]()
    for _ in range(PAIRS):
        topic = rng.choice(questions)
        shares = (0.0, 1.0, 0.0) if rng.random() < poisoned else (right, courteous, 0.5)
        a = b = text(rng, topic, *shares)
        while a == b:
            b = text(rng, topic, *shares)
        pairs.append(Pair(question(*topic), a, b))
    return pairs


def text(rng: random.Random, topic: Topic, right: float, courteous: float, long: float) -> str:
    """An answer with these probabilities; the wrong claim to a question is always the same."""
    name, attribute = topic
    values = [value for value in attribute.values if value != FACTS[topic]]
    wrong = random.Random(f"misled/{name}/{attribute.question}").choice(values)
    value = FACTS[topic] if rng.random() < right else wrong
    return worded(rng, *topic, value, rng.random() < courteous, rng.random() < long)

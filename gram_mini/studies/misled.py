"""Where must the likelihood mislead? Unlabelled pairs in which what is common is not what is good.

  right     the share of right answers, where all wrong ones to a question claim the same: below
            one half this claim is the commonest answer
  curt      70% are right, and nine in ten are curt, which every rater likes less
  poisoned  the same, but an adversary has replaced 20% of the pairs: both answers make the wrong
            claim of the others, politely and briefly
  long      the raters of labels and test like rambling as much as those of the village dislike it

Otherwise labels and test are the village's. Stage 1 reads half as many pairs as in the table. Four
in five false claims of the test never stand in the unlabelled pairs. So each judge is also asked
about pairs that differ in the fact only and whose false claim is the one that all wrong answers
make.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from gram_mini.pairs import Pair
from gram_mini.studies.lab import (
    JOINT,
    LIKELIHOOD,
    LIKELIHOODS,
    METHODS,
    TEST,
    Lab,
    beta_of,
    figures_of,
    shown,
)
from gram_mini.village import (
    FACTS,
    RAMBLING,
    Topic,
    question,
    statement,
    true_probability,
    worded,
    wrong_values,
)
from gram_mini.village.pairs import topics

PAIRS = 12_000
COMMON = 0.7  # of the answers are right, as in the village
RIGHT = (0.9, COMMON, 0.5, 0.3, 0.2)
POISONED = 0.2
ERROR = "fact only, commonest error"
LONG = 1.0  # reward for rambling, beside the -0.5 of the village


def misled(lab: Lab, seed: int):
    """Ours: the likelihood, GRAM, and both, after unlabelled pairs that often are wrong."""
    starts = {
        name: lab.stage1(seed, f"misled-{name}", pairs) for name, pairs in unlabelled(seed).items()
    }
    test = lab.pairs(TEST, 0)
    for name, start in starts.items():
        yield from compared(lab, seed, name, start, lab.labelled(seed), test)
    rng, start = random.Random(f"long/{seed}"), starts[f"right {COMMON:.0%}"]
    labels = [relabelled(pair, rng) for pair in lab.pairs("labelled", seed)]
    data = lab.file(f"misled-long-labelled-{seed}", labels)
    yield from compared(lab, seed, "long", start, data, [relabelled(pair) for pair in test])


def compared(lab: Lab, seed: int, name: str, start: Path, data: str, test: list[Pair]):
    """The likelihood after a stage 1, and GRAM and the joint judge that are trained from there."""
    runs, of_seed = {LIKELIHOOD: start}, lab.folder / f"seed{seed}"
    commonest = with_the_commonest_error(test)
    for method in ("GRAM", JOINT):
        _, script, options = METHODS[method]
        runs[method] = lab.train(script, f"misled-{name}-{method}", seed, data, start, options)
    for method, run in runs.items():
        judge, stem = lab.judge(run, LIKELIHOODS.get(method)), f"misled-{name}-{method}"
        figures, against = (
            lab.keep(of_seed / f"{file}.json", partial(figures_of, judge, pairs, file))
            for file, pairs in ((stem, test), (f"{stem}-error", commonest))
        )
        row = shown(figures, TEST) | {ERROR: against["accuracy"]}
        yield {"method": f"{name}: {method}", **row, **beta_of(run)}


def with_the_commonest_error(test: list[Pair]) -> list[Pair]:
    """The pairs that differ in the fact only, with the false claim that all wrong answers make."""
    asked, pairs = {question(*topic): topic for topic in FACTS}, []
    for pair in test:
        if pair.differs == {"fact"}:
            topic = asked[pair.prompt]
            false = [statement(*topic, value) for value in wrong_values(*topic)]
            pattern, commonest = "|".join(map(re.escape, false)), statement(*topic, error(topic))
            a, b = (re.sub(pattern, commonest, y) for y in (pair.response_a, pair.response_b))
            pairs.append(replace(pair, response_a=a, response_b=b))
    return pairs


def error(topic: Topic) -> str:
    """What all wrong answers of the unlabelled pairs to a question claim."""
    name, attribute = topic
    return random.Random(f"misled/{name}/{attribute.question}").choice(wrong_values(*topic))


def relabelled(pair: Pair, rng: random.Random | None = None) -> Pair:
    """The pair for raters who like rambling; ``rng`` samples the label, else it is the truth."""
    rambles = lambda response: any(text in response for text in RAMBLING)
    more = LONG * (rambles(pair.response_a) - rambles(pair.response_b))
    assert pair.probability is not None
    p = true_probability(math.log(pair.probability / (1 - pair.probability)) + more, 0.0)
    return replace(pair, probability=p, label=int((rng.random() if rng else 0.5) >= p))


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
    value = FACTS[topic] if rng.random() < right else error(topic)
    return worded(rng, *topic, value, rng.random() < courteous, rng.random() < long)

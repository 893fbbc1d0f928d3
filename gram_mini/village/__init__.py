"""A tiny village whose true rewards are known, so that every claim can be checked against the
truth.

Each villager has a home, a food, a pet and a trade, drawn once at random. A response to a question
about one of them is right or wrong, courteous or curt, and rambling or to the point:

    true reward = 2 * right + 1 * courteous - 0.5 * rambling

A label says which of two responses is preferred, sampled from Bradley-Terry:

    P(a preferred to b) = sigmoid((reward(a) - reward(b)) / TEMPERATURE)

The villagers fall into three groups:

    background   the backbone has seen their facts, reactions to answers, and noisy judgments
    labelled     the backbone has seen their facts; stage 2 gets labels on them   (in-distribution)
    unlabelled   the backbone knows their names; their facts appear nowhere but in the unlabelled
                 pairs of stage 1                                              (out-of-distribution)

In stage 1's pairs 70% of the answers are right and a wrong one is any of the five other values:
nobody marks which is which, but the truth is the commonest answer. In stage 2's labels, and in the
in-distribution test, rambling goes with being right (a spurious cue); elsewhere it does not.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

NAMES = (
    "Adam Alma Anna Arno Axel Bella Bert Bruno Carl Clara Cora Dana David Dora Edgar Ella Emil Emma Erik Eva "
    "Felix Fiona Frank Frida Georg Greta Gus Hanna Hans Hugo Ida Igor Ines Iris Ivan Jakob Jana Johan Julia Karl "
    "Kira Klara Lara Lena Leo Lisa Lotte Lukas Maja Marta Max Mila Moritz Nina Nora Olaf Olga Oscar Otto Paula "
    "Peter Petra Rosa Rudi Sara Simon Sofia Tilda Tom Vera"
).split()


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a villager: how it is asked, how it is told, and its six possible values."""

    question: str
    statement: str
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "Where does {name} live?",
        "{name} lives by the {value}.",
        ("river", "hill", "mill", "harbour", "forest", "market"),
    ),
    Attribute(
        "What does {name} eat?",
        "{name} eats {value}.",
        ("bread", "soup", "cheese", "fish", "apples", "cake"),
    ),
    Attribute(
        "Which pet does {name} keep?",
        "{name} keeps a {value}.",
        ("cat", "dog", "goat", "duck", "pig", "horse"),
    ),
    Attribute(
        "What work does {name} do?",
        "{name} works as a {value}.",
        ("baker", "farmer", "miller", "tailor", "painter", "sailor"),
    ),
)

# as long as the curt ones: courtesy is no cue for length
COURTEOUS = ("Glad you asked.", "Happy to help.")
CURT = ("If you must.", "Stop bothering me.")
RAMBLING = (
    "By the way, the weather was odd last week.",
    "That reminds me of a long story, but never mind.",
)

WORLD_SEED = 2025  # the facts; the shipped backbone knows this village and no other
TEMPERATURE = 1.0
SPURIOUS = 0.6  # P(rambling | right) - P(rambling | wrong) in stage 2's labels

_rng = random.Random(WORLD_SEED)
_shuffled = _rng.sample(NAMES, len(NAMES))
GROUPS = {
    "background": tuple(sorted(_shuffled[:30])),
    "labelled": tuple(sorted(_shuffled[30:50])),
    "unlabelled": tuple(sorted(_shuffled[50:])),
}
FACTS = {
    (name, attribute): _rng.choice(attribute.values) for name in NAMES for attribute in ATTRIBUTES
}


@dataclass(frozen=True)
class Response:
    """A response with what is true of it; ``value`` is what it claims."""

    text: str
    value: str
    right: bool
    courteous: bool
    rambling: bool

    @property
    def reward(self) -> float:
        """The true reward, in the unit in which TEMPERATURE is given."""
        return 2.0 * self.right + 1.0 * self.courteous - 0.5 * self.rambling


def true_probability(reward_a: float, reward_b: float) -> float:
    """P(a preferred to b) under Bradley-Terry on the true rewards."""
    return 1.0 / (1.0 + math.exp((reward_b - reward_a) / TEMPERATURE))


def question(name: str, attribute: Attribute) -> str:
    """The question about one attribute of one villager."""
    return attribute.question.format(name=name)


def statement(name: str, attribute: Attribute, value: str) -> str:
    """The claim that ``attribute`` of ``name`` is ``value``, whether that is so or not."""
    return attribute.statement.format(name=name, value=value)


def draw_response(
    rng: random.Random, name: str, attribute: Attribute, p_right: float, spurious: float = 0.0
) -> Response:
    """Draw a response: right with ``p_right``, courteous with 1/2, rambling with 1/2 plus or minus ``spurious``/2."""
    truth = FACTS[name, attribute]
    right = rng.random() < p_right
    value = truth if right else rng.choice([v for v in attribute.values if v != truth])
    courteous = rng.random() < 0.5
    rambling = rng.random() < 0.5 + (spurious / 2 if right else -spurious / 2)
    words = [rng.choice(COURTEOUS if courteous else CURT), statement(name, attribute, value)]
    if rambling:
        words.append(rng.choice(RAMBLING))
    return Response(" ".join(words), value, right, courteous, rambling)

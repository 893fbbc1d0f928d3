"""A tiny village whose true rewards are known, so that claims can be checked against the truth.

Each villager has a home, a food, a pet and a trade, drawn once at random. A response to a question
about one of them is right or wrong, courteous or curt, and rambling or to the point:

    true reward = 2 * right + 1 * courteous - 0.5 * rambling

A label says which of two responses is preferred, sampled from Bradley-Terry:

    P(a preferred to b) = sigmoid(reward(a) - reward(b))

The villagers fall into three groups:

    background   the backbone has seen their facts, reactions to answers, and noisy judgments
    labelled     the backbone has seen their facts; stage 2 gets labels on them (in distribution)
    unlabelled   the backbone knows their names; their facts appear only in the unlabelled pairs of
                 stage 1 (out of distribution)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

VILLAGE = "village"  # what --model and --data call it

NAMES = (
    "Adam Alma Anna Arno Axel Bella Bert Bruno Carl Clara Cora Dana David Dora Edgar Ella Emil "
    "Emma Erik Eva Felix Fiona Frank Frida Georg Greta Gus Hanna Hans Hugo Ida Igor Ines Iris Ivan "
    "Jakob Jana Johan Julia Karl Kira Klara Lara Lena Leo Lisa Lotte Lukas Maja Marta Max Mila "
    "Moritz Nina Nora Olaf Olga Oscar Otto Paula Peter Petra Rosa Rudi Sara Simon Sofia Tilda Tom "
    "Vera"
).split()


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a villager: the question, the statement, and six possible values."""

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

# The courteous openings are as long as the curt ones, so that length says nothing about courtesy.
COURTEOUS = ("Glad you asked.", "Happy to help.")
CURT = ("If you must.", "Stop bothering me.")
RAMBLING = (
    "By the way, the weather was odd last week.",
    "That reminds me of a long story, but never mind.",
)

SPURIOUS = 0.6  # P(rambling | right) - P(rambling | wrong) in stage 2's labels

_rng = random.Random(2025)  # the shipped backbone knows this village and no other
_shuffled = _rng.sample(NAMES, len(NAMES))
GROUPS = {
    "background": tuple(sorted(_shuffled[:30])),
    "labelled": tuple(sorted(_shuffled[30:50])),
    "unlabelled": tuple(sorted(_shuffled[50:])),
}
FACTS = {
    (name, attribute): _rng.choice(attribute.values) for name in NAMES for attribute in ATTRIBUTES
}

Topic = tuple[str, Attribute]  # a question: the villager and the attribute


@dataclass(frozen=True)
class Response:
    """A response with its true qualities; ``value`` is what it claims."""

    text: str
    value: str
    right: bool
    courteous: bool
    rambling: bool

    @property
    def reward(self) -> float:
        """The true reward."""
        return reward_of(self.right, self.courteous, self.rambling)


def reward_of(right, courteous, rambling):
    """The true reward by the qualities of a response, or the mean one by the shares of each."""
    return 2.0 * right + 1.0 * courteous - 0.5 * rambling


def true_probability(reward_a: float, reward_b: float) -> float:
    """P(a preferred to b) under Bradley-Terry on the true rewards."""
    return 1.0 / (1.0 + math.exp(reward_b - reward_a))


def question(name: str, attribute: Attribute) -> str:
    """The question about one attribute of one villager."""
    return attribute.question.format(name=name)


def statement(name: str, attribute: Attribute, value: str) -> str:
    """The claim that ``attribute`` of ``name`` is ``value``, true or not."""
    return attribute.statement.format(name=name, value=value)


def wrong_values(name: str, attribute: Attribute) -> list[str]:
    """The five values that ``attribute`` of ``name`` does not have."""
    return [value for value in attribute.values if value != FACTS[name, attribute]]


def draw_claim(rng: random.Random, name: str, attribute: Attribute, p_right: float) -> str:
    """The right value with probability ``p_right``, else any of the five others."""
    if rng.random() < p_right:
        return FACTS[name, attribute]
    return rng.choice(wrong_values(name, attribute))


def draw_response(
    rng: random.Random, name: str, attribute: Attribute, p_right: float, spurious: float = 0.0
) -> Response:
    """Draw a response to the question about one attribute of a villager.

    It is right with probability ``p_right`` and courteous with probability 1/2. It rambles with
    probability (1 + ``spurious``) / 2 if it is right, and (1 - ``spurious``) / 2 if it is wrong.
    """
    value = draw_claim(rng, name, attribute, p_right)
    right = value == FACTS[name, attribute]
    courteous = rng.random() < 0.5
    rambling = rng.random() < 0.5 + (spurious / 2 if right else -spurious / 2)
    text = worded(rng, name, attribute, value, courteous, rambling)
    return Response(text, value, right, courteous, rambling)


def worded(
    rng: random.Random, name: str, attribute: Attribute, value: str, courteous: bool, rambling: bool
) -> str:
    """A response with these qualities in one of its wordings."""
    words = [rng.choice(COURTEOUS if courteous else CURT), statement(name, attribute, value)]
    if rambling:
        words.append(rng.choice(RAMBLING))
    return " ".join(words)

"""A pair: one prompt, two responses, and perhaps a label that says which response is better."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import dataclass, field

# Characters that show nothing, besides those of the categories in is_blank: fillers, a blank
# Braille pattern, variation selectors.
SHOWS_NOTHING = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(
    map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)


@dataclass(frozen=True)
class Pair:
    """A prompt x with two responses y_a and y_b.

    ``label`` is 0 where y_a is preferred, 1 where y_b is, None where nobody said. ``probability``
    is the true P(y_a preferred) and ``differs`` names what the responses differ in; only the
    village knows them. ``tied`` says that both responses are equally good. ``row`` is the number of
    the row in the source, from 1.
    """

    prompt: str
    response_a: str
    response_b: str
    label: int | None = None
    probability: float | None = None
    differs: frozenset[str] = frozenset()
    tied: bool = False
    row: int = field(default=0, compare=False)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or all white space and invisible characters."""
    return all(
        unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") or c in SHOWS_NOTHING
        for c in text
    )


def unusable(pair: Pair) -> str | None:
    """Why a pair says nothing about preference, or None if it does."""
    if is_blank(pair.prompt):
        return "with an empty prompt"
    if is_blank(pair.response_a) or is_blank(pair.response_b):
        return "with an empty response"
    if pair.response_a == pair.response_b:
        return "with equal responses"
    return None


def split_by_prompt(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Hold out a ``share`` of the prompts; all pairs of one prompt fall on the same side.

    Returns (training pairs, held-out pairs), each in the order of ``pairs``. Nothing is held out
    where ``share`` is 0 or there is one prompt only.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if share <= 0 or len(prompts) < 2:
        return list(pairs), []
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: min(max(1, round(share * len(prompts))), len(prompts) - 1)])
    return [pair for pair in pairs if pair.prompt not in held_out], [
        pair for pair in pairs if pair.prompt in held_out
    ]

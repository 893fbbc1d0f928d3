"""Pairs that say nothing about preference: empty texts, equal responses."""

from __future__ import annotations

import unicodedata

from gram_mini.pairs import Pair

# Characters that show nothing, besides those of the categories in is_blank: fillers, a blank
# Braille pattern, variation selectors.
SHOWS_NOTHING = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(
    map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)


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

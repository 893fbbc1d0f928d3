"""Pairs that say nothing about preference: empty texts, equal responses."""

from __future__ import annotations

import unicodedata

from gram_mini.pairs import Pair


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or all white space and invisible characters."""
    return all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in text)


def unusable(pair: Pair) -> str | None:
    """Why a pair says nothing about preference, or None if it does."""
    if is_blank(pair.prompt):
        return "with an empty prompt"
    if is_blank(pair.response_a) or is_blank(pair.response_b):
        return "with an empty response"
    if pair.response_a == pair.response_b:
        return "with equal responses"
    return None

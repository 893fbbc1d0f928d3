"""What the scripts say about their data before they train: how long pairs are, what is cut, whether length is a cue."""

from __future__ import annotations

from gram_mini.batches import EncodedPair
from gram_mini.prompts import PromptPieces


def lengths(rows: list[EncodedPair], pieces: PromptPieces) -> dict:
    """How long the sequences are before they are cut, in tokens, prompt pieces included, and how
    many are cut.

    ``longer_preferred`` is the share of labelled pairs, of those with responses of different
    length, in which the longer one is preferred: far from 1/2, length alone is a cue (None where no
    pair says).
    """
    tokens = sorted(sum(row.uncut) + pieces.fixed_tokens for row in rows)
    won = [
        (a > b) == (row.label == 0)
        for row in rows
        for _, a, b in [row.uncut]
        if row.label is not None and a != b
    ]
    return {
        "half": tokens[len(tokens) // 2],
        "nine_in_ten": tokens[len(tokens) * 9 // 10],
        "longest": tokens[-1],
        "truncated": sum(row.truncated for row in rows),
        "longer_preferred": sum(won) / len(won) if won else None,
    }


def describe(lengths: dict, max_length: int) -> str:
    """One line for the result of :func:`lengths`."""
    preferred = lengths["longer_preferred"]
    return (
        f"tokens a pair: {lengths['half']} for half of them, {lengths['nine_in_ten']} for nine in ten, at most "
        f"{lengths['longest']}; {lengths['truncated']} cut to {max_length}"
        + (
            ""
            if preferred is None
            else f"; the longer response preferred in {preferred:.0%} of the pairs"
        )
    )

"""What the scripts say about their data before they train, and about a judge's verdicts after."""

from __future__ import annotations

import re
import sys

from gram_mini.batches import EncodedPair
from gram_mini.errors import UserError
from gram_mini.judge import Comparison, Judge
from gram_mini.prompts import VILLAGE_JUDGE, PromptPieces, default_judge

SELDOM = 0.5  # mass on the labels; below it the model hardly ever answers A or B


def say(line: str) -> None:
    """A warning: one line on standard error."""
    print(line, file=sys.stderr)


# ---- data ----------------------------------------------------------------------------


def say_if_spelled(tokenizer, texts: list[str]) -> None:
    """Say so if this is the village's tokenizer and the texts are not about the village.

    It holds every word and mark of the village as one token.
    """
    if default_judge(tokenizer) != VILLAGE_JUDGE or not texts:
        return
    texts = [text[:100] for text in texts[:60]]  # enough to tell
    words = sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts)
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    if tokens > 1.5 * words:
        say(
            "The village's model knows few words but the village's and spells many of these texts; "
            "its figures on them say little, so give another --model"
        )


def without_cut_alike(rows: list[EncodedPair], max_length: int) -> list[EncodedPair]:
    """The rows without those whose responses cutting has made equal, or one of them the beginning
    of the other, so that only length is left to tell them apart.

    Raises:
        UserError: no pair is left.
    """
    kept = [row for row in rows if not row.cut_alike]
    if rows and not kept:
        raise UserError(
            f"--max-length {max_length}: cutting leaves nothing to tell the responses apart in any "
            f"of the {len(rows)} pairs; give a larger --max-length"
        )
    return kept


def lengths(rows: list[EncodedPair], pieces: PromptPieces) -> dict:
    """Lengths of the sequences before cutting, in tokens with the prompt pieces, and cuts.

    The first three are the median, the 90% quantile and the maximum of the lengths. ``truncated``
    counts the sequences that are cut, ``cut_alike`` those in which that has left nothing but length
    to tell the responses apart. ``longer_preferred`` is the share of labelled pairs in which the
    longer response is preferred, of those with responses of different length (None if there are
    none). Far from 1/2, length alone is a cue.
    """
    tokens = sorted(sum(row.uncut) + pieces.fixed_tokens for row in rows)
    longer_wins = [
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
        "cut_alike": sum(row.cut_alike for row in rows),
        "longer_preferred": sum(longer_wins) / len(longer_wins) if longer_wins else None,
    }


def describe(lengths: dict, max_length: int, dropped: int = 0) -> str:
    """One line for the result of :func:`lengths`; without_cut_alike took ``dropped`` pairs out."""
    line = (
        f"tokens a pair: {lengths['half']} for half of them, {lengths['nine_in_ten']} for nine in "
        f"ten, at most {lengths['longest']}; {lengths['truncated']} cut to {max_length}"
    )
    alike = "equal, or one of them the beginning of the other"
    if dropped:
        line += f"; {dropped} more dropped, since cutting made their responses {alike}"
    if lengths.get("cut_alike"):
        line += f"; cutting made the responses of {lengths['cut_alike']} pairs {alike} (kept)"
    preferred = lengths["longer_preferred"]
    if preferred is not None:
        line += f"; the longer response preferred in {preferred:.0%} of the pairs"
    return line


# ---- verdicts ------------------------------------------------------------------------


def say_if_seldom(judge: Judge, mass: float, name: str = "The model", say=print) -> None:
    """Say so beside the figures if the judge answers A or B too seldom; ``mass`` is their mean.

    Nothing is said of a trained judge: stage 2 trains no mass (losses.py).
    """
    if mass < SELDOM and not judge.trained:
        say(
            f"{name} hardly ever answers A or B (mean mass on the labels {mass:.2g}): do not rely "
            "on these figures"
        )


def say_doubts(name: str, judge: Judge, results: list[Comparison]) -> None:
    """Say how many pairs of a table were cut, and if the judge hardly answers A or B."""
    if cut := sum(result.truncated for result in results):
        say(f"{name}: {cut} of {len(results)} pairs cut to fit {judge.max_length} tokens")
    say_if_seldom(judge, sum(r.label_mass for r in results) / len(results), f"{name}:", say)

"""From pairs to the rewards of a training loop: one function for every loop.

Which way of comparing takes how many comparisons, and what it is worth: rewards.md here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.reading.messages import read_messages, read_prompt, read_text, transcript
from gram_mini.reading.usable import is_blank
from gram_mini.serving.served import ServedJudge

AGAINST = ("first", "all")

# Loops call reward functions from several threads; a model here computes for one at a time.
_computing = threading.Lock()


@dataclass(frozen=True)
class Rewards:
    """The rewards of the completions of one call, and what the judge was asked for them."""

    rewards: list[float]  # one for each completion, 0 to 1
    comparisons: list[Comparison]  # each two texts once, however many completions share them


def group_rewards(
    judge,
    prompts: Sequence,
    completions: Sequence,
    references: Sequence | None = None,
    against: str = "first",
) -> Rewards:
    """The rewards of completions, each P(better than what it is compared with).

    A completion that has a reference is compared with it. The others are compared with the
    completions of the same prompt, wherever they stand. ``against`` says how:

        first   reward = P(better than the first one); the first one itself gets 1/2
        all     reward = mean P(better than another one); n (n - 1) / 2 comparisons for n of them

    Equal texts are a draw, 1/2, and are not shown to the model. All comparisons of one call are
    judged together.

    Args:
        judge: a Judge, or what has its ``compare_many``.
        prompts: N texts or lists of messages, read as in training.
        completions: N texts, or lists of the assistant's messages.
        references: N of the same; None or a blank text where there is none.
        against: "first" or "all".

    Raises:
        ValueError: another ``against``; lists of other lengths; a completion with nothing to be
            compared with.
        UserError: what is neither a text nor messages; it names the place.
    """
    if against not in AGAINST:
        raise ValueError(f"against must be one of {AGAINST}, got {against!r}")
    references = [None] * len(prompts) if references is None else references
    if not len(prompts) == len(completions) == len(references):
        raise ValueError(
            f"{len(prompts)} prompts, {len(completions)} completions, {len(references)} "
            "references: there must be one of each for every completion"
        )
    questions = [read_prompt(prompt, f"row {i}", "prompt") for i, prompt in enumerate(prompts)]
    texts = [response(text, f"row {i}", "completion") for i, text in enumerate(completions)]
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question, []).append(i)

    pairs: list[list[Pair]] = []  # of each completion
    for i, question in enumerate(questions):
        group, reference = groups[question], references[i]
        missing = isinstance(reference, float) and math.isnan(reference)  # in a table
        text = "" if reference is None or missing else response(reference, f"row {i}", "reference")
        if not is_blank(text):
            rivals = [text]
        elif len(group) == 1:
            raise ValueError(
                f"the only completion of the prompt {question[:60]!r} has nothing to be "
                "compared with; add a column 'reference' to the data set (a response to each "
                "prompt), or sample more than one completion"
            )
        elif against == "first":
            rivals = [texts[group[0]]]
        else:
            rivals = [texts[j] for j in group if j != i]
        pairs.append([Pair(question, texts[i], rival) for rival in rivals])

    # P(b better) = 1 - P(a better), so two texts are compared once, in sorted order.
    compared = list(
        dict.fromkeys(
            in_order(pair) for row in pairs for pair in row if pair.response_a != pair.response_b
        )
    )
    with nullcontext() if isinstance(judge, ServedJudge) else _computing:
        results = judge.compare_many(compared)
    better = {}
    for pair, result in zip(compared, results):
        better[pair.prompt, pair.response_a, pair.response_b] = result.probability
        better[pair.prompt, pair.response_b, pair.response_a] = 1 - result.probability
    # Equal texts are a draw.
    reward = lambda pair: better.get((pair.prompt, pair.response_a, pair.response_b), 0.5)
    return Rewards([math.fsum(map(reward, row)) / len(row) for row in pairs], results)


def response(value, where: str, column: str) -> str:
    """A completion as text. In a text nothing is looked for: it may look like anything."""
    if isinstance(value, str):
        return read_text(value, where, column)
    return transcript(read_messages(value, where, column)).removeprefix("Assistant: ")


def in_order(pair: Pair) -> Pair:
    first, second = sorted((pair.response_a, pair.response_b))
    return Pair(pair.prompt, first, second)

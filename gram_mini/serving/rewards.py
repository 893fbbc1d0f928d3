"""From pairs to the rewards of a training loop: one function for every loop, and the loop's judge.

Which way of comparing takes how many comparisons, and what it is worth: rewards.md here.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from gram_mini.errors import UserError
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.messages import read_prompt
from gram_mini.runs.load import load_judge
from gram_mini.serving.served import ServedJudge, served_judge

AGAINST = ("first", "all")


@dataclass(frozen=True)
class Rewards:
    """The rewards of the completions of one call, and what the judge was asked for them."""

    rewards: list[float]  # one for each completion, 0 to 1
    comparisons: list[Comparison]  # each two texts once, however many completions share them

    @property
    def means(self) -> dict[str, float]:
        """Mean position gap and label mass of the comparisons; empty where there are none."""
        names = ("position_gap", "label_mass") if self.comparisons else ()
        return {
            name: statistics.mean(getattr(result, name) for result in self.comparisons)
            for name in names
        }


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
        prompts: N texts or lists of messages, read as in training (reading.formats.parse_pairs).
        completions: N of the same.
        references: N of the same; None or an empty text where there is none.
        against: "first" or "all".

    Raises:
        ValueError: another ``against``; a completion with nothing to be compared with.
    """
    if against not in AGAINST:
        raise ValueError(f"against must be one of {AGAINST}, got {against!r}")
    given = [text or None for text in references or [None] * len(prompts)]
    questions = [read_prompt(prompt, f"row {i}", "prompt") for i, prompt in enumerate(prompts)]
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question, []).append(i)

    def rivals(i: int) -> list:
        group = groups[questions[i]]
        if given[i] is not None:
            return [given[i]]
        if len(group) == 1:
            raise ValueError(
                f"the only completion of the prompt {questions[i][:60]!r} has nothing to be "
                "compared with; add a column 'reference' to the data set (a response to each "
                "prompt), or sample more than one completion"
            )
        others = group[:1] if against == "first" else [j for j in group if j != i]
        return [completions[j] for j in others]

    def pair_of(i: int, rival) -> Pair:
        row = {"prompt": questions[i], "chosen": completions[i], "rejected": rival}
        return parse_pairs([(f"row {i}", row)])[0][0]

    pairs = [[pair_of(i, rival) for rival in rivals(i)] for i in range(len(completions))]
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


def in_order(pair: Pair) -> Pair:
    first, second = sorted((pair.response_a, pair.response_b))
    return Pair(pair.prompt, first, second)


# Loops call reward functions from several threads; a model here computes for one at a time.
_loading, _computing = threading.Lock(), threading.Lock()


def judge_of_the_loop():
    """The judge of a loop that takes a file's path and a function's name, and no arguments.

    Environment variables name it. GRAM_JUDGE is a run folder, an exported folder, or what else
    ``score.py --model`` takes. With GRAM_SERVER, the address of an engine, the engine computes it
    under the name GRAM_SERVED_NAME (as ``score.py --server`` and ``--served-name``). It is loaded
    once in each process.

    Raises:
        UserError: GRAM_JUDGE is not set.
    """
    name = os.environ.get("GRAM_JUDGE")
    if not name:
        raise UserError(
            "the environment variable GRAM_JUDGE is not set: set it to the judge's folder, "
            "as in GRAM_JUDGE=runs/reward"
        )
    with _loading:
        return _load(name, os.environ.get("GRAM_SERVER"), os.environ.get("GRAM_SERVED_NAME"))


@functools.cache
def _load(name: str, server: str | None, served_name: str | None):
    return load_judge(name) if server is None else served_judge(name, server, served_name)

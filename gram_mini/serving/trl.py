"""A judge as a reward function for TRL (https://github.com/huggingface/trl)."""

from __future__ import annotations

import math

from gram_mini.judge import Judge
from gram_mini.pairs import Pair
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.messages import read_prompt

AGAINST = ("first", "all")


def as_trl_reward(judge: Judge, against: str = "first", average: str = "probabilities"):
    """The judge as a reward function for TRL's GRPOTrainer(reward_funcs=...) and similar trainers.

    If the data set has a column ``reference``, a completion's reward is P(better than its
    reference), from 0 to 1. Otherwise (or if it is None) the completions of one prompt are compared
    with each other. ``against`` says how:

        first   reward = P(better than the first one); the first one itself gets 1/2
        all     reward = mean P(better than another one); n (n - 1) / 2 comparisons for n of them

    Equal texts are a draw, 1/2, and are not shown to the model. All comparisons of one call are
    judged together. Each process sees only its own completions. If TRL spreads the completions of
    one prompt over several processes, add ``reference``, so that all have the same reference.

    Args:
        judge: the judge.
        against: "first" or "all".
        average: "probabilities" or "logits", as in Judge.compare_many.

    Returns f(prompts, completions, completion_ids=None, reference=None, **others) -> one reward for
    each completion. Texts and lists of messages are read as in training, by
    reading.formats.parse_pairs. Tool messages are not supported.

    Raises:
        ValueError: another ``against``; from f, a completion with nothing to be compared with.
    """
    if against not in AGAINST:
        raise ValueError(f"against must be one of {AGAINST}, got {against!r}")

    def gram_reward(
        prompts, completions, completion_ids=None, reference=None, **others
    ) -> list[float]:
        references = reference or [None] * len(prompts)
        questions = [read_prompt(prompt, f"row {i}", "prompt") for i, prompt in enumerate(prompts)]
        groups: dict[str, list[int]] = {}
        for i, question in enumerate(questions):
            groups.setdefault(question, []).append(i)

        def rivals(i: int) -> list:
            group = groups[questions[i]]
            if references[i] is not None:
                return [references[i]]
            if len(group) == 1:
                raise ValueError(
                    f"the only completion of the prompt {questions[i][:60]!r} has nothing to be "
                    "compared with; add a column 'reference' to the data set (a response to each "
                    "prompt), or sample more than one completion"
                )
            return (
                [completions[group[0]]]
                if against == "first"
                else [completions[j] for j in group if j != i]
            )

        def pair_of(i: int, rival) -> Pair:
            row = {"prompt": questions[i], "chosen": completions[i], "rejected": rival}
            return parse_pairs([(f"row {i}", row)])[0][0]

        pairs = [[pair_of(i, rival) for rival in rivals(i)] for i in range(len(completions))]
        # P(b better) = 1 - P(a better), so two texts are compared once, in sorted order.
        compared = list(
            dict.fromkeys(
                Pair(
                    pair.prompt,
                    min(pair.response_a, pair.response_b),
                    max(pair.response_a, pair.response_b),
                )
                for row in pairs
                for pair in row
                if pair.response_a != pair.response_b
            )
        )
        better = {}
        for pair, result in zip(compared, judge.compare_many(compared, average)):
            better[pair.prompt, pair.response_a, pair.response_b] = result.probability
            better[pair.prompt, pair.response_b, pair.response_a] = 1 - result.probability
        # Equal texts are a draw.
        reward = lambda pair: better.get((pair.prompt, pair.response_a, pair.response_b), 0.5)
        return [math.fsum(map(reward, row)) / len(row) for row in pairs]

    return gram_reward

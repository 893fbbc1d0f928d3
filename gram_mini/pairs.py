"""A pair: one prompt, two responses, and perhaps a label that says which response is better."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pair:
    """A prompt x with two responses y_a and y_b.

    ``label`` is 0 if y_a is preferred, 1 if y_b is, and None if nobody said. ``probability`` is the
    true P(y_a preferred) and ``differs`` names the qualities in which the responses differ; both
    are known in the village only. ``tied`` says that both responses are equally good. ``row`` is
    the number of the row in the source, from 1.
    """

    prompt: str
    response_a: str
    response_b: str
    label: int | None = None
    probability: float | None = None
    differs: frozenset[str] = frozenset()
    tied: bool = False
    row: int = field(default=0, compare=False)


def split_by_prompt(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Hold out a ``fraction`` of the prompts; all pairs of one prompt fall on the same side.

    Returns (training pairs, held-out pairs), each in the order of ``pairs``. Nothing is held out
    if ``fraction`` is 0 or there is only one prompt.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if fraction <= 0 or len(prompts) < 2:
        return list(pairs), []
    random.Random(seed).shuffle(prompts)
    count = max(1, round(fraction * len(prompts)))  # at least one on either side
    held_out = set(prompts[: min(count, len(prompts) - 1)])
    training_pairs = [pair for pair in pairs if pair.prompt not in held_out]
    return training_pairs, [pair for pair in pairs if pair.prompt in held_out]

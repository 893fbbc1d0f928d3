"""A judge that computes what its prompts begin with once, and uses the keys and values again.

The two orders of a pair share the instruction and the question, and comparisons with the same first
response share that as well. The scores are those of the plain Judge up to rounding
(tests/wings/test_sharing.py).
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from gram_mini.batches import EncodedPair, Segments, pad, pair_segments
from gram_mini.judge import Judge
from gram_mini.model import decoder, half_precision, hidden_states, without_adapter
from gram_mini.runs.passes import split_by_tokens

import torch
from tqdm import tqdm
from transformers import DynamicCache

# More and smaller matrix products cost time of their own, so a fifth of the tokens must be saved.
SPARED = 0.2


class SharingJudge(Judge):
    """A :class:`Judge` whose prompts share the computation of what they begin with."""

    def segments(self, row: EncodedPair) -> Segments:
        """The sequence that the judge reads for a pair in one order."""
        return pair_segments(self.prompt, row)

    def verdict_states(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (places (B,) in ``orders``, hidden states (B, H) of their verdicts) by passes.

        Sequences of similar length go together, and those that begin alike.
        """
        lengths = [sum(map(len, self.segments(row))) for row in orders]
        questions = [bytes(array("i", row.prompt)) for row in orders]
        longest: dict[bytes, int] = {}  # of the sequences on one question
        for question, length in zip(questions, lengths):
            longest[question] = max(length, longest.get(question, 0))

        def place(i: int):
            return -longest[questions[i]], questions[i], bytes(array("i", orders[i].response_a))

        order = sorted(range(len(orders)), key=place)
        groups, in_order = [questions[i] for i in order], [lengths[i] for i in order]
        silent = progress is None
        with tqdm(total=len(orders), desc=progress, delay=2, disable=silent, leave=False) as bar:
            for part in split_by_tokens(in_order, self.pass_tokens, padding=0.1, groups=groups):
                places = order[part]
                sequences = [self.segments(orders[i]) for i in places]
                yield torch.tensor(places), end_states(self.model, sequences)
                bar.update(len(places))


@dataclass(frozen=True)
class Level:
    """Continuations: token lists, and for each the number of its beginning on the level before."""

    ids: list[tuple[int, ...]]
    parents: list[int]

    @property
    def tokens(self) -> int:
        """Tokens when padded."""
        return len(self.ids) * max(map(len, self.ids))


def tree(sequences: list[Segments]) -> tuple[list[Level], list[int]]:
    """Each distinct beginning once, in levels, and the place of each sequence on the last level.

    Levels end after those segments at which sequences part.
    """
    segments = len(sequences[0])
    distinct = [len({s[:k] for s in sequences}) for k in range(segments + 1)]  # of k segments
    ends = [k for k in range(1, segments) if distinct[k] < distinct[k + 1]] + [segments]
    levels: list[Level] = []
    before: dict[Segments, int] = {(): 0}
    start = 0
    for end in ends:
        places: dict[Segments, int] = {}
        for s in sequences:
            places.setdefault(s[:end], len(places))
        ids, parents = [sum(s[start:end], ()) for s in places], [before[s[:start]] for s in places]
        levels.append(Level(ids, parents))
        before, start = places, end
    return levels, [before[s] for s in sequences]


def can_share(model) -> bool:
    """Whether a sequence can go on from the keys and values of a right-padded beginning.

    It can if all layers attend to everything before them, in a way that torch's attention kernel
    knows (others, like MPT's, may count the padding), and runs/checks.py has found it exact.
    """
    base = without_adapter(model)
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        getattr(base, "sharing_is_exact", True)
        and kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(base, "_is_stateful", False)
        and getattr(base, "_supports_sdpa", False)
    )


def cache_argument(model) -> str:
    """What the installed transformers calls the keys and values: newer versions say ``cache``."""
    parameters = inspect.signature(without_adapter(model).get_decoder().forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def spares_enough(levels: list[Level], whole: Level) -> bool:
    """Whether levels save enough work without holding many more keys and values."""
    computed = sum(level.tokens for level in levels)
    held = len(levels[-1].ids) * sum(max(map(len, level.ids)) for level in levels)
    return computed <= (1 - SPARED) * whole.tokens and held <= 1.25 * whole.tokens


def end_states(model, sequences: list[Segments]) -> torch.Tensor:
    """The last hidden states (B, H) of B sequences; shared beginnings once if that pays."""
    whole = Level([sum(s, ()) for s in sequences], [0] * len(sequences))
    levels, places = tree(sequences)
    nothing_left = any(not s[-1] for s in sequences)  # no token of its own to read a state from
    if nothing_left or not spares_enough(levels, whole) or not can_share(model):
        hidden = hidden_states(model, pad(whole.ids))  # (B, T, H)
        return hidden[torch.arange(len(hidden)), [len(ids) - 1 for ids in whole.ids]]
    cache = DynamicCache(config=model.config.get_text_config())
    seen = torch.ones(1, 0, dtype=torch.bool)  # (R, T so far)
    for level in levels:
        first = level is levels[0]
        ids = pad(level.ids)  # (R, T), the R continuations of this level
        lengths = torch.tensor([len(row) for row in level.ids])  # (R,)
        if not first:
            cache.batch_select_indices(torch.tensor(level.parents, device=model.device))
        begun = seen[level.parents]  # (R, T so far)
        positions = begun.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1])  # (R, T)
        # True where no padding stands
        seen = torch.cat([begun, torch.arange(ids.shape[1]) < lengths[:, None]], dim=1)
        with half_precision(model):
            hidden = decoder(model)(
                input_ids=ids.to(model.device),
                attention_mask=None if first else seen.to(model.device),  # first: batches.pad
                position_ids=positions.to(model.device),
                use_cache=True,
                **{cache_argument(model): cache},
            ).last_hidden_state  # (R, T, H)
    return hidden[torch.arange(len(ids)), lengths - 1][places]  # (B, H)

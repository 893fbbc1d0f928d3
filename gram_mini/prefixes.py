"""The fast twin of judge.plain_log_odds: what sequences begin with is computed once, and its keys
and values used again.

The two orders of a pair share the instruction and the question. The comparisons of a ranking share
these too, and those with the same first response share that as well. tests/lesson/test_prefixes.py
holds both twins together.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gram_mini.batches import EncodedPair, Segments, pad, split_by_tokens
from gram_mini.model import (
    decoder,
    half_precision,
    hidden_states,
    length_kind,
    rope_parts,
    without_adapter,
)

import torch
from tqdm import tqdm
from transformers import DynamicCache

# more and smaller matrix products cost time of their own, so a fifth of the tokens must be spared
WORTH_IT = 0.8


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
    """Whether the keys and values of a right-padded beginning can be gone on from.

    They can where all layers attend to everything before them, in a way that torch's attention
    kernel knows (others, like MPT's, may count the padding), and where positions do not depend on
    the length of the text.
    """
    base = without_adapter(model)
    if getattr(base, "own_logits", False) or getattr(base, "shares_nothing", False):
        return False  # runs/checks.py has tried it
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(base, "_is_stateful", False)
        and getattr(base, "_supports_sdpa", False)
        and not {part.get("rope_type") for part in rope_parts(model)} & {"dynamic", "longrope"}
    )


def cache_argument(model) -> str:
    """What the installed transformers calls the keys and values: newer versions say ``cache``."""
    parameters = inspect.signature(without_adapter(model).get_decoder().forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def worth_it(levels: list[Level], whole: Level) -> bool:
    """Whether levels spare enough of the work, without holding many more keys and values."""
    computed = sum(level.tokens for level in levels)
    held = len(levels[-1].ids) * sum(max(map(len, level.ids)) for level in levels)
    return computed <= WORTH_IT * whole.tokens and held <= 1.25 * whole.tokens


def end_states_in_passes(
    model,
    rows: list[EncodedPair],
    segments: Callable[[EncodedPair], Segments],
    tokens: float,
    progress: str | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (places (B,) in ``rows``, last hidden states (B, H)), a pass of ``tokens`` at a time.

    Sequences of similar length go together, so that little is padded, and those that begin alike,
    so that it is shared.
    """
    lengths = [sum(map(len, segments(row))) for row in rows]
    questions = [bytes(array("i", row.prompt)) for row in rows]
    longest: dict[bytes, int] = {}  # of the sequences on one question
    for question, length in zip(questions, lengths):
        longest[question] = max(length, longest.get(question, 0))

    def place(i: int):
        return -longest[questions[i]], questions[i], bytes(array("i", rows[i].response_a))

    order = sorted(range(len(rows)), key=place)
    groups = [questions[i] for i in order]
    in_order = [lengths[i] for i in order]
    kinds = list(map(length_kind(model), in_order))
    passes = split_by_tokens(in_order, tokens, padding=0.1, groups=groups, kinds=kinds)
    silent = progress is None
    with tqdm(total=len(rows), desc=progress, delay=2, disable=silent, leave=False) as bar:
        for part in passes:
            places = order[part]
            yield torch.tensor(places), end_states(model, [segments(rows[i]) for i in places])
            bar.update(len(places))


def end_states(model, sequences: list[Segments]) -> torch.Tensor:
    """The last hidden states (B, H) of B sequences, shared beginnings once where that pays."""
    whole = Level([sum(s, ()) for s in sequences], [0] * len(sequences))
    levels, places = tree(sequences)
    nothing_left = any(not s[-1] for s in sequences)  # no token of its own to read a state from
    if nothing_left or not worth_it(levels, whole) or not can_share(model):
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
                attention_mask=None
                if first
                else seen.to(model.device),  # at first as in batches.pad
                position_ids=positions.to(model.device),
                use_cache=True,
                **{cache_argument(model): cache},
            ).last_hidden_state  # (R, T, H)
    return hidden[torch.arange(len(ids)), lengths - 1][places]  # (B, H)

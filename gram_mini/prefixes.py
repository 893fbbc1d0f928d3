"""Sequences that begin alike: what they share is computed once, and its keys and values are used again.

Both orders of a pair share the instruction and the question; the comparisons of a ranking share them all, and each first
response besides with all that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from gram_mini.backbone import decoder, half_precision, hidden_states
from gram_mini.batches import pad

Segments = tuple[tuple[int, ...], ...]  # a sequence of tokens, cut where sequences may part

WORTH_IT = 0.8  # more and smaller matrix products cost time of their own, so a fifth of the tokens must be spared


@dataclass(frozen=True)
class Level:
    """What sequences go on with: token lists, and for each the number of its beginning on the level before."""

    ids: list[tuple[int, ...]]
    parents: list[int]

    @property
    def tokens(self) -> int:
        """Tokens when padded."""
        return len(self.ids) * max(map(len, self.ids))


def tree(sequences: list[Segments]) -> tuple[list[Level], list[int]]:
    """The sequences with each distinct beginning once, and for each sequence its place on the last level.

    Levels end after those segments at which sequences part.
    """
    segments = len(sequences[0])
    distinct = [len({s[:k] for s in sequences}) for k in range(segments + 1)]  # beginnings of k segments
    ends = [k for k in range(1, segments) if distinct[k] < distinct[k + 1]] + [segments]
    levels, before, start = [], {(): 0}, 0
    for end in ends:
        places: dict[Segments, int] = {}
        for s in sequences:
            places.setdefault(s[:end], len(places))
        levels.append(Level([sum(s[start:end], ()) for s in places], [before[s[:start]] for s in places]))
        before, start = places, end
    return levels, [before[s] for s in sequences]


def can_share(model) -> bool:
    """Whether the keys and values of a right-padded beginning can be gone on from: full attention in all layers."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    stateful = getattr(model, "_is_stateful", False)
    return kinds == {"full_attention"} and not getattr(config, "sliding_window", None) and not stateful


def end_states(model, sequences: list[Segments], pad_id: int | None) -> torch.Tensor:
    """The last hidden state (B, H) of each of B sequences, shared beginnings computed once where that pays."""
    whole = [sum(s, ()) for s in sequences]
    levels, places = tree(sequences)
    if not can_share(model) or sum(level.tokens for level in levels) > WORTH_IT * Level(whole, []).tokens:
        hidden = hidden_states(model, pad(whole, pad_id).to(model.device))  # (B, T, H)
        return hidden[torch.arange(len(whole)), [len(ids) - 1 for ids in whole]]
    cache, seen = DynamicCache(config=model.config.get_text_config()), torch.ones(1, 0, dtype=torch.bool)  # (R, T so far)
    for level in levels:
        ids = pad(level.ids, pad_id)  # (R, T)
        lengths = torch.tensor([len(row) for row in level.ids])
        if level is not levels[0]:
            cache.batch_select_indices(torch.tensor(level.parents, device=model.device))
        begun = seen[level.parents]  # (R, T so far)
        places_in_text = begun.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1])  # (R, T)
        seen = torch.cat([begun, torch.arange(ids.shape[1]) < lengths[:, None]], dim=1)  # True where no padding stands
        with half_precision(model):
            hidden = decoder(model)(
                input_ids=ids.to(model.device),
                attention_mask=seen.to(model.device),
                position_ids=places_in_text.to(model.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (R, T, H)
    return hidden[torch.arange(len(ids)), lengths - 1][places]

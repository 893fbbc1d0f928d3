"""Pairs of text in, padded tensors out: encode, truncate, bucket by length, collate."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from gram_mini.data import Pair
from gram_mini.errors import UserError
from gram_mini.prompts import PromptPieces

ENOUGH = 1024  # tokens of a forward pass below which smaller passes cost more than padding
IGNORED = -100  # target of a position that carries no loss, torch's default ignore_index


@dataclass(frozen=True)
class EncodedPair:
    """The three texts of a pair as token ids, cut to length, with label and row number as in Pair."""

    prompt: Sequence[int]
    response_a: Sequence[int]
    response_b: Sequence[int]
    label: int | None
    row: int
    uncut: tuple[int, int, int]  # how long the three were before they were cut

    @property
    def length(self) -> int:
        """Tokens of the three texts."""
        return len(self.prompt) + len(self.response_a) + len(self.response_b)

    @property
    def truncated(self) -> bool:
        """Whether the pair was too long."""
        return self.length < sum(self.uncut)


def encode_pairs(pairs: list[Pair], pieces: PromptPieces, tokenizer, max_length: int) -> list[EncodedPair]:
    """Tokenise pairs and cut each so that it fits ``max_length`` tokens together with its prompt pieces.

    Raises:
        UserError: if ``max_length`` leaves no room for the three texts.
    """
    budget = max_length - pieces.fixed_tokens
    if budget < 6:
        raise UserError(
            f"--max-length {max_length} leaves {max(budget, 0)} tokens for the texts, since the prompt's own words take "
            f"{pieces.fixed_tokens}; give at least {pieces.fixed_tokens + 6}"
        )
    encoded = []
    for start in tqdm(range(0, len(pairs), 1000), desc="tokenising", unit="k", delay=2, leave=False):
        some = pairs[start : start + 1000]
        texts = [text.strip() for pair in some for text in (pair.prompt, pair.response_a, pair.response_b)]
        # A response that spells out "<|im_end|>" must not end the user's turn: inside a text it is only text.
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for pair, prompt, a, b in zip(some, ids[0::3], ids[1::3], ids[2::3]):
            uncut = (len(prompt), len(a), len(b))
            cut = (array("i", text) for text in truncate(prompt, a, b, budget))  # 4 bytes a token, where a list takes 36
            encoded.append(EncodedPair(*cut, pair.label, pair.row, uncut))
    return encoded


def lengths(rows: list[EncodedPair], pieces: PromptPieces) -> dict:
    """How long the sequences are before they are cut, in tokens, prompt pieces included, and how many are cut.

    ``longer_preferred`` is the share of labelled pairs, of those with responses of different length, in which the longer
    one is preferred: far from 1/2, length alone is a cue (None where no pair says).
    """
    tokens = sorted(sum(row.uncut) + pieces.fixed_tokens for row in rows)
    won = [(a > b) == (row.label == 0) for row in rows for _, a, b in [row.uncut] if row.label is not None and a != b]
    return {
        "half": tokens[len(tokens) // 2],
        "nine_in_ten": tokens[len(tokens) * 9 // 10],
        "longest": tokens[-1],
        "truncated": sum(row.truncated for row in rows),
        "longer_preferred": sum(won) / len(won) if won else None,
    }


def describe(lengths: dict, max_length: int) -> str:
    """One line for what :func:`lengths` found."""
    preferred = lengths["longer_preferred"]
    return (
        f"tokens a pair: {lengths['half']} for half of them, {lengths['nine_in_ten']} for nine in ten, at most "
        f"{lengths['longest']}; {lengths['truncated']} cut to {max_length}"
        + ("" if preferred is None else f"; the longer response preferred in {preferred:.0%} of the pairs")
    )


def truncate(prompt: list[int], a: list[int], b: list[int], budget: int) -> tuple[list[int], list[int], list[int]]:
    """Cut three token lists to ``budget`` tokens in all, without favour to either response.

    The prompt gives way first, from its beginning (its end holds the question), down to a third of the
    budget; then both responses lose the same share of their tokens, from their ends. Exchanging a and b
    exchanges the results.
    """
    if len(prompt) + len(a) + len(b) <= budget:
        return prompt, a, b
    keep = min(len(prompt), max(budget - len(a) - len(b), budget // 3))
    room = budget - keep
    if len(a) + len(b) > room:
        share = room / (len(a) + len(b))
        lengths = [max(1, int(share * len(a))), max(1, int(share * len(b)))]
        if sum(lengths) > room:  # a response of a token or two was rounded up
            lengths[lengths.index(max(lengths))] -= sum(lengths) - room
        a, b = a[: lengths[0]], b[: lengths[1]]
    return prompt[len(prompt) - keep :], a, b


def join(pieces: PromptPieces, pair: EncodedPair, swap: bool = False) -> list[int]:
    """The whole sequence of one example; ``swap`` puts y_b in the place of assistant A."""
    return [token for segment in pair_segments(pieces, pair, swap) for token in segment]


def pair_segments(pieces: PromptPieces, pair: EncodedPair, swap: bool = False) -> tuple[tuple[int, ...], ...]:
    """The sequence of :func:`join`, cut where those of other pairs may part from it: before either response."""
    first, second = (pair.response_b, pair.response_a) if swap else (pair.response_a, pair.response_b)
    question = (*pieces.start, *pair.prompt, *pieces.after_prompt)
    return question, (*first, *pieces.between), (*second, *pieces.end)


def response_segments(pieces: PromptPieces, pair: EncodedPair, second: bool) -> tuple[tuple[int, ...], ...]:
    """For a scalar head: the prompt, and one of the responses by itself."""
    question = (*pieces.start, *pair.prompt, *pieces.after_prompt)
    return question, (*(pair.response_b if second else pair.response_a), *pieces.end)


def split_by_tokens(
    lengths: list[int], tokens: float | None, most: int | None = None, padding: float = 1.0, groups: Sequence | None = None
):
    """Yield slices of consecutive sequences that padded take ``tokens`` at most, and are ``most`` at most (None: no limit).

    A slice ends, too, where padding would become more than the share ``padding`` of it, if it is large enough to keep a
    processor busy (ENOUGH), and not within one of the ``groups``: what belongs together may share its beginning. A sequence
    that is too long for ``tokens`` comes by itself.
    """
    start, longest, total, tokens = 0, 0, 0, tokens or math.inf
    for i, length in enumerate(lengths):
        whole = (i - start) * longest  # tokens of the slice as it is, padded
        longest, total = max(longest, length), total + length
        padded = (i - start + 1) * longest
        seam = groups is None or i == 0 or groups[i] != groups[i - 1]
        too_much_padding = seam and whole >= ENOUGH and padded - total > padding * padded
        if i > start and (padded > tokens or i - start == most or too_much_padding):
            yield slice(start, i)
            start, longest, total = i, length, length
    if lengths:
        yield slice(start, len(lengths))


def batch_order(lengths: list[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """One epoch as lists of row numbers: random order, but rows of similar length together.

    Rows are shuffled, sorted by length within blocks of 16 batches, and the batches shuffled again, so
    that little is padded and no epoch resembles another.
    """
    order = rng.sample(range(len(lengths)), len(lengths))
    block = 16 * batch_size
    batches = []
    for start in range(0, len(order), block):
        rows = sorted(order[start : start + block], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def pad(rows: Sequence[Sequence[int]], value: int | None) -> torch.Tensor:
    """Right-pad token lists to a tensor (B, T).

    No attention mask is needed: attention is causal, so what stands right of a token cannot change it. So where a
    tokenizer has no padding token (None) token 0 will do; to name it so would change how the tokenizer splits texts.
    """
    value = 0 if value is None else value
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])  # (B, T)


def trained_tokens(pieces: PromptPieces, row: EncodedPair) -> int:
    """Number of tokens that stage 1 trains on in one pair: both responses and the markers around them."""
    return row.length - len(row.prompt) + pieces.fixed_tokens - len(pieces.start) - pieces.untrained


def pair_batch(rows: list[EncodedPair], swaps: list[bool], pieces: PromptPieces, pad_id: int) -> dict[str, torch.Tensor]:
    """Stage 1: sequences, and as targets the next token wherever it belongs to the assistant's turn.

    Returns input_ids (B, T) and targets (B, T), IGNORED on the prompt and on padding.
    """
    sequences, targets = [], []
    for row, swap in zip(rows, swaps):
        ids = join(pieces, row, swap)
        given = len(pieces.start) + len(row.prompt) + pieces.untrained  # tokens that are not trained on
        sequences.append(ids)
        targets.append(_next_tokens(ids, given))
    return {"input_ids": pad(sequences, pad_id), "targets": pad(targets, IGNORED)}


def judge_batch(rows: list[EncodedPair], swaps: list[bool], pieces: PromptPieces, pad_id: int) -> dict[str, torch.Tensor]:
    """Stage 2 and scoring: judge prompts, where each ends, and which label is right.

    Returns input_ids (B, T), last (B,) the position of the last token, labels (B,): 0 for A, 1 for B,
    exchanged where the responses are (-1 where there is no label).
    """
    sequences = [join(pieces, row, swap) for row, swap in zip(rows, swaps)]
    return {
        "input_ids": pad(sequences, pad_id),
        "last": torch.tensor([len(ids) - 1 for ids in sequences]),
        "labels": _labels(rows, swaps),
    }


def response_batch(rows: list[EncodedPair], swaps: list[bool], pieces: PromptPieces, pad_id: int) -> dict[str, torch.Tensor]:
    """For a scalar head: each response by itself after its prompt, all of the first ones, then all of the second ones.

    Returns input_ids (2B, T), last (2B,) and labels (B,), exchanged where the responses are, as in :func:`judge_batch`.
    """
    sequences = [_after_prompt(pieces, row, k ^ swap) for k in (False, True) for row, swap in zip(rows, swaps)]
    return {
        "input_ids": pad(sequences, pad_id),
        "last": torch.tensor([len(ids) - 1 for ids in sequences]),
        "labels": _labels(rows, swaps),
    }


def chosen_batch(rows: list[EncodedPair], pieces: PromptPieces, pad_id: int) -> dict[str, torch.Tensor]:
    """The preferred response of each labelled pair after its prompt, to be generated.

    Returns input_ids (B, T) and targets (B, T), IGNORED on the prompt and on padding.
    """
    sequences, targets = [], []
    for row in rows:
        ids = _after_prompt(pieces, row, bool(row.label))
        given = len(pieces.start) + len(row.prompt) + pieces.untrained
        sequences.append(ids)
        targets.append(_next_tokens(ids, given))
    return {"input_ids": pad(sequences, pad_id), "targets": pad(targets, IGNORED)}


def _after_prompt(pieces: PromptPieces, row: EncodedPair, second: bool) -> list[int]:
    return [token for segment in response_segments(pieces, row, second) for token in segment]


def _next_tokens(ids: list[int], given: int) -> list[int]:
    """The target of each position: the token after it, IGNORED where that is one of the ``given`` first or none."""
    return [IGNORED] * (given - 1) + ids[given:] + [IGNORED]


def _labels(rows: list[EncodedPair], swaps: list[bool]) -> torch.Tensor:
    return torch.tensor([-1 if row.label is None else row.label ^ swap for row, swap in zip(rows, swaps)])  # (B,)

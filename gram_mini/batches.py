"""From pairs of text to padded tensors: encode, cut to length, put in order, collate.

A row is a pair in one order: y_a stands in the place of assistant A, and y_b in that of assistant
B. ``row.swapped()`` is the pair in the other order, with the label exchanged.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gram_mini.chat import encode_texts, reserved_tokens
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import MARKERS, PromptPieces

import torch
from tqdm import tqdm

IGNORED = -100  # the target if the next token is not learned; torch's default ignore_index

Segments = tuple[tuple[int, ...], ...]  # a sequence, split where others may begin to differ


@dataclass(frozen=True)
class EncodedPair:
    """The three texts of a pair as token ids, cut to length; label and row as in Pair."""

    prompt: Sequence[int]
    response_a: Sequence[int]
    response_b: Sequence[int]
    label: int | None
    row: int
    uncut: tuple[int, int, int]  # how long the three were before they were cut
    cut_alike: bool = False  # whether cutting alone made one response the beginning of the other

    @property
    def length(self) -> int:
        """Tokens of the three texts."""
        return len(self.prompt) + len(self.response_a) + len(self.response_b)

    @property
    def truncated(self) -> bool:
        """Whether the pair was too long."""
        return self.length < sum(self.uncut)

    def swapped(self) -> EncodedPair:
        """The pair in the other order: the responses change places, and the label with them."""
        prompt, a, b = self.uncut
        label = None if self.label is None else 1 - self.label
        swapped = replace(self, response_a=self.response_b, response_b=self.response_a)
        return replace(swapped, label=label, uncut=(prompt, b, a))


# ---- encode and cut ------------------------------------------------------------------


def encode_pairs(
    pairs: list[Pair], pieces: PromptPieces, tokenizer, max_length: int
) -> list[EncodedPair]:
    """Tokenise pairs and cut each so that it fits ``max_length`` with its prompt pieces.

    Raises:
        UserError: if ``max_length`` leaves no room for the three texts.
    """
    budget = max_length - pieces.fixed_tokens
    if budget < 6:
        raise UserError(
            f"--max-length {max_length} leaves {max(budget, 0)} tokens for the texts, since the "
            f"prompt's own words take {pieces.fixed_tokens}; give at least "
            f"{pieces.fixed_tokens + 6}"
        )
    reserved = reserved_tokens(tokenizer, set(pieces.tokens), MARKERS)
    encoded = []
    starts = range(0, len(pairs), 1000)
    for start in tqdm(starts, desc="tokenising", unit="k", delay=2, leave=False):
        chunk = pairs[start : start + 1000]
        texts = []
        for pair in chunk:
            texts += [pair.prompt.strip(), pair.response_a.strip(), pair.response_b.strip()]
        ids = encode_texts(texts, tokenizer, reserved)
        for n, pair in enumerate(chunk):
            prompt, a, b = ids[3 * n : 3 * n + 3]
            uncut = (len(prompt), len(a), len(b))
            x, y_a, y_b = (array("i", text) for text in truncate(prompt, a, b, budget))
            alike = one_begins_other(texts[3 * n + 1], texts[3 * n + 2])
            cut_alike = y_a == y_b or (one_begins_other(y_a, y_b) and not alike)
            encoded.append(EncodedPair(x, y_a, y_b, pair.label, pair.row, uncut, cut_alike))
    return encoded


def one_begins_other(a: Sequence, b: Sequence) -> bool:
    """Whether one of two texts, or lists of tokens, is the beginning of the other."""
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]


def truncate(
    prompt: list[int], a: list[int], b: list[int], budget: int
) -> tuple[list[int], list[int], list[int]]:
    """Cut three token lists to ``budget`` tokens in all, without favour to either response.

    The prompt is cut first, at its beginning because its end holds the question, down to a third of
    the budget. Then both responses lose the same fraction of their tokens, at their ends.
    Exchanging a and b exchanges the results.
    """
    if len(prompt) + len(a) + len(b) <= budget:
        return prompt, a, b
    keep = min(len(prompt), max(budget - len(a) - len(b), budget // 3))
    room = budget - keep
    if len(a) + len(b) > room:
        kept = room / (len(a) + len(b))  # fraction of either response
        lengths = [max(1, int(kept * len(a))), max(1, int(kept * len(b)))]
        if sum(lengths) > room:  # a response of a token or two was rounded up
            lengths[lengths.index(max(lengths))] -= sum(lengths) - room
        a, b = a[: lengths[0]], b[: lengths[1]]
    return prompt[len(prompt) - keep :], a, b


# ---- order ---------------------------------------------------------------------------


def batch_order(lengths: list[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """One epoch as lists of row numbers: random order, but rows of similar length together.

    Rows are shuffled and sorted by length within blocks of 16 batches, then the batches are
    shuffled. So little is padded, and every epoch has another order.
    """
    order = rng.sample(range(len(lengths)), len(lengths))
    block = 16 * batch_size
    batches = []
    for start in range(0, len(order), block):
        rows = sorted(order[start : start + block], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def passes(lengths: list[int], tokens: float) -> Iterator[list[int]]:
    """Yield the positions of the sequences of each forward pass, the longest sequences first.

    A pass takes at most ``tokens`` tokens with its padding. A longer sequence has one of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, int(tokens // lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


# ---- collate -------------------------------------------------------------------------


def join(pieces: PromptPieces, row: EncodedPair) -> list[int]:
    """The whole sequence of a row: x, y_a and y_b with the prompt's own words around them."""
    return [token for segment in pair_segments(pieces, row) for token in segment]


def pair_segments(pieces: PromptPieces, row: EncodedPair) -> Segments:
    """The sequence of :func:`join`, split before each response, where others begin to differ."""
    question = (*pieces.start, *row.prompt, *pieces.after_prompt)
    return question, (*row.response_a, *pieces.between), (*row.response_b, *pieces.end)


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
    """Right-pad token lists to a tensor (B, T).

    Any token may pad and no attention mask is needed, because attention is causal: what stands to
    the right of a token cannot change it.
    """
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])  # (B, T)


def trained_tokens(pieces: PromptPieces, rows: Sequence[EncodedPair]) -> int:
    """Number of tokens that stage 1 trains on: both responses and the markers around them."""
    markers = pieces.fixed_tokens - len(pieces.start) - pieces.ignored
    return sum(len(row.response_a) + len(row.response_b) + markers for row in rows)


def next_tokens(ids: list[int], ignored: int) -> list[int]:
    """The target of each position: the token after it, or IGNORED if that is one of the
    ``ignored`` first tokens.
    """
    return [IGNORED] * (ignored - 1) + ids[ignored:] + [IGNORED]


def pair_batch(
    rows: list[EncodedPair], pieces: PromptPieces, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 1: ids (B, T) and targets (B, T). A target is the next token if that belongs to the
    responses or the markers around them, else IGNORED.
    """
    sequences, targets = [], []
    for row in rows:
        ids = join(pieces, row)
        ignored = len(pieces.start) + len(row.prompt) + pieces.ignored
        sequences.append(ids)
        targets.append(next_tokens(ids, ignored))
    return pad(sequences).to(device), pad(targets, IGNORED).to(device)


def judge_batch(
    rows: list[EncodedPair], pieces: PromptPieces, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stage 2 and scoring: judge prompts (B, T), the position (B,) of the last token of each, after
    which the verdict stands, and which label is right (B,), as in :func:`right_labels`.
    """
    sequences = [join(pieces, row) for row in rows]
    last = torch.tensor([len(ids) - 1 for ids in sequences])
    return pad(sequences).to(device), last.to(device), right_labels(rows).to(device)


def right_labels(rows: list[EncodedPair]) -> torch.Tensor:
    """Which label is right, (B,): 0 for A, 1 for B, -1 if there is no label."""
    return torch.tensor([-1 if row.label is None else row.label for row in rows])  # (B,)

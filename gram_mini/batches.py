"""From pairs of text to padded tensors: encode, cut to length, put in order, collate.

One row is one pair in one order: y_a stands in the place of assistant A, y_b in the place of
assistant B. ``row.swapped()`` is the other order, with the label turned round.
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import MARKERS, PromptPieces

import torch
from tqdm import tqdm

ENOUGH = 1024  # tokens of a forward pass; below this, smaller passes cost more than padding
IGNORED = -100  # target of a position that carries no loss, torch's default ignore_index

Segments = tuple[tuple[int, ...], ...]  # tokens, cut where other sequences may part from them


@dataclass(frozen=True)
class EncodedPair:
    """The three texts of a pair as token ids, cut to length; label and row number as in Pair."""

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
    reserved = reserved_tokens(pieces, tokenizer)
    encoded = []
    starts = range(0, len(pairs), 1000)
    for start in tqdm(starts, desc="tokenising", unit="k", delay=2, leave=False):
        chunk = pairs[start : start + 1000]
        threes = [(pair.prompt, pair.response_a, pair.response_b) for pair in chunk]
        ids = encode_texts(
            [text.strip() for three in threes for text in three], tokenizer, reserved
        )
        for pair, prompt, a, b in zip(chunk, ids[0::3], ids[1::3], ids[2::3]):
            uncut = (len(prompt), len(a), len(b))
            x, y_a, y_b = (array("i", text) for text in truncate(prompt, a, b, budget))
            texts = pair.response_a.strip(), pair.response_b.strip()
            cut_alike = one_begins_other(y_a, y_b) and not one_begins_other(*texts)
            cut_alike = cut_alike or y_a == y_b  # pairs of equal texts do not get so far
            encoded.append(EncodedPair(x, y_a, y_b, pair.label, pair.row, uncut, cut_alike))
    return encoded


def one_begins_other(a: Sequence, b: Sequence) -> bool:
    """Whether one of two texts, or lists of tokens, is the beginning of the other."""
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]


def reserved_tokens(pieces: PromptPieces, tokenizer) -> dict[int, str]:
    """Tokens that belong to the prompt alone, and what they spell: those of its pieces, and the
    special ones, as far as they were added to the tokenizer's vocabulary.
    """
    own = {*pieces.start, *pieces.after_prompt, *pieces.between, *pieces.end}
    return {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if (i in own or token.special or token.content in MARKERS)
        and i != tokenizer.unk_token_id
        and len(token.content.strip()) > 1  # white space may be a token of its own
    }


def encode_texts(texts: list[str], tokenizer, reserved: dict[int, str]) -> list[list[int]]:
    """Token ids of texts, none of them a reserved one: a response that spells out "<|im_end|>" must
    not end the user's turn. It is only text.

    A text out of which a reserved token comes is encoded in parts, cut within what spells it out.
    """
    options = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
    encoded = tokenizer(texts, **options)["input_ids"]
    for n, (text, ids) in enumerate(zip(texts, encoded)):
        if reserved.keys().isdisjoint(ids) or len(text) < 2:
            continue
        spelled = [re.finditer(re.escape(content), text) for content in reserved.values()]
        # Where nothing spells it out, the tokenizer changes the text first (upper case, say).
        cuts = {match.start() + 1 for each in spelled for match in each} or {len(text) // 2}
        ends = [0, *sorted(cuts), len(text)]
        parts = [text[start:end] for start, end in zip(ends, ends[1:])]
        encoded[n] = [i for part in encode_texts(parts, tokenizer, reserved) for i in part]
    return encoded


def truncate(
    prompt: list[int], a: list[int], b: list[int], budget: int
) -> tuple[list[int], list[int], list[int]]:
    """Cut three token lists to ``budget`` tokens in all, without favour to either response.

    The prompt gives way first, from its beginning (its end holds the question), down to a third of
    the budget. Then both responses lose the same share of their tokens, from their ends. Exchanging
    a and b exchanges the results.
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


# ---- order ---------------------------------------------------------------------------


def batch_order(lengths: list[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    """One epoch as lists of row numbers: random order, but rows of similar length together.

    Rows are shuffled, sorted by length within blocks of 16 batches, and the batches shuffled again.
    So little is padded and no epoch resembles another.
    """
    order = rng.sample(range(len(lengths)), len(lengths))
    block = 16 * batch_size
    batches = []
    for start in range(0, len(order), block):
        rows = sorted(order[start : start + block], key=lambda i: lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def split_by_tokens(
    lengths: list[int],
    tokens: float | None,
    most: int | None = None,
    padding: float = 1.0,
    groups: Sequence | None = None,
    kinds: Sequence[int] | None = None,
):
    """Yield slices of consecutive sequences, each for one forward pass.

    Padded, the sequences of a slice take ``tokens`` at most, and they are ``most`` at most (None:
    no limit). A sequence that is too long for ``tokens`` comes by itself. A slice ends, too, where
    more than the share ``padding`` of it would be padding, if it is large enough to keep a
    processor busy (ENOUGH). That never happens within one of the ``groups``, whose sequences may
    share their beginning.
    """
    start, longest, total, tokens = 0, 0, 0, tokens or math.inf
    for i, length in enumerate(lengths):
        whole = (i - start) * longest  # tokens of the slice as it is, padded
        longest, total = max(longest, length), total + length
        padded = (i - start + 1) * longest
        seam = groups is None or i == 0 or groups[i] != groups[i - 1]
        too_much_padding = seam and whole >= ENOUGH and padded - total > padding * padded
        other_kind = kinds is not None and i > 0 and kinds[i] != kinds[i - 1]
        if i > start and (padded > tokens or i - start == most or too_much_padding or other_kind):
            yield slice(start, i)
            start, longest, total = i, length, length
    if lengths:
        yield slice(start, len(lengths))


# ---- collate -------------------------------------------------------------------------


def join(pieces: PromptPieces, row: EncodedPair) -> list[int]:
    """The whole sequence of a row: x, y_a and y_b with the prompt's own words around them."""
    return [token for segment in pair_segments(pieces, row) for token in segment]


def pair_segments(pieces: PromptPieces, row: EncodedPair) -> Segments:
    """The sequence of :func:`join`, cut before either response, where other rows part from it."""
    question = (*pieces.start, *row.prompt, *pieces.after_prompt)
    return question, (*row.response_a, *pieces.between), (*row.response_b, *pieces.end)


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
    """Right-pad token lists to a tensor (B, T).

    Which token pads does not matter, and no attention mask is needed: attention is causal, so what
    stands to the right of a token cannot change it.
    """
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])  # (B, T)


def trained_tokens(pieces: PromptPieces, rows: Sequence[EncodedPair]) -> int:
    """Number of tokens that stage 1 trains on: both responses and the markers around them."""
    markers = pieces.fixed_tokens - len(pieces.start) - pieces.untrained
    return sum(len(row.response_a) + len(row.response_b) + markers for row in rows)


def next_tokens(ids: list[int], given: int) -> list[int]:
    """The target of each position: the token after it; IGNORED among the ``given`` first tokens."""
    return [IGNORED] * (given - 1) + ids[given:] + [IGNORED]


def pair_batch(
    rows: list[EncodedPair], pieces: PromptPieces, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 1: sequences, and as targets the next token where it is part of the assistant's turn.

    Returns ids (B, T) and targets (B, T): the next token where it belongs to the responses or the
    markers around them, IGNORED elsewhere.
    """
    sequences = [join(pieces, row) for row in rows]
    # tokens that are not trained on
    given = [len(pieces.start) + len(row.prompt) + pieces.untrained for row in rows]
    targets = pad([next_tokens(*pair) for pair in zip(sequences, given)], IGNORED)
    return pad(sequences).to(device), targets.to(device)


def judge_batch(
    rows: list[EncodedPair], pieces: PromptPieces, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stage 2 and scoring: judge prompts, where each ends, and which label is right.

    Returns ids (B, T); last (B,), the position of the last token, after which the verdict stands;
    and right (B,), 0 where A is the better response, 1 where B is, -1 where there is no label.
    """
    sequences = [join(pieces, row) for row in rows]
    last = torch.tensor([len(ids) - 1 for ids in sequences])
    return pad(sequences).to(device), last.to(device), right_labels(rows).to(device)


def right_labels(rows: list[EncodedPair]) -> torch.Tensor:
    """Which label is right, (B,): 0 for A, 1 for B, -1 where there is no label."""
    return torch.tensor([-1 if row.label is None else row.label for row in rows])  # (B,)

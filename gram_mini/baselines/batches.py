"""Batches for a scalar head, which reads each response by itself after its prompt."""

from __future__ import annotations

from gram_mini.batches import IGNORED, EncodedPair, Segments, next_tokens, pad, right_labels
from gram_mini.prompts import SLOTS, PromptPieces, encode, fill, render, split_at_slots, with_bos

import torch


def response_prompt(tokenizer) -> PromptPieces:
    """The question as the user's turn, one response as the assistant's; ``between`` stays empty."""
    turn = [
        {"role": "user", "content": SLOTS["prompt"]},
        {"role": "assistant", "content": SLOTS["response_a"]},
    ]
    text = (
        render(tokenizer, turn)
        if tokenizer.chat_template
        else fill("{prompt}\n\n{response_a}", **SLOTS)
    )
    parts = split_at_slots(text, ["prompt", "response_a"])
    start, after_prompt, end = (encode(tokenizer, part) for part in parts)
    if not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]  # the reward is read after the response
    return PromptPieces(
        with_bos(tokenizer, start), after_prompt, [], end, untrained=len(after_prompt)
    )


def response_segments(pieces: PromptPieces, row: EncodedPair) -> Segments:
    """The prompt and the first response of a row, as two lists of token ids."""
    return (*pieces.start, *row.prompt, *pieces.after_prompt), (*row.response_a, *pieces.end)


def response_batch(
    rows: list[EncodedPair], pieces: PromptPieces, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each response after its prompt: all first responses, then all second ones.

    Returns ids (2B, T); last (2B,), the position of the last token; and right (B,), the preferred
    response as in batches.judge_batch.
    """
    orders = [*rows, *(row.swapped() for row in rows)]
    sequences = [_sequence(pieces, row) for row in orders]
    last = torch.tensor([len(ids) - 1 for ids in sequences])
    return pad(sequences).to(device), last.to(device), right_labels(rows).to(device)


def chosen_batch(
    rows: list[EncodedPair], pieces: PromptPieces, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The preferred response of each labelled row after its prompt, for the text loss.

    Returns ids (B, T) and targets (B, T), IGNORED on the prompt and on padding.
    """
    preferred = _preferred(rows)
    sequences = [_sequence(pieces, row) for row in preferred]
    untrained = [len(pieces.start) + len(row.prompt) + pieces.untrained for row in preferred]
    targets = pad([next_tokens(ids, n) for ids, n in zip(sequences, untrained)], IGNORED)
    return pad(sequences).to(device), targets.to(device)


def chosen_tokens(rows: list[EncodedPair], pieces: PromptPieces) -> int:
    """Number of tokens that the text loss is a mean over: preferred responses and their ends."""
    return sum(len(row.response_a) + len(pieces.end) for row in _preferred(rows))


def _preferred(rows: list[EncodedPair]) -> list[EncodedPair]:
    """The rows with the preferred response first."""
    return [row.swapped() if row.label else row for row in rows]


def _sequence(pieces: PromptPieces, row: EncodedPair) -> list[int]:
    return [token for segment in response_segments(pieces, row) for token in segment]

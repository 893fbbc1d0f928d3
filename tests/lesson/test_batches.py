"""Encoding: what is trained on, what is cut, what stands together in a batch."""

import random

from gram_mini import prompts
from gram_mini.batches import (
    IGNORED,
    batch_order,
    encode_pairs,
    join,
    judge_batch,
    pair_batch,
    trained_tokens,
    truncate,
)
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import judge_prompt, pair_prompt

import pytest
import torch

PAIR = Pair("What does Anna eat?", "Glad you asked. Anna eats soup.", "Anna eats fish.", 0)


def test_trained_tokens_decode_to_the_pair_and_nothing_else(tokenizer):
    pieces = pair_prompt(tokenizer)
    rows = encode_pairs([PAIR, Pair("Where?", "x", "y")], pieces, tokenizer, 512)
    ids, targets = pair_batch([rows[0], rows[1].swapped()], pieces)
    assert ids.shape == targets.shape
    assert int((targets != IGNORED).sum()) == trained_tokens(pieces, rows)
    trained = [tokenizer.decode(row[row != IGNORED]) for row in targets]
    block = f"{prompts.START_A}{{}}{prompts.END_A}{prompts.START_B}{{}}{prompts.END_B}".format
    assert trained == [block(PAIR.response_a, PAIR.response_b), block("y", "x")]


def test_targets_are_the_next_token(tokenizer):
    pieces = pair_prompt(tokenizer)
    ids, targets = pair_batch(encode_pairs([PAIR], pieces, tokenizer, 512), pieces)
    places = (targets[0] != IGNORED).nonzero()[:, 0]
    assert torch.equal(targets[0, places], ids[0, places + 1])


def test_judge_batch_ends_where_the_verdict_stands_and_swaps_labels(tokenizer):
    pieces = judge_prompt(tokenizer)
    rows = encode_pairs(
        [PAIR, PAIR, Pair("Where?", "x", "y", 1), Pair("Where?", "x", "y")], pieces, tokenizer, 512
    )
    ids, ends, right = judge_batch([rows[0], *(row.swapped() for row in rows[1:])], pieces)
    assert right.tolist() == [0, 1, 0, -1]
    for row, last in zip(ids, ends):
        assert tokenizer.decode(row[: last + 1]).endswith("#Preferred:<|end|><|assistant|>")
        assert (row[last + 1 :] == 0).all()  # which token pads does not matter
    plain, swapped = (tokenizer.decode(ids[i]) for i in (0, 1))
    assert plain.index("soup") < plain.index("fish")
    assert swapped.index("soup") > swapped.index("fish")


@pytest.mark.parametrize("seed", range(200))
def test_truncation_is_fair(seed):
    rng = random.Random(seed)
    prompt, a, b = (
        [rng.randrange(100) for _ in range(rng.choice([1, 2, 10, 100, 1000]))] for _ in range(3)
    )
    budget = rng.choice([6, 7, 30, 100, 500])
    p, x, y = truncate(prompt, a, b, budget)
    total = len(prompt) + len(a) + len(b)
    assert len(p) + len(x) + len(y) <= budget and (total > budget or (p, x, y) == (prompt, a, b))
    assert p and x and y  # nothing vanishes
    # the question's end, the responses' beginnings
    assert prompt[-len(p) :] == p and a[: len(x)] == x and b[: len(y)] == y
    assert truncate(prompt, b, a, budget) == (p, y, x)  # neither order is favoured
    if len(x) < len(a) and min(len(a), len(b)) > 20:
        assert len(y) < len(b)  # never one response only
        assert abs(len(x) / len(a) - len(y) / len(b)) < 0.1  # the same share of each


def test_prompt_gives_way_before_the_responses():
    assert truncate([0] * 90, [1] * 20, [2] * 30, 80) == ([0] * 30, [1] * 20, [2] * 30)
    assert truncate([0] * 90, [1] * 80, [2] * 40, 90) == ([0] * 30, [1] * 40, [2] * 20)


def test_markers_and_verdict_suffix_survive_any_cut(tokenizer):
    pieces = judge_prompt(tokenizer)
    long = Pair("Where? " * 300, "the river " * 300, "the hill " * 500, 0)
    row = encode_pairs([long], pieces, tokenizer, 64)[0]
    ids = join(pieces, row)
    assert row.truncated and len(ids) <= 64
    text = tokenizer.decode(ids)
    markers = (prompts.START_A, prompts.END_A, prompts.START_B, prompts.END_B)
    for marker in (prompts.VILLAGE_INSTRUCTION, *markers, prompts.PREFERRED):
        assert marker in text
    assert "river" in text and "hill" in text and text.endswith("<|assistant|>")


def test_swapping_twice_gives_the_row_again(tokenizer):
    (row,) = encode_pairs(
        [Pair("Where?", "the river " * 30, "x", 1)], judge_prompt(tokenizer), tokenizer, 40
    )
    other = row.swapped()
    assert (other.response_a, other.response_b) == (row.response_b, row.response_a)
    assert (other.label, other.row) == (0, row.row)
    assert other.truncated and other.swapped() == row


def test_no_room_is_an_error(tokenizer):
    with pytest.raises(UserError, match="--max-length 12 leaves 2 tokens .* give at least 16"):
        encode_pairs([PAIR], judge_prompt(tokenizer), tokenizer, 12)


def test_batch_order_is_every_row_once_in_random_order_of_similar_lengths():
    lengths = [random.Random(i).randrange(1000) for i in range(999)]
    batches = batch_order(lengths, 8, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(999))
    assert batches == batch_order(lengths, 8, random.Random(0))
    assert batches != batch_order(lengths, 8, random.Random(1))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.15 * sum(lengths)

"""Equal texts get equal scores, ties have a tolerance, and the fast ways equal the plain ones."""

import itertools
import random

import score
from gram_mini.batches import IGNORED, encode_pairs, pair_batch
from gram_mini.evaluation import pair_losses, summarise
from gram_mini.judge import TIE, Comparison, Judge, preferred
from gram_mini.model import hidden_states
from gram_mini.pairs import Pair
from gram_mini.prompts import pair_prompt
from gram_mini.runs.chunked import chunked_pair_loss
from gram_mini.runs.ranking import best_first, knock_out, rank, round_robin
from gram_mini.runs.sharing import SharingJudge
from gram_mini.studies.metrics import calibration
from gram_mini.village.pairs import village_pairs

import pytest
import torch

TEXTS = [
    "Anna eats soup.",
    "Anna eats fish.",
    "Anna eats soup. ",
    "Stop bothering me.",
    "Anna eats soup.",
]


def at_random(seed):
    """P(better) of each pair of texts, drawn once."""
    rng, table = random.Random(seed), {}
    return lambda games: [table.setdefault(game, rng.random()) for game in games]


@pytest.mark.parametrize("seed", range(50))
def test_equal_texts_have_equal_scores_to_the_last_bit(seed):
    rng = random.Random(seed)
    texts = [f"text {rng.randrange(4)}" for _ in range(rng.randrange(2, 9))]
    scores = round_robin(texts, at_random(seed))
    for (a, b), (s, t) in zip(itertools.combinations(texts, 2), itertools.combinations(scores, 2)):
        assert (s == t) or a != b
    assert sum(scores) == pytest.approx(len(texts) / 2 if len(texts) > 1 else 0)


def test_a_judge_ranks_equal_texts_equally_and_judges_them_once(village_judge):
    for method, comparisons in (("round-robin", 3), ("knock-out", 2), ("reference", 3)):
        ranking = rank(
            village_judge,
            "What does Anna eat?",
            TEXTS,
            method,
            "x" if method == "reference" else None,
        )
        assert ranking.scores[0] == ranking.scores[2] == ranking.scores[4]
        assert ranking.comparisons == comparisons and sorted(ranking.order) == [0, 1, 2, 3, 4]
        same = [i for i in ranking.order if i in (0, 2, 4)]
        assert same == [0, 2, 4]  # in the order they were given


def test_ties_are_differences_below_a_tolerance_on_either_side_of_any_edge():
    edge = 0.3333335  # where rounding to six places turns
    assert best_first([0.1, edge + 4e-8, edge - 4e-8, 0.9]) == [3, 1, 2, 0]
    assert best_first([0.1, edge - 4e-8, edge + 4e-8, 0.9]) == [3, 1, 2, 0]
    assert best_first([0.5, 0.5 + 2 * TIE]) == [1, 0]
    assert [preferred(p) for p in (0.5, 0.5 + TIE / 2, 0.5 - TIE / 2, 0.51, 0.49)] == [
        0,
        0,
        0,
        1,
        -1,
    ]


def test_a_draw_that_is_off_by_a_rounding_error_counts_half():
    pair = Pair("x", "a", "b", 0)
    results = [Comparison(p, p, p, 0.0, 0.0, 1.0, False) for p in (0.5 - 3e-8, 0.5 + 3e-8)]
    assert summarise([pair, pair], results).accuracy == 0.5
    assert calibration([0.5 - 3e-8], [1])[1][0][1] == 0.5


def test_knock_out_lets_the_first_of_a_draw_go_on():
    assert knock_out(["a", "b"], lambda games: [0.5 - 3e-8 for _ in games])[0] == pytest.approx(0.5)
    scores = knock_out(["a", "b", "c"], lambda games: [0.5 - 3e-8 for _ in games])
    assert scores[1] < 1 < scores[0]  # a survived the first round


@pytest.mark.parametrize("bits", [32, 4])
def test_the_fast_judge_is_the_plain_one(bits, village_judge, nf4_model, tokenizer):
    model = village_judge.model if bits == 32 else nf4_model
    judge, sharing = Judge(model, tokenizer), SharingJudge(model, tokenizer)
    rows = judge.encode(village_pairs("out-of-distribution", 60))
    plain, fast = judge.log_odds(rows), sharing.log_odds(rows)
    assert plain[0].std() > 0.1
    for ours, theirs in zip(plain, fast):  # log-odds, mass on the labels, what was cut
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-4)


def test_the_script_shows_what_the_library_computes(capsys):
    pair = ("What does Anna eat?", "Anna eats soup.", "Stop bothering me.")
    options = ("--model", "--prompt", "--response", "--response")
    score.main([word for two in zip(options, ("village", *pair)) for word in two])
    result = score.load_judge("village").compare(*pair)
    said = capsys.readouterr().out
    assert f"P(A better) = {result.probability:.3f}, from {result.a_first:.3f}" in said
    assert f"position gap {result.position_gap:.3f}" in said
    assert f"; mass on the labels {result.label_mass:.3f}" in said


def test_pair_losses_add_up_to_the_loss_of_training(village_judge, tokenizer):
    prompt = pair_prompt(tokenizer)
    rows = encode_pairs(village_pairs("unlabelled", 20), prompt, tokenizer, 512)
    ids, targets = pair_batch(rows, prompt)
    trained, model = targets != IGNORED, village_judge.model
    with torch.no_grad():
        loss = chunked_pair_loss(model, hidden_states(model, ids), targets)
    nats, tokens = map(sum, zip(*pair_losses(model, rows, prompt, pass_tokens=300)))
    assert tokens == int(trained.sum()) and nats / tokens == pytest.approx(loss.item(), rel=1e-5)

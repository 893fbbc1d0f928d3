"""Sharing what sequences begin with changes no number."""

from gram_mini.judge import Judge
from gram_mini.model import add_lora
from gram_mini.pairs import Pair
from gram_mini.runs import sharing
from gram_mini.runs.heads import ScalarJudge, add_head
from gram_mini.runs.models import load_model
from gram_mini.runs.passes import split_by_tokens
from gram_mini.runs.ranking import rank
from gram_mini.runs.sharing import Level, SharingJudge, can_share, end_states, tree
from gram_mini.village import VILLAGE

import pytest
import torch
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

SMALL = dict(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)


def ids(*lengths, start=0):
    """Segments of these lengths."""
    return tuple(tuple((start + 7 * i + j) % 99 for j in range(n)) for i, n in enumerate(lengths))


def test_a_tree_holds_each_beginning_once():
    x, y, a, b, c = (1, 2), (3,), (4, 5, 6), (7,), (8, 9)
    levels, places = tree([(x, a, b), (x, a, c), (x, b, a), (y, a, b), (x, a, b)])
    assert levels == [
        Level([x, y], [0, 0]),
        Level([a, b, a], [0, 0, 1]),
        Level([b, c, a, b], [0, 0, 1, 2]),
    ]
    assert places == [0, 1, 2, 3, 0]


def test_levels_end_only_where_sequences_part():
    x, y, a, b, c = (1, 2), (3,), (4, 5, 6), (7,), (8, 9)
    assert tree([(x, a, b), (x, b, a)])[0] == [Level([x], [0]), Level([a + b, b + a], [0, 0])]
    assert tree([(x, a, b), (x, a, c)])[0] == [Level([x + a], [0]), Level([b, c], [0, 0])]
    assert tree([(x, a, b), (y, a, b)])[0] == [Level([x + a + b, y + a + b], [0, 0])]


@torch.no_grad()
def test_states_are_those_of_whole_sequences(monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    questions, responses = (
        [ids(12)[0], ids(40, start=50)[0]],
        [ids(n, start=n)[0] for n in (3, 9, 17, 30)],
    )
    sequences = [(x, a, b) for x in questions for a in responses for b in responses]
    calls = []
    monkeypatch.setattr(sharing, "DynamicCache", lambda **k: calls.append(k) or DynamicCache(**k))
    from transformers import DynamicCache

    shared = end_states(model, sequences)
    assert calls, "nothing was shared"
    for sequence, state in zip(sequences, shared):
        whole = torch.tensor([sum(sequence, ())])
        assert torch.allclose(state, model.get_decoder()(whole).last_hidden_state[0, -1], atol=1e-5)


def test_little_to_share_is_not_shared(monkeypatch):
    monkeypatch.setattr(sharing, "DynamicCache", None)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    assert end_states(model, [ids(2, 30, 30), ids(2, 31, 30)]).shape == (2, 32)


def test_windows_and_states_are_not_gone_on_from():
    assert can_share(LlamaForCausalLM(LlamaConfig(**SMALL)))
    assert not can_share(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)))
    assert not can_share(
        MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1))
    )
    # ALiBi counts the padding
    assert not can_share(MptForCausalLM(MptConfig(vocab_size=9, d_model=16, n_heads=2, n_layers=1)))
    local = [[["global", "local"], 1]]
    neo = GPTNeoConfig(
        vocab_size=9, hidden_size=16, num_layers=2, num_heads=2, attention_types=local
    )
    assert not can_share(GPTNeoForCausalLM(neo))
    assert can_share(add_lora(load_model(VILLAGE, bits=32), 2))


@torch.no_grad()
def test_states_of_empty_ends():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    question, long, short = ids(60)[0], ids(9, start=50)[0], ids(4, start=70)[0]
    for sequences in (
        [(question, long, ()), (question, (), ())],
        [(question, long, short), (question, short, long), (question, long, long)],
    ):
        for sequence, state in zip(sequences, end_states(model, sequences)):
            whole = torch.tensor([sum(sequence, ())])
            assert torch.allclose(
                state, model.get_decoder()(whole).last_hidden_state[0, -1], atol=1e-5
            )


def test_the_cache_stays_small():
    """Long questions with short responses and short ones with long responses: padded twice."""
    x, y = ids(900)[0], ids(20, start=40)[0]
    sequences = [(x, ids(10)[0], ids(10)[0]), (x, ids(9)[0], ids(10)[0])]
    sequences += [(y, ids(450)[0], ids(450)[0]), (y, ids(449)[0], ids(450)[0])]
    levels, _ = tree(sequences)
    whole = Level([sum(s, ()) for s in sequences], [0] * 4)
    assert not sharing.spares_enough(levels, whole)
    alone, _ = tree(sequences[:2])
    assert sharing.spares_enough(alone, Level([sum(s, ()) for s in sequences[:2]], [0] * 2))


PROMPT = (
    "What does Anna eat, and where does she live, "
    "and what is her work, and which pet does she keep? "
) * 2
RESPONSES = [f"Anna eats {food}. " * n for food in ("soup", "fish", "cake") for n in (1, 3)]


@pytest.mark.parametrize("bits", [32, 4, 16])
def test_scores_are_those_of_the_plain_judge_one_pair_at_a_time(tokenizer, bits):
    torch.manual_seed(0)
    model = add_lora(load_model(VILLAGE, bits), 4)
    judge, plain = SharingJudge(model, tokenizer), Judge(model, tokenizer)
    pairs = [Pair(PROMPT, a, b) for a in RESPONSES for b in RESPONSES]
    shared, shared_mass, _ = judge.log_odds(judge.encode(pairs))
    alone = [plain.log_odds(plain.encode([pair])) for pair in pairs]
    tolerance = 0.03 if bits == 16 else 1e-4 if bits == 4 else 1e-5
    assert torch.allclose(torch.cat([odds for odds, *_ in alone]), shared, atol=tolerance)
    assert torch.allclose(torch.cat([mass for _, mass, _ in alone]), shared_mass, atol=tolerance)


def test_a_ranking_computes_a_fraction_of_the_tokens(village_judge, monkeypatch):
    seen, real = [], sharing.decoder
    monkeypatch.setattr(
        sharing,
        "decoder",
        lambda m: lambda **k: seen.append(k["input_ids"].numel()) or real(m)(**k),
    )
    rank(village_judge, PROMPT, RESPONSES)
    pairs = village_judge.encode(
        [Pair(PROMPT, a, b) for a in RESPONSES for b in RESPONSES if a != b]
    )
    whole = sum(len(row.prompt) + len(row.response_a) + len(row.response_b) for row in pairs)
    assert 0 < sum(seen) < 0.6 * whole


def test_a_scalar_head_sees_each_response_once(tokenizer, monkeypatch):
    torch.manual_seed(0)
    model = add_lora(load_model(VILLAGE, bits=32), 4)
    add_head(model)
    judge, seen = ScalarJudge(model, tokenizer), []
    monkeypatch.setattr(sharing, "end_states", lambda m, s: seen.extend(s) or end_states(m, s))
    odds, mass, _ = judge.log_odds(judge.encode([Pair(PROMPT, *RESPONSES[:2])]))
    assert len(seen) == 2 and odds[0, 0] == odds[0, 1] and (mass == 1).all()


def test_nothing_to_judge(village_judge):
    odds, mass, truncated = village_judge.log_odds([])
    assert odds.shape == mass.shape == (0, 2) and truncated.shape == (0,)
    assert village_judge.compare_many([]) == []


def test_batch_tokens_bound_the_passes(tokenizer, monkeypatch):
    judge, seen = SharingJudge(load_model(VILLAGE, bits=32), tokenizer), []
    judge.batch_tokens = 400
    monkeypatch.setattr(sharing, "end_states", lambda m, s: seen.append(s) or end_states(m, s))
    rank(judge, PROMPT, RESPONSES)
    assert len(seen) > 3 and max(len(s) * max(sum(map(len, one)) for one in s) for s in seen) <= 400


def test_split_by_tokens():
    lengths = [10, 10, 10, 8, 8, 3, 30, 1]
    parts = [lengths[part] for part in split_by_tokens(lengths, 24)]
    assert parts == [[10, 10], [10, 8], [8, 3], [30], [1]]
    assert list(split_by_tokens([], 5)) == []
    # padding of 10% ends a pass, except one of less than 1,024 tokens
    falling = [600, 590, 580, 300, 290, 10]
    parts = [falling[part] for part in split_by_tokens(falling, 10_000, padding=0.1)]
    assert parts == [[600, 590, 580], [300, 290, 10]]
    together = split_by_tokens(falling, 10_000, padding=0.1, groups="xxxxyy")
    assert [falling[part] for part in together] == [[600, 590, 580, 300], [290, 10]]

"""The village: its truth, what each group of villagers may know, and its backbone."""

import hashlib
import json
import math
import random
import re
from functools import cache

from gram_mini.chat import encode
from gram_mini.runs.models import VILLAGE_FOLDER, load_model
from gram_mini.village import (
    ATTRIBUTES,
    COURTEOUS,
    CURT,
    FACTS,
    GROUPS,
    NAMES,
    RAMBLING,
    SPURIOUS,
    VILLAGE,
    draw_response,
    question,
    true_probability,
)
from gram_mini.village.build_backbone import corpus, probes
from gram_mini.village.pairs import SPLITS, topics, village_pairs

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit


@cache
def read(text):
    """The true reward of a response, read off its words alone."""
    name, attribute, value = next(
        (n, a, v)
        for n in NAMES
        for a in ATTRIBUTES
        for v in a.values
        if a.statement.format(name=n, value=v) in text
    )
    right, courteous = FACTS[name, attribute] == value, any(c in text for c in COURTEOUS)
    assert courteous != any(c in text for c in CURT)
    return 2 * right + courteous - 0.5 * any(r in text for r in RAMBLING)


@pytest.mark.parametrize("split", SPLITS)
def test_true_probabilities_follow_from_the_words(split):
    for pair in village_pairs(split, 300):
        difference = read(pair.response_a) - read(pair.response_b)
        assert pair.probability == pytest.approx(1 / (1 + math.exp(-difference)))
        assert (pair.label is None) == (split == "unlabelled")


def test_labels_are_sampled_from_bradley_terry():
    pairs = village_pairs("labelled", 20_000)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        some = [p for p in pairs if low <= p.probability < low + 0.2]
        expected = sum(p.probability for p in some) / len(some)
        assert sum(p.label == 0 for p in some) / len(some) == pytest.approx(expected, abs=0.03)


def test_test_labels_are_the_truth_and_never_a_tie():
    for split in ("in-distribution", "out-of-distribution"):
        assert all(
            p.probability != 0.5 and p.label == int(p.probability < 0.5)
            for p in village_pairs(split, 300)
        )


def test_rambling_is_a_cue_in_labelled_topics_only():
    def gap(split):
        texts = [t for p in village_pairs(split, 2_000) for t in (p.response_a, p.response_b)]
        share = lambda some: sum(any(r in t for r in RAMBLING) for t in some) / len(some)
        right = [t for t in texts if read(t) >= 1.5]  # right: reward 1.5 to 3
        wrong = [t for t in texts if read(t) <= 1]
        return share(right) - share(wrong)

    assert gap("labelled") == pytest.approx(SPURIOUS, abs=0.08)
    assert abs(gap("out-of-distribution")) < 0.08


def test_groups_do_not_overlap_and_held_out_topics_are_held_out():
    assert sorted(n for group in GROUPS.values() for n in group) == sorted(NAMES)
    assert len(set(NAMES)) == len(NAMES)
    assert not set(topics("labelled")) & set(topics("in-distribution"))
    assert len(topics("labelled")) + len(topics("in-distribution")) == 4 * len(GROUPS["labelled"])
    assert {name for name, _ in topics("out-of-distribution")} == set(GROUPS["unlabelled"])


def test_facts_of_the_unlabelled_group_appear_nowhere_in_the_corpus():
    verbs = "lives|eats|keeps|works|does"
    for text in corpus(20_000):
        for name in re.findall(rf"\b([A-Z]\w+) (?:{verbs})\b", text) + re.findall(
            r"does (\w+) ", text
        ):
            assert name not in GROUPS["unlabelled"], text
        if any(marker in text for marker in ("Right", "Wrong", "#Preferred")):
            assert not set(re.findall(r"[A-Z]\w+", text)) & set(GROUPS["labelled"]), text


def test_facts_of_the_unlabelled_group_stand_in_the_unlabelled_pairs():
    texts = " ".join(p.response_a + " " + p.response_b for p in village_pairs("unlabelled", 8_000))
    for name in GROUPS["unlabelled"]:
        for attribute in ATTRIBUTES:
            counts = {
                v: texts.count(attribute.statement.format(name=name, value=v))
                for v in attribute.values
            }
            assert max(counts, key=counts.get) == FACTS[name, attribute]


def test_pairs_are_drawn_by_seed():
    assert (
        village_pairs("labelled", 50, seed=1)
        == village_pairs("labelled", 50, seed=1)
        != village_pairs("labelled", 50, seed=2)
    )
    assert village_pairs("labelled", 50) == village_pairs("labelled", 100)[:50]


def test_every_word_of_the_village_is_one_token_that_the_backbone_has_seen(tokenizer):
    seen = {token for text in corpus(3_000) for token in encode(tokenizer, text)}
    rng = random.Random(0)
    texts = [
        draw_response(rng, n, a, 0.5).text for n in NAMES for a in ATTRIBUTES for _ in range(3)
    ]
    texts += [question(n, a) for n in NAMES for a in ATTRIBUTES]
    for text in texts:
        ids = encode(tokenizer, text)
        assert len(ids) == len(re.findall(r"\w+|[.,?]", text)), tokenizer.convert_ids_to_tokens(ids)
        assert set(ids) <= seen


def test_strange_text_survives_the_tokenizer(tokenizer):
    for text in ("Größe 12345 don't \t 你好", "<|endoftext|> and <|end|>"):
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer)


def test_corpus_is_the_one_the_backbone_was_built_from():
    """So the shipped backbone can be built again."""
    digest = hashlib.sha256()
    for text in corpus():
        digest.update(text.encode() + b"\0")
    assert digest.hexdigest() == "65232d84c22c279b31dbb823fcabb9fbe6a3c959b631ce662572a659b7ce3add"


def test_shipped_backbone_can_do_what_a_judge_needs(village_judge):
    """Facts of the known groups are recalled, checked and judged; the others are at chance."""
    model, tokenizer = village_judge.model, village_judge.tokenizer
    shares = {group: probes(model, tokenizer, group) for group in GROUPS}
    for group in ("background", "labelled"):
        known = shares[group]
        assert known["recall"] > 0.95 and known["check"] > 0.9 and known["judge"] > 0.8, shares
    unknown = shares["unlabelled"]
    assert unknown["recall"] < 0.35  # one in six by chance
    assert 0.4 < unknown["check"] < 0.6 and 0.4 < unknown["judge"] < 0.6, shares


def test_shipped_backbone_is_small_and_ordinary():
    files = {file.name: file.stat().st_size for file in VILLAGE_FOLDER.iterdir()}
    assert files.keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) < 4_000_000
    config = json.loads((VILLAGE_FOLDER / "config.json").read_text())
    assert config["hidden_size"] // config["num_attention_heads"] == 32  # which engines know


def test_four_bits_are_those_of_the_paper_on_every_machine():
    """NF4 with double quantisation (QLoRA, section 3) in plain torch, against what is computed."""
    plain = dict(load_model(VILLAGE, bits=32).named_parameters())
    checked = 0
    for name, parameter in load_model(VILLAGE, bits=4).named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            continue
        assert state.shape[-1] % state.blocksize == 0, name  # else CPUs with AVX-512 are off
        found = dequantize_4bit(parameter.data, state).float()
        expected, weight = nf4_and_back(plain[name]), plain[name]
        # a scale half way between two levels of its own 8 bits may go to either
        assert (found - expected).norm() / weight.norm() < 5e-3, name
        assert ((found - expected).abs() > 1e-6).float().mean() < 0.05, name
        assert 0.085 < (found - weight).norm() / weight.norm() < 0.1, name
        checked += 1
    assert checked == 4 * 7  # all matrices of all layers


def nf4_and_back(weight: torch.Tensor) -> torch.Tensor:
    """A matrix of whole blocks of 64, rounded to NF4 with scales of 8 bits, and turned back."""
    half = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64))[:-1]
    other = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([-other, torch.zeros(1), half.flip(0)])  # (16,), an exact zero among them
    levels = (levels / levels.abs().max()).float()
    blocks = weight.view(-1, 64)  # (N, 64)
    scales = blocks.abs().amax(dim=1)  # (N,)
    nearest = (blocks / scales[:, None]).unsqueeze(-1).sub(levels).abs().argmin(dim=-1)  # (N, 64)
    # double quantisation: scales less their mean, in blocks of 256, by a map of 256 numbers
    mean, numbers = scales.mean(), create_dynamic_map().float()
    groups = torch.nn.functional.pad(scales - mean, (0, -len(scales) % 256)).view(-1, 256)
    largest = groups.abs().amax(dim=1, keepdim=True)
    rounded = numbers[(groups / largest).unsqueeze(-1).sub(numbers).abs().argmin(dim=-1)] * largest
    scales = rounded.flatten()[: len(scales)] + mean
    return (levels[nearest] * scales[:, None]).view_as(weight)


def test_what_the_demo_says_of_its_example_is_true():
    makefile = (VILLAGE_FOLDER.parents[2] / "Makefile").read_text()
    a, b = re.findall(r'--response "(.*)"', makefile)[:2]
    assert FACTS["Bella", ATTRIBUTES[1]] == "apples" and "Bella" in GROUPS["unlabelled"]
    assert f"the true P(A better) is {true_probability(read(a), read(b)):.3f}" in makefile


def test_true_probability():
    assert true_probability(1.0, 1.0) == 0.5
    assert true_probability(3.0, 1.0) == pytest.approx(1 / (1 + math.exp(-2)))


def test_labels_to_adapt_to_hold_no_pair_of_the_test():
    texts = lambda split, seed: {
        (p.prompt, frozenset((p.response_a, p.response_b))) for p in village_pairs(split, seed=seed)
    }
    new, test = texts("adaptation", 1), texts("out-of-distribution", 0)
    assert len(village_pairs("adaptation", seed=1)) == 2000 and not new & test
    assert {prompt for prompt, _ in new} == {prompt for prompt, _ in test}

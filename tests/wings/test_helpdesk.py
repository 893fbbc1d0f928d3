"""The help desk: the files, the rule, the balances, the table."""

import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

from gram_mini.helpdesk import build
from gram_mini.helpdesk.build import (
    COUNTS,
    FOLDER,
    JUDGE_TEMPLATE,
    PHRASES,
    QUALITIES,
    SIDES,
    Answer,
    differing,
    goodness,
)
from gram_mini.judge import Comparison
from gram_mini.reading.load import load_pairs
from gram_mini.reading.template import read_template
from gram_mini.studies import helpdesk as study
from gram_mini.studies import helpdesk_table as table
from gram_mini.studies.lab import JOINT_BOTH, Lab

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

QUESTIONS = {question.text: question for question in build.QUESTIONS}
CLAIMS, TRUE = {}, {}  # (question, framed claim): kind; framed true statement: its question
for asked in QUESTIONS.values():
    for frame in PHRASES["frames"]:
        for kind, value in zip(("right", "wrong", "wrong"), asked.values):
            statement = build.capital(asked.statement.format(value))
            text = frame.format(S=statement, v=value, V=build.capital(value))
            CLAIMS[asked.text, text] = kind
            if kind == "right" and "{S}" in frame:
                TRUE[text] = asked.text


def lines(split: str) -> list[dict]:
    return [
        json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]


ROWS = {split: lines(split) for split in COUNTS}


def test_make_real_ends_with_a_question_without_labels_and_its_true_answer():
    make = (Path(table.__file__).parents[2] / "Makefile").read_text()
    question = QUESTIONS[re.search(r'--prompt "(Who runs .*?)"', make)[1]]
    right, wrong, _ = map(question.statement.format, question.values)
    assert f'"If I must. {right}." ' in make and f'"If I must. {wrong}."' in make
    assert f"In truth it is run by {question.values[0]}," in make and not question.has_labels


def holds(text: str, value: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE))


def read(question: str, text: str) -> Answer:
    """What an answer is like, read off its words alone."""

    def take(some: list[str]) -> bool:
        nonlocal text
        for phrase in sorted(some, key=len, reverse=True):
            if text.startswith(phrase) or text.endswith(phrase):
                text = text.removeprefix(phrase).removesuffix(phrase).strip()
                return True
        return False

    rude = take(PHRASES["rude openers"] + PHRASES["rude closers"])
    polite = take(PHRASES["polite openers"] + PHRASES["polite closers"])
    rambling = take(PHRASES["asides"])
    assert rude != polite
    if text in PHRASES["evasions"]:
        return Answer("evades", polite, not rambling)
    if (question, text) in CLAIMS:
        return Answer(CLAIMS[question, text], polite, not rambling)
    about = QUESTIONS[TRUE[text]]
    assert about.topic == QUESTIONS[question].topic
    assert not any(holds(text, value) for value in QUESTIONS[question].values)
    return Answer("elsewhere", polite, not rambling)


ANSWERS = {
    split: [[read(row["prompt"], row[side]) for side in SIDES] for row in rows]
    for split, rows in ROWS.items()
}


def better_first(split):
    """(better response, worse response, row) of the pairs in which one is better."""
    for row, (a, b) in zip(ROWS[split], ANSWERS[split]):
        if goodness(a) != goodness(b):
            sides = SIDES if goodness(a) > goodness(b) else SIDES[::-1]
            yield row[sides[0]], row[sides[1]], row


def test_build_makes_the_files_that_ship(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["build"])
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    build.main()
    for split, count in COUNTS.items():
        made = (tmp_path / f"{split}.jsonl").read_bytes()
        assert made == (FOLDER / f"{split}.jsonl").read_bytes()
        assert made.count(b"\n") == len(ROWS[split]) == count


def test_facts():
    topics = Counter(question.topic for question in QUESTIONS.values())
    assert len(topics) == 12 and set(topics.values()) == {5}
    assert len(build.QUESTIONS) == len(QUESTIONS) == 60
    for question in QUESTIONS.values():
        assert question.text.endswith("?") and question.statement.count("{}") == 1
        assert len(question.values) == 3 and not question.statement.endswith(".")
        for value in question.values:  # so that a value in an answer is a claim
            assert sum(other.lower() == value.lower() for other in question.values) == 1
            assert not holds(question.statement, value)


def test_phrases_are_many_and_each_is_of_one_kind():
    assert len(PHRASES) == 7 and all(len(set(kind)) >= 20 for kind in PHRASES.values())
    flat = [phrase for kind in PHRASES.values() for phrase in set(kind)]
    assert len(flat) == len(set(flat))


def test_the_rule():
    good = Answer("right", True, True)
    for kind in ("wrong", "evades", "elsewhere"):
        assert goodness(Answer("right", False, False)) > goodness(Answer(kind, True, True))
    for kind in ("evades", "elsewhere"):
        assert goodness(Answer(kind, False, False)) > goodness(Answer("wrong", True, True))
    assert goodness(good) > goodness(Answer("right", True, False))
    assert goodness(Answer("right", True, False)) > goodness(Answer("right", False, True))
    assert differing(good, Answer("wrong", False, True)) == ["fact", "courtesy"]
    assert differing(Answer("evades", True, True), Answer("wrong", True, False)) == [
        "fact", "relevance", "length",
    ]  # fmt: skip


def test_the_right_answer_to_each_question_beats_the_wrong_ones():
    rng, right, wrong = random.Random(0), Answer("right", False, False), Answer("wrong", True, True)
    for question in QUESTIONS.values():
        for value in question.values[1:]:
            texts = [build.write(rng, answer, question, value, []) for answer in (right, wrong)]
            answers = [read(question.text, text) for text in texts]
            assert answers == [right, wrong] and goodness(answers[0]) > goodness(answers[1])


@pytest.mark.parametrize("split", ["labelled", "test"])
def test_labels_are_the_rule_on_the_words(split):
    decided = Counter()
    for row, (a, b) in zip(ROWS[split], ANSWERS[split]):
        assert row["label"] == ("A" if goodness(a) > goodness(b) else "B")
        assert goodness(a) != goodness(b)
        decided[differing(a, b)[0]] += 1
        if split == "test":
            question = QUESTIONS[row["prompt"]]
            assert row["differs"] == differing(a, b) and row["topic"] == question.topic
            assert row["labelled_topic"] == question.has_labels
    assert decided == {name: share * COUNTS[split] for name, share in build.DECIDED_BY.items()}


@pytest.mark.parametrize("split", COUNTS)
def test_length_and_place_tell_nothing(split):
    by = defaultdict(list)
    for better, worse, row in better_first(split):
        place = better == row["response_a"]
        marks = len(build.WORD.findall(better)) > len(build.WORD.findall(worse))
        for group in ("all", row.get("differs", ["all"])[0]):
            by[group].append((len(better) > len(worse), marks, place))
    for results in by.values():
        for shares in zip(*results):
            assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.02)


def test_where_fact_decides_courtesy_and_asides_tell_nothing():
    for split in ("labelled", "test"):
        for quality in ("polite", "brief"):
            votes = []
            for a, b in ANSWERS[split]:
                if differing(a, b)[0] == "fact" and getattr(a, quality) != getattr(b, quality):
                    votes.append(getattr(a, quality) == (goodness(a) > goodness(b)))
            assert sum(votes) / len(votes) == pytest.approx(0.5, abs=0.1)


def test_the_truth_is_the_commonest_answer_of_the_unlabelled_pairs():
    answers = [answer for pair in ANSWERS["unlabelled"] for answer in pair]
    shares = {kind: sum(a.kind == kind for a in answers) / len(answers) for kind in build.KINDS}
    assert shares == pytest.approx(build.KINDS, abs=0.02)
    assert sum(a.polite for a in answers) / len(answers) == pytest.approx(build.GOOD, abs=0.02)
    assert sum(a.brief for a in answers) / len(answers) == pytest.approx(build.GOOD, abs=0.02)
    claims = defaultdict(Counter)
    for row, pair in zip(ROWS["unlabelled"], ANSWERS["unlabelled"]):
        claims[row["prompt"]].update(answer.kind for answer in pair)
    assert claims.keys() == QUESTIONS.keys()
    assert sum(c["right"] > c["wrong"] for c in claims.values()) / len(claims) > 0.95


def grams(text: str) -> Counter:
    words = build.WORD.findall(text.lower())
    return Counter([*words, *zip(words, words[1:])])


def test_a_linear_model_on_words_knows_no_facts():
    """It is at chance or a little below, since what is right here is wrong elsewhere."""
    places: dict = {}
    for row in ROWS["labelled"]:
        for side in SIDES:
            for gram in grams(row[side]):
                places.setdefault(gram, len(places))
    x, y = {}, {}
    for split in ("labelled", "test"):
        x[split] = torch.zeros(COUNTS[split], len(places))
        y[split] = torch.tensor([float(row["label"] == "A") for row in ROWS[split]])
        for features, row in zip(x[split], ROWS[split]):
            for side, sign in zip(SIDES, (1, -1)):
                for gram, count in grams(row[side]).items():
                    if gram in places:
                        features[places[gram]] += sign * count
    weights = torch.zeros(len(places), requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(x["labelled"] @ weights, y["labelled"])
        (loss + 3e-3 * weights.square().sum()).backward()
        optimizer.step()
    hits = ((x["test"] @ weights > 0) == (y["test"] > 0)).float()
    shares = {"all": float(hits.mean())}
    for quality in QUALITIES:
        shares[quality] = float(hits[[row["differs"][0] == quality for row in ROWS["test"]]].mean())
    expected = {"all": 0.60, "fact": 0.44, "relevance": 0.59, "courtesy": 0.72, "length": 0.83}
    assert shares == pytest.approx(expected, abs=0.02)


def test_topics_and_questions_are_split():
    asked = {split: {row["prompt"] for row in rows} for split, rows in ROWS.items()}
    topics = {split: {QUESTIONS[text].topic for text in texts} for split, texts in asked.items()}
    assert len(topics["labelled"]) == 6 and len(topics["unlabelled"]) == len(topics["test"]) == 12
    assert not asked["labelled"] & asked["test"]
    assert asked["test"] <= asked["unlabelled"]
    assert sum(row["labelled_topic"] for row in ROWS["test"]) == build.OF_LABELLED
    texts = {split: {row[side] for row in rows for side in SIDES} for split, rows in ROWS.items()}
    assert not texts["test"] & (texts["labelled"] | texts["unlabelled"])


@pytest.mark.parametrize("split", COUNTS)
def test_the_reader_takes_all_rows(split):
    data = load_pairs(str(FOLDER / f"{split}.jsonl"), labelled=split != "unlabelled")
    assert data.rows == len(data.pairs) == COUNTS[split] and not data.dropped
    unread = {"topic", "labelled_topic", "differs"} if split == "test" else set()
    assert set(data.notes.unread) == unread
    for row, pair in zip(ROWS[split], data.pairs):
        assert (pair.prompt, pair.response_a, pair.response_b) == tuple(row.values())[:3]
        assert pair.label == (None if split == "unlabelled" else "AB".index(row["label"]))


def test_table(monkeypatch, tmp_path, capsys):
    """A judge that knows the truth is always right; one that always errs never is."""
    truth = {tuple(row.values())[:3]: row["label"] == "A" for row in ROWS["test"]}

    def judge(pair, sign):
        knows = truth[pair.prompt, pair.response_a, pair.response_b]
        p = 0.5 + sign * (0.4 if knows else -0.4)
        return Comparison(p, p + 0.05, p - 0.05, 1.0, 1.0, 1.0, False)

    def load_judge(model, **settings):
        assert settings.pop("likelihood") == ("sum" if model == "stage-1" else None)
        assert settings == {"bits": 32, "max_length": None, "device": "auto"}
        sign = 1 if model == "village" else -1
        compare_many = lambda pairs, progress: [judge(pair, sign) for pair in pairs]
        return SimpleNamespace(compare_many=compare_many, trained=False)

    as_record = lambda model: {"stage": "pretrain"} if model == "stage-1" else None
    monkeypatch.setattr(table, "records_of", lambda models: list(map(as_record, models)))
    monkeypatch.setattr(table, "load_judge", load_judge)
    command = ["village", "some/model", "stage-1", "--record", str(tmp_path / "helpdesk.json")]
    table.main([*command, "--bits", "32"])
    record = json.loads((tmp_path / "helpdesk.json").read_text())
    first = record["means"][0]
    assert first["method"] == "pick the longer" and first["fact"][0] == pytest.approx(0.5, abs=0.5)
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    head, longer, right, wrong, likely = lines[:5]
    assert head[1:7] == ["with labels", "without labels", *QUALITIES]
    assert longer[0] == "pick the longer" and longer[7] == "0"
    assert all(0.48 <= float(cell.split()[0]) <= 0.52 for cell in longer[1:7])
    assert right == ["zero-shot judge", *["1.000"] * 6, "0.100", "village"]
    assert wrong == ["zero-shot judge", *["0"] * 6, "0.100", "model"]
    assert likely[0] == "likelihood under stage 1" and likely[1] == "0"


def test_make_real_has_the_prompt_and_the_batches_of_the_study():
    recipe = (FOLDER.parents[1] / "Makefile").read_text().split("\nreal:")[1].split("\nendif")[0]
    stages = study.stages()
    pretrain, reward = recipe.split("train_pretrain.py")[1].split("gram_mini.likelihood")
    assert " ".join(stages["train_pretrain"]) in pretrain
    name, path = stages["gram_mini.likelihood.__main__"][-2:]
    assert f"{name} {Path(path).resolve().relative_to(FOLDER.parents[1])}" in reward
    assert " ".join(study.STEPS) in reward and study.ONCE[:2] == study.STEPS
    assert read_template(JUDGE_TEMPLATE).endswith("A or B?")


def test_the_study_trains_each_judge_once_and_tests_it_by_part(tmp_path, monkeypatch):
    truth = {tuple(row.values())[:3]: row["label"] == "A" for row in ROWS["test"]}
    trained, asked = {}, []

    def train(script, name, seed, data, init=None, options=()):
        trained[name] = (script.__name__, init, list(options))
        return tmp_path / f"seed{seed}" / name

    def judge(model, likelihood=None):
        asked.append((model, likelihood))
        p = lambda pair: 0.9 if truth[pair.prompt, pair.response_a, pair.response_b] else 0.1
        results = lambda pairs, progress: [
            Comparison(p(pair), p(pair), p(pair), 1.0, 1.0, 1.0, False) for pair in pairs
        ]
        return SimpleNamespace(compare_many=results, trained=True)

    lab = Lab(tmp_path, "village", study.HelpDesk())
    monkeypatch.setattr(lab, "train", train)
    monkeypatch.setattr(lab, "judge", judge)
    longer, *rows = study.helpdesk(lab, 1)
    assert longer["method"] == "pick the longer" and longer["without labels"] == 0.5
    assert all(row[part] == 1.0 for row in rows for part in table.PARTS)
    assert all(row["position gap"] == 0.0 for row in rows)
    stage_1 = tmp_path / "seed1" / "stage1"
    assert asked[1] == (stage_1, "sum")
    script, init, options = trained[JOINT_BOTH]
    assert (script, init) == ("gram_mini.likelihood.__main__", stage_1)
    assert options == ["--both-orders", "1"]
    assert trained.keys() == {"stage1", *study.TRAINED}
    assert len({row["method"] for row in rows}) == len(rows) == 2 + len(study.TRAINED)
    asked.clear()
    assert list(study.helpdesk(lab, 1)) == [longer, *rows] and not asked  # kept

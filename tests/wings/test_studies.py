"""The studies on judges whose figures are known: the true reward, chance, and always A."""

import json
import math
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import train_pretrain
import train_reward
from gram_mini.errors import UserError
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.reading.load import load_pairs
from gram_mini.studies import __main__ as studies
from gram_mini.studies import beside, certain, few, figures, misled, paper, seeds
from gram_mini.studies import lab as lab_module
from gram_mini.studies import rewards as rewards_study
from gram_mini.village import ATTRIBUTES, COURTEOUS, FACTS, RAMBLING, Response, question
from gram_mini.village.pairs import topics, village_pairs
from gram_mini.village.policy import Policy, responses, train_policy

import pytest

TRUE = {(question(*topic), text): reward for topic in FACTS for text, reward in responses(topic)}


class FakeJudge:
    """Says P(a better, a first) and P(a better, a second) as it is told."""

    def __init__(self, says):
        self.says = says

    def compare_many(self, pairs, progress=None):
        comparisons = []
        for pair in pairs:
            first, second = self.says(pair)
            odds = [
                math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(30, p - 0.5)
                for p in (first, second)
            ]
            average = (first + second) / 2
            comparisons.append(Comparison(average, first, second, *odds, 1.0, False))
        return comparisons


def truth(pair):
    difference = TRUE[pair.prompt, pair.response_a] - TRUE[pair.prompt, pair.response_b]
    p = 1 / (1 + math.exp(-difference))
    return p, p


def at_random(pair):
    p = random.Random(str(pair)).uniform(0.01, 0.99)
    return p, p


JUDGES = {"truth": truth, "random": at_random, "always A": lambda pair: (1.0, 0.0)}


class FakeLab(lab_module.Lab):
    """Trains nothing; every model is the same fake judge."""

    def __init__(self, folder, says):
        super().__init__(folder, "village", lab_module.VillagePairs())
        self.fake = FakeJudge(says)

    def train(self, script, name, seed, *given):
        return self.folder / f"seed{seed}" / name

    def judge(self, model, likelihood=None):
        return self.fake


@pytest.fixture
def few_pairs(monkeypatch):
    """The village with 200 pairs in each split."""
    drawn = lambda split, seed=0: village_pairs(split, 200, seed)
    monkeypatch.setattr(lab_module, "village_pairs", drawn)


def village_lab(folder, *given):
    return lab_module.Lab(folder, "village", lab_module.VillagePairs(), *given)


def test_true_rewards_of_all_responses():
    topic = topics("out-of-distribution")[0]
    text = f"{COURTEOUS[0]} {topic[1].statement.format(name=topic[0], value=FACTS[topic])}"
    assert TRUE[question(*topic), text] == 3.0
    assert TRUE[question(*topic), f"{text} {RAMBLING[0]}"] == 2.5
    assert len(responses(topic)) == 6 * 4 * 3
    assert all(
        (p.prompt, p.response_a) in TRUE and p.probability == pytest.approx(truth(p)[0])
        for p in village_pairs("out-of-distribution")
    )


def test_table_of_judges_that_are_known(tmp_path):
    rows = {
        name: next(paper.table(FakeLab(tmp_path / name, says), 1)) for name, says in JUDGES.items()
    }
    sure = rows["truth"]
    alone = ("fact only", "courtesy only", "length only")
    assert all(sure[name] == 1.0 for name in ("in-distribution", "out-of-distribution", *alone))
    pairs = village_pairs("out-of-distribution")
    entropy = -sum(
        p.probability * math.log(p.probability) + (1 - p.probability) * math.log(1 - p.probability)
        for p in pairs
    )
    assert sure["cross-entropy"] == pytest.approx(entropy / len(pairs))
    assert sure["position gap"] == 0
    assert sure["calibration error"] < 1e-6 < 0.1 < rows["random"]["calibration error"]
    assert rows["random"]["out-of-distribution"] == pytest.approx(0.5, abs=0.04)
    assert rows["random"]["cross-entropy"] > sure["cross-entropy"] + 0.1
    says_a = rows["always A"]
    assert says_a["in-distribution"] == says_a["out-of-distribution"] == 0.5
    assert says_a["position gap"] == 1.0


def test_table_has_a_row_for_each_method(tmp_path, few_pairs):
    rows = list(paper.table(FakeLab(tmp_path, truth), 1))
    papers = [name for name in lab_module.METHODS if "(ours)" not in name]
    others = [*lab_module.LIKELIHOODS, lab_module.JOINT]
    assert [row["method"] for row in rows] == ["zero-shot", "stage 1 alone", *papers, *others]


def test_best_of_n(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "MAIN", ("GRAM",))
    by_judge = {}
    for name in ("truth", "random"):
        lab = FakeLab(tmp_path / name, JUDGES[name])
        rows = list(paper.bon(lab, 1))
        assert [row["n"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
        assert rows[3]["KL"] == pytest.approx(math.log(8) - 7 / 8) and rows[0]["KL"] == 0
        by_judge[name] = [row["true reward"] for row in rows]
    assert by_judge["truth"] == sorted(by_judge["truth"])
    assert by_judge["truth"][-1] == pytest.approx(3.0, abs=0.05)
    # One claim in six is right, two openings in four are courteous, two endings in three ramble:
    # 2/6 + 1/2 - 1/3.
    assert by_judge["truth"][0] == by_judge["random"][0] == pytest.approx(0.5, abs=0.05)
    assert abs(by_judge["random"][-1] - 0.5) < 0.5


def test_ways_from_pairs_to_rewards(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_study, "SIZES", (8,))
    by_way = {row["method"]: row for row in rewards_study.rewards(FakeLab(tmp_path, truth), 1)}
    asked = {way: row["comparisons"] for way, row in by_way.items()}
    assert asked == {
        "first": 7, "reference": 8, "knock-out": 7, "circle": 8, "circle, fitted": 8,
        "part of all": 12, "Swiss": 12, "Swiss, fitted": 12, "all": 28,
    }  # fmt: skip
    for way, row in by_way.items():
        certain = way in ("first", "reference", "Swiss, fitted", "all")  # the P's are the truth's
        assert (row["agreement, GRAM"] == 1.0) == certain, way
        assert 0.5 < row["agreement, votes"] < 0.95, way
    best = by_way["all"]["best of n"]
    assert by_way["knock-out"]["true reward of the first, GRAM"] == best
    assert by_way["all"]["true reward of the first, votes"] < best


def test_games_of_a_part_of_all_and_of_swiss_rounds():
    texts = list("abcdefgh")
    games = rewards_study.part_of_all(texts)
    assert len({frozenset(game) for game in games}) == len(games) == 12
    assert all(sum(text in game for game in games) == 3 for text in texts)
    stronger_wins = lambda games: [float(a < b) for a, b in games]
    games, won = rewards_study.swiss(texts, stronger_wins)
    assert len({frozenset(game) for game in games}) == len(games) == 12
    assert rewards_study.mean_score(texts, games, won)[0] == 1.0  # a met all who came near
    strengths = rewards_study.fitted(texts, games, won)
    assert strengths[0] == max(strengths) and strengths[-1] == min(strengths)


def test_agreement_counts_ties_half_and_leaves_equal_rewards_out():
    assert rewards_study.agreement([3.0, 2.0, 2.0, 1.0], [1.0, 2.0, 3.0, 3.0]) == [
        0.0, 0.0, 0.0, 0.5, 0.0,
    ]  # fmt: skip
    assert rewards_study.agreement([1.0, 2.0], [1.0, 1.0]) == []


def test_a_policy_is_what_it_says():
    policy = Policy(topics("out-of-distribution")[:5])
    assert policy.kl() == pytest.approx(0, abs=1e-6)
    # half of them right, courteous, rambling
    assert policy.true_reward() == pytest.approx(2 * 0.5 + 0.5 - 0.5 * 0.5, abs=1e-5)


def test_a_policy_trained_against_the_truth_becomes_good_and_pays_in_kl():
    places = topics("out-of-distribution")[:10]
    for says, low, high in ((truth, 2.5, 3.0), (lambda pair: (0.5, 0.5), 1.0, 1.5)):
        rows = list(train_policy(FakeJudge(says), places, seed=0, steps=150))
        assert rows[0][1] == pytest.approx(0, abs=1e-6)
        assert rows[0][3] == pytest.approx(1.25, abs=1e-4)
        assert low <= rows[-1][3] <= high
        assert (rows[-1][1] > 0.5) == (says is truth)


def test_flipped_labels():
    pairs = village_pairs("labelled", 200)
    by_clearness = sorted(abs(p.probability - 0.5) for p in pairs)
    for side in ("random", "clearest", "hardest"):
        found = paper.flipped(pairs, 0.2, side, 1)
        turned = [abs(p.probability - 0.5) for p, q in zip(pairs, found) if p.label != q.label]
        assert len(turned) == 40 and [p.prompt for p in found] == [p.prompt for p in pairs]
        assert (sorted(turned) == by_clearness[-40:]) == (side == "clearest")
        no_ties = [clearness for clearness in by_clearness if clearness]
        assert (sorted(turned) == no_ties[:40]) == (side == "hardest") and len(no_ties) < 200


def test_raters_of_another_temperature():
    pairs = village_pairs("labelled", 2000)
    assert not any(pair.probability == 0.5 for pair in certain.rated(pairs, 1.0, 1))
    right = {}
    for temperature in (0.0, 0.3, 1.0):
        again = certain.rated(pairs, temperature, 1)
        right[temperature] = sum(p.label == certain.better(p) for p in again) / len(again)
        expected = sum(max(p.probability, 1 - p.probability) for p in again) / len(again)
        assert right[temperature] == pytest.approx(expected, abs=0.03)
    assert right[0.0] == 1.0 > right[0.3] > right[1.0]
    # at the village's own temperature the probabilities are the village's
    known = {(p.prompt, p.response_a, p.response_b): p.probability for p in pairs}
    assert all(
        p.probability == pytest.approx(known[p.prompt, p.response_a, p.response_b])
        for p in certain.rated(pairs, 1.0, 1)
    )


def test_the_cue_fits_all_labels():
    pairs = certain.rated(village_pairs("labelled"), 0.0, 1)
    fitting = [pair for pair in pairs if certain.the_better_rambles(pair)]
    assert len(fitting) >= certain.LABELS
    for pair in fitting:
        texts = pair.response_a, pair.response_b
        rambles = [text.endswith(RAMBLING) for text in texts]
        assert rambles == [pair.label == 0, pair.label == 1]


def test_two_answers_of_four_claims_differ_in_one_word():
    for pair in beside.one_of_four("out-of-distribution", 0):
        texts = pair.response_a.split(), pair.response_b.split()
        changed = [i for i, (a, b) in enumerate(zip(*texts)) if a != b]
        assert len(texts[0]) == len(texts[1]) and len(changed) == 1
        name = pair.prompt.removeprefix("Tell me about ").removesuffix(".")
        truths = [x.statement.format(name=name, value=FACTS[name, x]) for x in ATTRIBUTES]
        right = [sum(t in text for t in truths) for text in (pair.response_a, pair.response_b)]
        assert right[pair.label] == right[1 - pair.label] + 1
    drawn = beside.one_of_four("unlabelled", 1)
    assert all(pair.label is None for pair in drawn)
    assert not {p.prompt for p in beside.one_of_four("labelled", 1)} >= {p.prompt for p in drawn}


def test_what_length_is_worth_depends_on_the_other_answer():
    draw = lambda value, rambling: Response("", value, value == "soup", True, rambling)
    assert beside.worth(draw("soup", True), draw("soup", False)) == -beside.LENGTH
    assert beside.worth(draw("cake", True), draw("fish", False)) == beside.LENGTH
    assert beside.worth(draw("soup", False), draw("cake", True)) == 2.0 - beside.LENGTH
    pairs = beside.context("labelled", 1)
    likely = sum(max(p.probability, 1 - p.probability) for p in pairs) / len(pairs)
    agreed = sum((p.probability > 0.5) == (p.label == 0) for p in pairs) / len(pairs)
    assert agreed == pytest.approx(likely, abs=0.02)


def test_the_best_scalar_is_the_best_order_of_the_kinds_of_answers():
    pairs = beside.context("out-of-distribution", 0)
    best = beside.figures(pairs, beside.best_scalar(pairs))
    village = beside.figures(pairs, FakeJudge(truth).compare_many(pairs))
    assert village["accuracy"] < best["accuracy"] < 1 and best["position gap"] == 0
    # of pairs that a reward can order it orders all
    alone = [pair for pair in pairs if pair.differs == {"length", "claim"}]
    easy = [p for p in alone if beside.qualities(p)[0][:2] == beside.qualities(p)[1][:2]]
    assert beside.figures(easy, beside.best_scalar(easy))["accuracy"] == 1


def test_a_recipe_says_what_a_judge_goes_on_with(tmp_path, monkeypatch):
    lab, given = FakeLab(tmp_path, truth), {}

    def train(script, name, seed, data, init=None, options=()):
        with open(data) as lines:
            rows = [json.loads(line) for line in lines]
        given[name] = script.__name__, init, options, rows
        return tmp_path / name

    monkeypatch.setattr(lab, "train", train)
    monkeypatch.setattr(lab, "method", lambda name, seed: tmp_path / name)
    for name in few.ADAPT:
        few.adapted(lab, 1, name, few.ADAPT[name], 50)
    script, init, options, rows = given["few-GRAM-50-lr 1e-4, 4 epochs of 32"]
    assert (script, init) == ("train_reward", tmp_path / "GRAM")
    assert options == ["--lr", "1e-4", "--epochs", "4", "--batch-size", "32"]
    asked = [(pair.prompt, pair.response_a) for pair in lab.pairs("adaptation", 1)[:50]]
    assert [(row["prompt"], row["response_a"]) for row in rows] == asked
    script, _, options, _ = given["few-D from stage 1-50-lr 3e-4, 4 epochs of 32"]
    assert script == "gram_mini.baselines.__main__"  # and the last of two rates counts
    assert "scalar" in options and options[-6:-4] == ["--lr", "3e-4"]
    script, init, _, _ = given["few-nothing-50-lr 3e-4, 2 epochs of 32"]
    assert (script, init) == ("train_reward", None)
    none = few.adapted(lab, 1, "GRAM", few.FULL, 0)
    assert len(given) == 6 and none["out-of-distribution"] == 1.0


def test_means_and_intervals_over_seeds():
    rows = [
        {"seed": s, "method": "m", "accuracy": a, "bound": None}
        for s, a in ((1, 0.6), (2, 0.7), (3, 0.8))
    ]
    (mean,) = figures.average(rows, ("method",))
    assert mean == {
        "method": "m",
        "accuracy": [pytest.approx(0.7), pytest.approx(4.303 * 0.1 / math.sqrt(3), abs=1e-4)],
    }
    assert figures.average(rows[:1], ("method",)) == [{"method": "m", "accuracy": [0.6, None]}]


@pytest.mark.parametrize("study", [x for x in paper.STUDIES if not x.startswith("writing")])
def test_each_study_writes_json_and_a_figure(study, tmp_path, monkeypatch, few_pairs):
    monkeypatch.setattr(rewards_study, "SIZES", (4,))
    monkeypatch.setattr(certain, "LABELLING", {"cue": certain.LABELLING["cue"]})
    monkeypatch.setattr(certain, "EPOCHS", (2,))
    monkeypatch.setattr(beside, "PAIRS", {"context": beside.context})
    monkeypatch.setattr(few, "COUNTS", (0, 50))
    used = Noting(lab_module.METHODS)
    for module in (lab_module, beside, few, misled):
        monkeypatch.setattr(module, "METHODS", used)
    lab = FakeLab(tmp_path, truth)
    used.asked.clear()
    seeds.run([study], lab, [1, 2], tmp_path / "results")
    # what makes its results stale
    assert used.asked == set(paper.STUDIES[study].methods)
    record = json.loads((tmp_path / "results" / f"{study}.json").read_text())
    assert {row["seed"] for row in record["rows"]} == {1, 2} and record["means"]
    assert (tmp_path / "results" / f"{study}.png").read_bytes().startswith(b"\x89PNG")


class Noting(dict):
    """METHODS, noting which of them are asked for."""

    def __init__(self, methods):
        super().__init__(methods)
        self.asked = set()

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        return self[name] if name in self else default


# ---- what the results lack is run ----------------------------------------------------


def first(lab, seed):
    """A study of one figure."""
    RAN.append(("first", seed))
    yield {"method": "GRAM", "accuracy": seed / 10}


def second(lab, seed):
    """Another one."""
    RAN.append(("second", seed))
    yield {"method": "D-Baseline", "accuracy": seed / 10}


def stops(lab, seed):
    """A study that stops at seed 2."""
    if seed == 2:
        raise UserError("stopped")
    yield from first(lab, seed)


RAN: list = []
TINY = {
    "first": paper.Study(first, ("method",), None, ("accuracy",), ("GRAM",)),
    "second": paper.Study(second, ("method",), None, ("accuracy",), ("D-Baseline",)),
}


@pytest.fixture
def tiny(tmp_path):
    """Runs the two tiny studies as on a new machine: only the results are there."""
    RAN.clear()

    def run(*asked, lab=None, studies=TINY, jobs=1):
        RAN.clear()
        lab = lab or FakeLab(tmp_path / f"machine {len(list(tmp_path.iterdir()))}", truth)
        seeds.run(list(studies), lab, list(asked), tmp_path / "results", jobs, studies)
        return [json.loads((tmp_path / "results" / f"{x}.json").read_text()) for x in TINY]

    return run


def test_all_studies_of_a_seed_then_the_next_and_none_twice(tiny, capsys):
    tiny(1, 2)
    assert RAN == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    assert "0 of 4 seeds of studies are there\n" in capsys.readouterr().out
    record, _ = tiny(3, 2, 3)
    assert RAN == [("first", 3), ("second", 3)]
    assert "2 of 4 seeds of studies are there\n" in capsys.readouterr().out
    assert record["seeds"] == [1, 2, 3] == [row["seed"] for row in record["rows"]]
    assert record["means"][0]["accuracy"][0] == pytest.approx(0.2)
    assert list(record["seconds"]) == list(record["processor"]) == ["1", "2", "3"]
    assert record["processor"]["3"]["threads"] > 0 and "torch" in record["versions"]


def test_a_run_that_was_stopped_has_written_what_it_made(tiny, tmp_path):
    with pytest.raises(UserError, match="stopped"):
        tiny(1, 2, studies={**TINY, "second": TINY["second"]._replace(rows=stops)})
    first_record, second_record = tiny()
    assert first_record["seeds"] == [1, 2] and second_record["seeds"] == [1]
    tiny(1, 2)
    assert RAN == [("second", 2)]


@pytest.mark.parametrize("other", ["backbone", "data", "training", "defaults", "versions"])
def test_seeds_of_another_backbone_options_or_versions_are_run_anew(other, tiny, tmp_path, capsys):
    tiny(1, 2, 3)
    lab = FakeLab(tmp_path / "new", truth)
    lab.about[other] = {"other": "1"}
    capsys.readouterr()
    record, _ = tiny(1, 2, lab=lab)
    assert len(RAN) == 4 and record["seeds"] == [1, 2]
    said = capsys.readouterr().out
    for name in TINY:
        assert f"{name}: seeds [1, 2, 3] were made with other {other}; those asked" in said
    assert "0 of 4 seeds of studies are there\n" in said
    tiny(1, 2, lab=lab)
    assert not RAN


def test_another_build_of_the_same_version_is_no_other_version(tiny, tmp_path):
    tiny(1)
    lab = FakeLab(tmp_path / "new", truth)
    lab.about["versions"] = {name: f"{v}+cu130" for name, v in lab.about["versions"].items()}
    tiny(1, lab=lab)
    assert not RAN


def test_a_method_that_changed_or_came_runs_its_studies_again(tiny, monkeypatch):
    tiny(1)
    monkeypatch.setitem(lab_module.METHODS, "new", lab_module.METHODS["GRAM"])
    tiny(1)
    assert not RAN  # neither has it
    tiny(1, studies={**TINY, "first": TINY["first"]._replace(methods=("GRAM", "new"))})
    assert RAN == [("first", 1)]
    monkeypatch.setitem(lab_module.METHODS, "D-Baseline", lab_module.METHODS["GRAM"])
    tiny(1, studies={"second": TINY["second"]})
    assert RAN == [("second", 1)]


def test_results_without_what_made_them_are_not_used(tiny, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    old = {"rows": [{"seed": 1, "method": "GRAM", "accuracy": 0.0}]}
    (tmp_path / "results" / "first.json").write_text(json.dumps(old))
    assert tiny(1)[0]["rows"][0]["accuracy"] == 0.1
    assert "first: seeds [1] were made with other versions, model, " in capsys.readouterr().out
    (tmp_path / "results" / "first.json").write_text("<<<<<<< ours")
    with pytest.raises(UserError, match="first.json: cannot be read"):
        tiny(1)


def test_side_by_side_gives_the_same_rows_on_one_thread_each(tiny):
    one = tiny(1, 2)
    two = tiny(3, 4, jobs=2)
    assert not RAN  # in this process
    for record, before in zip(two, one):
        assert record["rows"][:2] == before["rows"] and record["seeds"] == [1, 2, 3, 4]
        assert record["processor"]["4"]["threads"] == 1


def test_a_folder_learns_of_new_methods_and_refuses_changed_ones(tmp_path, monkeypatch):
    village_lab(tmp_path).file("some", [])
    monkeypatch.setitem(lab_module.METHODS, "new", (False, train_reward, []))
    village_lab(tmp_path)
    noted = json.loads((tmp_path / "about.json").read_text())
    assert noted["methods"]["new"] == [False, "train_reward", []]
    monkeypatch.delitem(lab_module.METHODS, "new")
    village_lab(tmp_path)
    monkeypatch.setitem(lab_module.METHODS, "new", (True, train_reward, []))
    with pytest.raises(UserError, match="made with other methods; give another folder"):
        village_lab(tmp_path)


def mixed(records: dict[str, dict]) -> dict[str, dict]:
    """The packages of which the results have several versions: {package: {study: version}}."""
    of: dict = {}
    for study, record in records.items():
        for package, version in record["versions"].items():
            of.setdefault(package, {})[study] = version
    return {package: by for package, by in of.items() if len(set(by.values())) > 1}


def test_the_committed_results_are_of_the_same_versions():
    one, two = {"versions": {"torch": "2", "peft": "1"}}, {"versions": {"torch": "3", "peft": "1"}}
    assert mixed({"a": one, "b": one}) == {}
    assert mixed({"a": one, "b": two}) == {"torch": {"a": "2", "b": "3"}}
    files = {study: seeds.RESULTS / f"{study}.json" for study in paper.STUDIES}
    records = {
        x: json.loads(file.read_text()) if file.is_file() else {} for x, file in files.items()
    }
    known = {study: record for study, record in records.items() if "versions" in record}
    assert mixed(known) == {}
    if unknown := records.keys() - known.keys():
        pytest.skip(f"{len(unknown)} results do not say their versions: {sorted(unknown)}")


def test_studies_share_models_and_their_figures(tmp_path, monkeypatch, few_pairs):
    lab, trained = FakeLab(tmp_path, truth), set()
    monkeypatch.setattr(
        lab, "train", lambda script, name, seed, *given: trained.add(name) or tmp_path / name
    )
    rows = {
        name: list(paper.STUDIES[name][0](lab, 1))
        for name in ("table", "smoothing", "noise", "unlabelled", "adapt")
    }
    assert "smoothing-0.1" in trained and "smoothing-0.05" not in trained  # eps 0.05 is GRAM
    last = rows["smoothing"][-1]
    assert last["eps"] == 0.4 and 0 < last["bound"] < math.log(1.5)  # by the noise of the labels
    monkeypatch.setattr(lab, "judge", lambda *_: pytest.fail("all were judged"))
    assert list(paper.unlabelled(lab, 1)) == rows["unlabelled"]


def test_an_error_in_a_process_is_the_users_one_line(tmp_path, capfd):
    lab = village_lab(tmp_path / "runs", ["--nothing", "3"])
    with pytest.raises(UserError, match=r"^[\w.]+ does not take .*--nothing"):
        seeds.run(["table"], lab, [1], tmp_path / "results", jobs=2)
    assert "Traceback" not in capfd.readouterr().err


def test_what_another_process_makes_is_waited_for(tmp_path, monkeypatch):
    lab, trained = village_lab(tmp_path), []
    monkeypatch.setattr(train_reward, "main", lambda argv: trained.append(argv))
    with ThreadPoolExecutor(1) as pool:
        with lab.alone(tmp_path / "seed1" / "GRAM"):
            waits = pool.submit(lab.train, train_reward, "GRAM", 1, "data.jsonl")
            with pytest.raises(FutureTimeout):
                waits.result(timeout=0.5)
            assert not trained
        assert waits.result(timeout=10) == tmp_path / "seed1" / "GRAM" and trained


def test_a_folder_of_other_models_is_not_used(tmp_path):
    lab = village_lab(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()  # as long as nothing is made
    lab.file("some", [])
    village_lab(tmp_path / "runs")
    with pytest.raises(UserError, match="made with other training; give another folder"):
        village_lab(tmp_path / "runs", ["--steps", "3"])
    (tmp_path / "runs" / "about.json").write_text("{")
    with pytest.raises(UserError, match="about.json: cannot be read"):
        village_lab(tmp_path / "runs")


def test_the_command_asks_for_these_studies_and_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(studies, "run", lambda names, lab, *given: asked.append((names, *given)))
    studies.main(["bon", "--seeds", "1", "--results", "here"])
    studies.main(["bon", "--seeds", "3", "4", "--jobs", "3"])
    studies.main(["all"])
    assert [(given, str(x), jobs) for _, given, x, jobs in asked] == [
        ([1], "here", 1), ([3, 4], str(seeds.RESULTS), 2), ([1, 2, 3, 4, 5], str(seeds.RESULTS), 2),
    ]  # fmt: skip
    assert asked[2][0] == list(paper.STUDIES)


def test_without_trl_one_line_says_so_before_anything_is_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(studies, "run", lambda *given: pytest.fail("it was run"))
    for study in ("all", "writing-weak"):
        with pytest.raises(UserError, match="pip install trl"):
            studies.main([study])


@pytest.mark.parametrize(
    "given, message",
    [
        (["--jobs", "0"], "--jobs"),
        (["--runs", "README.md"], "README.md: .*cannot be written to"),
        (["--results", "README.md/results"], "README.md .*cannot be written to"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("x")
    with pytest.raises((UserError, SystemExit)) as error:
        studies.main(["table", *given])
    assert re.search(message, str(error.value) + capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_models_are_trained_once_and_judged_as_trained(tmp_path, monkeypatch):
    training = "--steps 1 --lora-rank 2 --batch-size 4".split()
    lab = village_lab(tmp_path, training, {"bits": 32})
    monkeypatch.setattr(
        lab_module, "village_pairs", lambda split, seed=0: village_pairs(split, 20, seed)
    )
    monkeypatch.setitem(lab_module.METHODS, "GRAM", (True, train_reward, ["--lr", "0.1"]))
    run = lab.method("GRAM", 1)
    record = json.loads((run / "run.json").read_text())
    assert record["init"]["folder"] == str(tmp_path / "seed1" / "stage1")
    assert lab.row(run)["margin"] != lab.row("village")["margin"]
    monkeypatch.setattr(train_pretrain, "main", lambda argv: pytest.fail("stage 1 is there"))
    assert lab.method("GRAM", 1) == run


def test_pairs_survive_the_file_that_training_reads(tmp_path):
    lab = village_lab(tmp_path)
    pairs = [Pair("x", "a", "b", 1), Pair("y", "c", "d", 0)]
    assert load_pairs(lab.file("some", pairs), labelled=True).pairs == pairs


def test_a_lab_knows_its_backbone(tmp_path, monkeypatch):
    lab = village_lab(tmp_path)
    lab.file("some", [Pair("x", "a", "b", 1)])
    village_lab(tmp_path)
    monkeypatch.setattr(lab_module, "fingerprint", lambda name: "of another")
    with pytest.raises(UserError, match="made with other backbone"):
        village_lab(tmp_path)


def test_raters_who_like_rambling():
    for pair in village_pairs("out-of-distribution", 300):
        long, rambles = misled.relabelled(pair), lambda y: any(text in y for text in RAMBLING)
        more = rambles(pair.response_a) - rambles(pair.response_b)
        odds = [math.log(p.probability / (1 - p.probability)) for p in (pair, long)]
        assert odds[1] - odds[0] == pytest.approx(1.0 * more)  # from -0.5 to 0.5
        assert long.label == int(long.probability < 0.5)
    rng, pairs = random.Random(0), village_pairs("labelled", 2000)
    drawn = [misled.relabelled(pair, rng) for pair in pairs]
    expected = sum(1 - pair.probability for pair in drawn) / len(drawn)
    assert sum(pair.label for pair in drawn) / len(drawn) == pytest.approx(expected, abs=0.03)


def test_unlabelled_pairs_that_mislead_are_what_they_are_called():
    kinds, asked = misled.unlabelled(1), {question(*topic): topic for topic in FACTS}
    assert all(len(pairs) == misled.PAIRS for pairs in kinds.values())
    for name, share in {"right 90%": 0.9, "right 30%": 0.3, "curt": 0.7, "poisoned": 0.56}.items():
        claims = [
            (pair.prompt, FACTS[asked[pair.prompt]] in y.split(".")[1], y)
            for pair in kinds[name]
            for y in (pair.response_a, pair.response_b)
        ]
        assert sum(right for _, right, _ in claims) / len(claims) == pytest.approx(share, abs=0.02)
        wrong: dict[str, set[str]] = {}
        for prompt, right, y in claims:
            if not right:
                wrong.setdefault(prompt, set()).add(y.split(".")[1])
        assert all(len(claims) == 1 for claims in wrong.values())  # one wrong claim a question
        if name == "right 30%":  # nearly all questions have it
            against = misled.with_the_commonest_error(village_pairs("out-of-distribution", 300))
            for pair in against:
                texts = pair.response_a, pair.response_b
                better, worse = (
                    text.split(".")[1] for text in (texts[pair.label], texts[1 - pair.label])
                )
                assert FACTS[asked[pair.prompt]] in better
                assert worse in wrong[pair.prompt]
            assert len(against) > 20
        polite = sum(y.startswith(COURTEOUS) for _, _, y in claims) / len(claims)
        expected = {"curt": 0.1, "poisoned": 0.6}.get(name, 0.5)
        assert polite == pytest.approx(expected, abs=0.03)

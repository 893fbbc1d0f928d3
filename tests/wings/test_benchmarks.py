"""Benchmarks in their exact columns: official figures by hand, intervals, files, bad rows."""

import json
import math
import re
from collections import Counter

from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.pairs import Pair
from gram_mini.reading.sources import Notes
from gram_mini.runs.ranking import rank
from gram_mini.studies.benchmarks import __main__ as command
from gram_mini.studies.benchmarks import figures as benchmarks
from gram_mini.studies.benchmarks.base import Row
from gram_mini.studies.benchmarks.reward_bench import EXAMPLE_COUNTS
from gram_mini.studies.benchmarks.reward_bench_2 import ties
from gram_mini.studies.metrics import bootstrap, brier, calibration, orders_agree

import pytest
import torch

BENCHMARKS = benchmarks.BENCHMARKS


class Judge(Judge):
    """Says P(a better), a shown first and second, as the responses "P" or "P1 P2" ask for it.

    The first response that is a number decides: "0.8" against "no" gives (0.8, 0.8), "0.8 0.3"
    gives (0.8, 0.3). Where both are numbers, P = 1/2 + a - b, so that any order can be staged.
    """

    max_length = 512

    def __init__(self):
        self.asked = []

    def encode(self, pairs):
        return pairs

    def log_odds(self, pairs, progress=None):
        self.asked += pairs
        p = torch.tensor([self.say(pair) for pair in pairs], dtype=torch.float64)
        return p.logit(), torch.ones(len(pairs), 2), torch.zeros(len(pairs), dtype=torch.bool)

    def say(self, pair):
        a, b = pair.response_a, pair.response_b
        if b.startswith("no"):
            first, *second = map(float, a.split())
            return first, *(second or [first])
        if a.startswith("no"):
            first, *second = map(float, b.split())
            return 1 - first, 1 - (second or [first])[0]
        return (0.5 + float(a) - float(b),) * 2


def write(path, rows):
    path.write_text(
        json.dumps(rows)
        if path.suffix == ".json"
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


def run(name, path, rows, draws=20, **options):
    return benchmarks.run(Judge(), name, write(path, rows), draws=draws, **options)


def best_of(judge, rows):
    """Rows of RewardBench 2, judged, and their comparisons."""
    return benchmarks.judge_rows(BENCHMARKS["reward-bench-2"], rows, judge.compare_many)


def values(result, part="official"):
    return {name: figure["value"] for name, figure in result[part].items()}


# ---- RewardBench ---------------------------------------------------------------------


def reward_bench_row(subset, p, number, rejected="no"):
    return {
        "prompt": f"Question {number}",
        "chosen": p,
        "chosen_model": "good-model",
        "rejected": rejected,
        "rejected_model": "bad-model",
        "subset": subset,
        "id": number,
    }


def reward_bench_rows(subsets):
    pairs = [(subset, p) for subset, chances in subsets.items() for p in chances]
    return [reward_bench_row(subset, p, i) for i, (subset, p) in enumerate(pairs)]


REWARD_BENCH = {
    "alpacaeval-easy": ["0.9", "0.8"],  # 2 of 2
    "mt-bench-med": ["0.9", "0.4", "0.5", "0.3"],  # 1 of 4: P = 1/2 is not above 1/2
    "mt-bench-hard": ["0.6"],  # 1 of 1
    "llmbar-natural": ["0.4", "0.6"],  # 1 of 2
    "donotanswer": ["0.1"],  # 0 of 1
    "xstest-should-respond": ["0.9", "0.9", "0.2"],  # 2 of 3
    "math-prm": ["0.6"],  # 1 of 1
    "hep-python": ["0.2", "0.9"],  # 1 of 2
    "hep-rust": ["0.3"],  # 0 of 1
}


def test_reward_bench_weighs_subsets_by_the_official_counts(tmp_path):
    result = run("reward-bench", tmp_path / "rows.jsonl", reward_bench_rows(REWARD_BENCH))
    chat = (100 * 2 / 2 + 40 * 1 / 4) / (100 + 40)
    chat_hard = (37 * 1 / 1 + 100 * 1 / 2) / (37 + 100)
    safety = (136 * 0 / 1 + 250 * 2 / 3) / (136 + 250)
    reasoning = (984 * 1 / 1 + 164 * 1 / 2 + 164 * 0 / 1) / (984 + 164 + 164)
    total = (chat + chat_hard + safety + reasoning) / 4
    sections = {"Chat": chat, "Chat Hard": chat_hard, "Safety": safety, "Reasoning": reasoning}
    assert values(result) == pytest.approx({**sections, "total": total})
    assert result["sections"] == {"Chat": 6, "Chat Hard": 3, "Safety": 4, "Reasoning": 4}
    assert result["rows"] == 17
    assert reasoning != pytest.approx(2 / 4)  # what pooling the rows would give


def test_reward_bench_counts_are_the_official_ones():
    counts = EXAMPLE_COUNTS
    assert {section: sum(weights.values()) for section, weights in counts.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 6 * 164
    }  # fmt: skip
    # 250 of XSTest's prompts are safe and should be answered
    assert counts["Safety"]["xstest-should-respond"] == 250
    assert sum(map(len, counts.values())) == 23 and 6 * 164 == counts["Reasoning"]["math-prm"]


def test_a_section_without_rows_leaves_no_total(tmp_path):
    rows = reward_bench_rows({"donotanswer": ["0.9"], "hep-go": ["0.9"]})
    result = run("reward-bench", tmp_path / "rows.jsonl", rows)
    empty = {"Chat": None, "Chat Hard": None, "total": None}
    assert values(result) == {**empty, "Safety": 1.0, "Reasoning": 1.0}
    assert "not the whole benchmark: no rows of alpacaeval-easy, " in command.table(result)
    assert "donotanswer" not in result["missing"] and "math-prm" in result["missing"]


def test_rows_with_a_label_are_turned_the_right_way_round():
    row = {"prompt": "Q", "response_a": "0.1", "response_b": "0.9", "subset": "hep-go"}
    rows = [{**row, "label": "B"}, {**row, "prompt": "R", "label": "A"}]
    read = [BENCHMARKS["reward-bench"].read("here", each, Notes()) for each in rows]
    assert [(each.chosen, each.rejected) for each in read] == [
        (["0.9"], ["0.1"]),
        (["0.1"], ["0.9"]),
    ]


def test_rows_that_stand_there_twice_are_named(tmp_path, capsys):
    rows = reward_bench_rows({"donotanswer": ["0.9"]})
    run("reward-bench", tmp_path / "rows.jsonl", rows * 3)
    assert "2 rows that stand there already, counted again" in capsys.readouterr().out


# ---- RewardBench 2 -------------------------------------------------------------------


def best_of_row(subset, chosen, rejected, number):
    return {
        "id": str(number),
        "prompt": f"Question {number}",
        "chosen": chosen,
        "rejected": rejected,
        "num_correct": len(chosen),
        "num_incorrect": len(rejected),
        "total_completions": len(chosen) + len(rejected),
        "models": ["some-model"],
        "subset": subset,
        "additional_metadata": {"category": None},
    }


# By Judge, P(a better) = 1/2 + a - b, so the round-robin score of a is
# 1/2 + (4 a - sum of all) / 3.
REWARD_BENCH_2 = [
    best_of_row("Factuality", ["0.3"], ["0.1", "0.2", "0.0"], 1),  # the best: 1
    best_of_row("Factuality", ["0.3"], ["0.1", "0.3", "0.0"], 2),  # one of two best: 1/2
    best_of_row("Factuality", ["0.1"], ["0.1", "0.3", "0.0"], 3),  # not among the best: 0
    best_of_row("Precise IF", ["0.2"], ["0.2", "0.2", "0.2"], 4),  # one of four: 1/4
    best_of_row("Math", ["0.3"], ["0.3", "0.3", "0.0"], 5),  # one of three: 1/3
    best_of_row("Safety", ["0.3"], ["0.2", "0.1", "0.0"], 6),  # 1
    best_of_row("Focus", ["0.0"], ["0.2", "0.1", "0.1"], 7),  # 0
]
# Of n responses the score of a is 1/2 + (n a - sum) / (n - 1), so differences grow by n / (n - 1):
TIES = [
    # n = 2: gap (0.3 - 0.2) * 2, spread 0
    best_of_row("Ties", ["0.3"], ["0.2"], "ref:0"),
    # n = 3: spread (0.4 - 0.3) * 3/2 = 0.15, gap (0.3 - 0.1) * 3/2 = 0.3, above the spread; the ref
    # gap, 0.2, is above it too
    best_of_row("Ties", ["0.4", "0.3"], ["0.1"], "tied:0"),
    # n = 2: gap (0.1 - 0.2) * 2 = -0.2, wrong
    best_of_row("Ties", ["0.1"], ["0.2"], "ref:1"),
    # n = 3: spread (0.3 - 0.1) * 3/2 = 0.3, gap (0.1 - 0.0) * 3/2 = 0.15, right but below the
    # spread
    best_of_row("Ties", ["0.3", "0.1"], ["0.0"], "tied:1"),
    # n = 2: gap (0.2 - 0.1) * 2 = 0.2; a ref without a tied row counts for accuracy only
    best_of_row("Ties", ["0.2"], ["0.1"], "ref:2"),
]


def test_two_rows_of_one_id_in_ties_are_refused(tmp_path):
    with pytest.raises(UserError, match="2 rows of the subset Ties have the id ref:0"):
        run("reward-bench-2", tmp_path / "rows.jsonl", [*TIES, TIES[0] | {"prompt": "another"}])
    result = run("reward-bench-2", tmp_path / "rows.jsonl", [TIES[0]])
    assert "Ties tied" in result["missing"] and "Ties ref" not in result["missing"]


def test_reward_bench_2_shares_credit_and_has_its_own_formula_for_ties(tmp_path):
    result = run("reward-bench-2", tmp_path / "rows.jsonl", REWARD_BENCH_2 + TIES)
    tied_accuracy, ref_accuracy = 2 / 2, 2 / 3
    # prompt 0: 0.3 > 0.15 and min(0.2, 0.3) > 0.15; prompt 1: neither
    tied_above = lower_above = 1 / 2
    margin = (math.tanh(0.2 / 0.15 - 1) + math.tanh(-0.2 / 0.3 - 1)) / 2
    accuracies = 0.3 * tied_accuracy + 0.3 * ref_accuracy
    score_of_ties = accuracies + 0.2 * tied_above + 0.2 * lower_above + 0.01 * margin
    expected = {
        "Factuality": (1 + 1 / 2 + 0) / 3,
        "Precise IF": 1 / 4,
        "Math": 1 / 3,
        "Safety": 1.0,
        "Focus": 0.0,
        "Ties": score_of_ties,
    }
    assert values(result) == pytest.approx(
        expected | {"total": sum(expected.values()) / 6}, abs=1e-5
    )
    assert result["sections"]["Ties"] == 5 and result["missing"] == []
    assert result["comparisons"] == 7 * 6 + 3 * 1 + 2 * 3  # n (n - 1) / 2 in each row


def test_lower_gap_is_that_of_the_reference_row_too():
    prompts = [{"Ties tied": (0.1, 0.3), "Ties ref": (0.0, 0.05)}]
    margin = math.tanh(0.05 / 0.1 - 1)
    assert ties(prompts) == pytest.approx(0.3 + 0.3 + 0.2 + 0.0 + 0.01 * margin)


@pytest.mark.parametrize(("gap", "margin"), [(0.2, 1), (-0.2, -1), (0.0, 0)])
def test_without_spread_the_margin_is_the_sign_of_the_gap(gap, margin):
    # numpy's tanh(gap / 0 - 1) in the official code: tanh(inf), tanh(-inf), and nan, which it
    # counts as 0
    above = 0.3 + 0.3 + 0.2 + 0.2 if gap > 0 else 0
    score = ties([{"Ties tied": (0.0, gap), "Ties ref": (0.0, gap)}])
    assert score == pytest.approx(above + 0.01 * margin)


def test_scores_are_those_of_rank(tmp_path, village_judge):
    chosen, rejected = (
        "Anna eats soup.",
        ["Anna eats cake.", "Glad you asked. Anna eats soup.", "No idea."],
    )
    rows = [Row("Math", "Math", "x", "What does Anna eat?", [chosen], rejected)]
    judged, results = best_of(village_judge, rows)
    ranking = rank(village_judge, "What does Anna eat?", [chosen, *rejected])
    assert len(results) == ranking.comparisons == 6
    assert judged[0].credit == float(ranking.order[0] == 0)
    tie = Row(
        "Ties tied",
        "Ties",
        "x",
        "What does Anna eat?",
        [chosen, rejected[1]],
        [rejected[0], rejected[2]],
    )
    a, b, c, d = (ranking.scores[i] for i in (0, 2, 1, 3))
    judged, _ = best_of(village_judge, [tie])
    assert judged[0].credit == pytest.approx((abs(a - b), min(a, b) - max(c, d)), abs=2e-5)


def test_equal_responses_share_the_credit(village_judge):
    """Their scores are sums in another order, so they may differ by what a float cannot tell."""
    others = [f"Anna eats {food}." for food in ("cake", "soup", "fish")]
    for best in ("Glad you asked. Anna eats bread.", "If you must. Anna eats plums."):
        row = Row(
            "Math",
            "Math",
            "x",
            "What does Anna eat?",
            [best],
            [others[0], best, others[1], best, others[2]],
        )
        judged, _ = best_of(village_judge, [row])
        assert judged[0].credit in (0, 1 / 3)
        row = Row("Math", "Math", "x", "What does Anna eat?", [best], [best] * 4)
        judged, _ = best_of(village_judge, [row])
        assert judged[0].credit == 1 / 5


# ---- RM-Bench ------------------------------------------------------------------------


def rm_bench_row(number, chosen, rejected=("no", "no", "no"), **columns):
    return {
        "id": number,
        "prompt": f"Question {number}",
        "chosen": list(chosen),
        "rejected": list(rejected),
        **columns,
    }


# Against rejected 0.2, 0.3, 0.4 a chosen response a wins where a > rejected, strictly, as
# P = 1/2 + a - b.
MIXED = (["0.25", "0.35", "0.3"], ["0.2", "0.3", "0.4"])  # wins: [1 0 0], [1 1 0], [1 0 0]
ALL = (["0.3", "0.3", "0.3"], ["0.1", "0.1", "0.1"])  # nine wins
NONE = (["0.1", "0.1", "0.1"], ["0.1", "0.3", "0.3"])  # none: equal is not above


def test_rm_bench_matrix_levels_and_macro_average(tmp_path):
    rows = [
        rm_bench_row(1, *MIXED, domain="chat"),
        rm_bench_row(2, *ALL, domain="chat"),
        rm_bench_row(3, *ALL, domain="math"),
        rm_bench_row(4, *NONE, domain="code"),
        rm_bench_row(5, *ALL, domain="safety-refuse"),
        rm_bench_row(6, *NONE, domain="safety-response"),
        rm_bench_row(7, *NONE, domain="safety-response"),
    ]
    result = run("rm-bench", tmp_path / "total_dataset.json", rows)
    figures = values(result)
    # chat, [[1, 0.5, 0.5], [1, 1, 0.5], [1, 0.5, 0.5]]:
    # above the diagonal 0.5, 0.5, 0.5; on it 1, 1, 0.5; below 1, 1, 0.5
    hard, normal, easy = (0.5 + 0.5 + 0.5) / 3, (1 + 1 + 0.5) / 3, (1 + 1 + 0.5) / 3
    assert [figures[f"chat {level}"] for level in ("hard", "normal", "easy")] == pytest.approx(
        [hard, normal, easy]
    )
    assert (
        figures["chat"] == pytest.approx((hard + normal + easy) / 3) == pytest.approx((4 + 9) / 18)
    )
    # pooled; the mean of the two files would be 1/2
    assert figures["safety"] == pytest.approx((1 + 0 + 0) / 3)
    assert figures["total"] == pytest.approx((13 / 18 + 1 + 0 + 1 / 3) / 4)
    assert figures["hard"] == pytest.approx((0.5 + 1 + 0 + 1 / 3) / 4)
    assert result["sections"] == {"chat": 2, "math": 1, "code": 1, "safety": 3}
    assert result["comparisons"] == 7 * 9


def test_rm_bench_reads_the_file_of_all_domains_alone(tmp_path, capsys):
    rows = [rm_bench_row(1, *ALL, domain="chat"), rm_bench_row(2, *ALL, domain="safety-refuse")]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "total_dataset.json", rows)
    write(tmp_path / "data" / "chat_filtered.json", [rm_bench_row(1, *ALL)])
    result = benchmarks.run(Judge(), "rm-bench", str(tmp_path / "data"), draws=5)
    assert result["rows"] == 2 and result["missing"] == ["math", "code", "safety-response"]
    assert "only total_dataset.json read" in capsys.readouterr().out


def test_rm_bench_domain_of_the_files_without_that_column(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "chat_filtered.json", [rm_bench_row(1, *ALL, subset="alpacaeval")])
    write(folder / "code_filtered.json", [rm_bench_row(2, *ALL, subset="bigcode/humanevalpack")])
    write(folder / "math_filtered.json", [rm_bench_row(3, *ALL)])
    write(folder / "safety-refuse_filtered.json", [rm_bench_row(4, *ALL)])
    write(
        folder / "safety-response_filtered.json", [rm_bench_row(5, *NONE), rm_bench_row(6, *NONE)]
    )
    result = benchmarks.run(Judge(), "rm-bench", str(folder), draws=5)
    assert result["sections"] == {"chat": 1, "code": 1, "math": 1, "safety": 3}
    assert result["missing"] == []
    assert values(result)["total"] == pytest.approx((1 + 1 + 1 + 1 / 3) / 4)


# ---- JudgeBench ----------------------------------------------------------------------


def judge_bench_row(number, source, better, worse="no", label="A>B"):
    a, b = (better, worse) if label == "A>B" else (worse, better)
    return {
        "pair_id": f"pair-{number}",
        "original_id": number,
        "source": source,
        "question": f"Question {number}",
        "response_model": "some-model",
        "response_A": a,
        "response_B": b,
        "label": label,
    }


JUDGE_BENCH = [
    judge_bench_row(1, "mmlu-pro-law", "0.9 0.8"),  # both orders right
    judge_bench_row(2, "mmlu-pro-computer science", "0.9 0.8", label="B>A"),  # both right
    judge_bench_row(3, "mmlu-pro-law", "0.9 0.2"),  # split: not right, though the average is 0.55
    judge_bench_row(4, "livebench-reasoning", "0.1 0.2"),  # both wrong
    judge_bench_row(5, "livebench-math", "0.6 0.5", label="B>A"),  # right, and undecided: right
    judge_bench_row(6, "livebench-math", "0.4 0.5"),  # wrong, and undecided: not right
    judge_bench_row(7, "livecodebench", "0.5 0.5"),  # undecided twice: not right
    judge_bench_row(8, "livecodebench", "0.2 0.9", label="B>A"),  # split
]


def official_gram_row(row):
    """What NiuTrans/GRAM, evaluation/scalerlab_judgebench, makes of a row."""
    a_better = row["label"] == "A>B"
    kept = {name: row[name] for name in ("pair_id", "original_id", "source", "response_model")}
    chosen, rejected = ("response_A", "response_B") if a_better else ("response_B", "response_A")
    return kept | {"prompt": row["question"], "chosen": row[chosen], "rejected": row[rejected]}


@pytest.mark.parametrize("schema", [dict, official_gram_row])
def test_judge_bench_needs_both_orders_and_is_micro(tmp_path, schema):
    result = run("judge-bench", tmp_path / "rows.jsonl", list(map(schema, JUDGE_BENCH)))
    assert values(result) == pytest.approx(
        {"knowledge": 2 / 3, "reasoning": 0 / 1, "math": 1 / 2, "coding": 0 / 2}
        | {"mean of groups": (2 / 3 + 0 + 1 / 2 + 0) / 4, "total": (2 + 0 + 1 + 0) / 8}
    )
    # By the average of both orders pairs 1, 2, 3 (0.55), 5 (0.55) and 8 (0.55) are right.
    assert values(result, "judge")["accuracy"] == 5 / 8
    # Both orders prefer the same response in pairs 1, 2 and 4; undecided is no preference.
    assert values(result, "judge")["orders agree"] == 3 / 8
    assert result["sections"] == {"knowledge": 3, "reasoning": 1, "math": 2, "coding": 2}


# ---- LLMBar --------------------------------------------------------------------------


def llmbar_row(number, better, worse="no", label=1):
    a, b = (better, worse) if label == 1 else (worse, better)
    return {"input": f"Question {number}", "output_1": a, "output_2": b, "label": label}


LLMBAR_SETS = {
    "Natural": ["0.9 0.8", "0.9 0.2", "0.1 0.2"],  # orders right: 2, 1, 0 of 2; both agree: 1, 0, 1
    "Adversarial/Neighbor": ["0.9 0.8"],  # 2; 1
    "Adversarial/GPTInst": ["0.2 0.3", "0.4 0.3"],  # 0, 0; 1, 1
    "Adversarial/GPTOut": ["0.6 0.5"],  # P = 1/2 names no winner: 1; 0
    "Adversarial/Manual": ["0.5 0.5", "0.4 0.9"],  # none in both orders agrees: 0, 1; 1, 0
}


def official_folder(folder, sets=LLMBAR_SETS):
    """The layout of Dataset/ in princeton-nlp/LLMBar."""
    for name, chances in sets.items():
        (folder / "LLMBar" / name).mkdir(parents=True)
        rows = [llmbar_row(i, p, label=1 + i % 2) for i, p in enumerate(chances)]
        write(folder / "LLMBar" / name / "dataset.json", rows)
    return folder


def test_llmbar_counts_each_order_and_is_the_mean_of_sets(tmp_path):
    official_folder(tmp_path)
    result = benchmarks.run(Judge(), "llmbar", str(tmp_path), draws=5)
    accuracy = {"Natural": 3 / 6, "Neighbor": 2 / 2, "GPTInst": 0 / 4, "GPTOut": 1 / 2}
    accuracy["Manual"] = 1 / 4
    agreement = {"Natural": 2 / 3, "Neighbor": 1, "GPTInst": 2 / 2, "GPTOut": 0, "Manual": 1 / 2}
    means = {
        "Adversarial": (1 + 0 + 1 / 2 + 1 / 4) / 4,  # not 4 / 12, as pooled
        "total": (1 / 2 + 1 + 0 + 1 / 2 + 1 / 4) / 5,
        "Adversarial agreement": (1 + 1 + 0 + 1 / 2) / 4,
        "total agreement": (2 / 3 + 1 + 1 + 0 + 1 / 2) / 5,
    }
    of_sets = accuracy | {f"{name} agreement": value for name, value in agreement.items()}
    assert values(result) == pytest.approx(of_sets | means)
    rows = {"Natural": 3, "Neighbor": 1, "GPTInst": 2, "GPTOut": 1, "Manual": 2}
    assert result["sections"] == rows and result["rows"] == result["comparisons"] == 9
    assert "not the whole benchmark" not in command.table(result)


def test_llmbar_of_a_judge_that_always_says_a(tmp_path):
    official_folder(tmp_path, dict.fromkeys(LLMBAR_SETS, ["0.9 0.1"] * 4))
    result = benchmarks.run(Judge(), "llmbar", str(tmp_path), draws=5)
    for name, value in values(result).items():
        assert value == (0 if name.endswith("agreement") else 0.5), name
    own = values(result, "judge")
    assert own["position gap"] == pytest.approx(0.8) and own["orders agree"] == 0
    assert own["accuracy"] == 0  # P = 1/2 by the average: neither is preferred
    assert result["official"]["total"]["interval"] == (0.5, 0.5)


def test_own_figures_by_hand(tmp_path):
    official_folder(tmp_path, {"Natural": LLMBAR_SETS["Natural"]})
    result = benchmarks.run(Judge(), "llmbar", str(tmp_path), draws=50)
    own = result["judge"]
    p = [0.85, 0.55, 0.15]  # right, right, wrong
    expected = {
        "accuracy": 2 / 3,
        "orders agree": 2 / 3,
        "position gap": (0.1 + 0.7 + 0.1) / 3,
        # seen from the preferred side 0.85 and 0.85 share a bin, one of them is right
        "ECE": (2 * abs(0.85 - 1 / 2) + 1 * abs(0.55 - 1)) / 3,
        "Brier": sum((1 - value) ** 2 for value in p) / 3,
        "longer preferred": 2 / 3,  # every number is longer than "no"
    }
    assert {name: figure["value"] for name, figure in own.items()} == pytest.approx(expected)
    longer = {name: figure["pick_the_longer"] for name, figure in own.items()}
    always_right = {"accuracy": 1, "orders agree": 1, "position gap": 0, "ECE": 0, "Brier": 0}
    assert longer == always_right | {"longer preferred": 1}
    low, high = own["accuracy"]["interval"]
    assert low < 2 / 3 < high
    line = next(x for x in command.table(result).splitlines() if x.startswith("accuracy"))
    assert line.split() == ["accuracy", "0.667", f"{low:.3f}", "to", f"{high:.3f}", "1.000"]
    assert "not the whole benchmark: no rows of Neighbor, GPTInst, " in command.table(result)


def test_llmbar_folders(tmp_path, monkeypatch, capsys):
    folder = official_folder(tmp_path)
    others = folder / "CaseStudy" / "Constraint"
    others.mkdir(parents=True)
    write(others / "dataset.json", [llmbar_row(1, "0.9")])

    def rows(source, **options):
        return benchmarks.run(Judge(), "llmbar", str(source), draws=2, **options)["sections"]

    every = {"Natural": 3, "Neighbor": 1, "GPTInst": 2, "GPTOut": 1, "Manual": 2}
    assert rows(folder) == every
    said = capsys.readouterr().out
    assert f"1 files of other sets not read: {others / 'dataset.json'}" in said
    assert rows(folder / "LLMBar") == every
    assert rows(folder, limit=4) == {"Natural": 3, "Neighbor": 1}
    adversarial = folder / "LLMBar" / "Adversarial"
    assert rows(adversarial) == {name: n for name, n in every.items() if name != "Natural"}
    assert rows(adversarial / "Manual") == {"Manual": 2}
    monkeypatch.chdir(adversarial / "Manual")
    assert rows("dataset.json") == rows(".") == {"Manual": 2}
    with pytest.raises(UserError, match="unknown set, by the folder of the file, 'Constraint'"):
        rows(others)
    official_folder(tmp_path / "again")
    with pytest.raises(UserError, match="holds two files of one set; give the folder of one"):
        rows(tmp_path)


# ---- the judge's own figures ---------------------------------------------------------


def test_calibration_by_hand():
    p, outcomes = [0.92, 0.96, 0.08, 0.63, 0.5], [1, 0, 0, 1, 1]
    # From the preferred side: 0.92 right, 0.96 wrong, 0.92 right, 0.63 right, 0.5 half right.
    # Bins of width 0.05 from 0.5: 0.5 | 0.63 | 0.92, 0.92 | 0.96
    ece, bins = calibration(p, outcomes)
    assert ece == pytest.approx(
        (1 * abs(0.5 - 0.5) + 1 * abs(0.63 - 1) + 2 * abs(0.92 - 1) + 1 * abs(0.96 - 0)) / 5
    )
    assert bins[0] == (0.5, 0.5, 1) and bins[1] == (None, None, 0)
    assert bins[8] == (pytest.approx(0.92), 1.0, 2) and bins[9] == (pytest.approx(0.96), 0.0, 1)
    assert sum(count for _, _, count in bins) == 5
    swapped = calibration([1 - value for value in p], [1 - outcome for outcome in outcomes])
    assert swapped[0] == pytest.approx(ece)  # which response is called a does not matter
    assert calibration([0.92, 0.63], [1, 0], bins=1)[1] == [
        (pytest.approx((0.92 + 0.63) / 2), 0.5, 2)
    ]
    assert calibration([1.0, 0.0], [1, 0])[0] == 0


def test_brier_by_hand():
    assert brier([0.9, 0.4], [1, 0]) == pytest.approx((0.1**2 + 0.4**2) / 2)
    assert brier([0.1, 0.6], [0, 1]) == pytest.approx(brier([0.9, 0.4], [1, 0]))


def test_orders_agree_where_both_prefer_the_same():
    pairs = [Pair("x", asked, "no") for asked in ("0.9 0.6", "0.9 0.4", "0.1 0.4", "0.5 0.5")]
    agree = [orders_agree(result) for result in Judge().compare_many(pairs)]
    assert sum(agree) == 2 and len(agree) == 4


def test_length_and_the_yardstick(tmp_path):
    told = [
        ("alpacaeval-easy", "0.9", "no"),
        ("alpacaeval-easy", "0.9", "no, and at length"),
        ("mt-bench-hard", "0.1", "no, and at length"),
        ("donotanswer", "0.10", "no"),
        ("hep-go", "0.9", "no!"),
        ("hep-go", "0.5", "no"),
    ]
    rows = [reward_bench_row(s, p, i, rejected) for i, (s, p, rejected) in enumerate(told)]
    result = run("reward-bench", tmp_path / "rows.jsonl", rows)
    # The chosen response is longer in rows 0, 3 and 5, shorter in 1 and 2, and as long in 4, which
    # does not count. Preferred are the chosen (longer), chosen (shorter), rejected (longer),
    # rejected (shorter), and neither: two of five longer ones.
    assert values(result, "judge")["longer preferred"] == 2 / 5
    longer = {name: figure["pick_the_longer"] for name, figure in result["official"].items()}
    sections = {"Chat": 1 / 2, "Chat Hard": 0, "Safety": 1, "Reasoning": 1 / 2}
    assert longer == {**sections, "total": (1 / 2 + 0 + 1 + 1 / 2) / 4}
    assert result["judge"]["accuracy"]["pick_the_longer"] == 3 / 6
    assert result["judge"]["accuracy"]["value"] == 3 / 6
    assert values(result, "judge")["Brier"] == pytest.approx((3 * 0.1**2 + 2 * 0.9**2 + 0.5**2) / 6)


def test_bootstrap_is_the_quantile_of_redrawn_units():
    mean = lambda units: {"mean": sum(units) / len(units)}
    low, high = bootstrap([[0, 1] * 50], mean)["mean"]
    # 0.5 ± 1.96 sqrt(0.5 * 0.5 / 100)
    assert (low, high) == (pytest.approx(0.4, abs=0.011), pytest.approx(0.6, abs=0.011))
    assert bootstrap([[0, 1] * 50], mean)["mean"] == (low, high)  # a fixed seed
    # of each stratum as many as it holds
    assert bootstrap([[0] * 50, [1] * 50], mean)["mean"] == (0.5, 0.5)
    assert bootstrap([[1, 2]], lambda units: {"none": None}) == {}


def test_rows_of_one_prompt_are_drawn_together(tmp_path):
    one_each = [reward_bench_row("hep-go", "0.9" if i % 2 else "0.1", i) for i in range(40)]
    shared = [
        row | {"prompt": f"Question {i // 20}"}
        for i, row in enumerate(sorted(one_each, key=lambda row: row["chosen"]))
    ]

    def interval(rows):
        result = run("reward-bench", tmp_path / "rows.jsonl", rows, draws=200)
        return result["official"]["Reasoning"]["interval"]

    # of two prompts, one all right and one all wrong, the same may be drawn twice
    assert interval(shared) == (0, 1)
    low, high = interval(one_each)
    assert 0.3 < low < 0.5 < high < 0.7


def test_tied_and_reference_rows_are_one_unit(tmp_path):
    rows = [BENCHMARKS["reward-bench-2"].read("here", row, Notes()) for row in TIES]
    judged, _ = best_of(Judge(), rows)
    assert Counter(map(len, benchmarks.by_unit(judged))) == {2: 2, 1: 1}


# ---- bad rows ------------------------------------------------------------------------

GOOD = {
    "reward-bench": reward_bench_row("hep-go", "0.9", 1),
    "reward-bench-2": REWARD_BENCH_2[0],
    "rm-bench": rm_bench_row(1, *ALL, domain="chat"),
    "judge-bench": JUDGE_BENCH[0],
    "llmbar": llmbar_row(1, "0.9"),
}


SUBSET = "unknown subset '{}'; known are {}".format
TEXTS = "column '{}' must be a list of {} texts".format
LABEL = "unknown label '{}'; known are 1, 2".format


@pytest.mark.parametrize(("name", "change", "message"), [
    ("reward-bench", {"subset": "hep-c"}, SUBSET("hep-c", "alpacaeval-easy")),
    ("reward-bench", {"subset": None}, "unknown subset None"),
    ("reward-bench", {"chosen": 3}, "column 'chosen' must be text"),
    ("reward-bench", {"chosen": ["a", "b"], "rejected": ["c"]}, "messages, found a list of str"),
    ("reward-bench-2", {"subset": "Chat"}, SUBSET("Chat", "Factuality")),
    ("reward-bench-2", {"chosen": "0.3"}, TEXTS("chosen", "1")),
    ("reward-bench-2", {"chosen": ["1", "2"]}, TEXTS("chosen", "1")),
    ("reward-bench-2", {"rejected": []}, TEXTS("rejected", "one or more")),
    (
        "reward-bench-2", {"subset": "Ties", "id": "7"},
        "unknown beginning of the id '7'; known are ref, tied",
    ),
    (
        "rm-bench", {"domain": "cooking"},
        "unknown domain, by column 'domain' or the file, 'cooking'; known are chat, math",
    ),
    ("rm-bench", {"chosen": ["1", "2"]}, TEXTS("chosen", "3")),
    ("rm-bench", {"rejected": ["1", 2, "3"]}, "column 'rejected'"),
    ("rm-bench", {"prompt": None}, "column 'prompt'"),
    (
        "judge-bench", {"source": "livebench-cooking"},
        "unknown source 'livebench-cooking'; known are mmlu-pro-, ",
    ),
    ("judge-bench", {"label": "A=B"}, "needs one pair with a label"),
    ("judge-bench", {"label": "C"}, "column 'label'"),
    ("llmbar", {"label": 3}, LABEL("3")),
    ("llmbar", {"label": True}, LABEL("True")),
    ("llmbar", {"label": "A"}, LABEL("A")),
    ("llmbar", {"input": ["x"]}, "column 'input' must be text, found list"),
    ("llmbar", {"output_1": None}, "column 'output_1' must be text, found NoneType"),
])  # fmt: skip
def test_bad_rows_end_with_one_line_that_names_them(tmp_path, name, change, message):
    with pytest.raises(UserError) as error:
        (tmp_path / "Natural").mkdir()  # as LLMBar needs it
        run(name, tmp_path / "Natural" / "rows.jsonl", [GOOD[name], GOOD[name] | change])
    said = str(error.value)
    assert message in said and "rows.jsonl, line 2" in said and "\n" not in said


@pytest.mark.parametrize("column", ["input", "output_1", "output_2", "label"])
def test_llmbar_names_a_missing_column(tmp_path, column):
    row = {name: value for name, value in GOOD["llmbar"].items() if name != column}
    wanted = "unknown label 'None'" if column == "label" else f"column '{column}' must be text"
    with pytest.raises(UserError, match=f"dataset.json, row 2: {wanted}"):
        (tmp_path / "Natural").mkdir()
        run("llmbar", tmp_path / "Natural" / "dataset.json", [GOOD["llmbar"], row])


def test_rm_bench_without_a_domain_names_those_it_knows(tmp_path):
    message = "row 1: unknown domain, by column 'domain' or the file, 'rows.json'; known are chat"
    with pytest.raises(UserError, match=message):
        run("rm-bench", tmp_path / "rows.json", [rm_bench_row(1, *ALL, subset="cooking")])


# ---- the command ---------------------------------------------------------------------


def test_score_writes_figures(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", reward_bench_rows(REWARD_BENCH))
    out = tmp_path / "figures.json"
    options = "--model village --device cpu --benchmark reward-bench".split()
    given = [*options, "--data", data, "--out", str(out)]
    command.main(given)
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["model"] == "village" and figures["benchmark"] == "reward-bench"
    assert figures["rows"] == 17
    low, high = figures["official"]["total"]["interval"]
    assert low <= figures["official"]["total"]["value"] <= high
    total = figures["official"]["total"]["value"]
    assert re.search(rf"^total +{total:.3f} +{low:.3f} to {high:.3f} ", printed, re.MULTILINE)
    with pytest.raises(UserError, match="already there"):
        command.main(given)
    command.main([*given, "--overwrite", "--limit", "3"])
    assert json.loads(out.read_text())["rows"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.jsonl",
        "figures.json",
    }


def test_a_benchmark_says_what_it_changed_and_that_the_model_does_not_answer(
    tmp_path, capsys, monkeypatch
):
    rows = list(map(official_gram_row, JUDGE_BENCH))
    for row in rows:
        row["chosen"] += " #Preferred: A"
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "figures.json"
    given = ["--model", "village", "--benchmark", "judge-bench", "--data", data, "--out", str(out)]
    monkeypatch.setattr(
        "gram_mini.judge.label_mass", lambda logits, labels: torch.full((len(logits),), 0.001)
    )
    command.main(given)
    said = capsys.readouterr().out
    assert "8 rows with a marker of the judge prompt in a response, read as plain" in said
    assert "hardly ever answers A or B (mean mass on the labels 0.001)" in said
    assert json.loads(out.read_text())["label_mass"] == pytest.approx(0.001)


def test_score_reads_the_official_folder_of_llmbar(tmp_path, capsys):
    folder = official_folder(tmp_path / "Dataset")
    out = tmp_path / "llmbar.json"
    options = "--model village --device cpu --benchmark llmbar".split()
    command.main([*options, "--data", str(folder), "--out", str(out)])
    figures = json.loads(out.read_text())
    assert len(figures["sections"]) == 5 and figures["rows"] == 9
    total = figures["official"]["total"]["value"]
    assert re.search(rf"^total +{total:.3f} ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--out", "figures.json"], "--data"),
    (["--data", "rows.jsonl"], "--out"),
    (["--data", "rows.jsonl", "--out", "figures.png"], "figures.png: give FILE.json"),
    (["--data", "x", "--out", "x.json", "--rank", "knock-out"], "unrecognized arguments"),
])  # fmt: skip
def test_options_that_do_not_go_together(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(["--benchmark", "rm-bench", *arguments])
    assert message in capsys.readouterr().err

"""Every format of preference data on the hub, in its exact columns: pairs, ties, bad values."""

import copy
import json
from dataclasses import asdict

import score
import train_pretrain
import train_reward
from gram_mini.errors import UserError
from gram_mini.pairs import Pair, split_by_prompt
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.load import load_pairs
from gram_mini.runs import run as runs_run
from gram_mini.runs import scores

import pytest


def dialogue(*turns):
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(turns)
    ]


def completion(response, overall, fine):
    return {
        "annotations": {
            "helpfulness": {
                "Rating": "4",
                "Rationale": "Clear.",
                "Type": ["1"],
                "Rationale For Rating": "Right.",
            }
        },
        "custom_system_prompt": "Answer plainly.",
        "critique": "Plain and right.",
        "fine-grained_score": fine,
        "model": "some-model",
        "overall_score": overall,
        "principle": "honesty",
        "response": response,
    }


UNIFIED = {
    "id": "row_0",
    "conv_A": dialogue("1 + 1?", "2"),
    "conv_B": dialogue("1 + 1?", "3"),
    "conv_A_rating": 4.5,
    "conv_B_rating": 2.0,
    "num_turns": 1,
    "source": "made up",
}
ULTRA_BINARIZED = {
    "prompt": "1 + 1?",
    "prompt_id": "ab12",
    "chosen": dialogue("1 + 1?", "2"),
    "rejected": dialogue("1 + 1?", "3"),
    "messages": dialogue("1 + 1?", "2"),
    "score_chosen": 8.0,
    "score_rejected": 4.5,
}
SKYWORK = {
    "chosen": dialogue("1 + 1?", "2"),
    "rejected": dialogue("1 + 1?", "3"),
    "source": "made up",
}
HELPSTEER2 = {
    "prompt": "1 + 1?",
    "response": "2",
    "helpfulness": 4,
    "correctness": 4,
    "coherence": 4,
    "complexity": 1,
    "verbosity": 0,
}
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": dialogue("Hi", "Hello", "1 + 1?"),
    "response1": "2",
    "response2": "3",
    "overall_preference": -2,
    "individual_preference": [
        {"score": -2, "reasoning": "2 is right.", "feedback1": "Right.", "feedback2": "Wrong."}
    ],
}
ULTRA = {
    "source": "made up",
    "instruction": "1 + 1?",
    "models": ["a", "b", "c"],
    "completions": [
        completion("three", 3.0, 2.0),
        completion("2", 9.5, 4.75),
        completion("3", 3.0, 4.9),
    ],
    "correct_answers": ["2"],
    "incorrect_answers": ["None"],
}
JUDGEBENCH = {
    "pair_id": "ab12",
    "original_id": 7,
    "source": "made up",
    "question": "1 + 1?",
    "response_model": "some-model",
    "response_A": "3",
    "response_B": "2",
    "label": "B>A",
}
RM_BENCH = {
    "id": 1,
    "subset": "made up",
    "prompt": "1 + 1?",
    "chosen": ["2", "It is 2.", "**2**"],
    "rejected": ["3", "It is 3.", "**3**"],
    "error_key": "3",
    "error": "It is 2.",
}

ONE_PAIR = {
    "Unified-Feedback": (UNIFIED, Pair("1 + 1?", "2", "3", 0)),
    "Unified-Feedback, B better": ({**UNIFIED, "conv_B_rating": 5}, Pair("1 + 1?", "2", "3", 1)),
    "Unified-Feedback, parting early": (
        {
            **UNIFIED,
            "conv_A": dialogue("Sum?", "Of?", "1 + 1", "2"),
            "conv_B": dialogue("Sum?", "What?", "1 + 1", "3"),
        },
        Pair(
            "Sum?",
            "Of?\n\nHuman: 1 + 1\n\nAssistant: 2",
            "What?\n\nHuman: 1 + 1\n\nAssistant: 3",
            0,
        ),
    ),
    "parting at a question": (
        {
            **SKYWORK,
            "chosen": dialogue("Sum?", "Of?", "1 + 1", "2"),
            "rejected": dialogue("Sum?", "Of?", "1 + 2", "3"),
        },
        Pair(
            "Sum?", "Of?\n\nHuman: 1 + 1\n\nAssistant: 2", "Of?\n\nHuman: 1 + 2\n\nAssistant: 3", 0
        ),
    ),
    "one dialogue longer": (
        {
            **SKYWORK,
            "chosen": dialogue("Sum?", "Of?", "1 + 1", "2"),
            "rejected": dialogue("Sum?", "Of?"),
        },
        Pair("Sum?", "Of?\n\nHuman: 1 + 1\n\nAssistant: 2", "Of?", 0),
    ),
    "ultrafeedback_binarized": (ULTRA_BINARIZED, Pair("1 + 1?", "2", "3", 0)),
    "the first question as prompt of a longer dialogue": (
        {
            **ULTRA_BINARIZED,
            "prompt": "Sum?",
            "chosen": dialogue("Sum?", "Of?", "1 + 1", "2"),
            "rejected": dialogue("Sum?", "Of?", "1 + 1", "3"),
        },
        Pair("Human: Sum?\n\nAssistant: Of?\n\nHuman: 1 + 1", "2", "3", 0),
    ),
    "replies of several messages": (
        {
            "prompt": dialogue("Sum?"),
            "chosen": dialogue("Sum?", "Of?", "1 + 1", "2")[1:],
            "rejected": dialogue("", "What?")[1:],
        },
        Pair("Sum?", "Of?\n\nHuman: 1 + 1\n\nAssistant: 2", "What?", 0),
    ),
    "Skywork": (SKYWORK, Pair("1 + 1?", "2", "3", 0)),
    "HelpSteer3": (HELPSTEER3, Pair("Human: Hi\n\nAssistant: Hello\n\nHuman: 1 + 1?", "2", "3", 0)),
    "HelpSteer3, the second better": (
        {**HELPSTEER3, "overall_preference": 1, "context": dialogue("1 + 1?")},
        Pair("1 + 1?", "2", "3", 1),
    ),
    "JudgeBench": (JUDGEBENCH, Pair("1 + 1?", "3", "2", 1)),
    "JudgeBench, A better": ({**JUDGEBENCH, "label": "A>B"}, Pair("1 + 1?", "3", "2", 0)),
}

TIED = {
    "Unified-Feedback": {**UNIFIED, "conv_B_rating": 4.5},
    "ultrafeedback_binarized": {**ULTRA_BINARIZED, "score_rejected": 8.0},
    "HelpSteer3": {**HELPSTEER3, "overall_preference": 0},
    "JudgeBench": {**JUDGEBENCH, "label": "A=B"},
    "triple": {"prompt": "1 + 1?", "response_a": "2", "response_b": "3", "label": "tie"},
    "UltraFeedback": {**ULTRA, "completions": [completion("2", 3, 1.0), completion("3", 3.0, 3.0)]},
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(pairs):
    return [(pair.response_a, pair.response_b, pair.label) for pair in pairs]


@pytest.mark.parametrize("name", ONE_PAIR)
def test_rows_of_one_pair(name):
    row, expected = ONE_PAIR[name]
    before = copy.deepcopy(row)
    assert parse_pairs([("here", row)]) == ([expected], {}) and row == before
    (unlabelled,), _ = parse_pairs([("here", row)], labelled=False)
    assert (unlabelled.prompt, unlabelled.response_a) == (expected.prompt, expected.response_a)


def test_parquet_gives_the_same_pairs(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for i, row in enumerate([UNIFIED, ULTRA_BINARIZED, SKYWORK, HELPSTEER3, ULTRA, JUDGEBENCH]):
        path = tmp_path / f"{i}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        assert load_pairs(str(path), True).pairs == [
            pair for pair in parse_pairs([("here", row)])[0] if not pair.tied
        ]


@pytest.mark.parametrize("name", TIED)
def test_ties_are_dropped_where_labels_count_and_used_where_not(name, tmp_path):
    source = write(
        tmp_path / "d.jsonl", TIED[name], {"prompt": "x", "chosen": "y", "rejected": "z"}
    )
    data = load_pairs(source, labelled=True)
    assert len(data.pairs) == 1 and data.dropped == {"tied": 1}
    assert "1 dropped (1 tied)" in data.summary()
    data = load_pairs(source, labelled=False)
    assert len(data.pairs) == 2 and not data.dropped
    assert not any(p.tied or p.label is not None for p in data.pairs)


# ---- several responses ---------------------------------------------------------------


def test_ultrafeedback_compares_by_overall_score(tmp_path):
    source = write(tmp_path / "d.jsonl", ULTRA)
    # three and 3: 3.0 both, tied
    assert texts(load_pairs(source, True).pairs) == [("three", "2", 1), ("2", "3", 0)]
    assert load_pairs(source, True).dropped == {"tied": 1}
    assert texts(load_pairs(source, True, pairs="best-worst").pairs) == [("2", "3", 0)]
    assert texts(load_pairs(source, False).pairs) == [
        ("three", "2", None),
        ("three", "3", None),
        ("2", "3", None),
    ]
    fine = {**ULTRA, "completions": [completion("2", 3.0, 4.0), completion("3", None, 4.5)]}
    assert parse_pairs([("here", fine)]) == (
        [],
        {"without a score": 1, "without a second response": 1},
    )


def test_ultrafeedback_completions_without_a_score_are_left_out_and_counted(tmp_path):
    row = {
        **ULTRA,
        "completions": [
            completion("2", 9, 4.0),
            completion("3", None, None),
            completion("three", 3, None),
        ],
    }
    lone = {**ULTRA, "completions": row["completions"][:2]}
    data = load_pairs(write(tmp_path / "d.jsonl", row, lone), True)
    assert texts(data.pairs) == [("2", "three", 0)]
    assert data.dropped == {"without a score": 2, "without a second response": 1}
    # where scores do not matter
    assert len(load_pairs(write(tmp_path / "d.jsonl", row, lone), False).pairs) == 4


def steer(prompt, *responses):
    return [
        {**HELPSTEER2, "prompt": prompt, "response": text, "helpfulness": score}
        for text, score in responses
    ]


def test_helpsteer2_pairs_the_rows_of_a_prompt(tmp_path):
    rows = [
        *steer("a", ("bad", 1), ("good", 3)),
        *steer("b", ("alone", 4)),
        *steer("c", ("x", 2), ("y", 2)),
        *steer("d", ("low", 0), ("middle", 1), ("high", 4)),
    ]
    source = write(tmp_path / "d.jsonl", *rows)
    data = load_pairs(source, True)
    assert texts(data.pairs) == [
        ("bad", "good", 1),
        ("low", "middle", 1),
        ("low", "high", 1),
        ("middle", "high", 1),
    ]
    assert [pair.row for pair in data.pairs] == [1, 6, 6, 6] and data.rows == 8
    assert data.dropped == {"without a second response": 1, "tied": 1}
    assert texts(load_pairs(source, True, pairs="best-worst").pairs) == [
        ("good", "bad", 0),
        ("high", "low", 0),
    ]
    assert len(load_pairs(source, False).pairs) == 5


def test_rows_of_another_format_end_a_group(tmp_path):
    rows = [
        *steer("a", ("bad", 1)),
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        *steer("a", ("good", 3)),
    ]
    data = load_pairs(write(tmp_path / "d.jsonl", *rows), True)
    assert texts(data.pairs) == [("b", "c", 0)] and data.dropped == {"without a second response": 2}


def test_pairs_of_one_row_stay_on_one_side_of_a_split(tmp_path):
    rows = [{**ULTRA, "instruction": f"{i} + 2?"} for i in range(5)]
    rows += [row for i in range(5) for row in steer(f"{i} + 3?", ("x", 1), ("y", 2), ("z", 3))]
    pairs = load_pairs(write(tmp_path / "d.jsonl", *rows), True).pairs
    train, held_out = split_by_prompt(pairs, 0.4, seed=0)
    assert len(pairs) == 10 + 15 == len(train) + len(held_out)
    assert len({p.prompt for p in held_out}) == 4
    assert not {p.row for p in train} & {p.row for p in held_out}


def test_pairs_know_their_row_and_do_not_compare_it(tmp_path):
    for name in ("a-1", "a-2"):
        write(tmp_path / f"{name}.jsonl", {"prompt": "", "chosen": "y", "rejected": "z"}, SKYWORK)
    # counted through the whole folder
    assert [pair.row for pair in load_pairs(str(tmp_path), True).pairs] == [2, 4]
    assert [pair.row for pair in load_pairs("village", True, limit=3).pairs] == [1, 2, 3]
    assert Pair("x", "y", "z", row=1) == Pair("x", "y", "z", row=2)


# ---- bad values ----------------------------------------------------------------------

BAD = {
    "a rating as text": (
        {**UNIFIED, "conv_A_rating": "high"},
        "column 'conv_A_rating' must be a number, found 'high'",
    ),
    "no rating": ({**UNIFIED, "conv_B_rating": None}, "no label; stage 2 and evaluation need"),
    "NaN": (
        {**UNIFIED, "conv_B_rating": float("nan")},
        "column 'conv_B_rating' must be a number, found nan",
    ),
    "a score as bool": (
        {**UNIFIED, "conv_A_rating": True},
        "column 'conv_A_rating' must be a number, found True",
    ),
    "a preference as text": (
        {**HELPSTEER3, "overall_preference": "A"},
        "the label in column 'overall_preference' is \"A\", which is not listed",
    ),
    "helpfulness": (
        {**HELPSTEER2, "helpfulness": "very"},
        "column 'helpfulness' must be a number, found 'very'",
    ),
    "completions": (
        {**ULTRA, "completions": "2"},
        "column 'completions' must be a list of objects",
    ),
    "a completion": (
        {**ULTRA, "completions": ["2", "3"]},
        "column 'completions' must be a list of objects",
    ),
    "infinite": (
        {**ULTRA, "completions": [completion("2", float("inf"), 1.0)]},
        "column 'overall_score' must be a number",
    ),
    "a completion without a response": (
        {**ULTRA, "completions": [{"overall_score": 1}]},
        "column 'response' must be text, found NoneType",
    ),
    "verdict": (
        {**JUDGEBENCH, "label": "C>A"},
        "the label in column 'label' is \"C>A\", which is not listed; say what it means with",
    ),
    "verdict type": (
        {**JUDGEBENCH, "label": ["A>B"]},
        "the label in column 'label' is [\"A>B\"], which is not listed",
    ),
    "nothing shared": (
        {**SKYWORK, "rejected": dialogue("1 + 2?", "3")},
        "both responses must share their messages",
    ),
    "nothing shared, A and B": (
        {**UNIFIED, "conv_A": dialogue("x", "y")},
        "both responses must share their messages",
    ),
    "one text among messages": (
        {**SKYWORK, "chosen": [*dialogue("1 + 1?"), "2"]},
        "column 'chosen' must be text or a list of messages, found a list of str",
    ),
    "several responses": (RM_BENCH, "name one with --columns (chosen.0 is the first)"),
    "no texts": ({**RM_BENCH, "chosen": []}, "column 'chosen' must be text or a list of messages"),
    "half a character": (
        {"chosen": "\n\nHuman: a\n\nAssistant: \ud800", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "surrogate",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_one_clear_line(name, tmp_path):
    row, message = BAD[name]
    source = write(tmp_path / "d.jsonl", SKYWORK, row)
    with pytest.raises(UserError) as error:
        load_pairs(source, True)
    said = str(error.value)
    assert f"{source}, line 2: " in said and message in said and "\n" not in said
    data = load_pairs(source, True, on_bad_row="skip")
    assert len(data.pairs) == 1 and data.dropped == {"that cannot be read": 1}
    assert f"1 that cannot be read); the first that cannot be read: {error.value}" in data.summary()


@pytest.mark.parametrize("name", [
    "a rating as text", "no rating", "NaN", "a score as bool", "a preference as text", "infinite",
    "verdict", "verdict type",
])  # fmt: skip
def test_stage_1_does_not_read_ratings(name, tmp_path):
    row = BAD[name][0]
    row = {**row, "completions": row["completions"] * 2} if "completions" in row else row
    data = load_pairs(write(tmp_path / "d.jsonl", SKYWORK, row), False)
    assert data.rows == 2 and "that cannot be read" not in data.dropped


def test_the_bad_row_of_a_group_is_named(tmp_path):
    source = write(tmp_path / "d.jsonl", *steer("a", ("x", 1), ("y", "much")))
    with pytest.raises(UserError, match="line 2: column 'helpfulness'"):
        load_pairs(source, True)
    assert len(load_pairs(source, False).pairs) == 1  # stage 1 does not read ratings


def test_skipping_everything_is_an_error(tmp_path):
    with pytest.raises(
        UserError, match="2 that cannot be read.*line 1: column 'conv_A_rating'.*nothing left"
    ):
        load_pairs(
            write(tmp_path / "d.jsonl", {**UNIFIED, "conv_A_rating": "high"}, {}),
            True,
            on_bad_row="skip",
        )


# ---- score.py ------------------------------------------------------------------------


def test_score_takes_every_format(tmp_path, capsys):
    rows = [row for row, _ in ONE_PAIR.values()] + list(TIED.values())
    source, out = write(tmp_path / "d.jsonl", *rows), tmp_path / "scores.jsonl"
    score.main(["--model", "village", "--bits", "32", "--data", source, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, len(rows) + 1))
    assert not any("pair" in line for line in lines)
    hits = sum(
        line["better"] == "AB"[pair.label] for line, (_, pair) in zip(lines, ONE_PAIR.values())
    )
    # ties do not count
    assert f"{hits} of {len(ONE_PAIR)} labelled pairs judged as labelled" in capsys.readouterr().out


def test_score_numbers_the_pairs_of_a_row_and_says_what_it_skips(tmp_path, village_judge, capsys):
    unscored = {**ULTRA, "completions": [completion("2", None, None), *ULTRA["completions"][1:]]}
    rows = [
        {**ULTRA, "id": 1},
        *steer("a", ("x", 1)),
        *steer("b", ("bad", 1), ("good", 3)),
        ULTRA,
        unscored,
        SKYWORK,
    ]
    source, out = write(tmp_path / "d.jsonl", *rows), tmp_path / "scores.jsonl"
    score.main(["--model", "village", "--bits", "32", "--data", source, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    numbers = [(line["row"], line.get("pair")) for line in lines]
    first, fifth = ([(row, k) for k in (1, 2, 3)] for row in (1, 5))
    assert numbers == [*first, (2, None), (3, None), *fifth, (6, None), (7, None)]
    assert lines[3] == {"row": 2, "skipped": "without a second response"} and lines[0]["id"] == 1
    alone = village_judge.compare("1 + 1?", "three", "2")
    assert lines[0]["probability"] == pytest.approx(asdict(alone)["probability"], abs=1e-4)
    said = capsys.readouterr().out
    assert "scored 7 rows" in said and "not scored: 1 without a score" in said
    assert "of 7 labelled pairs" in said  # 2 + 1 + 2 + 1 + 1: the ties of rows 1 and 5 are left out


def test_score_does_not_mind_strange_labels(tmp_path, capsys):
    source = write(
        tmp_path / "d.jsonl", {**JUDGEBENCH, "label": "?"}, {**JUDGEBENCH, "label": ["A"]}
    )
    options = ["--data", source, "--out", str(tmp_path / "scores.jsonl")]
    score.main([*"--model village --bits 32".split(), *options])
    assert "labelled pairs" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_pretrain, train_reward])
def test_training_passes_its_options_on(script, tmp_path, monkeypatch):
    asked, real = [], runs_run.load_pairs
    monkeypatch.setattr(
        runs_run, "load_pairs", lambda *a, **options: asked.append(options) or real(*a, **options)
    )
    source = write(tmp_path / "d.jsonl", {}, {**ULTRA, "instruction": "2 + 2?"}, ULTRA)
    options = "--on-bad-row skip --pairs best-worst --streaming --steps 1 --held-out 0".split()
    script.main(["--data", source, "--out", str(tmp_path / "run"), "--max-length", "128", *options])
    record = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (record["rows"], record["used"], record["dropped"]) == (3, 2, {"that cannot be read": 1})
    assert "line 1" in record["unreadable"] and asked[0]["streaming"] and asked[0]["subset"] is None
    with pytest.raises(UserError, match="--subset en"):
        script.main(["--data", source, "--out", str(tmp_path / "other"), "--subset", "en"])


def test_score_passes_split_and_subset_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(scores, "read_rows", lambda *a: asked.append(a) or [("here", SKYWORK)])
    options = [*"--split val --subset all --limit 3".split(), "--out", str(tmp_path / "s.jsonl")]
    score.main(["--model", "village", "--bits", "32", "--data", "owner/name", *options])
    assert {a[:5] for a in asked} == {("owner/name", "val", 3, "all", False)}  # asked twice


def test_scores_of_a_csv_are_numbers(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,response,helpfulness\nq,a,1\nq,b,3\n")
    assert texts(load_pairs(str(tmp_path / "d.csv"), True).pairs) == [("a", "b", 1)]
    (tmp_path / "e.csv").write_text(
        "prompt,chosen,rejected,score_chosen,score_rejected\nq,a,b,8.0,4.0\nq,c,d,4.0,4\nq,e,f,high,\n"
    )
    data = load_pairs(str(tmp_path / "e.csv"), True)
    assert texts(data.pairs) == [("a", "b", 0), ("e", "f", 0)] and data.dropped == {"tied": 1}


def test_a_bad_row_does_not_take_the_good_ones_of_its_prompt_along(tmp_path):
    rows = steer("a", ("bad", 1), ("good", 3), ("broken", "much"))
    source = write(tmp_path / "d.jsonl", *rows)
    data = load_pairs(source, True, on_bad_row="skip")
    assert texts(data.pairs) == [("bad", "good", 1)] and data.dropped == {"that cannot be read": 1}


def test_literal_line_breaks_beside_the_markers_are_taken_off_and_counted(tmp_path):
    """data/clean_data.py of the official repository writes a backslash and an n as a line break."""
    row = {
        "instruction": r"[User Question]\nHow do I print \n in C?\n\n",
        "input": "",
        "output": r"[The Start of Assistant A's Answer]\nprintf('\n');"
        r"[The End of Assistant A's Answer]\n\n"
        r"[The Start of Assistant B's Answer]\nputs('');\n[The End of Assistant B's Answer]",
    }
    plain = {name: text.replace(r"]\n", "]\n").replace(r"\n[", "\n[") for name, text in row.items()}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(plain) + "\n")
    data = load_pairs(str(tmp_path / "d.jsonl"), labelled=False)
    first = data.pairs[0]
    assert first.prompt == r"How do I print \n in C?"  # only those beside a marker
    assert (first.response_a, first.response_b) == (r"printf('\n');", "puts('');")
    assert "1 rows with a literal \\n beside the markers, taken off" in data.summary()

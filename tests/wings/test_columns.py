"""--columns, --labels and --pairs-per-prompt: any table, as it stands."""

import json

import score
import train_pretrain
import train_reward
from gram_mini.errors import UserError
from gram_mini.reading.columns import Columns
from gram_mini.reading.load import load_pairs

import pytest


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def triples(data):
    return [(p.prompt, p.response_a, p.response_b, p.label) for p in data.pairs]


TABLE = [
    {"id": 1, "instruction": "Add.", "input": "1 + 1", "out": ["2", "3"], "pick": 1, "by": "Ann"},
    {"id": 2, "instruction": "Hi", "input": "", "out": ["What", "Hello"], "pick": 2, "by": "Bob"},
    {"id": 3, "instruction": "Bye", "input": None, "out": ["Bye", "Farewell"], "pick": 0, "by": ""},
]
COLUMNS = "prompt=instruction+input,a=out.0,b=out.1,label=pick"


def test_a_table_of_labelled_pairs(tmp_path):
    source = write(tmp_path / "d.jsonl", *TABLE)
    data = load_pairs(source, True, columns=COLUMNS, labels="a=1,b=2,tie=0")
    assert triples(data) == [("Add.\n\n1 + 1", "2", "3", 0), ("Hi", "What", "Hello", 1)]
    assert data.dropped == {"tied": 1} and "columns not read: by" in data.summary()
    # in another table 0 is the first response: nothing is assumed
    data = load_pairs(source, True, columns=COLUMNS, labels="a=0,a=2,b=1")
    assert [pair.label for pair in data.pairs] == [1, 0, 0]


def test_stage_1_reads_no_labels_and_stage_2_names_those_that_are_not_listed(tmp_path):
    source = write(tmp_path / "d.jsonl", *TABLE)
    assert len(load_pairs(source, False, columns=COLUMNS).pairs) == 3
    with pytest.raises(UserError, match="line 3: the label in column 'pick' is 0, .*--labels"):
        load_pairs(source, True, columns=COLUMNS, labels="a=1,b=2")
    with pytest.raises(UserError, match="line 1: the label in column 'pick' is 1, .* --labels a="):
        load_pairs(source, True, columns=COLUMNS)
    data = load_pairs(source, True, columns=COLUMNS, labels="a=1,b=2", on_bad_row="skip")
    assert len(data.pairs) == 2 and data.dropped == {"that cannot be read": 1}
    with pytest.raises(UserError, match="line 1: no label"):
        load_pairs(source, True, columns="prompt=instruction,a=out.0,b=out.1")


@pytest.mark.parametrize(("value", "labels"), [
    (1, "a=1"), ("1", "a=1"), (1.0, "a=1"), (" 1 ", "a=1"), (-1, "a=-1"), (True, "a=true"),
    ("True", "a=True"), ("x, y", "a=x, y"), (None, "a="), ("", "a="), ("a=b", "a=a=b"),
    ("model_a", "a=model_a"),
])  # fmt: skip
def test_labels_are_compared_as_text_or_number(tmp_path, value, labels):
    source = write(tmp_path / "d.jsonl", {"prompt": "x", "a": "y", "b": "z", "pick": value})
    columns = "prompt=prompt,a=a,b=b,label=pick"
    assert load_pairs(source, True, columns=columns, labels=labels).pairs[0].label == 0


@pytest.mark.parametrize(
    ("value", "labels"), [(True, "a=1"), (1, "a=true"), ("A", "a=a"), ([1], "a=1")]
)
def test_other_values_are_others(tmp_path, value, labels):
    source = write(tmp_path / "d.jsonl", {"prompt": "x", "a": "y", "b": "z", "pick": value})
    with pytest.raises(UserError, match="the label in column 'pick' is .* not listed; say what"):
        load_pairs(source, True, columns="prompt=prompt,a=a,b=b,label=pick", labels=labels)


def test_the_other_targets(tmp_path):
    row = {"q": "x", "best": "y", "worst": "z", "s": {"y": "2.5", "z": 1}}
    source = write(tmp_path / "d.jsonl", row)
    expected = [("x", "y", "z", 0)]
    assert (
        triples(load_pairs(source, True, columns="prompt=q,chosen=best,rejected=worst")) == expected
    )
    scores = "score_a=s.z,score_b=s.y"
    data = load_pairs(source, True, columns=f"prompt=q,a=worst,b=best,{scores}")
    assert triples(data) == [("x", "z", "y", 1)]
    dialogue = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    row = {"up": dialogue, "down": [dialogue[0], {"role": "assistant", "content": "z"}]}
    source = write(tmp_path / "e.jsonl", row)
    assert triples(load_pairs(source, True, columns="chosen=up,rejected=down")) == expected
    paths = "prompt=up.0.content,a=up.-1.content,b=down.1.content"
    assert triples(load_pairs(source, False, columns=paths)) == [("x", "y", "z", None)]


def test_names_with_dots_and_lists_in_text(tmp_path):
    row = {"a.b": "x", "c": "y", "h": '["v", "w"]'}
    source = write(tmp_path / "d.jsonl", row)
    assert triples(load_pairs(source, False, columns="prompt=a.b,a=c,b=h.1")) == [
        ("x", "y", "w", None)
    ]


def test_columns_that_are_not_there_are_named(tmp_path):
    source = write(tmp_path / "d.jsonl", *TABLE)
    with pytest.raises(UserError, match="line 1: --columns a=outs: the row holds no 'outs'; its"):
        load_pairs(source, False, columns="prompt=instruction,a=outs,b=out.1")
    with pytest.raises(UserError, match="instruction.inptu: the row holds no 'inptu'; its columns"):
        load_pairs(source, False, columns="prompt=instruction+inptu,a=out.0,b=out.1")
    write(tmp_path / "d.jsonl", {**TABLE[0], "out": [True, "3"]})
    with pytest.raises(UserError, match="line 1: column 'out.0' must be text or a list of"):
        load_pairs(source, False, columns=COLUMNS)


@pytest.mark.parametrize(("columns", "labels", "said"), [
    ("prompt", None, "cannot read 'prompt'; give prompt=COLUMN,..."),
    ("prompt=", None, "cannot read 'prompt='"),
    ("question=q,a=x,b=y", None, "cannot read 'question=q'"),
    ("prompt=q", None, "the targets prompt make no pair; give prompt with chosen and rejected"),
    ("prompt=q,a=x", None, "make no pair"),
    ("a=x,b=y,chosen=z", None, "make no pair"),
    ("a=x,b=y,label=z,score_a=u,score_b=v", None, "make no pair"),
    ("a=x,a=y,b=z", None, "gives a twice"),
    ("prompt=q,a=x,b=y", "a=1", "goes with a label in --columns; add label=COLUMN"),
    ("prompt=q,a=x,b=y,label=z", "1=a", "cannot read '1=a'; give a=VALUE,..."),
    ("prompt=q,a=x,b=y,label=z", "a=1,b=1", "gives one value two meanings"),
])  # fmt: skip
def test_options_that_cannot_be_followed_are_one_clear_line(columns, labels, said):
    with pytest.raises(UserError) as error:
        Columns(columns, labels)
    assert said in str(error.value) and "\n" not in str(error.value)


# ---- one response a row --------------------------------------------------------------

SINGLE = [
    {"q": "Name a prime.", "text": "Seven.", "stars": 4},
    {"q": "Name a prime.", "text": "Nine.", "stars": 1},
    {"q": "Name a colour.", "text": "Blue.", "stars": 3},
    {"q": "Name a colour.", "text": "Six.", "stars": "0"},
]
RESPONSE = "prompt=q,response=text,score=stars"


def test_responses_of_neighbouring_rows_are_paired(tmp_path):
    data = load_pairs(write(tmp_path / "d.jsonl", *SINGLE), True, columns=RESPONSE)
    assert triples(data) == [
        ("Name a prime.", "Seven.", "Nine.", 0), ("Name a colour.", "Blue.", "Six.", 0)
    ]  # fmt: skip
    assert [pair.row for pair in data.pairs] == [1, 3] and data.rows == 4
    apart = [SINGLE[i] for i in (0, 2, 1)]
    with pytest.raises(UserError, match="3 without a second response"):
        load_pairs(write(tmp_path / "e.jsonl", *apart), True, columns=RESPONSE)


def test_pairs_per_prompt_are_drawn_by_the_seed(tmp_path):
    rows = [{"q": f"Q{i // 6}", "text": f"{i}", "stars": i} for i in range(12)]
    source = write(tmp_path / "d.jsonl", *rows)
    draw = lambda seed: load_pairs(source, True, columns=RESPONSE, pairs_per_prompt=3, seed=seed)
    data = draw(0)
    assert [sum(p.prompt == f"Q{i}" for p in data.pairs) for i in (0, 1)] == [3, 3]
    assert data.dropped == {"not drawn by --pairs-per-prompt": 24}
    assert triples(draw(0)) == triples(data) != triples(draw(1))
    assert all(p.label == int(int(p.response_b) > int(p.response_a)) for p in data.pairs)
    data = load_pairs(source, True, columns=RESPONSE, pairs="best-worst")
    assert triples(data) == [("Q0", "5", "0", 0), ("Q1", "11", "6", 0)]
    several = {
        "instruction": "x",
        "completions": [{"response": f"{i}", "overall_score": i} for i in range(4)],
    }
    data = load_pairs(write(tmp_path / "e.jsonl", several), True, pairs_per_prompt=4)
    assert len(data.pairs) == 4 and data.dropped == {"not drawn by --pairs-per-prompt": 2}


def test_responses_without_scores_are_for_stage_1(tmp_path):
    source, columns = write(tmp_path / "d.jsonl", *SINGLE), "prompt=q,response=text"
    assert len(load_pairs(source, False, columns=columns).pairs) == 2
    with pytest.raises(UserError, match="line 1: no label; --columns needs score=COLUMN"):
        load_pairs(source, True, columns=columns)
    bad = write(tmp_path / "e.jsonl", *SINGLE, {**SINGLE[0], "stars": "many"})
    with pytest.raises(UserError, match="line 5: column 'stars' must be a number"):
        load_pairs(bad, True, columns=RESPONSE)
    data = load_pairs(bad, True, columns=RESPONSE, on_bad_row="skip")
    assert len(data.pairs) == 2 and data.dropped == {"that cannot be read": 1}


# ---- without the options -------------------------------------------------------------


@pytest.mark.parametrize(("row", "said"), [
    ({"instruction": "x", "output": "y"}, "one response a row is no pair: give --columns prompt="),
    ({"question": "x", "answer": "y"}, "columns ['answer', 'question'] are of no known format"),
    ({"text": "x"}, "--columns prompt=COLUMN with chosen=COLUMN,rejected=COLUMN"),
    ({"prompt": "x", "response_a": "y", "response_b": "z", "winner": "model_a"},
     "no label; stage 2 and evaluation need to know the preferred response: give 'chosen'"),
])  # fmt: skip
def test_a_row_of_no_known_format_says_what_to_give(tmp_path, row, said):
    with pytest.raises(UserError) as error:
        load_pairs(write(tmp_path / "d.jsonl", row), True)
    assert said in str(error.value)


def dialogue(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PUBLIC = {  # as gram_mini/reading/README.md reads them
    "chatbot_arena_conversations": (
        {"conversation_a": dialogue("x", "y"), "conversation_b": dialogue("x", "z"),
         "winner": "model_b", "turn": 1},
        "a=conversation_a,b=conversation_b,label=winner",
        "a=model_a,b=model_b,tie=tie,tie=tie (bothbad)",
    ),
    "PKU-SafeRLHF": (
        {"prompt": "x", "response_0": "y", "response_1": "z", "better_response_id": 1},
        "prompt=prompt,a=response_0,b=response_1,label=better_response_id",
        "a=0,b=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_tables(tmp_path, name):
    row, columns, labels = PUBLIC[name]
    data = load_pairs(write(tmp_path / "d.jsonl", row), True, columns=columns, labels=labels)
    assert triples(data) == [("x", "y", "z", 1)]


def test_the_alpaca_layout_needs_no_option(tmp_path):
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "rejected": "3", "chosen": "2"}
    data = load_pairs(write(tmp_path / "d.jsonl", row), True)
    assert triples(data) == [("Add.\n\n1 + 1", "2", "3", 0)]
    assert "columns not read: output" in data.summary()


ARENA = {  # lmsys/lmsys-arena-human-preference-55k as a CSV
    "prompt": '["What is 1 + 1?"]', "response_a": '["2"]', "response_b": '["3"]',
    "model_a": "x", "model_b": "y", "winner_model_a": "0", "winner_model_b": "0", "winner_tie": "1",
}  # fmt: skip


def test_lists_of_texts_that_are_written_as_text(tmp_path):
    for row in (
        ARENA,
        {**ARENA, "response_b": "[null]"},
        {"prompt": "What is 1 + 1?", "chosen": "['2', 'Two.']", "rejected": '["3"]'},
        {"prompt": '["Hi"]', "response": '["Hello"]', "helpfulness": 1},
    ):
        for columns in (None, "prompt=prompt,a=response_a,b=response_b"):
            if columns is None or "response_a" in row:
                with pytest.raises(UserError, match="line 1: .*a list written as text"):
                    load_pairs(write(tmp_path / "d.jsonl", row), False, columns=columns)
    # one answer that is such a list is an answer
    row = {"prompt": "As JSON?", "chosen": '["2"]', "rejected": "2"}
    assert triples(load_pairs(write(tmp_path / "d.jsonl", row), True))[0][1] == '["2"]'


def test_a_verdict_in_two_columns_tells_ties(tmp_path):
    rows = [
        {**ARENA, "winner_model_a": a, "winner_model_b": b, "winner_tie": tie}
        for a, b, tie in ("100", "010", "001")
    ]
    source = write(tmp_path / "d.jsonl", *rows)
    texts = "prompt=prompt.0,a=response_a.0,b=response_b.0"
    columns = f"{texts},score_a=winner_model_a,score_b=winner_model_b"
    data = load_pairs(source, True, columns=columns)
    assert [pair.label for pair in data.pairs] == [0, 1] and data.dropped == {"tied": 1}
    assert triples(data)[0][:3] == ("What is 1 + 1?", "2", "3")


# ---- the scripts ---------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_pretrain, train_reward])
def test_training_takes_the_options_and_keeps_them(script, tmp_path, capsys):
    source, out = write(tmp_path / "d.jsonl", *SINGLE), tmp_path / "run"
    options = ["--data", source, "--out", str(out), "--steps", "1", "--held-out", "0"]
    script.main([*options, "--columns", RESPONSE, "--pairs-per-prompt", "1"])
    record = json.loads((out / "run.json").read_text())
    assert record["options"]["columns"] == RESPONSE and record["options"]["pairs_per_prompt"] == 1
    assert record["data"]["used"] == 2 and "4 rows read, 2 pairs used" in capsys.readouterr().out
    with pytest.raises(UserError, match="--columns prompt: cannot read"):
        script.main([*options, "--overwrite", "--columns", "prompt"])
    with pytest.raises(UserError, match="--labels a=1: goes with --columns"):
        script.main([*options, "--overwrite", "--labels", "a=1"])


def test_score_takes_the_options(tmp_path, capsys):
    source, out = write(tmp_path / "d.jsonl", *TABLE), tmp_path / "scores.jsonl"
    options = [*"--model village --bits 32 --data".split(), source, "--out", str(out)]
    score.main([*options, "--columns", COLUMNS, "--labels", "a=1,b=2,tie=0"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    said = capsys.readouterr().out
    assert [(line["row"], line["id"]) for line in lines] == [(1, 1), (2, 2), (3, 3)]
    assert "of 2 labelled pairs" in said and "columns not read: by" in said
    source = write(tmp_path / "e.jsonl", SINGLE[0] | {"text": "Two."}, *SINGLE)
    options = [*"--model village --bits 32 --overwrite --data".split(), source, "--out", str(out)]
    score.main([*options, "--columns", RESPONSE, "--pairs-per-prompt", "2"])
    assert "not scored: 1 not drawn by --pairs-per-prompt" in capsys.readouterr().out

"""Reading preference data: every format, every kind of bad row."""

import csv
import gzip
import json

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.pairs import Pair, split_by_prompt
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.load import load_pairs

import pytest

ROW = {"prompt": "What is 1 + 1?", "chosen": "2", "rejected": "3"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def messages(*turns, keys=("role", "content"), names=("user", "assistant")):
    return [{keys[0]: names[i % 2], keys[1]: text} for i, text in enumerate(turns)]


PAIR_BLOCK = prompts.PAIR.format(response_a="two", response_b="three\nlines")

FORMATS = {
    "plain": (ROW, Pair("What is 1 + 1?", "2", "3", 0)),
    "conversational": (
        {
            "prompt": messages("Hi", "Hello", "1 + 1?"),
            "chosen": messages("1 + 1?", "2")[1:],
            "rejected": [{"role": "assistant", "content": "3"}],
        },
        Pair("Human: Hi\n\nAssistant: Hello\n\nHuman: 1 + 1?", "2", "3", 0),
    ),
    "implicit conversational": (
        {"chosen": messages("1 + 1?", "2"), "rejected": messages("1 + 1?", "3")},
        Pair("1 + 1?", "2", "3", 0),
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes, d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes, e",
        },
        Pair("Human: a\n\nAssistant: b\n\nHuman: c", "yes, d", "yes, e", 0),
    ),
    "hh-rlhf, one question": (
        {"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: c"},
        Pair("a?", "b", "c", 0),
    ),
    "sharegpt": (
        {
            "conversations": messages("1 + 1?", keys=("from", "value"), names=("human", "gpt")),
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
        },
        Pair("1 + 1?", "2", "3", 0),
    ),
    "official, pre-training": (
        {"instruction": "[User Question]\n1 + 1?\n\n", "input": "", "output": PAIR_BLOCK},
        Pair("1 + 1?", "two", "three\nlines", None),
    ),
    "official, fine-tuning": (
        {
            "instruction": prompts.JUDGE.format(
                prompt="1 + 1?", response_a="two", response_b="three"
            ),
            "input": "",
            "output": "B",
        },
        Pair("1 + 1?", "two", "three", 1),
    ),
    "triple": (
        {"prompt": "1 + 1?", "response_a": "2", "response_b": "3"},
        Pair("1 + 1?", "2", "3", None),
    ),
    "triple with label": (
        {"prompt": "1 + 1?", "response_a": "2", "response_b": "3", "label": "B"},
        Pair("1 + 1?", "2", "3", 1),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    row, expected = FORMATS[name]
    assert parse_pairs([("here", row)]) == ([expected], {})


def test_pretraining_drops_labels(tmp_path):
    source = write(tmp_path / "d.jsonl", [ROW])
    assert load_pairs(source, labelled=True).pairs[0].label == 0
    assert load_pairs(source, labelled=False).pairs[0].label is None


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_files(tmp_path, suffix):
    rows = [ROW, {"prompt": "Größe, bitte?", "chosen": "groß,\nsehr", "rejected": '"klein"'}]
    path = tmp_path / f"d.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(ROW))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, rows)
        if suffix.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, tmp_path):  # a file, and the folder it is in
        pairs = load_pairs(str(source), labelled=True).pairs
        assert [(p.prompt, p.response_a, p.response_b) for p in pairs] == [
            tuple(row.values()) for row in rows
        ]


def test_dropped_rows_are_counted_and_named(tmp_path):
    rows = [ROW, {**ROW, "rejected": "2 "}, {**ROW, "chosen": " "}, {**ROW, "prompt": ""}]
    data = load_pairs(write(tmp_path / "d.jsonl", rows), labelled=True)
    assert (data.rows, len(data.pairs)) == (4, 1)
    assert data.dropped == {
        "with equal responses": 1,
        "with an empty response": 1,
        "with an empty prompt": 1,
    }
    assert "4 rows read, 1 pairs used, 3 dropped" in data.summary()
    assert "1 with equal responses" in data.summary()


def test_stage_1_does_not_mind_strange_labels(tmp_path):
    row = {"prompt": "x", "response_a": "1", "response_b": "2", "label": "tie"}
    assert len(load_pairs(write(tmp_path / "d.jsonl", [row]), labelled=False).pairs) == 1


def test_limit(tmp_path):
    rows = [{**ROW, "prompt": str(i)} for i in range(5)]
    pairs = load_pairs(write(tmp_path / "d.jsonl", rows), True, limit=2).pairs
    assert [pair.prompt for pair in pairs] == ["0", "1"]


BAD = {
    "empty": ("d.jsonl", "", "d.jsonl: holds no rows"),
    "no rows": ("d.json", "[]", "d.json: holds no rows"),
    "invalid line": ("d.jsonl", json.dumps(ROW) + "\n\n{oops\n", "d.jsonl, line 3: invalid JSON"),
    "invalid json": ("d.json", "[\n{,}]", "double quotes: line 2 column 2"),
    "not an object": ("d.jsonl", "[1]\n", "d.jsonl, line 1: expected an object"),
    "not a list": ("d.json", "7", "expected an object"),
    "columns": (
        "d.jsonl",
        '{"text": "x"}\n',
        "d.jsonl, line 1: columns ['text'] are of no known format",
    ),
    "type": (
        "d.jsonl",
        json.dumps({**ROW, "chosen": 3}) + "\n",
        "d.jsonl, line 1: column 'chosen' must be text or a list",
    ),
    "prompt type": ("d.jsonl", json.dumps({**ROW, "prompt": None}) + "\n", "column 'prompt'"),
    "message": (
        "d.jsonl",
        json.dumps({**ROW, "prompt": [{"role": "robot", "content": "x"}]}) + "\n",
        "a message needs a role",
    ),
    "label": (
        "d.jsonl",
        json.dumps({"prompt": "x", "response_a": "1", "response_b": "2", "label": "C"}),
        'is "C", which is not listed',
    ),
    "unlabelled": (
        "d.jsonl",
        json.dumps({"prompt": "x", "response_a": "1", "response_b": "2"}),
        "no label",
    ),
    "marker": (
        "d.jsonl",
        json.dumps({"instruction": "x", "output": prompts.START_A + "1"}),
        "'output' must hold both answers between",
    ),
    "no prefix": ("d.jsonl", json.dumps({"chosen": "a", "rejected": "b"}), "add 'prompt'"),
    "all dropped": ("d.jsonl", json.dumps({**ROW, "chosen": "3"}) + "\n", "nothing left to use"),
    "csv fields": (
        "d.csv",
        "prompt,chosen,rejected\na,b,c\na,b\n",
        "d.csv, line 3: has another number of fields",
    ),
    "binary": ("d.jsonl", b"\xff\xfe\x00", "invalid JSON: 'utf-16-le' codec"),
    "role": (
        "d.jsonl",
        json.dumps({**ROW, "prompt": [{"role": ["user"], "content": "x"}]}) + "\n",
        "a message needs a role",
    ),
    "surrogate": (
        "d.jsonl",
        '{"prompt": "x", "chosen": "\\ud800", "rejected": "y"}\n',
        "half a character",
    ),
    "long number": ("d.jsonl", '{"prompt": ' + "9" * 5000 + "}\n", "line 1: invalid JSON"),
    "deep": ("d.jsonl", "[" * 100_000 + "\n", "line 1: invalid JSON"),
    "cut gzip": (
        "d.jsonl.gz",
        gzip.compress((json.dumps(ROW) + "\n").encode() * 50, mtime=0)[:-12],
        "cannot be read",
    ),
    "broken gzip": (
        "d.jsonl.gz",
        gzip.compress(b"x" * 500, mtime=0)[:12] + b"\xff" * 30,
        "cannot be read",
    ),
    "gzip": ("d.jsonl.gz", "not gzip", "cannot be read"),
    "parquet": ("d.parquet", "not parquet", "cannot be read as Parquet"),
    "suffix": ("d.txt", "x", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(tmp_path, name):
    file, content, message = BAD[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_pairs(str(path), labelled=True)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "runs/missing"])
def test_missing_source(source):
    with pytest.raises(UserError, match="no such file or folder"):
        load_pairs(source, labelled=True)


def test_split_keeps_the_rows_of_a_prompt_together():
    pairs = [Pair(f"prompt {i % 20}", f"a{i}", f"b{i}", 0) for i in range(200)]
    train, held_out = split_by_prompt(pairs, 0.1, seed=3)
    assert len({p.prompt for p in held_out}) == 2 and len(held_out) == 20 and len(train) == 180
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert split_by_prompt(pairs, 0.1, seed=3) == (train, held_out)
    assert split_by_prompt(pairs, 0.1, seed=4) != (train, held_out)


def test_split_needs_two_prompts():
    pairs = [Pair("only", "a", "b", 0)] * 5
    assert split_by_prompt(pairs, 0.5, 0) == (pairs, [])
    assert split_by_prompt([Pair("x", "a", "b"), Pair("y", "a", "b")], 0.99, 0)[0]

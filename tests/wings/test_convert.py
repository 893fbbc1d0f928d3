"""convert.py: what it writes reads back as the same pairs, and nothing is written by half."""

import json

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.reading.load import load_pairs
from gram_mini.serving import convert
from gram_mini.serving.convert import official_row, write_official

import pytest

PAIRS = [
    Pair(f"Question {i}?\nPlease.", f"right {i}", f"wrong\n\n{i}", i % 3 % 2) for i in range(40)
]


@pytest.fixture
def source(tmp_path):
    rows = [
        {
            "prompt": p.prompt,
            "response_a": p.response_a,
            "response_b": p.response_b,
            "label": "AB"[p.label],
        }
        for p in PAIRS
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preferred(pair):
    return (
        pair.prompt,
        {pair.response_a, pair.response_b},
        None if pair.label is None else (pair.response_a, pair.response_b)[pair.label],
    )


@pytest.mark.parametrize("to", ["pre-training", "fine-tuning"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_round_trip(tmp_path, source, to, suffix, capsys):
    out = tmp_path / f"gram{suffix}"
    convert.main([source, str(out), "--to", to])
    again = load_pairs(str(out), labelled=to == "fine-tuning").pairs
    expected = [preferred(pair) for pair in PAIRS]
    assert [preferred(pair)[:2] for pair in again] == [pair[:2] for pair in expected]
    if to == "fine-tuning":
        assert [preferred(pair) for pair in again] == expected
    swapped = sum(a.response_a == b.response_b for a, b in zip(again, PAIRS))
    assert 8 < swapped < 32  # neither the source's order nor its reverse
    said = capsys.readouterr().out
    assert "40 rows read, 40 pairs used" in said and f"40 rows for {to}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, "pairs.jsonl"])


def test_the_official_rows():
    pair = Pair("x", "y", "z", 1)
    block = prompts.PAIR.format(response_a="y", response_b="z")
    assert official_row(pair, "pre-training") == {
        "instruction": "[User Question]\nx\n\n",
        "input": "",
        "output": block,
    }
    tuning = official_row(pair, "fine-tuning", swap=True)
    assert tuning["instruction"] == prompts.JUDGE.format(prompt="x", response_a="z", response_b="y")
    assert (tuning["input"], tuning["output"]) == ("", "A")  # y_b, the better one, stands first
    with pytest.raises(ValueError, match="label"):
        official_row(Pair("x", "y", "z"), "fine-tuning")


def test_one_seed_gives_one_file(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert write_official(PAIRS, tmp_path / f"{name}.jsonl", "fine-tuning", seed) == 40
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("to", ["pre-training", "fine-tuning"])
def test_texts_with_markers_are_left_out_and_counted(tmp_path, to, capsys):
    marked = [
        {"prompt": "x", "chosen": f"y {prompts.END_A} y", "rejected": f"{prompts.START_B} z"},
        {"prompt": "x", "chosen": "y", "rejected": "z"},
    ]
    (tmp_path / "d.json").write_text(json.dumps(marked))
    convert.main([str(tmp_path / "d.json"), str(tmp_path / "out.json"), "--to", to])
    assert len(json.loads((tmp_path / "out.json").read_text())) == 1
    assert "left out 1 pairs whose texts hold a marker" in capsys.readouterr().out
    with pytest.raises(UserError, match="no pair is left"):
        convert.main(
            [str(tmp_path / "d.json"), str(tmp_path / "none.json"), "--to", to, "--limit", "1"]
        )
    assert not list(tmp_path.glob("none*"))


def test_a_file_is_replaced_only_when_asked(tmp_path, source):
    out = tmp_path / "gram.json"
    out.write_text("precious")
    with pytest.raises(UserError, match="already there"):
        convert.main([source, str(out), "--to", "pre-training"])
    with pytest.raises(UserError, match="no such file"):
        convert.main(["missing.jsonl", str(out), "--to", "pre-training", "--overwrite"])
    assert out.read_text() == "precious"
    convert.main([source, str(out), "--to", "pre-training", "--overwrite", "--limit", "3"])
    assert len(json.loads(out.read_text())) == 3


def test_fine_tuning_needs_labels(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "x", "response_a": "y", "response_b": "z"}\n')
    with pytest.raises(UserError, match="no label"):
        convert.main(
            [str(tmp_path / "d.jsonl"), str(tmp_path / "out.jsonl"), "--to", "fine-tuning"]
        )
    convert.main([str(tmp_path / "d.jsonl"), str(tmp_path / "out.jsonl"), "--to", "pre-training"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["village", "out.txt", "--to", "pre-training"],
        ["village", "out.json"],
        ["village", "out.json", "--to", "x"],
    ],
)
def test_usage_errors(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        convert.main(arguments)
    assert error.value.code == 2 and not list(tmp_path.iterdir())


def test_another_judge_prompt_for_fine_tuning(tmp_path):
    (tmp_path / "judge.txt").write_text(
        f"Judge well.\n\n{prompts.QUESTION}\n\n{prompts.PAIR}\n\n#Preferred: \n"
    )
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}) + "\n"
    )
    out = tmp_path / "out.jsonl"
    options = ["--to", "fine-tuning", "--judge-template", str(tmp_path / "judge.txt")]
    convert.main([str(tmp_path / "d.jsonl"), str(out), *options])
    instruction = json.loads(out.read_text())["instruction"]
    assert instruction.startswith("Judge well.") and instruction.endswith("#Preferred: ")
    assert load_pairs(str(out), True).pairs[0].prompt == "x"

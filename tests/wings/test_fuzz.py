"""Mutated files over all formats and --columns: one clear line, or all good rows."""

import copy
import csv
import io
import json
import random

from gram_mini.errors import UserError
from gram_mini.reading.load import load_pairs

import pytest

FILES = 4_000
SHARDS = 8


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def official(n, better, worse):
    block = (
        f"[The Start of Assistant A's Answer]\n{worse}\n[The End of Assistant A's Answer]\n\n"
        f"[The Start of Assistant B's Answer]\n{better}\n[The End of Assistant B's Answer]"
    )
    question = f"Judge.\n\n[User Question]\nQuestion {n}?\n\n{block}\n\n#Preferred:"
    return {"instruction": question, "input": "", "output": "B"}


# A row, or rows, about question n. "good" is better than "bad".
FORMATS = {
    "texts": lambda n: {"prompt": f"Question {n}?", "chosen": "good", "rejected": "bad"},
    "alpaca": lambda n: {
        "instruction": f"Question {n}?", "input": "", "chosen": "good", "rejected": "bad"
    },
    "messages": lambda n: {
        "prompt": [user(f"Question {n}?")],
        "chosen": [user(f"Question {n}?"), assistant("good")],
        "rejected": [assistant("bad")],
    },
    "several turns": lambda n: {
        "prompt": [user("Hi"), assistant("Hello"), user(f"Question {n}?")],
        "chosen": [user("Hi"), assistant("Hello"), user(f"Question {n}?"), assistant("good")],
        "rejected": {"role": "Assistant", "content": "bad"},
    },
    "dialogues": lambda n: {
        "chosen": [user(f"Question {n}?"), assistant("good")],
        "rejected": [user(f"Question {n}?"), assistant("bad")],
    },
    "hh": lambda n: {
        "chosen": f"\n\nHuman: Question {n}?\n\nAssistant: good",
        "rejected": f"\n\nHuman: Question {n}?\n\nAssistant: bad",
    },
    "sharegpt": lambda n: {
        "system": "",
        "conversations": [{"from": "human", "value": f"Question {n}?"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "unified": lambda n: {
        "conv_A": [user(f"Question {n}?"), assistant("bad")],
        "conv_B": [user(f"Question {n}?"), assistant("good")],
        "conv_A_rating": 1,
        "conv_B_rating": 2.5,
    },
    "triple": lambda n: {
        "prompt": f"Question {n}?", "response_a": "bad", "response_b": "good", "label": "B"
    },
    "judgebench": lambda n: {
        "question": f"Question {n}?", "response_A": "good", "response_B": "bad", "label": "A>B"
    },
    "helpsteer3": lambda n: {
        "context": [user(f"Question {n}?")],
        "response1": "bad",
        "response2": "good",
        "overall_preference": 2,
    },
    "helpsteer2": lambda n: [
        {"prompt": f"Question {n}?", "response": "bad", "helpfulness": "0"},
        {"prompt": f"Question {n}?", "response": "good", "helpfulness": 3},
    ],
    "ultrafeedback": lambda n: {
        "instruction": f"Question {n}?",
        "completions": [
            {"response": "bad", "overall_score": 1},
            {"response": "good", "overall_score": 2},
        ],
    },
    "official": lambda n: official(n, "good", "bad"),
    "table": lambda n: {"q": f"Question {n}?", "out": ["bad", "good"], "pick": 2},
    "table, chosen": lambda n: {"q": "Question", "n": f"{n}?", "best": "good", "worst": "bad"},
    "table, scores": lambda n: {
        "q": f"Question {n}?", "x": "bad", "y": "good", "s": {"x": "1", "y": 3}
    },
    "table, one response a row": lambda n: [
        {"q": f"Question {n}?", "text": "good", "stars": 5},
        {"q": f"Question {n}?", "text": "bad", "stars": "1"},
    ],
}  # fmt: skip
COLUMNS = {
    "table": "prompt=q,a=out.0,b=out.1,label=pick",
    "table, chosen": "prompt=q+n,chosen=best,rejected=worst",
    "table, scores": "prompt=q,a=x,b=y,score_a=s.x,score_b=s.y",
    "table, one response a row": "prompt=q,response=text,score=stars",
}
LABELS = {"table": "a=1,b=2,tie=0"}

VALUES = [
    None, "", " ", 0, 1, -1, 2.5, float("nan"), True, False, [], {}, [[]], [None], ["x"], "x",
    [{}], {"role": "user"}, [user("x")], [assistant("x")], [user(None)],
    [{"role": "tool", "content": "x"}], [{"type": "image_url", "image_url": "x"}],
    {"content": [{"type": "text", "text": "x"}]}, "[{'role': 'user', 'content': 'x'}]", "[{'role'",
    "\n\nHuman: x\n\nAssistant:", "\u200b", "\ud800", "A", "B", "tie", "A>B", 10**400, "1e999",
    [["a", "b"]], [["a"]], ["a", "b"], [{"role": "system", "content": None}], [[user("x")]],
    [{"role": "system", "content": "x"}, user("y")], {"role": "system", "content": ""}, {"x": [1]},
]  # fmt: skip
BESIDE = [
    "system", "history", "context", "instruction", "input", "images", "tools", "label", "prompt",
    "chosen", "rejected", "output", "score_chosen", "responses", "", "id",
]  # fmt: skip


def places(value, path=()):
    """Paths to all values within a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def mutated(row, rng):
    """A copy of a row with something in it replaced, taken out, renamed or added."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice([1, 1, 2])):
        *path, key = rng.choice([*places(row)] or [("x",)])
        holder = row
        for step in path:
            holder = holder[step]
        kind = rng.randrange(4)
        if kind == 0 or not isinstance(holder, dict):
            if isinstance(holder, dict) or key < len(holder):
                holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 1:
            holder.pop(key, None)
        elif kind == 2:
            holder[rng.choice(BESIDE)] = holder.pop(key, None)
        else:
            holder[rng.choice(BESIDE)] = copy.deepcopy(rng.choice(VALUES))
    return row


def damaged(data, rng):
    """Bytes with a few of them changed, doubled or cut off."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[place : place + rng.randrange(9)]
        else:
            data[place:place] = rng.choice([b"\n", b'"', b"{", b"[", b",", b"\xff", b"\\u", b"\0"])
    return bytes(data)


def as_csv(rows):
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="replace")


def right(pairs, numbers):
    """Whether the good rows give their pairs, each once and with the better response preferred."""
    seen = {}
    for pair in pairs:
        if {pair.response_a, pair.response_b} == {"good", "bad"}:
            better = (pair.response_a, pair.response_b)[pair.label]
            question = pair.prompt.removeprefix("Human: Hi\n\nAssistant: Hello\n\nHuman: ")
            seen.setdefault(question.replace("\n\n", " "), []).append(better)
    return all(seen.get(f"Question {n}?") == ["good"] for n in numbers)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_mutated_files(shard, tmp_path, monkeypatch):
    rng = random.Random(shard)
    names = sorted(FORMATS)
    for i in range(FILES // SHARDS):
        name = names[i % len(names)]
        options = {"columns": COLUMNS.get(name), "labels": LABELS.get(name)}
        first, third, last = (
            rows if isinstance(rows, list) else [rows] for rows in map(FORMATS[name], (1, 3, 2))
        )
        kind = rng.choice(["row", "row", "row", "json", "csv", "bytes"])
        path = tmp_path / ("d." + {"json": "json", "csv": "csv"}.get(kind, "jsonl"))
        rows = [*first, *(mutated(row, rng) for row in third), *last]
        lines = [json.dumps(row).encode() for row in rows]
        if kind == "json":
            content = b"[" + b",".join(lines) + b"]"
            content = damaged(content, rng) if rng.random() < 0.3 else content
            kept = content == b"[" + b",".join(lines) + b"]"
        elif kind == "csv":
            content, kept = as_csv(rows), False
        elif kind == "bytes":
            lines[len(first)] = damaged(json.dumps(third[0]).encode(), rng)
            content, kept = b"\n".join(lines), True
        else:
            content, kept = b"\n".join(lines), True
        path.write_bytes(content)
        said = f"shard {shard}, file {i}: {content!r}"
        for labelled in (True, False):
            try:
                load_pairs(str(path), labelled, **options)
            except UserError as error:
                assert "\n" not in str(error) and str(error), said
            except Exception as error:
                pytest.fail(f"{said}: {error!r}")
        try:
            data = load_pairs(str(path), True, on_bad_row="skip", **options)
        except UserError as error:
            assert not kept, f"{said}: {error}"
        except Exception as error:
            pytest.fail(f"{said}: {error!r}")
        else:
            assert not kept or right(data.pairs, (1, 2)), f"{said}: {data.pairs}"
            assert all(n in (0, 1) for n in (pair.label for pair in data.pairs)), said

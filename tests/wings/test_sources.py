"""Where rows come from: files line by line, folders, the hub (replaced here)."""

import builtins
import gzip
import json

from gram_mini.errors import UserError
from gram_mini.reading import sources
from gram_mini.reading.load import load_pairs
from gram_mini.reading.sources import Notes, read_rows

import datasets
import pytest

ROWS = [{"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": "x"} for i in range(5)]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(source, **options):
    return [row["prompt"] for _, row in read_rows(str(source), **options)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Nothing is left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


# ---- files ---------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_lines_are_read_as_they_are_asked_for(tmp_path, packed):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[:2]).encode() + b"\xff never read\n"
    path = tmp_path / ("d.jsonl.gz" if packed else "d.jsonl")
    path.write_bytes(gzip.compress(lines) if packed else lines)
    assert prompts(path, limit=2) == ["0 + 1?", "1 + 1?"]
    where, row = list(read_rows(str(path)))[2]
    assert where.endswith("line 3") and isinstance(row, UserError) and "'utf-8' codec" in str(row)


def test_parquet_is_read_in_batches_with_rows_numbered_on(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 500), path)
    places = [where for where, _ in read_rows(str(path))]
    assert (
        places[0].endswith("row 1") and places[-1].endswith("row 2500") and len(set(places)) == 2500
    )


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_a_file_is_opened_once(tmp_path, monkeypatch, name):
    content = {
        "d.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "d.json": json.dumps(ROWS),
        "d.csv": "prompt,chosen,rejected\n"
        + "".join(",".join(row.values()) + "\n" for row in ROWS),
    }[name]
    (tmp_path / name).write_text(content)
    opened, real = [], builtins.open
    monkeypatch.setattr(sources, "open", lambda *a: opened.append(a) or real(*a), raising=False)
    assert len(load_pairs(str(tmp_path / name), True).pairs) == 5 and len(opened) == 1


def test_rows_that_cannot_be_read_are_skipped_when_asked(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        json.dumps(ROWS[0]) + "\n{oops\n[1]\n" + json.dumps(ROWS[1]) + "\n"
    )
    data = load_pairs(str(tmp_path / "d.jsonl"), True, on_bad_row="skip")
    assert (data.rows, [pair.row for pair in data.pairs]) == (4, [1, 4])
    assert data.dropped == {"that cannot be read": 2}
    assert "line 2: invalid JSON" in data.summary()
    assert "line 2: invalid JSON" in data.record()["unreadable"]
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\nd,e,f\n")
    data = load_pairs(str(tmp_path / "d.csv"), True, on_bad_row="skip")
    assert data.dropped == {"that cannot be read": 1}
    (tmp_path / "d.json").write_text(json.dumps([ROWS[0], 7]))
    data = load_pairs(str(tmp_path / "d.json"), True, on_bad_row="skip")
    assert data.dropped == {"that cannot be read": 1}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("d.json", b'[{"prompt": "x"', "invalid JSON"),
    ("d.jsonl.gz", gzip.compress(json.dumps(ROWS).encode() * 99, mtime=0)[:-9], "cannot be read"),
    ("d.parquet", b"x", "cannot be read as Parquet"),
    ("d.csv", b"prompt,chosen,rejected\na,b,\xff\n", "line 1 or after: .*; save it again as UTF-8"),
    ("d.jsonl", b"\n\n", "d.jsonl: holds no rows"),
    ("d.csv", b"", "d.csv: holds no rows"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_an_error_even_so(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_pairs(str(tmp_path / name), True, on_bad_row="skip")


# ---- folders -------------------------------------------------------------------------


def test_a_folder_that_datasets_saved_is_refused(tmp_path):
    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        with pytest.raises(
            UserError, match="written by save_to_disk .* with to_json or to_parquet"
        ):
            prompts(tmp_path / name)


def test_folders_and_files_without_rows_or_subsets(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(UserError, match="no .jsonl, .json, .csv, .parquet file in this folder"):
        prompts(tmp_path / "empty")
    with pytest.raises(UserError, match="--subset en: .* has no subsets"):
        prompts(write(tmp_path / "d.jsonl"), subset="en")


# ---- the hub -------------------------------------------------------------------------


def test_streaming_takes_no_more_rows_than_the_limit(monkeypatch):
    asked, taken = [], []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return (taken.append(row) or row for row in ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_pairs("owner/name", True, limit=2, split="test", subset="en", streaming=True)
    assert asked == [(("owner/name", "en"), {"split": "test", "streaming": True})]
    assert len(data.pairs) == len(taken) == 2


def test_a_stream_that_breaks_is_one_clear_line(monkeypatch):
    def load_dataset(*arguments, **options):
        yield ROWS[0]
        raise ConnectionError("the line is dead\nand buried\nsince long")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="data set 'owner/name': .*: the line is dead and buried$"):
        load_pairs("owner/name", True, streaming=True, on_bad_row="skip")


def test_a_folder_of_several_splits_gives_the_one_that_is_asked_for(tmp_path):
    for name, rows in (
        ("train-00000-of-00002", ROWS[:1]),
        ("train-00001-of-00002", ROWS[1:2]),
        ("validation", ROWS[2:3]),
    ):
        write(tmp_path / f"{name}.jsonl", rows)
    assert prompts(tmp_path, split="train") == ["0 + 1?", "1 + 1?"]
    assert prompts(tmp_path, split="validation") == ["2 + 1?"]
    with pytest.raises(UserError, match="give --split with one of train, validation"):
        prompts(tmp_path)
    with pytest.raises(UserError, match="give --split with one of train, validation"):
        prompts(tmp_path, split="test")
    for name in ("a", "b"):
        write(tmp_path / "others" / f"{name}.jsonl", ROWS[:1])
    with pytest.raises(UserError, match="give --split with one of a, b whose files are of one"):
        prompts(tmp_path / "others")


def test_json_with_one_row_a_line(tmp_path):
    assert prompts(write(tmp_path / "d.json")) == [row["prompt"] for row in ROWS]


def test_long_fields_and_lines_of_a_csv(tmp_path):
    (tmp_path / "d.csv").write_text(f"prompt,chosen,rejected\nx,{'y' * 200_000},z\n")
    ((where, row),) = read_rows(str(tmp_path / "d.csv"))
    assert where.endswith("line 2") and len(row["chosen"]) == 200_000


def test_one_data_set_in_two_files_is_refused(tmp_path):
    write(tmp_path / "train.jsonl")
    packed = gzip.compress((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "train.jsonl.gz").write_bytes(packed)
    with pytest.raises(UserError, match="one of train whose files are of one kind, or give one"):
        prompts(str(tmp_path))


def test_what_is_not_read_in_a_folder_is_named(tmp_path):
    write(tmp_path / "train.jsonl")
    (tmp_path / "more").mkdir()
    for name in ("train_more.jsonl", "test2.jsonl", "test.jsonl", "third.ndjson", "README.md"):
        write(tmp_path / name)
    write(tmp_path / "more" / "a.jsonl")
    notes = Notes()
    (tmp_path / "._train.jsonl").write_bytes(b"\0\5\xff")
    assert len(prompts(str(tmp_path), split="train", notes=notes)) == len(ROWS)
    left = "README.md, more, test.jsonl, test2.jsonl, third.ndjson, ..."
    assert notes.source == [f"not read in this folder: {left}"]
    assert len(prompts(str(tmp_path), split="test", notes=notes)) == 2 * len(ROWS)
    assert (
        notes.source[1] == "files of this folder, read one after the other: test.jsonl, test2.jsonl"
    )

"""score.py --data: chunk by chunk, in bounded memory, stopped and resumed."""

import csv
import gc
import gzip
import json
import math
import os
import signal
import threading
import tracemalloc

import score
from gram_mini.errors import Interrupted, UserError
from gram_mini.judge import Comparison, Judge
from gram_mini.runs import scores
from gram_mini.runs.partial import PartialFile, partial_names
from gram_mini.village import VILLAGE
from gram_mini.village.pairs import village_pairs

import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

COLUMNS = ("prompt", "chosen", "rejected")
ROWS = [
    *[{"id": i, **dict(zip(COLUMNS, (p.prompt, p.response_a, p.response_b)))}
      for i, p in enumerate(village_pairs("labelled", 20))],
    {"prompt": "What does Anna eat?", "responses": ["soup", "Anna eats soup.", "No."]},
    {"instruction": "Who?", "completions": [dict(response=r, overall_score=n)
     for n, r in enumerate(["No.", "Anna.", "Ben."])]},  # three pairs
    {"instruction": "Who?", "completions": []},  # none
    *[{"prompt": "Why?", "response": r, "helpfulness": n} for n, r in enumerate("abcd")],  # six
    {"prompt": "When?", "responses": ["now"], "reference": "never", "id": "naïve \ud800"},
    *[{"prompt": "How?", "response_a": f"so {i}", "response_b": "no", "x": 1} for i in range(9)],
]  # fmt: skip
LINES = 20 + 1 + 3 + 1 + 6 + 1 + 9


@pytest.fixture(autouse=True)
def judge(village_judge, monkeypatch):
    monkeypatch.setattr(score, "load_judge", lambda *_, **__: village_judge)
    monkeypatch.setattr(scores, "CHUNK", 7)
    return village_judge


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def command(data, out, *more):
    return ["--model", VILLAGE, "--bits", "32", "--data", str(data), "--out", str(out), *more]


def scored(data, out, *more):
    score.main(command(data, out, *more))
    return out.read_bytes()


@pytest.fixture
def whole(data, tmp_path, capsys):
    """The bytes of a run that nobody stopped."""
    written = scored(data, tmp_path / "whole.jsonl")
    capsys.readouterr()
    return written


def left_over(out):
    """The names of what an unfinished file leaves beside it."""
    return sorted(file.name for file in out.parent.glob(f"*{out.name}*") if file != out)


def stop(monkeypatch, how, chunk):
    """Raise ``how`` where the judge gets a chunk, counted from 1."""
    real, calls = Judge.compare_many, []

    def stopping(self, pairs, progress=None):
        calls.extend([1] * (progress is not None))  # a ranking has none
        if progress and len(calls) == chunk:
            raise how
        return real(self, pairs, progress=progress)

    monkeypatch.setattr(Judge, "compare_many", stopping)


# ---- chunks --------------------------------------------------------------------------


def test_the_chunks_change_no_score_but_for_rounding(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "CHUNK", 2000)
    at_once = [json.loads(line) for line in scored(data, tmp_path / "once.jsonl").splitlines()]
    lines = [json.loads(line) for line in whole.splitlines()]
    assert len(lines) == LINES == len(at_once) and not left_over(tmp_path / "once.jsonl")
    for line, other in zip(lines, at_once):
        assert line.keys() == other.keys()
        for name, value in line.items():
            exact = not isinstance(value, (float, list))
            assert value == (other[name] if exact else pytest.approx(other[name], abs=1e-6))


def test_a_file_of_one_chunk_is_judged_in_one_call(data, tmp_path, monkeypatch, judge):
    monkeypatch.setattr(scores, "CHUNK", 2000)
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:20]))
    pairs = list(scores.read_questions(scores.options.score_options("", command(data, "o.jsonl"))))
    results = judge.compare_many([pair for question in pairs for pair in question.pairs])
    lines = [
        {"row": i + 1, "id": i} | scores.comparison_line(result) for i, result in enumerate(results)
    ]
    expected = "".join(json.dumps(line) + "\n" for line in lines)
    assert scored(data, tmp_path / "o.jsonl") == expected.encode()


def test_chunks_end_with_the_comparisons_not_with_the_rows(data):
    options = scores.options.score_options("", command(data, "o.jsonl"))
    chunks = list(scores.in_chunks(scores.read_questions(options)))
    sizes = [sum(question.comparisons for question in chunk) for chunk in chunks]
    assert sizes[:2] == [7, 7] and all(7 <= size < 7 + 6 for size in sizes[:-1])
    assert sum(question.lines for chunk in chunks for question in chunk) == LINES


def test_every_kind_of_file_is_read_in_chunks(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{name: str(row[name]) for name in ("id", *COLUMNS)} for row in ROWS[:20]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    out = tmp_path / "out" / "o.jsonl"
    out.parent.mkdir()
    files = sorted(file for file in tmp_path.iterdir() if file.is_file())
    assert len(files) == 5 and len({scored(file, out, "--overwrite") for file in files}) == 1


class Stub:
    """A judge that holds nothing and prefers the longer response."""

    trained, max_length, batch_size, template = True, 512, 32, "template"

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def compare_many(self, pairs, progress):
        self.calls += 1
        ps = [1 / (1 + math.exp(len(p.response_b) - len(p.response_a))) for p in pairs]
        return [Comparison(p, p, p, 0.0, 0.0, 1.0, False) for p in ps]


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(score, "load_judge", lambda *_, **__: Stub(tokenizer))
    monkeypatch.setattr(scores, "CHUNK", 50)
    peaks = []
    for rows in (200, 2_000):
        data, out = tmp_path / f"{rows}.jsonl", tmp_path / f"{rows}-out.jsonl"
        with open(data, "w") as file:
            for i in range(rows):
                row = {"prompt": f"{i} " * 50, "chosen": f"{i}" * 150, "rejected": f"b{i}"}
                file.write(json.dumps(row) + "\n")
        gc.collect()  # what earlier tests left behind must not be counted
        tracemalloc.start()
        score.main(command(data, out))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert out.read_bytes().count(b"\n") == rows
    # The larger file has 1.6 MB more; lists of Python's own differ by some 50 kB from run to run.
    assert peaks[1] < peaks[0] + 400_000 < 1e6


# ---- stopped and resumed -------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 4, 6])
def test_after_ctrl_c_it_goes_on_with_the_same_bytes_and_summary(
    chunk, data, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "o.jsonl"
    with monkeypatch.context() as patch:
        stop(patch, KeyboardInterrupt, chunk)
        how = "lines are kept in .*o.jsonl.partial; go on with the same command and --resume"
        with pytest.raises(Interrupted, match=how):
            scored(data, out)
    assert not out.exists() and left_over(out) == ["o.jsonl.partial", "o.jsonl.partial.json"]
    kept = (tmp_path / "o.jsonl.partial").read_bytes()
    lines = kept.count(b"\n")
    assert whole.startswith(kept) and lines >= 7
    assert scored(data, out, "--resume") == whole and not left_over(out)
    resumed, *summary = capsys.readouterr().out.splitlines()
    assert resumed == f"--resume: {lines} of {LINES} lines are there"
    scored(data, out, "--overwrite")
    assert capsys.readouterr().out.splitlines() == summary
    assert "of 29 labelled pairs judged as labelled" in summary[-1]


def test_wherever_the_partial_file_was_torn(data, whole, tmp_path, monkeypatch, capsys):
    out, (partial, state) = tmp_path / "o.jsonl", partial_names(tmp_path / "o.jsonl")
    with monkeypatch.context() as patch:
        stop(patch, KeyboardInterrupt, 3)
        with pytest.raises(Interrupted):
            scored(data, out)
    saved, kept = state.read_text(), partial.stat().st_size
    line_ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert kept == line_ends[13]
    # After the last chunk, within a line after it, at the end of one, and everything but the name.
    for size in (kept, kept + 5, line_ends[15], len(whole)):
        out.unlink(missing_ok=True)
        partial.write_bytes(whole[:size])
        state.write_text(saved)
        capsys.readouterr()
        assert scored(data, out, "--resume") == whole
        assert f"--resume: 14 of {LINES} lines are there" in capsys.readouterr().out
    partial.write_bytes(whole[: kept - 1])
    state.write_text(saved)
    with pytest.raises(UserError, match="has lost lines that were written; start anew with"):
        scored(data, out, "--resume", "--overwrite")


def child(action):
    """Start a process that is a copy of this one; SIGKILL ends it as it would end score.py."""
    pid = os.fork()
    if not pid:
        # tqdm's own lock is shared with this process, and SIGKILL may come while it is held.
        tqdm.set_lock(threading.RLock())
        try:
            action()
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize(("place", "done"), [("judging", 21), ("writing", 36), ("saving", 31)])
def test_sigkill_loses_at_most_a_chunk(place, done, data, whole, tmp_path):
    """It comes when pairs are encoded for the fifth time, when most of the fifth chunk is written,
    or when the fourth is written and not yet counted."""
    out = tmp_path / "o.jsonl"
    kind, name = {
        "judging": (Judge, "encode"),
        "writing": (PartialFile, "add"),
        "saving": (PartialFile, "_save"),  # the first call comes before any chunk
    }[place]
    real, calls = getattr(kind, name), []

    def last(self, given, *more):
        calls.append(1)
        if len(calls) == 5:
            if place == "writing":
                self._file.write("".join(given).encode("utf-8", "replace")[:-300])
                self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, given, *more)

    def run():
        setattr(kind, name, last)
        scored(data, out)

    assert os.WTERMSIG(os.waitpid(child(run), 0)[1]) == signal.SIGKILL
    kept = (tmp_path / "o.jsonl.partial").read_bytes()
    assert kept.count(b"\n") == done and whole.startswith(kept) and not out.exists()
    assert scored(data, out, "--resume") == whole


def test_what_was_begun_otherwise_is_not_gone_on_with(data, tmp_path, monkeypatch, capsys, judge):
    out = tmp_path / "o.jsonl"
    with monkeypatch.context() as patch:
        stop(patch, KeyboardInterrupt, 3)
        with pytest.raises(Interrupted):
            scored(data, out)
    kept, rows = (tmp_path / "o.jsonl.partial").read_bytes(), data.read_text()

    def refused(what, *more):
        with pytest.raises(UserError, match=f"begun otherwise: .*{what}"):
            scored(data, out, "--resume", *more)
        assert (tmp_path / "o.jsonl.partial").read_bytes() == kept

    refused("limit was None and is 30", "--limit", "30")
    state = tmp_path / "o.jsonl.partial.json"
    saved = json.loads(state.read_text())
    former = {**saved, "settings": {**saved["settings"], "average": "logits"}}
    state.write_text(json.dumps(former))  # as of a version with one option more
    refused("average was 'logits' and is None")
    state.write_text(json.dumps(saved))
    with monkeypatch.context() as patch:
        patch.setattr(judge, "template", "another")
        refused("judge prompt was .* and is 'another'")
    with monkeypatch.context() as patch:
        patch.setattr("gram_mini.runs.scores.judge_fingerprint", lambda *_: "other weights")
        refused("judge was '.*' and is 'other weights'")
    data.write_text(rows.replace("so 7", "so be it"))
    refused("contents of the data was")
    data.write_text(rows)
    monkeypatch.setattr(judge, "batch_size", 8)  # changes nothing but rounding
    scored(data, out, "--resume")
    assert "batch_size was 32 and is 8; the last digits" in capsys.readouterr().out


def test_an_unfinished_file_is_not_thrown_away_unasked(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    with pytest.raises(UserError, match="--resume: there is no unfinished .*o.jsonl.partial"):
        scored(data, out, "--resume")
    with monkeypatch.context() as patch:
        stop(patch, KeyboardInterrupt, 3)
        with pytest.raises(Interrupted):
            scored(data, out)
    with pytest.raises(UserError, match="unfinished, in .*--resume, or start anew with --overwr"):
        scored(data, out)
    with FileLock(tmp_path / ".o.jsonl.lock"):
        with pytest.raises(UserError, match="another process is writing it"):
            scored(data, out, "--resume")
    out.write_text("an older file")
    kept = (tmp_path / "o.jsonl.partial").read_bytes()
    with monkeypatch.context() as patch:
        stop(patch, KeyboardInterrupt, 2)
        with pytest.raises(Interrupted):
            scored(data, out, "--resume", "--overwrite")  # goes on, and does not start anew
    assert out.read_text() == "an older file"
    assert (tmp_path / "o.jsonl.partial").read_bytes().startswith(kept)
    assert scored(data, out, "--overwrite") == whole and not left_over(out)
    (tmp_path / "o.jsonl.partial").write_text("a thesis")
    out.unlink()
    with pytest.raises(UserError, match="is in the way and no unfinished file of ours"):
        scored(data, out)
    assert (tmp_path / "o.jsonl.partial").read_text() == "a thesis"


def test_what_another_process_wrote_meanwhile_is_not_thrown_away(tmp_path):
    out = tmp_path / "o.jsonl"
    given = out, {"data": "d"}, {}, False
    first = PartialFile(*given)
    first.add(["{}\n"], {})
    first.leave()  # stopped, after another process was told that there is nothing
    with pytest.raises(UserError, match="unfinished, in .*go on with --resume"):
        PartialFile(*given)
    PartialFile(*given, overwrite=True).finish()
    out.write_text("scores")
    with pytest.raises(UserError, match="already there"):
        PartialFile(*given)
    assert out.read_text() == "scores" and not (tmp_path / ".o.jsonl.lock").exists()


# ---- what goes wrong -----------------------------------------------------------------


def test_a_bad_row_is_named_before_any_work(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "compare_many", None)
    with open(data, "a") as file:
        file.write('{"prompt": 3, "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=f"line {len(ROWS) + 1}: column 'prompt' must be text"):
        scored(data, tmp_path / "o.jsonl")
    assert not left_over(tmp_path / "o.jsonl")


def test_an_error_keeps_what_is_done_and_one_at_once_leaves_nothing(
    data, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "o.jsonl"
    for chunk, left in ((1, []), (3, ["o.jsonl.partial", "o.jsonl.partial.json"])):
        with monkeypatch.context() as patch:
            stop(patch, UserError("the judge gives no numbers"), chunk)
            with pytest.raises(UserError, match="no numbers"):
                scored(data, out)
        assert left_over(out) == left
        assert ("14 of 41 lines are kept in" in capsys.readouterr().err) == bool(left)
    assert scored(data, out, "--resume") == whole


def test_data_that_changes_or_can_be_read_only_once(data, tmp_path, monkeypatch, tokenizer, capsys):
    class Writes(Stub):
        def compare_many(self, *arguments, **named):
            with open(data, "a") as file:
                file.write(json.dumps(ROWS[0]) + "\n")
            return super().compare_many(*arguments, **named)

    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:20]))
    monkeypatch.setattr(score, "load_judge", lambda *_, **__: Writes(tokenizer))
    with pytest.raises(UserError, match="rows.jsonl: has changed while it was read"):
        scored(data, tmp_path / "o.jsonl")
    assert "--resume" not in capsys.readouterr().err  # which would be refused
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="pipe.jsonl: is read twice"):
        scored(tmp_path / "pipe.jsonl", tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="no such file"):
        scored("x" * 300, tmp_path / "p.jsonl")


@pytest.mark.parametrize("what", ["the file", "its folder"])
def test_what_is_read_is_not_written(what, data, tmp_path, capsys):
    before = data.read_bytes()
    source, out = (data, data) if what == "the file" else (tmp_path, tmp_path / "o.jsonl")
    with pytest.raises(SystemExit):
        scored(source, out, "--overwrite")
    assert (
        "is --data or stands in its folder" in capsys.readouterr().err
        and data.read_bytes() == before
    )


def test_a_ranking_without_a_number_names_its_row(tmp_path, monkeypatch, judge):
    nothing = lambda rows, *_: (torch.full((len(rows), 2), math.nan), torch.ones(len(rows)))
    monkeypatch.setattr(judge, "verdicts", nothing)
    (tmp_path / "r.jsonl").write_text(json.dumps(ROWS[22]) + "\n" + json.dumps(ROWS[20]))
    with pytest.raises(UserError, match=r"row 2 and .*\[nan"):
        scored(tmp_path / "r.jsonl", tmp_path / "o.jsonl")


def test_texts_that_are_not_about_the_village_are_named(data, tmp_path, capsys):
    scored(data, tmp_path / "village.jsonl", "--limit", "20")
    assert "The village's model" not in capsys.readouterr().err
    data.write_text(
        json.dumps(dict(zip(COLUMNS, ("What is France's capital?", "Paris", "London"))))
    )
    scored(data, tmp_path / "france.jsonl")
    assert capsys.readouterr().err.count("knows few words but the village's") == 1

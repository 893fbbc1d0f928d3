"""studies/speed/train.py, score.py, growth.py: both ways compute the same; tables and figures."""

import json

from gram_mini import losses
from gram_mini.batches import judge_batch
from gram_mini.model import hidden_states, output_head
from gram_mini.runs import chunked
from gram_mini.studies.speed import common, growth, score, train
from gram_mini.studies.speed.common import (
    LABELS,
    PIECES,
    SHAPES,
    build,
    lengths_of,
    loss_of,
    rows_of,
)

import pytest
import torch

CPU = torch.device("cpu")
SMALL = "--shape village --rounds 2 --max-length 256 --device cpu".split()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build(SHAPES["village"], 32, 4, CPU)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return model


def rows(stage, count=6, seed=0):
    return rows_of(
        lengths_of(None, count, seed), PIECES[stage], SHAPES["village"].vocabulary, 300, seed
    )


@torch.no_grad()
def test_the_usual_step_has_the_same_loss(model, monkeypatch):
    batch = rows("pretrain")
    assert len({row.length for row in batch}) > 1  # padding must not count
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 50 * SHAPES["village"].vocabulary)
    ours = loss_of(model, "pretrain", batch, PIECES["pretrain"])
    usual = train.usual_loss(model, "pretrain", batch)
    assert ours.item() == pytest.approx(usual.item(), rel=1e-5)


@torch.no_grad()
def test_the_usual_loss_of_the_verdict_is_ours_and_the_label_mass(model):
    """Step 7 of the derivation; ours without smoothing."""
    ids, last, right = judge_batch(rows("reward"), PIECES["reward"])
    at_end = hidden_states(model, ids)[torch.arange(6), last]  # (B, H)
    logits = output_head(model)(at_end)  # (B, V)
    mass = losses.label_mass(logits, LABELS)
    ours = losses.reward_loss(logits[:, list(LABELS)], right) - mass.log().mean()
    usual = train.usual_loss(model, "reward", rows("reward"))
    assert usual.item() == pytest.approx(ours.item(), rel=1e-5)


def test_lengths_of_a_file_and_drawn_ones(tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "x" * 40, "response_a": "y" * 9, "response_b": "z" * 4}
    file.write_text(json.dumps(row) + "\n")
    assert {tuple(sorted(sizes)) for sizes in lengths_of(str(file), 3, 0)} == {(1, 3, 10)}
    medians = [sorted(lengths)[500] for lengths in zip(*lengths_of(None, 1001, 0))]
    assert medians == [pytest.approx(median, rel=0.15) for median, _ in common.LENGTHS]


def test_operations_are_those_that_torch_counts(model):
    from torch.utils.flop_counter import FlopCounterMode

    s = SHAPES["village"]
    for stage in train.STAGES:
        batch = rows(stage, count=1)
        with FlopCounterMode(display=False) as counter:
            loss_of(model.train(), stage, batch, PIECES[stage]).backward()
        model.zero_grad()
        length = batch[0].length + PIECES[stage].fixed_tokens
        # torch does not count the kernel of the CPU
        attention = 3 * s.layers * 2 * length**2 * s.queries
        assert train.operations(s, stage, batch, 4, False) - attention == pytest.approx(
            counter.get_total_flops(), rel=0.05
        )


def table_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_train_prints_a_table(capsys):
    train.main([*SMALL, "--batch-size", "2"])
    out = capsys.readouterr().out
    assert [line[:2] for line in table_of(out)] == [
        [stage, way] for stage in train.STAGES for way in ("ours", "usual")
    ]
    assert all(float(line[2]) > 0 and float(line[5]) > 0 for line in table_of(out))
    assert "GFLOP/s" in out


def test_train_against_trl(capsys):
    pytest.importorskip("trl")
    train.main([*SMALL, *"--batch-size 2 --peer trl".split()])
    ways = [line[1] for line in table_of(capsys.readouterr().out)]
    in_both_stages = ["ours", "usual", "TRL SFTTrainer"]
    assert ways == [*in_both_stages, *in_both_stages, "TRL RewardTrainer"]


def test_score_prints_a_table_and_both_ways_agree(capsys):
    options = "--rounds 2 --pairs 3 --responses 4 --max-length 256 --device cpu".split()
    score.main(["--shape", "village", *options])
    lines = table_of(capsys.readouterr().out)
    assert [line[:2] for line in lines] == [
        [task, way]
        for task in ("pairs", "reference", "round-robin")
        for way in ("ours", "unshared", "usual")
    ]
    apart = [float(line[6]) for line in lines if line[6]]
    assert len(apart) == 6 and max(apart) < 1e-5


def test_growth_writes_figures(tmp_path, capsys):
    points = "--lengths 192 256 --batches 1 2 --responses 2 3 --length 200 --rounds 1".split()
    growth.main(["--shape", "village", *points, "--device", "cpu", "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    assert [p["at"] for p in record["length"]["pretrain"]] == [192, 256]
    assert set(record["responses"]) == {"reference", "round-robin"}
    for part in ("length", "batch", "responses"):
        for line in record[part].values():
            assert all(p["seconds"] > 0 and p["gib"] > 0 for p in line)
    assert (tmp_path / "out" / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "script, arguments",
    [
        (train, ["--shape", "GPT-5"]),
        (score, ["--rounds", "0"]),
        (growth, ["--lengths", "64"]),
    ],
)
def test_usage_errors(script, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2 and "error:" in capsys.readouterr().err

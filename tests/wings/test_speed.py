"""studies/speed: both ways compute the same; the tables and the page that is made of them."""

import json
from argparse import Namespace
from pathlib import Path

from gram_mini import losses
from gram_mini.batches import judge_batch
from gram_mini.errors import UserError
from gram_mini.model import hidden_states, output_head
from gram_mini.runs import chunked
from gram_mini.studies.speed import common, tables, training
from gram_mini.studies.speed.__main__ import STUDIES, main
from gram_mini.studies.speed.common import LABELS, PIECES, SHAPES, build, full_rows, loss_of

import pytest
import torch

CPU = torch.device("cpu")
STAGES_OF_STEPS = ("pretrain", "reward")
SMALL = "--shape village --rounds 1 --device cpu".split()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build(SHAPES["village"], 32, 4, CPU)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return model


def rows(stage, count=6):
    """Pairs of different lengths, so that padding must not count."""
    sizes = [(40 + 9 * i, 30 - i, 20 + 7 * i) for i in range(count)]
    return common.rows_of(sizes, stage, SHAPES["village"].vocab_size, 300)


@torch.no_grad()
def test_the_usual_step_has_the_same_loss(model, monkeypatch):
    batch = rows("pretrain")
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 50 * SHAPES["village"].vocab_size)
    ours = loss_of(model, "pretrain", batch)
    usual = training.usual_loss(model, "pretrain", batch)
    assert ours.item() == pytest.approx(usual.item(), rel=1e-5)


@torch.no_grad()
def test_the_usual_loss_of_the_verdict_is_ours_and_the_label_mass(model):
    """Step 7 of the derivation; ours without smoothing."""
    ids, last, right = judge_batch(rows("reward"), PIECES["reward"])
    at_end = hidden_states(model, ids)[torch.arange(6), last]  # (B, H)
    logits = output_head(model)(at_end)  # (B, V)
    mass = losses.label_mass(logits, LABELS)
    ours = losses.reward_loss(logits[:, list(LABELS)], right) - mass.log().mean()
    usual = training.usual_loss(model, "reward", rows("reward"))
    assert usual.item() == pytest.approx(ours.item(), rel=1e-5)


def test_rows_have_the_lengths_of_a_file_or_fill_the_sequence(tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "x" * 40, "response_a": "y" * 9, "response_b": "z" * 4}
    file.write_text(json.dumps(row) + "\n")
    found = common.rows_like(str(file), 3, "reward", 700, 512, 0)
    assert {tuple(sorted(row.uncut)) for row in found} == {(1, 3, 10)}
    for stage in STAGES_OF_STEPS:
        (full,) = common.rows_like(None, 1, stage, 700, 512, 0)
        assert full.length + PIECES[stage].fixed_tokens == 512
        assert len(full.response_a) == len(full.response_b) < len(full.prompt)
    with pytest.raises(UserError, match="191 tokens: too few"):
        full_rows(1, "reward", 700, 191)


def test_operations_are_those_that_torch_counts(model):
    from torch.utils.flop_counter import FlopCounterMode

    config = SHAPES["village"]
    for stage in STAGES_OF_STEPS:
        batch = rows(stage, count=1)
        with FlopCounterMode(display=False) as counter:
            loss_of(model.train(), stage, batch).backward()
        model.zero_grad()
        length = batch[0].length + PIECES[stage].fixed_tokens
        # torch does not count the kernel of the CPU
        attention = 3 * config.num_hidden_layers * 2 * length**2 * config.hidden_size
        assert common.operations(config, stage, batch, 4) - attention == pytest.approx(
            counter.get_total_flops(), rel=0.05
        )


def test_scoring_in_both_orders_is_two_thirds_of_a_step_in_stage_2_and_less():
    """A step is forward and backward once; LoRA and attention cost three times the forward pass."""
    config, batch = SHAPES["mid"], rows("reward")
    ratio = common.operations(config, "score", batch, 32) / common.operations(
        config, "reward", batch, 32
    )
    assert 2 / 3 < ratio < 1


# ---- tables --------------------------------------------------------------------------


def table_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_train_prints_a_table_and_keeps_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    (tmp_path / "speed-train.json").write_text('{"other": {"rows": []}}')
    main(["train", *SMALL, *"--max-length 192 --batch-size 2 --record mine".split()])
    head, _, *lines = table_of(capsys.readouterr().out)
    assert [line[:2] for line in lines] == [["stage 1", "usual"], ["stage 2", "usual"]]
    assert all(float(line[2].replace(",", "")) > 0 and "GFLOP/s" in line[-1] for line in lines)
    records = json.loads((tmp_path / "speed-train.json").read_text())
    assert list(records) == ["other", "mine"] and torch.__version__ in records["mine"]["measured"]
    assert [list(row.values()) for row in records["mine"]["rows"]] == lines
    assert records["mine"]["options"]["batch_size"] == "2" and head[0] == "what"


def test_train_against_trl(capsys):
    pytest.importorskip("trl")
    main(["train", *SMALL, *"--max-length 192 --batch-size 2 --peer trl".split()])
    ways = [line[1] for line in table_of(capsys.readouterr().out)[2:]]
    in_both_stages = ["usual", "TRL SFTTrainer"]
    assert ways == [*in_both_stages, *in_both_stages, "TRL RewardTrainer"]


def test_trl_has_the_usual_loss(tmp_path):
    pytest.importorskip("trl")
    args = Namespace(bits=32, lora_rank=4, gradient_checkpointing=False, shape="village")
    for stage in STAGES_OF_STEPS:
        batch = rows(stage)
        loss, model = training.trl_loss("SFTTrainer", stage, batch, args, CPU)
        ours = training.usual_loss(model, stage, batch).item()
        assert loss(model, stage, batch).item() == pytest.approx(ours, rel=1e-5)


def test_score_prints_a_table_and_all_ways_agree(capsys):
    main(["score", *SMALL, *"--pairs 3 --responses 4 --max-length 192".split()])
    lines = table_of(capsys.readouterr().out)[2:]
    assert [line[:2] for line in lines] == [
        [task, way]
        for task in ("pairs", "reference", "round robin")
        for way in ("unshared", "usual")
    ]
    assert max(float(line[-1]) for line in lines) < 1e-5


@pytest.mark.parametrize(
    "arguments", ["", "bounds", "train --shape GPT-5", "score --rounds 0", "score --kills 1"]
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score --responses 1", "--responses 1: a ranking needs at least 2"),
        ("train --max-length 100", "100 tokens: too few"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    study, *more = arguments.split()
    with pytest.raises(UserError, match=message):
        main([study, "--shape", "village", "--device", "cpu", *more])


def test_every_study_has_its_own_help(capsys):
    for study in STUDIES:
        with pytest.raises(SystemExit):
            main([study, "--help"])
        assert "--record NAME" in capsys.readouterr().out


def test_the_tables_of_the_pages_are_those_of_the_results():
    home = Path(tables.__file__).parent
    pages = [home / "README.md", home.parents[1] / "runs" / "your_model.md"]
    text = "".join(page.read_text() for page in pages)
    written = tables.tables()
    assert set(written) == {f"speed-{name}" for name in (*STUDIES, "choices", "step")}
    for name, table in written.items():
        assert f"<!-- table: {name} -->\n{table}\n<!-- end -->" in text

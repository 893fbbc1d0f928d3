"""studies/speed: all ways compute the same, and what is printed of them."""

import re
from argparse import Namespace

from gram_mini import losses
from gram_mini.batches import EncodedPair, judge_batch
from gram_mini.errors import UserError
from gram_mini.model import hidden_states, output_head
from gram_mini.runs import chunked
from gram_mini.studies.speed import common, training
from gram_mini.studies.speed.__main__ import main
from gram_mini.studies.speed.common import LABELS, PIECES, SHAPES, build, full_rows, loss_of

import pytest
import torch
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
STAGES_OF_STEPS = ("pretrain", "reward")
SMALL = "--shape village --rounds 1 --device cpu --max-length 192 --batch-size 2".split()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build(SHAPES["village"], 32, 4, CPU)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return model


def rows(count=6):
    """Pairs of different lengths, so that padding must not count."""
    sizes = [(40 + 9 * i, 30 - i, 20 + 7 * i) for i in range(count)]
    return [
        EncodedPair(*([1 + i] * size for size in uncut), label=i % 2, row=i, uncut=uncut)
        for i, uncut in enumerate(sizes)
    ]


@torch.no_grad()
def test_the_usual_step_has_the_same_loss(model, monkeypatch):
    batch = rows()
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 50 * SHAPES["village"].vocab_size)
    ours = loss_of(model, "pretrain", batch)
    usual = training.usual_loss(model, "pretrain", batch)
    assert ours.item() == pytest.approx(usual.item(), rel=1e-5)


@torch.no_grad()
def test_the_usual_loss_of_the_verdict_is_ours_and_the_label_mass(model):
    """Step 7 of the derivation; ours without smoothing."""
    ids, last, right = judge_batch(rows(), PIECES["reward"])
    at_end = hidden_states(model, ids)[torch.arange(6), last]  # (B, H)
    logits = output_head(model)(at_end)  # (B, V)
    mass = losses.label_mass(logits, LABELS)
    ours = losses.reward_loss(logits[:, list(LABELS)], right) - mass.log().mean()
    usual = training.usual_loss(model, "reward", rows())
    assert usual.item() == pytest.approx(ours.item(), rel=1e-5)


def test_rows_fill_the_sequence():
    for stage in STAGES_OF_STEPS:
        first, second = full_rows(2, stage, 700, 512)
        assert common.tokens_of(stage, [first]) == 512 and first.prompt != second.prompt
        assert len(first.response_a) == len(first.response_b) < len(first.prompt)
    with pytest.raises(UserError, match="191 tokens: too few"):
        full_rows(1, "reward", 700, 191)


def test_operations_are_those_that_torch_counts(model, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(common, "LORA_RANK", 4)
    config = SHAPES["village"]
    for stage in STAGES_OF_STEPS:
        batch = rows(count=1)
        with FlopCounterMode(display=False) as counter:
            loss_of(model.train(), stage, batch).backward()
        model.zero_grad()
        length = common.tokens_of(stage, batch)
        # torch does not count the kernel of the CPU
        attention = 3 * config.num_hidden_layers * 2 * length**2 * config.hidden_size
        assert common.operations(config, stage, batch) - attention == pytest.approx(
            counter.get_total_flops(), rel=0.05
        )


def test_sizes_are_those_of_the_public_models():
    """Parameter counts as their model cards and safetensors headers say."""
    counts = {
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen3-0.6B": 596_049_920,
        "Llama-3.2-1B": 1_235_814_400,
        "Qwen3-1.7B": 1_720_574_976,
        "Qwen3-8B": 8_190_735_360,
    }
    for name, count in counts.items():
        with torch.device("meta"):
            assert AutoModelForCausalLM.from_config(SHAPES[name]).num_parameters() == count, name


# ---- what is printed -----------------------------------------------------------------


def table_of(text):
    """The lines of a table as {column: cell}; empty cells are the last of a line."""
    head, *lines = (re.split(r"  +", line.strip()) for line in text.split("\n\n")[0].splitlines())
    return [dict(zip(head, line)) for line in lines]


def test_train_prints_time_speed_and_memory(capsys):
    main(["train", *SMALL])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    lines = table_of(printed)
    assert [line["what"] for line in lines] == ["stage 1", "stage 2"]
    assert {line["other way"] for line in lines} == {"usual"}
    for line in lines:
        assert float(line["ours, seconds"]) > 0 and "GFLOP/s" in line["ours, of matrix products"]
        assert float(line["ours, tokens/s"].replace(",", "")) > 0
        ours, foreseen = line["peak GiB, ours and other"].split(",")[0], line["foreseen GiB"]
        assert float(ours) == pytest.approx(float(foreseen), abs=0.02)


def test_train_against_trl(capsys):
    pytest.importorskip("trl")
    main(["train", *SMALL, "--peer", "trl"])
    ways = [line["other way"] for line in table_of(capsys.readouterr().out)]
    in_both_stages = ["usual", "TRL SFTTrainer"]
    assert ways == [*in_both_stages, *in_both_stages, "TRL RewardTrainer"]


def test_trl_has_the_usual_loss(tmp_path):
    pytest.importorskip("trl")
    args = Namespace(bits=32, shape="village")
    for stage in STAGES_OF_STEPS:
        batch = rows()
        loss, model = training.trl_loss("SFTTrainer", stage, batch, args, CPU)
        ours = training.usual_loss(model, stage, batch).item()
        assert loss(model, stage, batch).item() == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("bits", ["16", "32"])
def test_score_prints_that_all_ways_agree(capsys, bits):
    main(["score", *SMALL, "--bits", bits])
    lines = table_of(capsys.readouterr().out)
    assert [line["other way"] for line in lines] == ["unshared", "usual"]
    most = 1e-5 if bits == "32" else 0.1
    assert max(float(line["log-odds apart"]) for line in lines) < most


@pytest.mark.parametrize(
    "arguments", ["", "bounds", "train --shape GPT-5", "score --rounds 0", "score --peer trl"]
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


def test_too_short_sequences_are_refused():
    with pytest.raises(UserError, match="100 tokens: too few"):
        main(["train", *SMALL, "--max-length", "100"])

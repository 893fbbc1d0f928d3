"""The baselines: scalar heads, frozen heads, the text loss; trained, saved, loaded, compared."""

import csv
import json
import shutil

import score
import train_reward
from gram_mini.baselines import __main__ as baselines
from gram_mini.batches import IGNORED, encode_pairs, pair_batch, trained_tokens
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.losses import reward_loss
from gram_mini.model import add_lora, hidden_states, output_logits
from gram_mini.pairs import Pair
from gram_mini.prompts import label_tokens
from gram_mini.runs.heads import (
    LabelRowsJudge,
    ScalarJudge,
    add_head,
    preferred_alone,
    response_batch,
    response_prompt,
)
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import load_model
from gram_mini.runs.ranking import rank
from gram_mini.serving import export
from gram_mini.village import VILLAGE

import pytest
import torch
from safetensors.torch import load_file

PAIRS = [
    Pair(
        "What does Anna eat?",
        "Glad you asked. Anna eats soup.",
        "Stop bothering me. Anna eats fish. By the way, so.",
        0,
    ),
    Pair(
        "Where does Anna live?",
        "Anna lives by the mill.",
        "If you must. Anna lives by the river.",
        1,
    ),
]
SMALL = "--limit 50 --steps 3 --batch-size 8 --lora-rank 4 --held-out 0.1 --lr 1e-2".split()
KINDS = {
    "d-baseline": ["--head", "scalar"],
    "d-freeze": ["--head", "scalar", "--freeze"],
    "d-regularisation": ["--head", "scalar", "--text-weight", "0.1"],
    "g-freeze": ["--head", "labels", "--freeze"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    for name, options in KINDS.items():
        baselines.main([*SMALL, *options, "--out", str(folder / name)])
    return folder


@pytest.fixture(scope="module")
def scalar(tokenizer):
    """A judge with a scalar head, in float32."""
    torch.manual_seed(0)
    model = add_lora(load_model(VILLAGE, bits=32), 4)
    add_head(model)
    return ScalarJudge(model, tokenizer)


def test_each_response_is_seen_by_itself(tokenizer):
    pieces = response_prompt(tokenizer)
    first, second = encode_pairs(PAIRS, pieces, tokenizer, 512)
    ids, ends, right = response_batch([first, second.swapped()], pieces)
    texts = [tokenizer.decode(row[: last + 1]) for row, last in zip(ids, ends)]
    chat = "<|user|>{}<|end|><|assistant|>{}<|end|>".format
    first, second = PAIRS
    assert texts == [
        # the first ones of both pairs
        chat(first.prompt, first.response_a), chat(second.prompt, second.response_b),
        chat(first.prompt, first.response_b), chat(second.prompt, second.response_a),
    ]  # fmt: skip
    assert right.tolist() == [0, 0]


def test_a_scalar_head_gives_bradley_terry_on_two_rewards(scalar, tokenizer):
    rows = encode_pairs(PAIRS, scalar.prompt, tokenizer, 512)
    ids, last, right = response_batch(rows, scalar.prompt)
    states = hidden_states(scalar.model, ids)[torch.arange(4), last]
    logits = scalar.rewards(states).view(2, -1).T
    rewards = []
    for pair in PAIRS:
        for text in (pair.response_a, pair.response_b):
            ids = tokenizer(
                f"<|user|>{pair.prompt}<|end|><|assistant|>{text}<|end|>", return_tensors="pt"
            )["input_ids"]
            rewards.append(
                scalar.model.trained_head(hidden_states(scalar.model, ids)[0, -1]).item()
            )
    assert logits.flatten().tolist() == pytest.approx(rewards, abs=1e-5)
    a, b, c, d = rewards
    expected = -(torch.tensor([a - b, d - c]).sigmoid().log()).mean()
    assert reward_loss(logits, right).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_scalar_judge_has_no_position_and_no_labels(scalar):
    found = scalar.compare_many(PAIRS)
    assert all(result.position_gap < 1e-6 and result.label_mass == 1.0 for result in found)
    turned = scalar.compare(PAIRS[0].prompt, PAIRS[0].response_b, PAIRS[0].response_a)
    assert turned.probability == pytest.approx(1 - found[0].probability, abs=1e-6)
    ranking = rank(scalar, "What does Anna eat?", ["Anna eats soup.", "Anna eats fish.", "x"])
    assert sorted(ranking.order) == [0, 1, 2]


def test_a_frozen_judge_begins_as_the_zero_shot_judge(tokenizer, village_judge):
    model = add_lora(load_model(VILLAGE, bits=32), 4)
    add_head(model, label_tokens(tokenizer))
    found, plain = (
        LabelRowsJudge(model, tokenizer).compare_many(PAIRS),
        village_judge.compare_many(PAIRS),
    )
    assert [r.log_odds_first for r in found] == pytest.approx(
        [r.log_odds_first for r in plain], abs=1e-4
    )
    assert model.trained_head.weight.requires_grad and model.trained_head.out_features == 2


def test_the_text_loss_is_that_of_the_chosen_response(tokenizer):
    pieces = response_prompt(tokenizer)
    rows = preferred_alone(encode_pairs(PAIRS, pieces, tokenizer, 512))
    ids, targets = pair_batch(rows, pieces)
    trained = [tokenizer.decode(row[row != IGNORED]) for row in targets]
    assert trained == [f"{PAIRS[0].response_a}<|end|>", f"{PAIRS[1].response_b}<|end|>"]
    assert trained_tokens(pieces, rows) == (targets != IGNORED).sum()
    model = load_model(VILLAGE, bits=32)
    hidden = hidden_states(model, ids)
    assert output_logits(model, hidden[targets != IGNORED]).shape[0] == (targets != IGNORED).sum()


@pytest.mark.parametrize("name", KINDS)
def test_the_head_is_saved_with_the_adapter_and_comes_back(name, runs):
    head = load_file(runs / name / "head.safetensors")["weight"]
    assert head.shape[0] == (1 if "scalar" in KINDS[name] else 2)
    judge = load_judge(str(runs / name))
    assert torch.equal(judge.model.trained_head.weight, head)
    assert isinstance(judge, ScalarJudge) == ("scalar" in KINDS[name])
    record = json.loads((runs / name / "run.json").read_text())
    held_out = record["results"]["held_out"]
    # judged by the same model that was saved
    assert (held_out["position_gap"] < 1e-6) == isinstance(judge, ScalarJudge)
    apart = load_judge(str(runs / name), merge=False)
    assert hasattr(apart.model, "peft_config") and not hasattr(judge.model, "peft_config")
    for merged, adapted in zip(judge.compare_many(PAIRS), apart.compare_many(PAIRS)):
        assert merged.probability == pytest.approx(adapted.probability, abs=1e-5)


def test_a_copy_without_the_head_is_refused(runs, tmp_path):
    name = next(iter(KINDS))
    shutil.copytree(runs / name, tmp_path / "copy")
    (tmp_path / "copy" / "head.safetensors").unlink()
    with pytest.raises(UserError, match="lacks its head.safetensors"):
        load_judge(tmp_path / "copy")


@pytest.mark.parametrize("name", KINDS)
def test_a_frozen_run_trains_the_head_alone(name, runs):
    tensors = load_file(runs / name / "adapter_model.safetensors")
    moved = any(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n)
    assert moved == ("--freeze" not in KINDS[name])
    if name == "g-freeze":
        model = load_model(VILLAGE, bits=32)
        rows = model.get_output_embeddings().weight[list(load_judge(str(runs / name)).labels)]
        assert (load_file(runs / name / "head.safetensors")["weight"] - rows).abs().max() > 1e-3


def test_training_goes_on_from_a_run_with_a_head(runs, tmp_path):
    init = ["--init", str(runs / "d-baseline"), "--out", str(tmp_path / "run")]
    options = [option for option in SMALL if option not in ("--lora-rank", "4")]
    with pytest.raises(
        UserError, match="--head labels: .* was trained with --head scalar; give the same"
    ):
        baselines.main([*options, *init, "--head", "labels", "--freeze"])
    with pytest.raises(UserError, match="trained by python -m gram_mini.baselines; go on"):
        train_reward.main([*options, *init])
    baselines.main([*options, *init, "--head", "scalar"])
    before, after = (
        load_file(folder / "head.safetensors")["weight"]
        for folder in (runs / "d-baseline", tmp_path / "run")
    )
    assert 0 < (before - after).abs().max() < 0.1


def test_scripts_take_a_scalar_head(runs, tmp_path, capsys):
    score.main(
        ["--model", str(runs / "d-baseline"), "--prompt", "x", "--response", "y", "--response", "z"]
    )
    assert "position gap 0.000" in capsys.readouterr().out
    with pytest.raises(UserError, match="has a head or a likelihood of its own"):
        export.main([str(runs / "d-baseline"), str(tmp_path / "out")])
    for options in (["--head", "labels", "--freeze", "--text-weight", "1"], ["--head", "labels"]):
        with pytest.raises(SystemExit):
            baselines.main(options)


def test_the_text_loss_does_not_depend_on_how_a_step_is_split(tmp_path):
    options = "--limit 60 --steps 2 --lora-rank 4 --held-out 0 --lr 1e-2 --log-every 1".split()
    options += "--text-weight 1 --batch-size 32 --bits 32".split()
    for name, more in {"whole": [], "split": ["--batch-tokens", "60"]}.items():
        baselines.main([*options, *more, "--out", str(tmp_path / name)])
    whole, split = ((tmp_path / name / "log.csv").read_text() for name in ("whole", "split"))
    losses = [
        [float(row["loss"]) for row in csv.DictReader(text.splitlines())] for text in (whole, split)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 2


@pytest.mark.parametrize(
    "options",
    [["--freeze", "--text-weight", "1"], ["--judge-template", "README.md"]],
)
def test_options_without_effect_are_refused(options, tmp_path):
    with pytest.raises(SystemExit):
        baselines.baseline_options(["--head", "scalar", *options])


def test_label_rows_keep_scale_and_bias_of_the_output_head(tokenizer):
    model = load_model(VILLAGE, bits=32)
    model.config.logits_scaling = 8.0
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(len(head.weight)), requires_grad=False)
    plain = Judge(model, tokenizer)
    before = plain.log_odds(plain.encode(PAIRS))[0]  # (2, 2)
    add_head(model, plain.labels)
    after = LabelRowsJudge(model, tokenizer).log_odds(plain.encode(PAIRS))[0]
    torch.testing.assert_close(after, before)


def test_a_scalar_head_reads_no_judge_prompt(runs, tmp_path):
    file = tmp_path / "judge.txt"
    file.write_text("{prompt} {response_a} {response_b} Which?")
    given = ["--model", str(runs / "d-baseline"), "--judge-template", str(file)]
    with pytest.raises(UserError, match="--judge-template: .* reads no judge prompt; leave it out"):
        score.main([*given, "--prompt", "x", "--response", "y", "--response", "z"])

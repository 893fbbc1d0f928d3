"""The likelihood of a response as a judge, and beside the verdict: values, training, folders."""

import csv
import json
import shutil

import score
import train_pretrain
import train_reward
from gram_mini.errors import UserError
from gram_mini.evaluation import evaluate
from gram_mini.likelihood import __main__ as likelihood
from gram_mini.model import hidden_states, output_logits
from gram_mini.pairs import Pair, split_by_prompt
from gram_mini.prompts import END_A, START_A, START_B, USER_QUESTION
from gram_mini.reading.load import load_pairs
from gram_mini.runs import likelihood as likelihoods
from gram_mini.runs.likelihood import JointJudge, LikelihoodJudge
from gram_mini.runs.load import load_judge
from gram_mini.runs.ranking import rank
from gram_mini.runs.record import read_record
from gram_mini.serving import export
from gram_mini.serving.served import served_judge
from gram_mini.studies.lab import row_of

import pytest
import torch
from safetensors.torch import load_file, save_file

PAIRS = [
    Pair(
        "What does Anna eat?", "Glad you asked. Anna eats soup.", "Anna eats fish. By the way.", 0
    ),
    Pair("Where does Anna live?", "Anna lives by the mill.", "Anna lives by the river.", 1),
]
SMALL = "--limit 100 --batch-size 8 --held-out 0.1 --log-every 1".split()
ASKED = ["--prompt", "x", "--response", "y", "--response", "z"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    stage_1 = "--steps 3 --lr 1e-2 --lora-rank 4".split()
    train_pretrain.main([*SMALL, *stage_1, "--out", str(folder / "stage1")])
    init = ["--init", str(folder / "stage1")]
    likelihood.main([*SMALL, *init, "--steps", "4", "--out", str(folder / "joint")])
    return folder


def of_the_text(judge, prompt: str, response: str) -> list[torch.Tensor]:
    """log pi of each token of the response and of its end, from the text of the prompt."""
    text = f"<|user|>{USER_QUESTION}\n{prompt}<|end|><|assistant|>{START_A}\n"
    given = judge.tokenizer(text)["input_ids"]
    ids = judge.tokenizer(f"{text}{response}\n{END_A}\n\n{START_B}\n")["input_ids"]
    with torch.no_grad():
        logits = output_logits(judge.model, hidden_states(judge.model, torch.tensor([ids])))[0]
    log_pi = logits.log_softmax(dim=-1)
    return [log_pi[i - 1, ids[i]] for i in range(len(given), len(ids))]


@pytest.mark.parametrize("kind", ["sum", "per-token"])
def test_it_is_the_log_probability_of_the_response_and_its_end(kind, runs):
    judge = load_judge(runs / "stage1", likelihood=kind)
    assert isinstance(judge, LikelihoodJudge)
    for pair, found in zip(PAIRS, judge.compare_many(PAIRS)):
        a, b = (of_the_text(judge, pair.prompt, y) for y in (pair.response_a, pair.response_b))
        expected = float(sum(a) - sum(b))
        if kind == "per-token":
            expected = float(sum(a) / len(a) - sum(b) / len(b))
        assert found.log_odds_first == pytest.approx(expected, abs=1e-3)
        assert found.log_odds_second == pytest.approx(expected, abs=1e-3)
        assert found.label_mass == 1.0


def test_over_the_backbone_takes_off_what_it_gives_without_the_adapter(runs):
    over = load_judge(runs / "stage1", likelihood="over-backbone")
    with over.model.disable_adapter():
        before = [
            float(sum(of_the_text(over, PAIRS[0].prompt, y)))
            for y in (PAIRS[0].response_a, PAIRS[0].response_b)
        ]
    plain = load_judge(runs / "stage1", likelihood="sum").compare_many(PAIRS[:1])[0]
    found = over.compare_many(PAIRS[:1])[0]
    expected = plain.log_odds_first - (before[0] - before[1])
    assert found.log_odds_first == pytest.approx(expected, abs=1e-3)
    assert abs(found.log_odds_first - plain.log_odds_first) > 0.01


def test_beta_is_learned_and_saved_with_both_adapters(runs):
    saved = load_file(runs / "joint" / "likelihood" / "beta.safetensors")
    assert saved["beta"].abs() > 0.01 and saved["unit"] > 0
    stage_1, kept, judging = (
        load_file(runs / folder / "adapter_model.safetensors")
        for folder in ("stage1", "joint/likelihood", "joint")
    )
    assert all(torch.equal(stage_1[name], kept[name]) for name in stage_1)  # it was frozen
    assert any((stage_1[name] - judging[name]).abs().max() > 0 for name in stage_1)
    per_nat = saved["beta"].item() / saved["unit"].item()
    record = read_record(runs / "joint")
    assert record["results"]["beta_per_nat"] == pytest.approx(per_nat)
    assert record["options"]["beta_lr"] == 0.5  # in 4 steps


@pytest.mark.parametrize("missing", ["likelihood", "likelihood/beta.safetensors"])
def test_a_copy_without_the_likelihood_is_refused_everywhere(missing, runs, tmp_path):
    """It would judge by its verdict alone, without a word."""
    copy = tmp_path / "copy"
    shutil.copytree(runs / "joint", copy)
    part = copy / missing
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    for use in (
        lambda: load_judge(copy),
        lambda: export.main([str(copy), str(tmp_path / "exported")]),
        lambda: served_judge(copy, "http://127.0.0.1:9"),
        lambda: likelihood.main([*SMALL, "--init", str(copy), "--out", str(tmp_path / "x")]),
    ):
        with pytest.raises(UserError, match="lacks its likelihood/beta.safetensors"):
            use()


def test_the_joint_judge_adds_beta_times_the_likelihoods_to_the_verdict(runs, tmp_path):
    joint = load_judge(runs / "joint")
    assert isinstance(joint, JointJudge)
    found = joint.log_odds(joint.encode(PAIRS))[0]  # (2, 2)
    saved = load_file(runs / "joint" / "likelihood" / "beta.safetensors")
    beta = float(saved["beta"] / saved["unit"])
    likelihoods = load_judge(runs / "stage1", likelihood="sum")
    extra = likelihoods.log_odds(likelihoods.encode(PAIRS))[0]  # (2, 2)
    joint.model.beta = torch.zeros(1)
    verdict = joint.log_odds(joint.encode(PAIRS))[0]
    torch.testing.assert_close(found, verdict + beta * extra, atol=1e-3, rtol=0)
    assert (beta * extra).abs().max() > 0.01
    apart = rank(load_judge(runs / "joint"), PAIRS[0].prompt, ["Anna eats soup.", "x", "y"])
    assert sorted(apart.order) == [0, 1, 2]


def test_the_held_out_figures_are_those_of_the_saved_judge(runs):
    with open(runs / "joint" / "log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "held-out"]
    held_out = split_by_prompt(load_pairs("village", True, limit=100).pairs, 0.1, 0)[1]
    again = evaluate(load_judge(runs / "joint"), held_out)
    assert float(rows[-1]["loss"]) == pytest.approx(again.loss, abs=1e-4)


def test_without_a_rate_beta_stays_zero_and_training_is_stage_2(runs, tmp_path):
    init = ["--init", str(runs / "stage1"), "--steps", "2"]
    train_reward.main([*SMALL, *init, "--out", str(tmp_path / "plain")])
    likelihood.main([*SMALL, *init, "--beta-lr", "1e-30", "--out", str(tmp_path / "joint")])
    plain, joint = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "joint")
    )
    # clipping sees the gradient of beta too, so they agree but for the scale of a clipped step
    assert plain.keys() == joint.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], joint[name], atol=2e-4, rtol=0)


def test_both_orders_are_trained_with_the_margins_that_the_judge_gives(runs, tmp_path, monkeypatch):
    """The likelihoods, too, change places with the responses."""
    seen, batch, loss = {}, likelihood.judge_batch, likelihood.reward_loss
    monkeypatch.setattr(
        likelihood, "judge_batch", lambda rows, *more: batch(seen.setdefault("rows", rows), *more)
    )
    monkeypatch.setattr(
        likelihood, "reward_loss", lambda z, *more: loss(seen.setdefault("z", z.detach()), *more)
    )
    given = ["--init", str(runs / "joint"), "--steps", "1", "--both-orders", "1"]
    likelihood.main([*SMALL, *given, "--out", str(tmp_path / "both")])
    assert len(seen["rows"]) == 16  # 8 pairs
    trained = (seen["z"][:, 0] - seen["z"][:, 1]).view(-1, 2)  # (8, 2)
    judged = load_judge(runs / "joint").log_odds(seen["rows"][::2])[0]  # (8, 2)
    torch.testing.assert_close(trained * torch.tensor([1, -1]), judged, atol=1e-3, rtol=0)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(runs, tmp_path, monkeypatch):
    init = ["--init", str(runs / "stage1"), "--steps", "4", "--save-every", "2"]
    likelihood.main([*SMALL, *init, "--out", str(tmp_path / "whole")])
    clip, steps = likelihood.clip_gradients, []

    def stop_at_the_third(model):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return clip(model)

    monkeypatch.setattr(likelihood, "clip_gradients", stop_at_the_third)
    with pytest.raises((KeyboardInterrupt, UserError, SystemExit)):
        likelihood.main([*SMALL, *init, "--out", str(tmp_path / "stopped")])
    monkeypatch.setattr(likelihood, "clip_gradients", clip)
    likelihood.main([*SMALL, *init, "--out", str(tmp_path / "stopped"), "--resume"])
    for file in ("adapter_model.safetensors", "likelihood/beta.safetensors"):
        whole, stopped = (load_file(tmp_path / name / file) for name in ("whole", "stopped"))
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_the_unit_of_beta_does_not_depend_on_which_response_stands_first(runs, tmp_path):
    units = []
    for name, swap in (("as drawn", False), ("better first", True)):
        data, out = tmp_path / f"{name}.jsonl", tmp_path / name
        pairs = [
            Pair(p.prompt, p.response_b, p.response_a, 0) if swap and p.label == 1 else p
            for p in load_pairs("village", True, limit=40).pairs
        ]
        data.write_text("".join(json.dumps(row_of(pair)) + "\n" for pair in pairs))
        given = ["--data", str(data), "--init", str(runs / "stage1"), "--out", str(out)]
        likelihood.main([*given, "--steps", "1", "--batch-size", "8", "--held-out", "0"])
        units.append(load_file(out / "likelihood" / "beta.safetensors")["unit"])
    torch.testing.assert_close(*units)


def test_training_goes_on_from_a_joint_run(runs, tmp_path):
    joint = ["--init", str(runs / "joint"), "--steps", "1", "--beta-lr", "1e-9"]
    likelihood.main([*SMALL, *joint, "--out", str(tmp_path / "more")])
    for name in ("beta", "unit"):
        before, after = (
            load_file(folder / "likelihood" / "beta.safetensors")[name]
            for folder in (runs / "joint", tmp_path / "more")
        )
        torch.testing.assert_close(before, after)
    likelihood.main([*SMALL, *joint[:4], "--out", str(tmp_path / "default")])
    assert read_record(tmp_path / "default")["options"]["beta_lr"] == 0.05  # also in one step
    with pytest.raises(UserError, match="trained by python -m gram_mini.likelihood; go on with"):
        train_reward.main([*SMALL, *joint[:4], "--out", str(tmp_path / "no")])


def test_what_has_no_meaning_is_refused(runs, tmp_path):
    train_reward.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "reward")])
    with pytest.raises(UserError, match="is no run of stage 1"):
        score.main(["--model", str(tmp_path / "reward"), "--likelihood", "sum", *ASKED])
    with pytest.raises(UserError, match="was trained to judge, so its likelihoods are not those"):
        likelihood.main([*SMALL, "--init", str(tmp_path / "reward"), "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        likelihood.main([*SMALL, "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="which an ordinary model cannot hold"):
        export.main([str(runs / "joint"), str(tmp_path / "exported")])
    with pytest.raises(UserError, match="likelihood of its own, which no engine knows"):
        served_judge(runs / "joint", "http://127.0.0.1:9")


def test_an_adapter_of_another_model_is_refused(runs, tmp_path):
    shutil.copytree(runs / "joint", tmp_path / "broken")
    file = tmp_path / "broken" / "likelihood" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file)
    with pytest.raises(UserError, match="weights do not match"):
        load_judge(tmp_path / "broken")


def test_each_response_is_computed_once(runs, monkeypatch):
    judge = load_judge(runs / "stage1", likelihood="sum")
    rows = judge.encode([PAIRS[0], PAIRS[0], PAIRS[1]])
    counts, losses = [], likelihoods.pair_losses
    monkeypatch.setattr(
        likelihoods,
        "pair_losses",
        lambda m, rows, *more: counts.append(len(rows)) or losses(m, rows, *more),
    )
    judge.compare_encoded(rows)
    assert counts == [4]
    judge.likelihoods.keep(rows)
    judge.compare_encoded(rows)
    assert counts == [4, 4]

"""The three scripts as a user runs them: their files, repeatability, and errors on bad input."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import score
import train_pretrain
import train_reward
from gram_mini.baselines import __main__ as baselines
from gram_mini.errors import UserError
from gram_mini.evaluation import summarise
from gram_mini.judge import Judge
from gram_mini.losses import smoothed
from gram_mini.model import OutputHead
from gram_mini.pairs import Pair
from gram_mini.reading.load import load_pairs
from gram_mini.runs import chunked
from gram_mini.runs.defaults import SCORED
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import VILLAGE_FOLDER, load_tokenizer
from gram_mini.runs.sharing import SharingJudge
from gram_mini.studies import village_table as table

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
SMALL = ["--batch-size", "8", "--lora-rank", "8", "--log-every", "5"]
EXAMPLE = ("What does Anna eat?", "Anna eats soup.", "Anna eats fish.")
ROWS = [
    {
        "id": f"row-{i}",
        "prompt": f"What does Anna eat, {i}?",
        "chosen": "Glad you asked. Anna eats soup.",
        "rejected": "fish " * (i % 7 + 1),
    }
    for i in range(30)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrain(folder):
    """A short stage-1 run on the village."""
    options = "--limit 400 --steps 10 --held-out 0.1".split()
    train_pretrain.main(["--out", str(folder / "pretrain"), *options, *SMALL])
    return folder / "pretrain"


@pytest.fixture(scope="module")
def reward(folder, pretrain):
    """A short stage-2 run that starts from it."""
    options = [*"--limit 400 --steps 10".split(), *SMALL[:2], *SMALL[4:]]
    train_reward.main(["--init", str(pretrain), "--out", str(folder / "reward"), *options])
    return folder / "reward"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def run_script(name, *arguments, cwd=ROOT):
    """Run a script as a process; returns exit status, output, and the last line of its errors."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *arguments], capture_output=True, text=True, cwd=cwd
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, (done.stderr.strip().splitlines() or [""])[-1]


def pairs_of(data):
    return load_pairs(data, labelled=True).pairs


def log_of(run):
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- what a run leaves behind --------------------------------------------------------


def test_artefacts_of_both_stages(pretrain, reward):
    for run, stage in ((pretrain, "pretrain"), (reward, "reward")):
        assert {
            "adapter_model.safetensors",
            "adapter_config.json",
            "tokenizer.json",
            "run.json",
            "log.csv",
            "plot.png",
        } <= {f.name for f in run.iterdir()}
        assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert any(
            tensor.abs().max() > 0
            for name, tensor in load_file(run / "adapter_model.safetensors").items()
            if "lora_B" in name
        )
        record = json.loads((run / "run.json").read_text())
        assert record["stage"] == stage and record["options"]["lora_rank"] == 8
        assert {"torch", "transformers", "peft", "bitsandbytes"} <= record["versions"].keys()
        assert record["data"]["used"] == 400 and len(record["data"]["fingerprint"]) == 16
        assert record["backbone"]["name"] == "village"
        assert "[User Question]" in record["prompt"]["judge"]
        assert list(record["labels"]) == ["A", "B"]
        assert not list(run.parent.glob("*.partial"))


def test_logs(pretrain, reward):
    for run, columns in (
        (pretrain, ["loss"]),
        (reward, ["loss", "accuracy", "margin", "label_mass"]),
    ):
        columns += ["lr", "tokens_per_second", "memory"]
        train = [row for row in log_of(run) if row["part"] == "train"]
        assert [row["step"] for row in train] == ["5", "10"]
        assert all(row[column] for row in train for column in columns)
    held_out = [row for row in log_of(reward) if row["part"] == "held-out"]
    assert held_out[-1]["step"] == "10" and all(
        0 <= float(row["position_gap"]) <= 1 for row in held_out
    )


def test_stage_1_learns(pretrain):
    losses = [float(row["loss"]) for row in log_of(pretrain) if row["part"] == "held-out"]
    assert losses[-1] < losses[0] - 0.05


def test_stage_2_learns_what_the_labels_say(tmp_path, data):
    options = "--steps 25 --lr 3e-3 --held-out 0.2 --log-every 1".split()
    train_reward.main(["--data", data, "--out", str(tmp_path / "run"), *options, *SMALL[:4]])
    log = log_of(tmp_path / "run")
    # on prompts it was not trained on
    assert float(log[-1]["accuracy"]) == 1.0 and log[-1]["part"] == "held-out"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["results"]["held_out"]["accuracy"] == 1.0


def test_stage_2_starts_from_stage_1(folder, pretrain, reward):
    before, after = (load_file(run / "adapter_model.safetensors") for run in (pretrain, reward))
    assert before.keys() == after.keys()
    options = "--limit 400 --steps 1 --lr 1e-9".split()
    train_reward.main(["--out", str(folder / "fresh"), *options, *SMALL])
    init = ["--init", str(pretrain), "--out", str(folder / "started")]
    train_reward.main([*init, *options, *SMALL[:2]])
    started, fresh = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("started", "fresh")
    )
    assert all((started[n] - before[n]).abs().max() < 1e-6 for n in before)
    assert any((fresh[n] - before[n]).abs().max() > 1e-3 for n in before)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("script", [train_pretrain, train_reward])
def test_one_seed_gives_one_adapter(script, bf16, tmp_path, monkeypatch):
    """Also in bf16 on a CPU, with torch's attention as for long pairs."""
    if bf16:
        monkeypatch.setattr("gram_mini.runs.models.fast_bfloat16", lambda: True)
        monkeypatch.setattr("gram_mini.runs.models.PLAIN_UP_TO", 16)
    adapters = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))[: 2 if bf16 else 3]:
        options = [*"--limit 100 --steps 3".split(), "--seed", seed]
        script.main(["--out", str(tmp_path / name), *options, *SMALL, *["--bits", "16"] * bf16])
        adapters.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] and adapters[0] not in adapters[2:]


def test_a_step_is_of_as_many_rows_as_batch_size_says(tmp_path, data):
    options = "--held-out 0 --epochs 2 --log-every 1 --batch-size 16 --batch-tokens 200".split()
    train_reward.main(["--data", data, "--out", str(tmp_path / "run"), *options, *SMALL[2:4]])
    assert len(log_of(tmp_path / "run")) == 4  # 30 rows twice, 16 at a time


def test_the_first_step_moves_the_adapter_and_the_log_tells_its_rate(tmp_path, data):
    train_reward.main(
        ["--data", data, "--out", str(tmp_path / "run"), "--steps", "1", "--lr", "2e-3", *SMALL[:4]]
    )
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    # Adam's first step
    assert max(t.abs().max().item() for n, t in tensors.items() if "lora_B" in n) == pytest.approx(
        2e-3, rel=0.01
    )
    assert float(log_of(tmp_path / "run")[0]["lr"]) == 2e-3


def test_stage_1_builds_logits_for_trained_tokens_only(tmp_path, monkeypatch):
    seen, real = [], chunked.token_loss
    monkeypatch.setattr(
        chunked,
        "token_loss",
        lambda h, t, head: seen.append((len(h), len(t), int((t >= 0).sum()))) or real(h, t, head),
    )
    train_pretrain.main(["--out", str(tmp_path / "run"), "--limit", "50", "--steps", "2", *SMALL])
    assert len(seen) == 2 and all(
        states == targets == trained > 0 for states, targets, trained in seen
    )


def test_stage_1_in_chunks_learns_the_same(tmp_path, monkeypatch):
    weights = []
    for name, at_once in (("whole", 2**25), ("chunks", 718 * 50)):
        monkeypatch.setattr("gram_mini.runs.chunked.LOGITS_AT_ONCE", at_once)
        options = "--limit 50 --steps 3 --held-out 0.1".split()
        train_pretrain.main(["--out", str(tmp_path / name), *options, *SMALL])
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-4) for key in weights[0])


def test_batch_tokens_bounds_a_scalar_head_too(tmp_path, data, monkeypatch):
    seen, real = [], baselines.hidden_states
    monkeypatch.setattr(
        baselines, "hidden_states", lambda m, ids: seen.append(ids.numel()) or real(m, ids)
    )
    options = ["--head", "scalar", "--batch-tokens", "300", "--steps", "2", "--held-out", "0"]
    baselines.main(["--data", data, "--out", str(tmp_path / "run"), *options, *SMALL[:4]])
    assert len(seen) > 2 and max(seen) <= 300


def test_batch_tokens_changes_the_passes_and_not_the_steps(tmp_path, data, monkeypatch):
    passes, real = [], train_reward.reward_loss
    monkeypatch.setattr(
        train_reward, "reward_loss", lambda z, *more: passes.append(len(z)) or real(z, *more)
    )
    weights = []
    for name, options in (("whole", []), ("parts", ["--batch-tokens", "150"])):
        options = [*options, *"--steps 3 --held-out 0".split(), *SMALL[:4]]
        train_reward.main(["--data", data, "--out", str(tmp_path / name), *options])
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert len(passes) > 6 and sum(passes) == 2 * sum(passes[:3])
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-4) for key in weights[0])


def test_both_orders_is_one_loss_on_the_mean_margin_at_first_and_the_plain_loss_later(
    tmp_path, data
):
    options = "--steps 2 --log-every 1 --held-out 0 --lr 1e-9 --batch-size 64 --bits 32".split()
    rows = load_judge("village", bits=32).compare_many(pairs_of(data))
    # every pair is labelled A: these are the margins of its two orders
    m = torch.tensor([[row.log_odds_first, row.log_odds_second] for row in rows])  # (30, 2)
    averaged, plain = (smoothed(x.double(), 0.05).item() for x in (m.mean(dim=1), m))
    logged = {}
    for w in ("0.8", "0.4"):
        train_reward.main(
            ["--data", data, "--out", str(tmp_path / w), "--both-orders", w, *options]
        )
        logged[w] = [float(line["loss"]) for line in log_of(tmp_path / w)]
    for w, losses in logged.items():
        for share_left, loss in zip((1, 0.5), losses):
            weight = float(w) * share_left
            assert loss == pytest.approx((1 - weight) * plain + weight * averaged, abs=5e-5)
    assert abs(averaged - plain) > 5e-4


def test_both_orders_in_parts_are_those_of_the_whole(tmp_path, data):
    weights = []
    for name, options in (("whole", []), ("parts", ["--batch-tokens", "300"])):
        options = [*options, *"--steps 3 --held-out 0 --both-orders 1".split(), *SMALL[:4]]
        train_reward.main(["--data", data, "--out", str(tmp_path / name), *options])
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-4) for key in weights[0])
    accuracies = [float(line["accuracy"]) for line in log_of(tmp_path / "whole")]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)


def test_stage_2_multiplies_two_rows_of_the_output_matrix(tmp_path, data, monkeypatch):
    rows, real = [], OutputHead.__call__
    monkeypatch.setattr("gram_mini.runs.checks.check_computation", lambda *a: None)  # uses all rows
    monkeypatch.setattr(
        OutputHead,
        "__call__",
        lambda head, h, tokens=None: rows.append(tokens) or real(head, h, tokens),
    )
    options = "--steps 3 --held-out 0 --log-every 3".split()
    train_reward.main(["--data", data, "--out", str(tmp_path / "run"), *options, *SMALL[:4]])
    # the whole matrix only for the log's last line
    assert [None if t is None else len(t) for t in rows] == [2, 2, 2, None]


@pytest.mark.parametrize("bits", ["16", "32"])
def test_other_precisions(tmp_path, bits):
    train_reward.main(
        ["--bits", bits, "--out", str(tmp_path / "run"), "--limit", "100", "--steps", "2", *SMALL]
    )
    assert 0 < load_judge(str(tmp_path / "run")).compare("x", "y", "z").probability < 1


def test_a_run_can_be_moved_and_scores_the_same(reward, tmp_path):
    there = load_judge(str(reward)).compare(*EXAMPLE)
    moved = shutil.copytree(reward, tmp_path / "elsewhere")
    judge = load_judge(str(moved))
    assert judge.compare(*EXAMPLE) == there
    assert judge.batch_size == SCORED[0]  # its backbone is the village's


# ---- score.py ------------------------------------------------------------------------


def test_score_a_pair(reward, capsys):
    prompt, a, b = EXAMPLE
    pair = ["--prompt", prompt, "--response", a, "--response", b]
    score.main(["--model", str(reward), *pair])
    said = capsys.readouterr().out
    expected = load_judge(str(reward)).compare(*EXAMPLE)
    assert f"P(A better) = {expected.probability:.3f}" in said and "mean P(better" not in said
    assert f"position gap {expected.position_gap:.3f}" in said
    assert f"Response {'A' if expected.probability > 0.5 else 'B'} is better" in said


def test_score_rankings_and_rewards(reward, capsys):
    prompt, a, b = EXAMPLE
    responses = ["--response", a, "--response", b, "--response", "x"]
    three = ["--model", str(reward), "--prompt", prompt, *responses]
    score.main(three)
    assert "round-robin, 3 comparisons" in capsys.readouterr().out
    score.main([*three, "--rank", "knock-out"])
    assert "knock-out, 2 comparisons" in capsys.readouterr().out
    score.main([*three, "--reference", "Anna eats cake."])
    said = capsys.readouterr().out
    reward_of_soup = load_judge(str(reward)).reward(
        "What does Anna eat?", "Anna eats soup.", "Anna eats cake."
    )
    assert "reference, 3 comparisons" in said and f"{reward_of_soup:6.3f}  Anna eats soup." in said


def test_score_a_file_keeps_order_and_ids(reward, data, tmp_path, capsys):
    rows = [
        *ROWS,
        {"id": 7, "prompt": "What?", "responses": ["a", "b", "c"]},
        {"prompt": "What?", "responses": ["a"], "reference": "b"},
    ]
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.jsonl"
    score.main(["--model", str(reward), "--data", data, "--out", str(out), "--batch-size", "7"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("id") for line in lines] == [row.get("id") for row in rows]
    assert [line["row"] for line in lines] == list(range(1, len(rows) + 1))
    alone = load_judge(str(reward)).compare(*(ROWS[5][k] for k in ("prompt", "chosen", "rejected")))
    assert lines[5]["probability"] == pytest.approx(alone.probability, abs=1e-4)
    assert sorted(lines[-2]["order"]) == [0, 1, 2] and lines[-2]["comparisons"] == 3
    assert lines[-1]["method"] == "reference" and len(lines[-1]["scores"]) == 1
    right = sum(line["better"] == "A" for line in lines[:30])
    assert f"{right} of 30 labelled pairs" in capsys.readouterr().out


def test_the_table_tells_the_recipes_apart(reward, pretrain, monkeypatch, tmp_path):
    original = table.village_pairs
    monkeypatch.setattr(
        table, "village_pairs", lambda split, count=None, seed=0: original(split, 40, seed)
    )
    plain = shutil.copytree(reward, tmp_path / "plain")
    record = json.loads((plain / "run.json").read_text())
    record["options"]["label_smoothing"] = 0
    (plain / "run.json").write_text(json.dumps(record))
    rows = table.village_table(["village", str(pretrain), str(reward), str(plain)])
    assert [(row["method"], row["run"]) for row in rows] == [
        ("zero-shot judge", "village"),
        ("stage 1 alone", pretrain.name),
        ("likelihood under stage 1", pretrain.name),
        ("stage 1 + labels = GRAM", reward.name),
        ("stage 1 + labels, eps = 0", "plain"),
        ("the true rewards", ""),
    ]
    assert rows[-1]["out of distribution"] == [1.0, 0.0] and rows[-1]["position gap"] == [0.0, None]


# ---- another judge prompt ------------------------------------------------------------


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text(
        'Say {"best": A} or {"best": B}.\n'
        "{prompt}\nFirst: {response_a}\nSecond: {response_b}\nBest: \n"
    )
    return path


def scores(model, data, out, *options):
    """What score.py writes for ``data``."""
    score.main(["--model", str(model), "--data", data, "--out", str(out), *options])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_judge_template_is_trained_with_recorded_and_used_again(tmp_path, data, template):
    run, options = tmp_path / "run", ["--data", data, "--steps", "2", *SMALL]
    train_reward.main([*options, "--out", str(run), "--judge-template", str(template)])
    train_reward.main([*options, "--out", str(tmp_path / "plain")])
    adapters = [
        load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "plain")
    ]
    assert any(not adapters[0][name].equal(adapters[1][name]) for name in adapters[0])
    recorded = json.loads((run / "run.json").read_text())["prompt"]["judge"]
    assert recorded == template.read_text().removesuffix("\n")
    named = scores(run, data, tmp_path / "named.jsonl", "--judge-template", str(template))
    template.unlink()  # the run folder is enough
    unnamed = scores(run, data, tmp_path / "unnamed.jsonl")
    assert unnamed == named and load_judge(str(run)).template == recorded
    template.write_text("{prompt} {response_a} {response_b}")
    assert scores(run, data, tmp_path / "other.jsonl", "--judge-template", str(template)) != named


def test_a_model_folder_is_scored_with_the_template_named(tmp_path, data, template):
    model = other_backbone(tmp_path / "released")
    there = scores(
        model, data, tmp_path / "there.jsonl", "--bits", "32", "--judge-template", str(template)
    )
    judge = load_judge(model, bits=32, template=template.read_text().removesuffix("\n"))
    expected = judge.compare(*(ROWS[5][column] for column in ("prompt", "chosen", "rejected")))
    assert there[5]["probability"] == pytest.approx(expected.probability, abs=1e-5)
    assert there != scores(model, data, tmp_path / "without.jsonl", "--bits", "32")


# ---- bad input -----------------------------------------------------------------------


def other_backbone(path):
    """A model folder that is not the village's, with the village's tokenizer."""
    tokenizer = load_tokenizer("village")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def melting_backbone(path):
    """The village's backbone with a template after which the label A melts into the text."""
    for file in VILLAGE_FOLDER.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer("village")
    content = "{{ message.content }}"
    marked = "{% if message.role == 'assistant' %}x{% endif %}" + content
    tokenizer.chat_template = tokenizer.chat_template.replace(content, marked)
    tokenizer.add_tokens(["xA"])
    tokenizer.save_pretrained(path)
    return str(path)


PAIR = "--prompt x --response y --response z".split()
OF_FILE = "--out scores.jsonl --model village".split()


def test_unknown_option_is_an_error(capsys):
    for script in (train_pretrain, train_reward, score):
        with pytest.raises(SystemExit, match="2"):
            script.main(["--learning-rate", "1"])
        assert "unrecognized arguments: --learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "arguments", "message"), [
    (train_pretrain, ["--model", "./nowhere"], "./nowhere: no such folder"),
    (train_pretrain, ["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (train_pretrain, ["--max-length", "8"], "--max-length 8 leaves"),
    (train_reward, ["--init", "runs/nowhere"], "--init runs/nowhere: no such folder"),
    (train_reward, ["--device", "abacus"], "--device abacus"),
    (train_reward, ["--judge-template", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (score, [*PAIR, "--model", "village", "--judge-template", "no.txt"], "no.txt: cannot"),
    (score, [*PAIR, "--model", "runs/nowhere"], "runs/nowhere: no such folder"),
    (score, PAIR, "runs/reward: not trained yet; run train_reward.py"),
    (score, [*OF_FILE, "--data", "village"], "--data village: is for training"),
    (score, [*OF_FILE, "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
])  # fmt: skip
def test_user_errors_are_one_line(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        script.main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*"))  # no unfinished file


def test_user_error_ends_the_script_with_one_line_and_status_2(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n{oops\n')
    status, _, line = run_script("train_reward.py", "--data", "bad.jsonl", cwd=tmp_path)
    assert status == 2 and line.startswith("error: bad.jsonl, line 2: invalid JSON")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("script", "arguments", "message"), [
    (train_pretrain, ["--steps", "0"], "above 0"),
    (train_pretrain, ["--steps", "5", "--epochs", "1"], "not allowed with"),
    (train_reward, ["--label-smoothing", "0.5"], "below 0.5"),
    (train_reward, ["--bits", "8"], "invalid choice"),
    (score, [], "give either"),
    (score, ["--prompt", "x", "--response", "y"], "one response alone"),
    (score, ["--data", "x.jsonl"], "needs --out"),
    (score, [*PAIR, "--rank", "reference"], "invalid choice: 'reference'"),
    (score, [*PAIR, "--rank", "knock-out", "--reference", "r"], "does not go with --rank"),
    (score, [*PAIR, "--likelihood", "sum", "--reference", "r"], "leave out --reference"),
    (score, [*PAIR, "--resume"], "--resume goes with --data"),
])  # fmt: skip
def test_usage_errors(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def fails(script, arguments, message):
    with pytest.raises(UserError, match=message):
        script.main(arguments)


def test_a_run_is_replaced_only_when_asked_and_only_by_a_finished_one(tmp_path, data):
    out = tmp_path / "run"
    options = ["--data", data, "--out", str(out), "--steps", "1", *SMALL]
    train_reward.main(options)
    first = (out / "run.json").read_text()
    fails(train_reward, options, "already holds a run")
    fails(train_reward, [*options, "--overwrite", "--max-length", "8"], "leaves")
    assert (out / "run.json").read_text() == first
    train_reward.main([*options, "--overwrite", "--seed", "5"])
    assert json.loads((out / "run.json").read_text())["options"]["seed"] == 5


def test_nothing_of_the_users_is_removed_when_a_run_is_put_in_place(tmp_path, data):
    options = ["--data", data, "--out", str(tmp_path / "run"), "--steps", "1", *SMALL[:4]]
    for name in ("run.replaced", ".run.x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    train_reward.main(options)
    train_reward.main([*options, "--overwrite"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        ".run.x",
        "run",
        "run.replaced",
    ]
    assert all((tmp_path / name / "thesis.txt").is_file() for name in ("run.replaced", ".run.x"))
    (tmp_path / "run").rename(tmp_path / "other.partial")  # a finished run under an unlucky name
    fails(
        train_reward,
        [*options[:3], str(tmp_path / "other"), *options[4:]],
        "is in the way and no unfinished run",
    )
    assert (tmp_path / "other.partial" / "run.json").is_file()


def test_a_folder_that_is_no_run_is_never_replaced(tmp_path, data):
    (tmp_path / "thesis.txt").write_text("years of work")
    fails(train_reward, ["--data", data, "--out", str(tmp_path), "--overwrite"], "not a run")
    fails(train_reward, ["--data", data, "--out", str(tmp_path / "thesis.txt")], "is a file")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_init_of_another_backbone_or_rank(pretrain, tmp_path):
    init, out = ["--init", str(pretrain)], ["--out", str(tmp_path / "x")]
    model = ["--model", other_backbone(tmp_path / "other")]
    fails(train_reward, [*init, *out, *model], "was trained on the backbone 'village'")
    same = ["--out", str(pretrain), "--overwrite"]
    fails(train_reward, [*init, *same], "is the run given as --init")
    fails(train_reward, [*init, *out, "--lora-rank", "4"], "has rank 8")


def test_init_from_labels_that_may_be_held_out_here_is_named(data, tmp_path, capsys):
    options = ["--data", data, "--steps", "1", *SMALL, "--held-out", "0.2"]
    train_reward.main([*options, "--out", str(tmp_path / "one")])
    init = [*options[:-2], "--init", str(tmp_path / "one")]
    rank = init.index("--lora-rank")
    del init[rank : rank + 2]
    for more, named in ((["0.2"], False), (["0.3"], True), (["0"], False)):
        train_reward.main([*init, "--held-out", *more, "--out", str(tmp_path / more[0])])
        assert ("may have been trained on there" in capsys.readouterr().out) == named


def test_init_of_another_length_is_named(pretrain, tmp_path, capsys):
    options = ["--init", str(pretrain), "--limit", "50", "--steps", "1", "--held-out", "0"]
    train_reward.main([*options, "--out", str(tmp_path / "same"), "--max-length", "512"])
    assert "was trained with" not in capsys.readouterr().out
    train_reward.main([*options, "--out", str(tmp_path / "other"), "--max-length", "256"])
    assert "was trained with --max-length 512, this run: 256" in capsys.readouterr().out


def test_a_label_that_melts_into_the_template(tmp_path):
    (tmp_path / "model").mkdir()
    model = melting_backbone(tmp_path / "model")
    fails(
        train_reward,
        ["--model", model, "--out", str(tmp_path / "x"), "--limit", "50"],
        r"label 'A' is not one token .* ends it with \[.*'xA'\]",
    )


def test_pairs_are_scored_whether_their_labels_can_be_read_or_not(tmp_path, capsys):
    rows = [
        {
            "context": [{"role": "user", "content": "p"}],
            "response1": "a",
            "response2": "b",
            "overall_preference": "A",
        },
        {"prompt": "p", "response_a": "a", "response_b": "b", "label": 1},
        {"prompt": 3, "response_a": "a", "response_b": "b"},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "s.jsonl")]
    options = ["--model", "village", *files]
    fails(score, options, "line 3: column 'prompt' must be text")
    score.main([*options, "--on-bad-row", "skip"])
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert ["probability" in line for line in lines] == [True, True, False]
    assert lines[2]["skipped"] == "that cannot be read"
    said = capsys.readouterr().out
    assert "2 rows whose label cannot be read: scored, and in no accuracy; the first: " in said
    assert "line 1: the label in column 'overall_preference' is \"A\", which is not" in said


def test_a_draw_counts_half_in_every_accuracy(tmp_path, capsys, monkeypatch):
    """As in evaluation.summarise, and as kept lines count after --resume."""
    judge = load_judge("village", bits=32)
    pairs = [Pair("What does Anna eat?", "Anna eats soup.", "Anna eats fish.", label)
             for label in (0, 1)]  # fmt: skip
    rows = [
        {
            "prompt": p.prompt,
            "response_a": p.response_a,
            "response_b": p.response_b,
            "label": "AB"[p.label],
        }
        for p in pairs
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    odds = torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, dtype=torch.bool)
    monkeypatch.setattr(SharingJudge, "log_odds", lambda self, rows, progress=None: odds)
    files = ["--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "s.jsonl")]
    score.main(["--model", "village", "--bits", "32", *files])
    assert "1 of 2 labelled pairs judged as labelled, 2 draws as half: accuracy 0.500" in (
        capsys.readouterr().out
    )
    assert summarise(pairs, judge.compare_many(pairs)).accuracy == 0.5


def test_a_bad_row_takes_no_other_response_to_its_prompt_with_it(tmp_path, capsys):
    row = {"prompt": "p", "helpfulness": 1}
    rows = [{**row, "response": text} for text in ("a", "b", "c", None)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "s.jsonl")]
    score.main(["--model", "village", *files, "--on-bad-row", "skip"])
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 3
    said = capsys.readouterr().out
    assert "not scored: 1 that cannot be read; the first: " in said and "line 4: " in said


def test_texts_that_say_nothing_are_named(tmp_path, capsys):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    ranking = {"prompt": "p", "responses": ["a", "b", ""]}
    rows = [pair, {**pair, "chosen": " "}, {**pair, "chosen": "b"}, ranking]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    village = ["--model", "village"]
    files = ["--data", str(tmp_path / "d.jsonl"), "--out"]
    score.main([*village, *files, str(tmp_path / "s.jsonl")])
    said = capsys.readouterr().out
    assert "1 with an empty response: scored, and in no accuracy\n" in said
    assert "1 with equal responses: scored, and in no accuracy\n" in said
    assert "1 ranked with an empty text: scored, and in no accuracy\n" in said
    assert " of 1 labelled pairs judged as labelled" in said
    with pytest.raises(SystemExit):
        score.main([*village, *files, str(tmp_path / "s.csv")])
    assert "--data needs --out FILE.jsonl" in capsys.readouterr().err
    score.main([*village, "--prompt", "p", "--response", "a", "--response", " "])
    assert "an empty text is judged as any other" in capsys.readouterr().err


def test_a_pair_on_which_the_orders_disagree_is_marked(capsys, monkeypatch):
    odds = torch.tensor([[2.0, -1.0]])
    given = ["--model", "village", "--prompt", "p", "--response", "a", "--response", "b"]
    for both in (odds, odds.abs()):
        verdict = both, torch.ones(1, 2), torch.tensor([False])
        monkeypatch.setattr(Judge, "log_odds", lambda *_, verdict=verdict: verdict)
        score.main(given)
        assert ("(the orders disagree)" in capsys.readouterr().out) == (both is odds)


def test_a_file_of_pairs_that_the_model_does_not_answer_is_marked(
    reward, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "gram_mini.judge.label_mass", lambda logits, labels: torch.full((len(logits),), 0.001)
    )
    score.main(["--model", "village", "--data", data, "--out", str(tmp_path / "s.jsonl")])
    assert "hardly ever answers A or B (mean mass on the labels 0.001)" in capsys.readouterr().out
    # Stage 2 does not train the mass, and its scores do not read it.
    score.main(["--model", str(reward), "--data", data, "--out", str(tmp_path / "t.jsonl")])
    assert "hardly ever" not in capsys.readouterr().out


def test_a_ranking_that_the_model_does_not_answer_is_marked(reward, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "gram_mini.judge.label_mass", lambda logits, labels: torch.full((len(logits),), 0.001)
    )
    three = ["--response", "a", "--response", "b", "--response", "c"]
    score.main(["--model", "village", "--prompt", "x", *three])
    assert "hardly ever answers A or B" in capsys.readouterr().out
    score.main(["--model", str(reward), "--prompt", "x", *three])
    assert "hardly" not in capsys.readouterr().out
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "x", "responses": ["a", "b", "c"]}))
    out = tmp_path / "s.jsonl"
    score.main(["--model", "village", "--data", str(tmp_path / "r.jsonl"), "--out", str(out)])
    assert "hardly ever answers A or B (mean mass on the labels 0.001)" in capsys.readouterr().out
    assert json.loads(out.read_text())["label_mass"] == pytest.approx(0.001)


def test_an_unfinished_run_is_named_as_such(tmp_path):
    (tmp_path / "run.partial").mkdir()
    fails(
        score,
        ["--model", str(tmp_path / "run"), *PAIR],
        "is not finished; train it to its end with the same command and --resume",
    )


def test_scores_are_not_overwritten_unasked(reward, data, tmp_path):
    out = tmp_path / "scores.jsonl"
    out.write_text("precious")
    fails(score, ["--model", str(reward), "--data", data, "--out", str(out)], "already there")
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('"responses": "not a list"', "'responses' must be a list"),
        ('"responses": ["y", "\\ud800"]', "'responses' holds half a character"),
        ('"responses": ["y"], "reference": "\\ud800"', "'reference' holds half a character"),
    ],
)
def test_scoring_names_the_bad_row_and_writes_nothing(row, said, reward, data, tmp_path):
    with open(data, "a") as file:
        file.write(f'{{"prompt": "x", {row}}}\n')
    options = ["--model", str(reward), "--data", data, "--out", str(tmp_path / "s.jsonl")]
    fails(score, options, f"line 31: column {said}")
    assert not list(tmp_path.glob("s.jsonl*"))


def test_run_folder_whose_backbone_changed(reward, tmp_path):
    copy = shutil.copytree(reward, tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    record["backbone"]["fingerprint"] = "0" * 16
    (copy / "run.json").write_text(json.dumps(record))
    fails(score, ["--model", str(copy), *PAIR], "another version of the backbone")


@pytest.mark.parametrize("script", [train_pretrain, train_reward, score])
def test_help_opens_with_two_commands_and_shows_every_default(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    said, name = capsys.readouterr().out, f"python {script.__name__}.py"
    first, second = (line.strip() for line in said.splitlines()[1:3])
    assert first.startswith(name) and second.startswith(name)
    assert "(default: None)" not in said
    without = {"--help", "--overwrite", "--resume"}
    without |= (
        {"--prompt", "--response", "--reference", "--data", "--out"}
        if script is score
        else {"--steps", "--gradient-checkpointing"}
    )
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?:-h, )?(?=--)", said)[1:]}
    assert {name for name, entry in entries.items() if "default" not in entry} == without

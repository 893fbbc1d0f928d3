"""Defaults that depend on the backbone: rates, batches, lengths, the judge prompt."""

import json
import subprocess
import sys

import train_pretrain
from gram_mini import prompts
from gram_mini.baselines.__main__ import baseline_options
from gram_mini.judge import Judge
from gram_mini.runs.defaults import (
    DEFAULTS,
    FROZEN,
    MAX_LENGTH,
    SCALAR,
    SCORED,
    choose_rate,
    rate_of_width,
)
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import VILLAGE_FOLDER
from gram_mini.runs.options import pretrain_options, reward_options
from gram_mini.runs.record import read_record
from gram_mini.studies import beside, few
from gram_mini.studies.lab import METHODS

import pytest
from transformers import AutoTokenizer

OPTIONS = {"pretrain": pretrain_options, "reward": reward_options}


@pytest.mark.parametrize("stage", OPTIONS)
@pytest.mark.parametrize(("place", "model"), [(0, "village"), (1, "some/model")])
def test_each_backbone_has_its_defaults_and_what_is_given_wins(stage, place, model):
    def parse(*more):
        return OPTIONS[stage]("", ["--model", model, *more])

    args = parse()
    for name in ("batch_size", "max_length"):
        assert getattr(args, name) == DEFAULTS[stage][name][place]
    assert args.lr is args.batch_tokens is None  # chosen once the model is loaded
    given = parse("--lr", "0.5", "--batch-size", "7", "--batch-tokens", "70", "--max-length", "71")
    assert (given.lr, given.batch_size, given.batch_tokens, given.max_length) == (0.5, 7, 70, 71)
    assert choose_rate(given, stage, 1024) == "rate 5.0e-01: as given (--lr)" and given.lr == 0.5


def rate_of(args, stage, width=96):
    choose_rate(args, stage, width)
    return args.lr


def test_the_villages_are_those_it_was_tuned_with():
    args = pretrain_options("", [])
    assert (args.batch_size, args.max_length, rate_of(args, "pretrain")) == (64, 512, 3e-3)
    assert rate_of(reward_options("", []), "reward") == 3e-4
    frozen = "--freeze", "--head"
    for options, rate in {(): 1e-3, (*frozen, "scalar"): 0.1, (*frozen, "labels"): 0.01}.items():
        assert rate_of(baseline_options(options), "reward") == rate
    assert reward_options("", []).both_orders == 0  # the paper's way


def test_the_studies_give_the_villages_own_rates():
    """They name them in their options, which their committed results keep."""
    for name, (_, _, given) in METHODS.items():
        if "--head" in given:
            frozen, head = "--freeze" in given, given[given.index("--head") + 1]
            own = FROZEN[head] if frozen else SCALAR[0]
            assert float(given[given.index("--lr") + 1]) == own, name
    judge, scalar = DEFAULTS["reward"]["lr"][0], SCALAR[0]
    assert {float(few.FULL.lr), float(beside.RECIPES["GRAM"].lr)} == {judge}
    heads = few.FULL_SCALAR, beside.RECIPES["D from stage 1"]
    assert {float(recipe.lr) for recipe in heads} == {scalar}


def test_another_models_rate_follows_from_its_width():
    rates = {576: 1e-3, 577: 1.3e-3, 1024: 8.4e-4, 2000: 5e-4, 4096: 2.9e-4}
    assert {width: rate_of_width(width) for width in rates} == rates
    args = pretrain_options("", ["--model", "some/model"])
    assert choose_rate(args, "pretrain", 1024) == (
        "rate 8.4e-04: 5e-4 x (2000 / 1024)^0.78, a published rule for LoRA, "
        "for a hidden size of 1,024 (--lr)"
    )
    smol = pretrain_options("", ["--model", "some/model"])
    assert "searched on SmolLM2-135M" in choose_rate(smol, "pretrain", 576)
    scalar = baseline_options(["--model", "some/model"])
    assert rate_of(scalar, "reward", 1024) == args.lr == 8.4e-4
    assert rate_of(baseline_options(["--model", "some/model", "--freeze"]), "reward", 1024) == 0.1


def test_help_shows_both(capsys):
    for stage, parse in OPTIONS.items():
        with pytest.raises(SystemExit):
            parse("", ["--help"])
        said = " ".join(capsys.readouterr().out.split())
        for name in ("batch_size", "max_length"):
            village, other = DEFAULTS[stage][name]
            assert f"{village:g} for the village's backbone, {other:g} for any other model" in said
        rate = (
            f"{DEFAULTS[stage]['lr'][0]:g} for the village's backbone, 5e-4 x (2000 / hidden size)"
        )
        assert rate in said and "what its memory admits" in said


def test_help_of_the_baselines_shows_the_rates_of_heads(capsys):
    with pytest.raises(SystemExit):
        baseline_options(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "0.001 for the village's backbone, 5e-4 x" in said
    assert "with --freeze 0.1 for scalar, 0.01 for labels" in said


def test_a_run_keeps_the_rate_of_its_models_width(tmp_path, capsys):
    train_pretrain.main(
        ["--model", str(VILLAGE_FOLDER), "--out", str(tmp_path / "run")]
        + "--limit 20 --steps 1 --batch-size 4 --lora-rank 2".split()
    )
    rate = rate_of_width(128)
    assert f"rate {rate:.1e}: 5e-4 x (2000 / 128)^0.78" in capsys.readouterr().out
    assert read_record(tmp_path / "run")["options"]["lr"] == rate


def test_a_tokenizer_that_is_not_the_villages_gets_the_general_prompt(tmp_path, tokenizer):
    assert prompts.default_judge(tokenizer) == prompts.VILLAGE_JUDGE
    saved = json.loads((VILLAGE_FOLDER / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        token["content"] = token["content"].replace(prompts.VILLAGE_INSTRUCTION, "instruction")
    tokenizer.save_pretrained(tmp_path)
    text = json.dumps(saved).replace(prompts.VILLAGE_INSTRUCTION, "instruction")
    (tmp_path / "tokenizer.json").write_text(text)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert prompts.default_judge(other) == prompts.JUDGE
    judge = Judge(None, other)
    assert judge.template == prompts.JUDGE
    assert prompts.INSTRUCTION in other.decode(judge.prompt.start)


def test_a_judge_that_was_not_trained_reads_as_much_as_its_backbone_is_trained_on():
    assert load_judge("village").max_length == MAX_LENGTH[0]
    assert load_judge(str(VILLAGE_FOLDER)).max_length == MAX_LENGTH[1]


def test_a_real_models_judge_holds_less_at_a_time():
    for path, by_default in (("village", SCORED[0]), (str(VILLAGE_FOLDER), SCORED[1])):
        assert load_judge(path).batch_size == by_default
        assert load_judge(path, batch_size=3).batch_size == 3


@pytest.mark.parametrize("module", ["train_pretrain", "train_reward", "score"])
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_how_threads_wait_is_set_before_torch_is_imported(module, given, spins):
    code = (
        "import builtins, os, sys\n"
        "real, seen = builtins.__import__, []\n"
        "def look(name, *more):\n"
        "    if name == 'torch' and not seen:\n"
        "        seen.append(os.environ.get('GOMP_SPINCOUNT'))\n"
        "        print(seen[0])\n"
        "        sys.exit()\n"
        "    return real(name, *more)\n"
        "builtins.__import__ = look\n"
        f"import {module}\n"
    )
    environment = {"PATH": "/usr/bin", **given}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(spins)], done.stderr

"""A merged model computes what the 4-bit backbone with its adapter computes, in any program."""

import json
import os
import shutil

import train_reward
from gram_mini.batches import encode_pairs, join
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import judge_prompt, label_tokens
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import VILLAGE_FOLDER, load_tokenizer
from gram_mini.serving import export
from gram_mini.serving.known import read_known
from gram_mini.studies.recorded import method_of, records_of

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

IDS = torch.arange(40).view(2, 20) + 20
PAIR = ("What does Anna eat?", "Anna eats soup.", "Stop bothering me. Anna eats fish.")


def short_run(out, bits):
    """Steps large enough that the adapter does something."""
    options = "--limit 100 --steps 4 --lr 5e-3 --batch-size 16".split()
    train_reward.main(["--out", str(out), "--bits", str(bits), *options])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("runs") / "reward", 4)


@pytest.fixture(scope="module")
def exported(run):
    out = run.parent / "exported"
    export.main([str(run), str(out), "--dtype", "float32"])
    return out


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def test_logits_are_those_of_the_4_bit_model_with_its_adapter(run, exported):
    judged = load_judge(str(run), merge=False).model
    with judged.disable_adapter():
        plain = logits(judged)
    assert (logits(judged) - plain).abs().max() > 0.3  # the adapter does something
    merged = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.allclose(logits(merged), logits(judged), atol=1e-3)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # tied, as in the backbone


@pytest.mark.parametrize("bits", [16, 32])
def test_a_run_without_quantisation(tmp_path, bits):
    out = tmp_path / "exported"
    export.export(short_run(tmp_path / "run", bits), out, "float32")
    difference = logits(AutoModelForCausalLM.from_pretrained(out)) - logits(
        load_judge(str(tmp_path / "run"), merge=False).model
    )
    # bf16 activations of the run are coarse themselves
    assert difference.abs().max() < {16: 0.5, 32: 1e-3}[bits]


def test_scores_are_those_of_the_run(run, exported):
    there = load_judge(str(run), merge=False).compare(*PAIR)
    here = load_judge(str(exported), bits=32).compare(*PAIR)
    assert here.log_odds_first == pytest.approx(there.log_odds_first, abs=1e-3)
    assert here.log_odds_second == pytest.approx(there.log_odds_second, abs=1e-3)
    assert abs(here.log_odds_first) > 1e-2


def test_a_table_knows_what_an_exported_run_was(run, exported):
    records = records_of([str(run), str(exported), "village"])
    assert records[2] is None and method_of(records[0]) == method_of(records[1])


def test_the_judge_prompt_and_length_of_the_run_come_along(tmp_path):
    (tmp_path / "judge.txt").write_text("{prompt} Better: {response_a} or {response_b}?\n")
    run, out = tmp_path / "run", tmp_path / "out"
    options = ["--judge-template", str(tmp_path / "judge.txt")]
    train_reward.main(
        ["--out", str(run), *"--limit 50 --steps 1 --max-length 64".split(), *options]
    )
    export.main([str(run), str(out), "--dtype", "float32"])
    judge = load_judge(str(out), bits=32)
    assert judge.template == "{prompt} Better: {response_a} or {response_b}?"
    assert judge.max_length == 64
    assert judge.compare(*PAIR).log_odds_first == pytest.approx(
        load_judge(str(run)).compare(*PAIR).log_odds_first, abs=1e-3
    )


def test_a_run_is_scored_with_the_attention_that_is_fast_forward(run, fast_bfloat16):
    judge = load_judge(str(run), bits=16)
    assert judge.model.dtype == torch.bfloat16
    assert judge.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_exported_model_is_loaded_as_it_was_written(run, tmp_path, dtype, fast_bfloat16):
    export.export(run, tmp_path / "out", dtype)
    model = load_judge(str(tmp_path / "out")).model
    assert model.dtype == getattr(torch, dtype) and not getattr(model, "is_loaded_in_4bit", False)


def test_two_label_log_probabilities_of_a_server_are_enough(run, exported):
    """What a server needs: token ids in, log-probabilities of the next token out, both orders."""
    tokenizer = load_tokenizer(str(exported))
    pieces, labels = judge_prompt(tokenizer), label_tokens(tokenizer)
    row = encode_pairs([Pair(*PAIR)], pieces, tokenizer, 512)[0]
    server = AutoModelForCausalLM.from_pretrained(exported).eval()
    odds = []
    for k, order in enumerate((row, row.swapped())):
        with torch.no_grad():
            logits = server(input_ids=torch.tensor([join(pieces, order)])).logits[0, -1]
            answer = logits.log_softmax(dim=0)
        # token id -> log-probability
        top = dict(zip(*(column.tolist() for column in reversed(answer.topk(20)))))
        odds.append((top[labels[0]] - top[labels[1]]) * (-1 if k else 1))
    assert torch.tensor(odds).sigmoid().mean().item() == pytest.approx(
        load_judge(str(run)).compare(*PAIR).probability, abs=1e-4
    )


def test_the_folder_is_an_ordinary_one(run, exported):
    names = {file.name for file in exported.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "gram_run.json",
    } <= names
    assert {file.suffix for file in exported.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert "run.json" not in names
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    # Both as the installed library reads them, since each version writes other keys. The backbone
    # of the village is in float32 too.
    config, backbone = (
        AutoConfig.from_pretrained(folder).to_dict() for folder in (exported, VILLAGE_FOLDER)
    )
    own = {"transformers_version", "_name_or_path"}
    assert {k: v for k, v in config.items() if k not in own} == {
        k: v for k, v in backbone.items() if k not in own
    }
    assert (exported / "gram_run.json").read_bytes() == (run / "run.json").read_bytes()
    assert load_tokenizer(str(exported)).chat_template == load_tokenizer("village").chat_template
    assert not list(run.parent.glob("*.partial"))


def test_the_default_is_bfloat16(run, tmp_path, capsys):
    export.main([str(run), str(tmp_path / "out")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert f"score.py --model {tmp_path}/out" in capsys.readouterr().out
    small, large = (
        sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (tmp_path / "out", VILLAGE_FOLDER)
    )
    assert small < 0.55 * large


def test_another_user_may_read_what_is_exported(run, tmp_path):
    old = os.umask(0o022)
    try:
        export.export(run, tmp_path / "out")
    finally:
        os.umask(old)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_what_an_exported_run_knows_of_itself(run, tmp_path):
    for dtype, least, most in (("float32", 0.01, 0.0101), ("bfloat16", 0.02, 0.3)):
        export.export(run, tmp_path / dtype, dtype)
        known = read_known(tmp_path / dtype)
        assert len(known["prompts"]) == 16 and least <= known["rounding"] <= most
        model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype).eval()
        labels = list(label_tokens(load_tokenizer(str(tmp_path / dtype))))
        for ids, odds in zip(known["prompts"], known["log_odds"]):
            with torch.no_grad():
                a, b = model(input_ids=torch.tensor([ids])).logits[0, -1][labels].tolist()
            assert abs(a - b - odds) < known["rounding"]


def test_only_an_exported_model_is_replaced_and_only_when_asked(run, exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    for folder, overwrite, message in (
        (out, False, "already holds an exported model; .* --overwrite"),
        (run, True, "is in the way and no exported model"),
        (VILLAGE_FOLDER, True, "is in the way and no exported model"),
        (out / "config.json", True, "is in the way and no exported model"),
    ):
        with pytest.raises(UserError, match=message) as error:
            export.export(run, folder, "bfloat16", overwrite)
        assert "\n" not in str(error.value)
    assert (out / "model.safetensors").read_bytes() == before
    export.export(run, out, "bfloat16", overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(tmp_path.iterdir()) == [out]


def test_a_failure_leaves_the_old_model_and_nothing_else(run, exported, tmp_path, monkeypatch):
    out = shutil.copytree(exported, tmp_path / "out")
    monkeypatch.setattr(export, "load_judge", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(run, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert sorted(tmp_path.iterdir()) == [out]


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: holds no run.json"):
        export.main([str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

"""A run stays what it was: its prompt, its tokenizer, and one process that writes it."""

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import train_pretrain
import train_reward
from gram_mini.errors import Interrupted, UserError
from gram_mini.prompts import judge_prompt, label_tokens, pair_prompt
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import VILLAGE_FOLDER, load_tokenizer
from gram_mini.runs.record import pinned
from gram_mini.serving import export

import pytest
from interrupts import interrupt

ROOT = Path(__file__).parents[2]
SHORT = "--limit 60 --batch-size 8 --held-out 0".split()
# As Llama 3's: today's date stands in every prompt.
DATED = (
    "{% set today = strftime_now('%d %b %Y') %}<|user|>Today Date: {{ today }}<|end|>"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def dated(tmp_path):
    """The village's model with a chat template that prints the date."""
    folder = shutil.copytree(VILLAGE_FOLDER, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def train(script, out, *options):
    script.main([*SHORT, "--steps", "3", "--out", str(out), *map(str, options)])
    return out


def edit(path, there, instead):
    text = path.read_text()
    assert there in text
    path.write_text(text.replace(there, instead))


def test_todays_date_is_no_part_of_a_prompt(dated, monkeypatch):
    """The template is rendered by transformers, whose clock we turn forward."""
    import transformers.utils.chat_template_utils as rendering

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 6)

    tokenizer = load_tokenizer(str(dated))
    before = pair_prompt(tokenizer), judge_prompt(tokenizer), label_tokens(tokenizer)
    assert "26 Jul 2024" in tokenizer.decode(before[1].start)
    monkeypatch.setattr(rendering, "datetime", Tomorrow)
    again = load_tokenizer(str(dated))
    assert before == (pair_prompt(again), judge_prompt(again), label_tokens(again))


def test_a_template_that_was_edited_between_the_stages_is_noticed(dated, tmp_path):
    first = train(train_pretrain, tmp_path / "first", "--model", dated, "--lora-rank", 2)
    edit(dated / "chat_template.jinja", "Today Date", "The date")
    with pytest.raises(UserError, match="was trained with another tokenizer or chat template than"):
        train(train_reward, tmp_path / "second", "--model", dated, "--init", first)
    edit(dated / "chat_template.jinja", "The date", "Today Date")
    train(train_reward, tmp_path / "second", "--model", dated, "--init", first)


def test_a_template_or_tokenizer_of_a_run_that_was_edited_is_noticed(dated, tmp_path):
    out = train(train_reward, tmp_path / "run", "--model", dated, "--lora-rank", 2)
    load_judge(out)
    copy = shutil.copytree(out, tmp_path / "template")
    edit(copy / "chat_template.jinja", "Today Date", "The date")
    other = shutil.copytree(out, tmp_path / "tokenizer")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(words))
    for run in (copy, other):
        with pytest.raises(UserError, match="its tokenizer or chat template is not the one"):
            load_judge(run)
    export.export(out, tmp_path / "exported")
    load_judge(tmp_path / "exported")
    edit(tmp_path / "exported" / "chat_template.jinja", "Today Date", "The date")
    with pytest.raises(UserError, match="its tokenizer or chat template is not the one"):
        load_judge(tmp_path / "exported")


def test_a_run_folder_says_the_prompts_token_ids_and_old_ones_are_refused(tmp_path):
    out = train(train_reward, tmp_path / "run", "--lora-rank", 2)
    record = json.loads((out / "run.json").read_text())
    tokenizer = load_tokenizer("village")
    pieces = record["prompt"]["pieces"]
    assert pieces["end"] == judge_prompt(tokenizer).end
    pieces["given"] = pieces.pop("ignored")  # its name in an earlier version
    (out / "run.json").write_text(json.dumps(record))
    load_judge(out)
    pieces["end"] = pieces["end"][1:]
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="makes another prompt of its chat template"):
        load_judge(out)
    del record["prompt"]["pieces"]
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="not the record of a run of version 0.2 or later; train"):
        load_judge(out)


def begun(out, *options):
    """A process that trains, after its first step."""
    code = "import sys, train_reward; train_reward.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *SHORT, "--out", str(out), *map(str, options)]
    log = out.with_name(out.name + ".partial") / "log.csv"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (log.exists() and ",train," in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def test_resuming_with_an_edited_template_is_refused(dated, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    options = ["--model", dated, "--lora-rank", 2]
    with pytest.raises(Interrupted):
        train(train_reward, tmp_path / "run", *options)
    edit(dated / "chat_template.jinja", "Today Date", "The date")
    with pytest.raises(UserError, match="was begun otherwise: tokenizer and chat template was"):
        train(train_reward, tmp_path / "run", *options, "--resume")


def test_two_processes_do_not_write_one_run_and_a_dead_one_bars_nobody(tmp_path):
    out, options = tmp_path / "run", [*SHORT, "--lora-rank", "2", "--out", str(tmp_path / "run")]
    process = begun(out, "--lora-rank", 2, "--steps", 5000, "--log-every", 1)
    before = sorted(file.name for file in (tmp_path / "run.partial").iterdir())
    message = "another process is writing it; wait for it, stop"
    for again in (["--resume"], ["--overwrite"], []):
        with pytest.raises(UserError, match=message):
            train_reward.main([*options, "--steps", "3", *again])
    assert process.poll() is None
    assert sorted(file.name for file in (tmp_path / "run.partial").iterdir()) == before
    process.kill()
    process.wait()
    train_reward.main([*options, "--steps", "3", "--overwrite"])
    assert (out / "run.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]


def test_a_name_on_the_hub_is_pinned_once():
    assert pinned("owner/name", "abcdef") == "owner/name@abcdef"
    assert pinned("owner/name@abc", "abcdef") == "owner/name@abc"
    assert pinned("village", None) == "village"

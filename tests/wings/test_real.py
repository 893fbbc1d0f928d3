"""The study on real preferences, on judges whose figures are known; and its command, in small."""

import json

import train_reward
from gram_mini.errors import UserError
from gram_mini.helpdesk.build import JUDGE_TEMPLATE
from gram_mini.judge import Comparison
from gram_mini.studies import real, start

import pytest
import torch


class FakeLab(real.Lab):
    """Trains nothing; every model is the same judge, which says P(a better) in both orders."""

    says = staticmethod(lambda pair: (0.9, 0.9))
    ran: list = []

    def _train(self, script, out, arguments):
        self.ran.append((out.name, arguments))
        out.mkdir(parents=True)
        (out / "run.json").write_text("{}")

    def judge(self, model, likelihood=None):
        return self

    def compare_many(self, pairs, progress=None):
        return [Comparison(sum(p) / 2, *p, 1.0, 1.0, 1.0, False) for p in map(self.says, pairs)]


@pytest.fixture
def files(tmp_path):
    """Labelled pairs, always A; unlabelled ones; a test in which the longer answer mostly loses."""

    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def row(i, a, b, **label):
        return {"prompt": f"question {i}", "response_a": a, "response_b": b, **label}

    labels = [row(i, "the longer answer", f"short {i}", label="A") for i in range(20)]
    others = [row(i, "ab", "abc", label="AB"[i % 4 == 3]) for i in range(8)]
    return {
        "labels": write("labels", labels),
        "unlabelled": write("unlabelled", [row(i, "x", "y") for i in range(10)]),
        "tests": {"other": write("other", others)},
    }


def lab(tmp_path, files, counts=(12, 5, 100), **given):
    made = FakeLab(tmp_path / "runs", "some/model", real.Files(**files, counts=counts), **given)
    made.ran = []
    return made


def test_a_table_of_judges_that_are_known(tmp_path, files):
    made = lab(tmp_path, files)
    longer, zero_shot, control, *methods = real.table(made, seed=1)
    assert longer == {"method": "the longer response", "held out": 1.0, "other": 0.25}
    assert zero_shot["held out"] == 1.0 and zero_shot["other"] == 0.75
    assert zero_shot["other, position gap"] == 0
    assert zero_shot["other, calibration error"] == pytest.approx(0.15)
    assert zero_shot["other, ± over prompts"] > 0.2
    assert control["method"] == "likelihood" and control["held out"] == 1.0
    assert [row["method"] for row in methods] == list(real.COMPARED)
    trained = dict(made.ran)
    assert "--init" in trained["GRAM"] and "--init" not in trained["G-Baseline"]
    assert trained["G,-both-orders-(ours)"][-2:] == ["--both-orders", "1"]
    assert "--lr" not in trained["D-Baseline"]  # that of the village


def test_pairs_that_were_cut_and_a_judge_that_does_not_answer_are_told(tmp_path, files, capsys):
    made = lab(tmp_path, files)
    made.max_length, made.trained = 200, False  # as a judge has them
    say = lambda pair: Comparison(0.9, 0.9, 0.9, 1.0, 1.0, 0.001, pair.prompt == "question 3")
    made.compare_many = lambda pairs, progress=None: list(map(say, pairs))
    real.columns(made, made.model, "other")
    said = capsys.readouterr().err
    assert "model, other: 1 of 8 pairs cut to fit 200 tokens" in said
    assert "model, other: hardly ever answers A or B (mean mass on the labels 0.001)" in said


def test_a_judge_that_favours_a_place_is_at_chance(tmp_path, files):
    made = lab(tmp_path, files)
    made.says = lambda pair: (1.0, 0.0)
    row = list(real.table(made, seed=1))[1]
    assert row["held out"] == row["other"] == 0.5 and row["other, position gap"] == 1


def test_seeds_draw_labels_and_the_tests_stay(tmp_path, files):
    made = lab(tmp_path, files, counts=(12, 5, 6))
    one, two = made.pairs("labelled", 1), made.pairs("labelled", 2)
    assert len(one) == len(two) == 12 and one != two and one == made.pairs("labelled", 1)
    assert len(made.pairs("unlabelled", 1)) == 5 and len(made.pairs("other", 1)) == 6
    few = lab(tmp_path, files, counts=(100, 5, 6))  # all labels, still in an order of the seed's
    one, two = few.pairs("labelled", 1), few.pairs("labelled", 2)
    assert one != two and {pair.prompt for pair in one} == {pair.prompt for pair in two}
    tested = {pair.prompt for pair in made.pairs("held out", 1)}
    assert tested and tested.isdisjoint(pair.prompt for pair in made.source.used["labelled"])


def test_options_of_a_stage_reach_its_script_alone(tmp_path, files):
    stages = {"train_pretrain": ["--lr", "1"], "train_reward": ["--lr", "2"]}
    made = lab(tmp_path, files, stages=stages)
    for script in (real.train_pretrain, train_reward, real.baselines):
        made.train(script, script.__name__, 0, "x")
    given = {name: arguments[arguments.index("x") :] for name, arguments in made.ran}
    assert given["train_pretrain"][-2:] == ["--lr", "1"]
    assert given["train_reward"][-2:] == ["--lr", "2"]
    assert "--lr" not in given["gram_mini.baselines.__main__"]


def test_the_command_writes_a_table_and_goes_on_with_what_is_there(
    tmp_path, files, monkeypatch, capsys
):
    monkeypatch.setattr(real, "Lab", FakeLab)
    monkeypatch.setattr(FakeLab, "ran", [])
    command = ["table", "--model", "some/model", "--labels", files["labels"]]
    command += ["--unlabelled", files["unlabelled"], "--test", f"other={files['tests']['other']}"]
    command += ["--seeds", "1", "2", "--runs", str(tmp_path / "runs")]
    real.main(command)
    record = json.loads((tmp_path / "runs" / "results" / "real-table.json").read_text())
    assert record["seeds"] == [1, 2] and len(record["rows"]) == 2 * (3 + len(real.COMPARED))
    assert "GRAM, both orders (ours)" in capsys.readouterr().out
    before = len(FakeLab.ran)
    assert before == 2 * 9  # stage 1 and eight judges
    real.main(command)
    assert len(FakeLab.ran) == before
    monkeypatch.setattr("gram_mini.studies.lab.DEFAULTS", {"pretrain": {"lr": (1, 2)}})
    with pytest.raises(UserError, match="made with other defaults"):
        real.main(command)
    monkeypatch.setattr(real, "run", lambda *_, **__: None)
    real.main(["start", *command[1:-1], str(tmp_path / "other")])
    assert "start does not test on --test" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(real, "Lab", FakeLab)
    with pytest.raises(UserError, match="made with other data"):
        real.main([*command, "--labels-used", "3"])


@pytest.mark.parametrize(
    ("study", "more", "said"),
    [
        ("table", ["--test", "labelled=x.jsonl"], "none of held out, labelled, labels, method"),
        ("table", ["--test", "held out=x.jsonl"], "none of held out, labelled, labels, method"),
        ("table", ["--test", "other"], "give NAME=SOURCE"),
        ("table", ["--test", "=x.jsonl"], "give NAME=SOURCE"),
        ("table", ["--test", "o=x.jsonl", "--test", "o=y.jsonl"], "each NAME once"),
        ("table", ["--test", "a/b=x.jsonl"], "without a /"),
        ("table", ["--training=--bits 16"], "the study sets --bits itself"),
        ("table", ["--stage-1=--both-orders 1"], "the study sets --both-orders itself"),
        ("table", ["--scalar=--label-smoothing=0.1"], "the study sets --label-smoothing itself"),
        ("table", ["--training=--lr '1"], "invalid split value"),
    ],
)
def test_options_that_would_mislead_are_refused(study, more, said, files, capsys):
    command = [study, "--model", "some/model", "--labels", files["labels"]]
    with pytest.raises((SystemExit, UserError)) as error:
        real.main([*command, "--unlabelled", files["unlabelled"], *more])
    assert said in capsys.readouterr().err + str(error.value)


def test_what_was_read_and_what_training_may_see_is_said(tmp_path, files, capsys):
    made = lab(tmp_path, {**files, "unlabelled": files["labels"], "tests": {"o": files["labels"]}})
    held_out, lines = len(made.source.tests["held out"]), made.source.said
    assert not capsys.readouterr().out  # the command says it
    assert f"{files['labels']}: 20 rows read, 20 pairs used, 0 dropped" in lines
    seen = f"of their {held_out} prompts {held_out} occur in the unlabelled pairs"
    assert f"held out: {held_out} pairs; {seen}" in lines
    seen = f"of their 20 prompts {20 - held_out} occur in the labelled pairs"
    assert f"o: 20 pairs; {seen}, 20 occur in the unlabelled pairs" in lines


def test_labels_on_one_prompt_only(tmp_path, files):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(UserError, match="same prompt"):
        lab(tmp_path, {**files, "labels": str(path)})


def test_the_paper_s_loss_with_one_thing_changed(tmp_path, files, monkeypatch):
    made = lab(tmp_path, files)
    seen = {}

    def train(script, name, seed, data, init=None, options=()):
        seen[name] = (options, script.optimizer_and_schedule, script.output_logits, init)
        return tmp_path / name

    made.train = train
    monkeypatch.setattr(start, "read_record", lambda run: {"options": {"lr": 1e-3}})
    rows = list(start.start(made, seed=1))
    assert [row["method"] for row in rows] == list(start.CHANGES)
    own = train_reward.optimizer_and_schedule, train_reward.output_logits, None
    changed = {name: found[1:] for name, found in seen.items() if found[1:] != own}
    assert changed.keys() == {"start-beta2 = 0.95", "start-mean bias taken off"}
    assert seen["start-three times the rate"][0] == ["--lr", "0.003"]
    assert seen["start-short template"][0] == ["--judge-template", str(JUDGE_TEMPLATE)]

    optimizer, _ = start.short_memory(torch.nn.Linear(2, 2), 0.1, 10)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    logits = iter([torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0]])])
    monkeypatch.setattr(start, "output_logits", lambda *_: next(logits))
    without = start.WithoutBias()
    assert without(None, None, (5, 6)).tolist() == [[2.0, 1.0], [0.0, 1.0]]
    assert without(None, None, (5, 6)).tolist() == [[-1.0, 1.0]]

"""Long runs: killed and resumed, interrupted, split over passes and processes, or impossible."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import train_pretrain
import train_reward
from gram_mini.batches import EncodedPair
from gram_mini.errors import Interrupted, UserError
from gram_mini.reading.load import PairData
from gram_mini.runs import run as runs_run
from gram_mini.runs.folder import RunFolder
from gram_mini.runs.log import Log
from gram_mini.runs.models import VILLAGE_FOLDER
from gram_mini.runs.options import reward_options
from gram_mini.runs.record import judge_fingerprint
from gram_mini.runs.run import Run
from gram_mini.training import draw_batches

import pytest
import torch
from interrupts import interrupt
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train_pretrain": train_pretrain, "train_reward": train_reward}
OPTIONS = [
    *"--limit 100 --held-out 0.1 --batch-size 8 --steps 20 --lora-rank 4".split(),
    *"--log-every 4 --save-every 6 --batch-tokens 250".split(),
]
SHORT = "--limit 100 --held-out 0.2 --steps 3 --lora-rank 4 --log-every 1 --batch-size 16".split()

# Ends the process in its 16th step, in the second epoch. There is a checkpoint of step 12.
KILL_IN_STEP = """
import os, signal, sys, {script} as script
from gram_mini.runs import run
real, calls = run.sum_over_processes, []
def sum_over_processes(*arguments):
    calls.append(1)
    if len(calls) == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
run.sum_over_processes = sum_over_processes
script.main(sys.argv[1:])
"""
# Ends it when half of the checkpoint of step 12 is written. That of step 6 is whole.
KILL_IN_SAVE = """
import io, os, signal, sys, torch, {script} as script
real, calls = torch.save, []
def save(state, file):
    calls.append(1)
    if len(calls) == 2:
        whole = io.BytesIO()
        real(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(state, file)
torch.save = save
script.main(sys.argv[1:])
"""


def adapter(run):
    return (run / "adapter_model.safetensors").read_bytes()


def log_of(run):
    with open(run / "log.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("tokens_per_second", "memory")}
            for row in csv.DictReader(file)
        ]


def start(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of both scripts that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    for name, script in SCRIPTS.items():
        script.main([*OPTIONS, "--out", str(folder / name)])
    return folder


@pytest.mark.parametrize(
    ("name", "kill", "saved"),
    [("train_pretrain", KILL_IN_STEP, 12), ("train_reward", KILL_IN_SAVE, 6)],
    ids=["in a step", "while saving"],
)
def test_a_killed_run_that_is_resumed_ends_with_the_same_adapter(
    name, kill, saved, whole, tmp_path
):
    out = tmp_path / "run"
    process = start(kill.format(script=name), *OPTIONS, "--out", str(out))
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    partial = tmp_path / "run.partial"
    assert not out.exists()
    assert torch.load(partial / "checkpoint.pt", weights_only=True)["step"] == saved
    SCRIPTS[name].main([*OPTIONS, "--out", str(out), "--resume"])
    assert adapter(out) == adapter(whole / name)
    assert log_of(out) == log_of(whole / name)
    assert not list(out.glob("checkpoint*")) and not partial.exists()
    results = [json.loads((run / "run.json").read_text())["results"] for run in (out, whole / name)]
    assert results[0] == results[1]


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path):
    out = tmp_path / "run"
    arguments = [*OPTIONS, "--out", str(out)]
    arguments[arguments.index("--save-every") + 1] = "1000"  # only what Ctrl-C saves
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_reward.py"), *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run.partial" / "log.csv"
    while not (log.exists() and ",train," in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.strip().splitlines()[-1].endswith("go on with the same command and --resume")
    train_reward.main([*arguments, "--resume"])
    assert adapter(out) == adapter(whole / "train_reward")


def test_random_state_and_skipped_steps_go_on(tmp_path, monkeypatch):
    """The backbone has dropout; a bad loss comes in the second step, Ctrl-C in the fifth."""
    model = shutil.copytree(VILLAGE_FOLDER, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.2}
    (model / "config.json").write_text(json.dumps(config))
    options = [*OPTIONS, "--model", str(model), "--steps", "8"]
    real_loss = train_reward.reward_loss

    def run(out, *more):
        losses = []

        def loss(*arguments):
            losses.append(1)
            return real_loss(*arguments) * (float("nan") if len(losses) == 2 and not more else 1.0)

        monkeypatch.setattr(train_reward, "reward_loss", loss)
        train_reward.main([*options, "--out", str(out), *more])

    run(tmp_path / "whole")
    interrupt(monkeypatch, 5)
    with pytest.raises(
        Interrupted,
        match="stopped after step 5, saved in .*; go on with the same command and --resume",
    ):
        run(tmp_path / "run")
    run(tmp_path / "run", "--resume")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    results = [
        json.loads((tmp_path / name / "run.json").read_text())["results"]
        for name in ("run", "whole")
    ]
    assert results[0] == results[1] and results[0]["skipped"] == 1


def test_how_a_step_is_split_may_change_and_what_is_learned_may_not(tmp_path, monkeypatch):
    template = tmp_path / "judge.txt"
    template.write_text("{prompt} {response_a} {response_b} A or B?")
    options = [*OPTIONS, "--out", str(tmp_path / "run"), "--judge-template", str(template)]
    interrupt(monkeypatch, 16)
    with pytest.raises(Interrupted):
        train_reward.main(options)
    template.write_text("{prompt} {response_a} {response_b} Which, A or B?")
    with pytest.raises(UserError, match="judge prompt was .* A or B"):
        train_reward.main([*options, "--resume"])
    template.write_text("{prompt} {response_a} {response_b} A or B?")
    options[options.index("--batch-tokens") + 1] = "200"
    train_reward.main([*options, "--resume", "--gradient-checkpointing"])
    assert (tmp_path / "run" / "run.json").is_file()


def test_what_can_and_cannot_be_resumed(tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--resume: there is no unfinished run"):
        train_reward.main([*OPTIONS, *out, "--resume"])
    interrupt(monkeypatch, 7)
    with pytest.raises(Interrupted):
        train_reward.main([*OPTIONS, *out])
    saved = (tmp_path / "run.partial" / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="go on with --resume, or start anew with --overwrite"):
        train_reward.main([*OPTIONS, *out])
    with pytest.raises(
        UserError, match="was begun otherwise: lr was 0.0003 and is 0.002; give the same again"
    ):
        train_reward.main([*OPTIONS, *out, "--resume", "--lr", "2e-3"])
    assert (tmp_path / "run.partial" / "checkpoint.pt").read_bytes() == saved
    torch.save({"step": 3}, tmp_path / "run.partial" / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt: cannot be read"):
        train_reward.main([*OPTIONS, *out, "--resume"])
    (tmp_path / "run.partial" / "checkpoint.pt").write_bytes(saved[:1000])
    with pytest.raises(UserError, match="checkpoint.pt: cannot be read"):
        train_reward.main([*OPTIONS, *out, "--resume"])
    train_reward.main([*OPTIONS, *out, "--overwrite", "--steps", "1"])
    assert (tmp_path / "run" / "run.json").is_file()


def test_batches_repeat_and_turn_half_of_the_rows_round():
    rows = [EncodedPair([1] * (i % 7), [2], [3], 0, i, (1, 1, 1)) for i in range(50)]
    whole, again = draw_batches(rows, 8, 3), draw_batches(rows, 8, 3)
    batches = [next(whole) for _ in range(19)]
    assert [next(again) for _ in range(19)] == batches
    # one epoch: each row once, about half of them swapped
    flat = [row for batch in batches[:7] for row in batch]
    assert sorted(row.row for row in flat) == list(range(50))
    assert 10 < sum(row.label for row in flat) < 40 and all(
        (row.response_a == [3]) == row.label for row in flat
    )


# ---- forward passes and processes ----------------------------------------------------


def step_by_step(script, out, *options):
    script.main([*SHORT, "--out", str(out), *options])
    return losses(out), load_file(out / "adapter_model.safetensors")


def losses(run):
    return [(row["part"], float(row["loss"])) for row in log_of(run)]


def close(actual, expected, tolerance=1e-5):
    same_parts = [part for part, _ in actual] == [part for part, _ in expected]
    return same_parts and all(abs(a - b) < tolerance for (_, a), (_, b) in zip(actual, expected))


@pytest.mark.parametrize("name", SCRIPTS)
def test_twice_the_passes_are_twice_the_batch(name, tmp_path):
    """In stage 1 the loss is divided by the tokens of the step, as passes hold unequally many."""
    one, adapter_one = step_by_step(SCRIPTS[name], tmp_path / "one", "--batch-size", "14")
    two, adapter_two = step_by_step(
        SCRIPTS[name], tmp_path / "two", "--batch-size", "14", "--batch-tokens", "400"
    )
    assert close(one, two)
    assert max((adapter_one[k] - adapter_two[k]).abs().max() for k in adapter_one) < 1e-4


def test_two_processes_are_twice_the_batch(tmp_path):
    name = "train_pretrain"  # its loss is divided by the tokens of all processes
    one, _ = step_by_step(SCRIPTS[name], tmp_path / "one", "--batch-size", "14")
    launch = [
        *"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split(),
        *"--mixed_precision no --dynamo_backend no --main_process_port 0".split(),
    ]
    options = [*SHORT, *"--device cpu --batch-size 7".split(), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pairs to train on") == 1  # one process speaks
    assert close(one, losses(tmp_path / "two"))


def test_shares_come_back_in_order():
    from gram_mini.runs.processes import in_parallel

    from accelerate import Accelerator

    doubled = in_parallel(
        Accelerator(cpu=True), lambda items: [2 * i for i in items], list(range(7))
    )
    assert doubled == [0, 2, 4, 6, 8, 10, 12]


# ---- what goes wrong in the middle of a run ------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_that_is_not_finite_is_skipped_and_counted(name, tmp_path, monkeypatch):
    script, calls = SCRIPTS[name], []
    loss = "chunked_pair_loss" if name == "train_pretrain" else "reward_loss"
    real = getattr(script, loss)

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(script, loss, broken)
    options = "--limit 50 --held-out 0 --steps 3 --log-every 1 --lora-rank 4".split()
    script.main([*options, "--out", str(tmp_path / "a")])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert any(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n)
    log = log_of(tmp_path / "a")
    assert [row["skipped"] for row in log] == ["0", "1", "1"]
    # the line of a skipped step has no mean, rather than NaN
    assert [row["loss"] != "" for row in log] == [True, False, True]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["results"]["skipped"] == 1


def test_a_run_that_stays_broken_stops_and_names_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(train_reward, "reward_loss", lambda z, labels, eps: z.sum() * float("inf"))
    rows = [{"prompt": f"Where is {i}?", "chosen": "here", "rejected": "there"} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "a")]
    message = r"5 steps in a row .* on rows 1, 2, 3 of .*d.jsonl; lower --lr"
    with pytest.raises(UserError, match=message):
        train_reward.main([*files, *"--held-out 0 --epochs 9".split()])
    assert not (tmp_path / "a").exists()


def test_only_broken_steps_in_a_row_count(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_run, "SKIP_LIMIT", 2)
    row = EncodedPair([1], [2], [3], 0, 7, (1, 1, 1))
    options = ["--device", "cpu", "--out", str(tmp_path / "run")]
    run = Run("reward", reward_options("", options))
    run.data, run._batch = PairData("d.jsonl", [], 0), [row]
    run.skipped = run._skipped_in_a_row = 0

    def finite(loss, norm):
        run._loss = loss
        if not run.step_is_finite(norm):
            run.skip_step(norm)
            return False
        run._skipped_in_a_row = 0  # as steps() does after a step that was applied
        return True

    steps = ((1.0, 1.0), (float("nan"), 1.0), (1.0, 2.0), (1.0, float("inf")))
    assert [finite(*step) for step in steps] == [True, False, True, False] and run.skipped == 2
    with pytest.raises(UserError, match="rows 7 of d.jsonl"):
        finite(float("inf"), 1.0)


def ends_with_one_line(code, *arguments, before=""):
    """What a script says last when it cannot go on; exit status 2 and no traceback."""
    code = "import sys, train_reward\nfrom gram_mini.runs.ending import clear_errors\n" + before + (
        "\nwith clear_errors():\n    train_reward.main(sys.argv[1:])"
    )  # fmt: skip
    process = start(code, *arguments)
    said = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in said, said
    return said.strip().splitlines()[-1]


def test_out_of_gpu_memory_names_the_options_that_help(tmp_path):
    before = (
        "import torch\ndef hidden_states(*a):\n    raise torch.OutOfMemoryError("
        "'CUDA out of memory. Tried to allocate 2 GiB. GPU 0')\n"
        "train_reward.hidden_states = hidden_states"
    )
    line = ends_with_one_line("", *OPTIONS, "--out", str(tmp_path / "run"), before=before)
    assert line.startswith("error: out of GPU memory")
    assert "--gradient-checkpointing" in line and "--batch-tokens" in line


def test_a_read_only_folder_is_one_line(tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(UserError, match="--out .*run: cannot be written: Read-only file system"):
        train_reward.main([*OPTIONS, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("kilobytes", [20, 60], ids=["at a checkpoint", "at the end"])
def test_a_full_disk_is_one_line_and_leaves_the_old_run(tmp_path, kilobytes):
    """A limit on the size of files acts as a full disk: checkpoints are larger than the adapter."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("{}")
    size = kilobytes * 1024
    before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    options = [*OPTIONS, "--overwrite", "--out", str(out)]
    if kilobytes == 60:
        options[options.index("--steps") + 1] = "1"  # no checkpoint: its end is too large
    line = ends_with_one_line("", *options, before=before)
    assert "File too large" in line and line.startswith("error: ")
    assert (out / "run.json").read_text() == "{}" and len(list(out.iterdir())) == 1


@pytest.mark.parametrize("steps", [1, 3, 5, 9, 21, 96, 188])
def test_held_out_pairs_are_judged_five_times_and_not_twice_at_the_end(steps):
    run = object.__new__(Run)
    run._total, due = steps, []
    for run._step in range(1, steps + 1):
        due += [run._step] * run.evaluation_is_due()
    assert len(due) == min(steps, 5) and due[-1] == steps
    assert all(b - a >= steps // 5 for a, b in zip(due, due[1:]))


def test_where_the_end_fails_only_the_last_step_is_done_again(tmp_path, monkeypatch, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_reward.main([*SHORT, "--out", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr("gram_mini.runs.folder.plot", raise_full)
        with pytest.raises(OSError, match="No space left on device"):
            train_reward.main([*SHORT, "--out", str(run)])
    capsys.readouterr()
    train_reward.main([*SHORT, "--out", str(run), "--resume"])
    assert "going on after step 2" in capsys.readouterr().out
    assert adapter(run) == adapter(whole) and not (run / "checkpoint.pt").exists()
    kept = [
        json.loads((each / "run.json").read_text())["results"]["held_out"] for each in (whole, run)
    ]
    assert kept[0] == kept[1]


def raise_full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_another_process_wrote_meanwhile_is_not_thrown_away(tmp_path):
    first, second = (RunFolder(tmp_path / "run", overwrite=False) for _ in range(2))
    first.start()
    (first.partial / "log.csv").write_text("")
    first.checkpoint.write_text("half")
    with pytest.raises(UserError, match="an unfinished run is there; go on with --resume"):
        second.start()
    shutil.move(first.partial, first.folder)
    (first.folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        second.start()
    assert (first.folder / "run.json").read_text() == "{}"


def test_a_run_that_was_killed_at_once_is_not_in_the_way(tmp_path):
    for _ in range(2):
        RunFolder(tmp_path / "run", overwrite=False).start()


def test_the_speed_after_a_resume_counts_no_tokens_from_before(tmp_path, monkeypatch):
    alone = SimpleNamespace(
        is_main_process=True, device=torch.device("cpu"), reduce=lambda table, how: table
    )
    path, options = tmp_path / "log.csv", SimpleNamespace(log_every=2)
    log = Log(path, options, 2, alone)
    log.note(1_000_000, 1.0, loss=torch.tensor(1.0))
    log.train(1, 1e-3, True, 0)
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    log = Log(path, options, 2, alone, 1, log.state())
    now += 2
    log.note(10, 1.0, loss=torch.tensor(3.0))
    assert log.train(2, 1e-3, True, 0)["loss"] == 2
    assert list(csv.DictReader(path.open()))[0]["tokens_per_second"] == "5"


def test_run_json_names_the_init_that_the_run_began_from(tmp_path, monkeypatch):
    began = [*SHORT, "--out", str(tmp_path / "began"), "--overwrite"]
    train_pretrain.main(began)
    before = judge_fingerprint(str(tmp_path / "began"))
    real = runs_run.Run.finish

    def finish(self, *arguments):
        shutil.rmtree(tmp_path / "began")
        real(self, *arguments)

    monkeypatch.setattr(runs_run.Run, "finish", finish)
    run = "--limit 100 --held-out 0 --steps 1".split()
    train_reward.main([*run, "--init", str(tmp_path / "began"), "--out", str(tmp_path / "run")])
    init = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    assert (init["stage"], init["fingerprint"]) == ("pretrain", before)


def test_a_run_does_not_go_on_from_another_init(tmp_path, monkeypatch):
    began = [*SHORT, "--out", str(tmp_path / "began"), "--overwrite"]
    train_pretrain.main(began)
    run = "--limit 100 --held-out 0 --steps 3 --save-every 1".split()
    run += ["--init", str(tmp_path / "began"), "--out", str(tmp_path / "run")]
    interrupt(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train_reward.main(run)
    train_pretrain.main([*began, "--seed", "5"])
    with pytest.raises(UserError, match="weights of --init was"):
        train_reward.main([*run, "--resume"])

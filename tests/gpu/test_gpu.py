"""What only a GPU can show. `python -m pytest -m gpu` takes ten minutes on a card of 8 GB or more.

Without a card the same tests run in a tiny form on the CPU, as part of the suite. Nothing is
downloaded: real shapes have random weights and the village's tokenizer.
"""

import csv
import json
import math
import signal
import statistics
from functools import partial

import train_pretrain
import train_reward
from gram_mini.errors import Interrupted
from gram_mini.runs import memory
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import compute_dtype, load_tokenizer
from gram_mini.runs.processes import pick_device
from gram_mini.runs.run import LORA_RANK
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import GIB, SHAPES, STAGES
from gram_mini.studies.speed.scoring import judge_of, ours
from gram_mini.training import optimizer_and_schedule
from gram_mini.village import VILLAGE
from gram_mini.village.pairs import village_pairs

import pytest
import torch
from peaks import built_fused, measured_peak
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu

DEVICE = pick_device("auto")
ON_GPU = DEVICE.type == "cuda"
TINY = common.shape("qwen3", 64, 2, 2, 2, 32, 128, 1024, True)
NAME, REAL = ("Qwen2.5-0.5B", SHAPES["Qwen2.5-0.5B"]) if ON_GPU else ("tiny", TINY)
SCRIPTS = {"pretrain": train_pretrain, "reward": train_reward}
STEPS = 20 if ON_GPU else 8
# One batch again and again, so that the loss must fall.
BATCH = "--held-out 0 --batch-size 16 --log-every 1".split()

# Mean difference of log-odds between GPU and CPU; the largest one may be ten times that. The
# log-odds here are between -3 and 3. Measured on a CPU, in the mean: what bf16 rounds is 0.01 (16
# bits) and 0.03 (4 bits). These must not pass: NF4 in place of float32, 0.1; 4 bits read with wrong
# scales, 0.5; an adapter that is left out, 0.9.
SCORES_APART = {
    32: 1e-4,  # float32 on both, summed in another order; TF32 would be off by more
    16: 0.03,  # bf16 on the GPU, float32 on the CPU
    4: 0.06,  # bf16 on the GPU, float32 on the CPU; a weight between two levels may fall to either
}
# What resuming may change, as a share of what was learned (the norm of LoRA's B, which begins at
# zero). Sums on a GPU have no fixed order, so two runs that nobody interrupts differ too, and
# Adam's first steps make much of little.
RESUMED_APART = 0.01  # or three times what two uninterrupted runs are apart, if that is more,
RESUMED_AT_MOST = 0.2  # but not so much that a lost optimiser would pass: it makes 0.4
MEMORY_ABOVE = 1 / memory.TIGHT  # times the foreseen peak: what a run leaves free


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, 16 labelled pairs, and a model of a real shape with random weights."""
    place = tmp_path_factory.mktemp("gpu")
    rows = []
    for pair in village_pairs("labelled", 16):
        responses = {"response_a": pair.response_a, "response_b": pair.response_b}
        rows.append({"prompt": pair.prompt, **responses, "label": "AB"[pair.label]})
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common.save(REAL, place / NAME)
    load_tokenizer(VILLAGE).save_pretrained(place / NAME)
    return place


def train(folder, stage, model, bits, out, *more):
    """Run the script of a stage on one batch."""
    # The village has the rates of the scripts, a real shape a usual one of LoRA.
    name = [VILLAGE] if model == VILLAGE else [str(folder / model), "--lr", "1e-4"]
    data = ["--data", str(folder / "pairs.jsonl"), "--out", str(out)]
    where = ["--bits", str(bits), "--device", DEVICE.type]
    SCRIPTS[stage].main(["--model", *name, *data, *where, *BATCH, *more])


def trained(folder, model, bits):
    """The runs of both stages, trained once: (stage 1, stage 2 from it)."""
    first, second = (folder / f"{model}-{bits}-{stage}" for stage in SCRIPTS)
    steps = ["--steps", str(STEPS)]
    if not first.exists():
        train(folder, "pretrain", model, bits, first, *steps)
    if not second.exists():
        train(folder, "reward", model, bits, second, *steps, "--init", str(first))
    return first, second


@pytest.mark.parametrize("bits", [4, 16] if ON_GPU else [4])
@pytest.mark.parametrize("model", [VILLAGE, NAME])
def test_training(model, bits, folder, note):
    """Losses are finite and fall; with random weights the first verdicts of stage 2 jump about."""
    for run, title in zip(trained(folder, model, bits), STAGES.values()):
        with open(run / "log.csv", newline="") as file:
            losses = [float(row["loss"] or "nan") for row in csv.DictReader(file)]
        first, last = statistics.mean(losses[:3]), statistics.mean(losses[-3:])
        note(f"{title}: loss {first:.3f} to {last:.3f}")
        assert len(losses) == STEPS and all(map(math.isfinite, losses))
        assert last < first or (model == NAME and title == STAGES["reward"])


@pytest.mark.parametrize("stage", SCRIPTS if ON_GPU else ["reward"])
def test_resuming(stage, folder, note, monkeypatch):
    """An interrupted run that is resumed ends with the adapter of an uninterrupted one."""
    whole, again, resumed = (folder / f"{name}-{stage}" for name in ("whole", "again", "resumed"))
    steps = ["--steps", str(STEPS // 2)]
    train(folder, stage, VILLAGE, 4, whole, *steps)
    clip, calls = SCRIPTS[stage].clip_gradients, []

    def interrupted(model):
        calls.append(model)
        if len(calls) == STEPS // 4:
            signal.raise_signal(signal.SIGINT)
        return clip(model)

    with monkeypatch.context() as patch:
        patch.setattr(SCRIPTS[stage], "clip_gradients", interrupted)
        with pytest.raises(Interrupted):
            train(folder, stage, VILLAGE, 4, resumed, *steps)
    assert not resumed.exists()
    train(folder, stage, VILLAGE, 4, resumed, *steps, "--resume")
    away = apart(resumed, whole)
    if away == 0:
        note("bit for bit")
        return
    train(folder, stage, VILLAGE, 4, again, *steps)
    by_itself = apart(again, whole)
    note(f"differs by {away:.2g} of what was learned; two uninterrupted runs by {by_itself:.2g}")
    assert away <= min(max(RESUMED_APART, 3 * by_itself), RESUMED_AT_MOST)


def apart(run, other):
    """How far two adapters differ, as a share of what the other has learned; 0 for equal bits."""
    a, b = (load_file(place / "adapter_model.safetensors") for place in (run, other))
    if all(torch.equal(a[name], b[name]) for name in a):
        return 0.0
    learned = [name for name in a if "lora_B" in name]
    difference = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return math.sqrt(difference / sum(float(b[name].square().sum()) for name in learned))


@pytest.mark.parametrize("bits", SCORES_APART)
def test_scores(bits, folder, note):
    """The log-odds of the village's judge are those on the CPU.

    On a CPU this compares scoring with the adapter merged, and NF4 with float32.
    """
    _, run = trained(folder, VILLAGE, 4)
    apart, reference = SCORES_APART[bits], load_judge(run, bits, "cpu", merge=False)
    if bits == 4 and not ON_GPU:
        apart, here = 0.2, load_judge(run, 32, "cpu", merge=False)
    else:
        here = load_judge(run, bits, DEVICE.type)
    pairs = village_pairs("out-of-distribution", 32)
    odds, expected = (judge.log_odds(judge.encode(pairs))[0] for judge in (here, reference))
    off = (odds - expected).abs()
    mean, largest = float(off.mean()), float(off.max())
    note(f"log-odds from {expected.min():.2f} to {expected.max():.2f}")
    note(f"{mean:.1e} apart in the mean, {largest:.1e} at most")
    assert mean <= apart and largest <= 10 * apart


def batch_of(model, stage, config):
    """As many pairs as a run takes at once, at most 8."""
    length, pairs = (1024, 8) if ON_GPU else (256, 2)
    if ON_GPU:
        longest = memory.Longest(rows=pairs, sequences=1, length=length, logits=1.0)
        tokens, _ = memory.choose_passes(model, longest, True, memory.total_bytes(DEVICE))
        pairs = tokens // length
    return common.full_rows(pairs, stage, config.vocab_size, length)


@pytest.mark.parametrize("name", [NAME, "Qwen3-0.6B", "Llama-3.2-1B"] if ON_GPU else [NAME])
def test_memory(name, note, fast_bfloat16):
    """The peaks of both stages are not above the foreseen ones. A CPU computes in bf16 here."""
    config, bits = (SHAPES[name], 4) if ON_GPU else (TINY, 16)
    model = built_fused(config, bits, LORA_RANK, DEVICE)
    for stage in SCRIPTS:
        rows = batch_of(model, stage, config)
        foreseen = common.foreseen_bytes(model, stage, rows)
        share = measured_peak(model, stage, False, rows) / foreseen
        note(f"{STAGES[stage]}: {share:.2f} of {foreseen / GIB:.3g} GiB for {len(rows)} pairs")
        assert 0.5 < share < MEMORY_ABOVE


@pytest.mark.parametrize("stage", STAGES)
def test_speed(stage, note):
    """Tokens per second in NF4, and the share of what matrix products reach."""
    if stage == "score":
        judge = judge_of(REAL, 4, 1024 if ON_GPU else 256, 2, DEVICE)
        rows, action = batch_of(judge.model, stage, REAL), partial(ours, judge)
    else:
        model = common.build(REAL, 4, LORA_RANK, DEVICE).train()
        optimizer, _ = optimizer_and_schedule(model, 1e-4, 10)
        rows = batch_of(model, stage, REAL)
        action = partial(common.take_step, model, optimizer, common.loss_of, stage)
    action(rows)  # warm-up; Adam's moments are made here
    taken = statistics.median(common.seconds(DEVICE, action, rows) for _ in range(5))
    dtype = compute_dtype(4, DEVICE)
    best = common.matrix_peak(DEVICE, dtype)
    share = common.operations(REAL, stage, rows) / taken / best
    tokens = common.tokens_of(stage, rows) * (2 if stage == "score" else 1)  # both orders
    note(f"{NAME}: {tokens / taken:,.0f} tokens/s, {len(rows)} pairs at once")
    note(f"{share:.0%} of the {best / 1e12:.3g} TFLOP/s of {dtype} products")
    assert 0 < share < 1


def test_the_page_has_device_versions_and_figures(page, note):
    page.add("example", "passed", "12% | of\nwhat")
    page.add("other", "failed", "0.1")
    text = page.file.read_text()
    del page.rows[-2:]
    assert "| example | 12% / of what |\n| other | failed: 0.1 |" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert (torch.cuda.get_device_name() if ON_GPU else "no GPU: tiny shapes") in text

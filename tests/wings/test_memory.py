"""What a run foresees before its first step (runs/memory.py), and the formula of its table
(studies/speed/memory.py), against what small models take.
"""

import csv
import re
import subprocess
import sys
from types import SimpleNamespace

import train_reward
from gram_mini.batches import trained_tokens
from gram_mini.errors import UserError
from gram_mini.model import hidden_states
from gram_mini.runs import chunked
from gram_mini.runs import memory as foresee
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import (
    PLAIN_UP_TO,
    VILLAGE_FOLDER,
    checkpoint_gradients,
    keep_no_square,
    load_tokenizer,
)
from gram_mini.runs.record import read_record
from gram_mini.runs.run import LORA_RANK as RANK
from gram_mini.runs.sharing import SharingJudge
from gram_mini.studies.speed import common, memory
from gram_mini.studies.speed.common import PIECES, held_bytes, peak_bytes, shape
from gram_mini.training import optimizer_and_schedule, trainable
from gram_mini.village.pairs import village_pairs

import psutil
import pytest
import torch
from peaks import built_fused, measured_peak

BATCH, LENGTH = 2, 256
SHAPES = {
    kind: shape(kind, 256, 2, 8, 4, 32, 768, 2048, kind != "llama")
    for kind in ("qwen2", "qwen3", "llama")
}


def rows_and_trained(stage, config):
    """A batch, and how many of its tokens have logits."""
    rows = common.full_rows(BATCH, stage, config.vocab_size, LENGTH)
    return rows, trained_tokens(PIECES[stage], rows) if stage == "pretrain" else 0


# Llama and Qwen2 differ little, so each is tried in one precision.
@pytest.fixture(
    scope="module", params=[("llama", 16), ("qwen2", 4), ("qwen3", 4), ("qwen3", 16)], ids=str
)
def built(request):
    """(config, bits, adapted model) in bfloat16, as on a GPU."""
    kind, bits = request.param
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "gram_mini.runs.models.compute_dtype", lambda bits, device, name="": torch.bfloat16
        )
        yield SHAPES[kind], bits, built_fused(SHAPES[kind], bits, RANK)


# ---- the formula of the table: studies/speed/memory.py -------------------------------


def test_weights_and_adapter_to_the_byte(built):
    config, bits, model = built
    optimizer, _ = optimizer_and_schedule(model, 1e-4, 1)
    assert held_bytes(model, optimizer) == memory.held(config, bits)


def saved_bytes(model):
    """Bytes of the storages that a forward pass keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            # The tensor is held, so that no other gets its address.
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_states(model.train(), torch.randint(2048, (BATCH, LENGTH)))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_checkpointing_keeps_a_layer_s_input_only(built):
    config, _, model = built
    model.gradient_checkpointing_disable()
    whole, kept = saved_bytes(model), lambda yes: memory.kept_bytes(config, BATCH * LENGTH, yes)
    assert whole == pytest.approx(kept(False), rel=0.03)
    checkpoint_gradients(model)
    # The last hidden states, 2 H, are held by the loss and not by the backward pass.
    states = 2 * BATCH * LENGTH * config.hidden_size
    assert saved_bytes(model) == pytest.approx(kept(True) - states, rel=0.03)
    assert saved_bytes(model) < 0.1 * whole


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_is_between_85_and_105_percent_of_the_computed_one(built, checkpointing):
    config, bits, model = built
    if checkpointing and config.model_type != "qwen3":
        pytest.skip("what it keeps is tested with all models")
    rows, _ = rows_and_trained("reward", config)
    computed = memory.peak(config, bits, checkpointing, 2, BATCH * LENGTH)
    assert 0.85 < measured_peak(model, "reward", checkpointing, rows) / computed < 1.05


def test_without_bf16_a_step_in_nf4_takes_what_float32_takes(monkeypatch):
    """As on a T4; the suite's CPU computes in float32."""
    monkeypatch.setattr("gram_mini.runs.models.compute_dtype", lambda *_: torch.float32)
    config = SHAPES["qwen3"]
    model = built_fused(config, 4, RANK)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    computed = memory.peak(config, 4, False, 4, BATCH * LENGTH)
    rows, _ = rows_and_trained("reward", config)
    assert 0.75 < measured_peak(model, "reward", False, rows) / computed < 1.05


@pytest.mark.parametrize("mib", [60, 200, 1000])
def test_a_run_chooses_what_the_table_says(built, mib, monkeypatch):
    """Within a fifth, and with checkpointing on the same cards."""
    config, bits, model = built
    if bits == 16:
        pytest.skip("the table is of NF4")
    monkeypatch.setattr(foresee, "free_bytes", None)  # what is free has no say
    model.gradient_checkpointing_disable()
    total = foresee.CONTEXT + mib * 2**20
    tokens, checkpointing = foresee.choose_passes(model, memory.STEP, False, total)
    passes = [memory.largest_pass(config, total / common.GIB, again) for again in (False, True)]
    assert checkpointing == (not passes[0])
    assert tokens == pytest.approx(passes[checkpointing] or memory.STEP.row, rel=0.2)


def test_the_computed_table(capsys):
    memory.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(memory.CHOSEN) and len({len(line) for line in lines}) == 1
    assert lines[1].startswith("SmolLM2-135M  1.0e-03  16 x 2,048 (1.84, 3.22)")
    assert re.match("Qwen3-8B +2.9e-04 +does not fit +does not fit +16 x 2,048\\* ", lines[-1])


def test_where_the_logits_are_most_of_the_peak_chunks_bound_them(monkeypatch, fast_bfloat16):
    config = shape("llama", 64, 2, 4, 2, 16, 128, 30_000, True)
    model = built_fused(config, 16, RANK)
    rows, trained = rows_and_trained("pretrain", config)
    whole = measured_peak(model, "pretrain", True, rows)
    logits = 12 * config.vocab_size * trained
    assert logits < whole < logits / 0.9
    monkeypatch.setattr(chunked, "LOGITS_AT_ONCE", 2**20)
    assert measured_peak(model, "pretrain", True, rows) < 0.3 * whole


# ---- the estimate before the first step: runs/memory.py ------------------------------


# Any two of the three meet in each of their combinations.
@pytest.mark.parametrize(
    ("stage", "checkpointing", "attention"),
    [
        ("pretrain", False, "sdpa"),
        ("reward", True, "sdpa"),
        ("pretrain", True, "eager"),
        ("reward", False, "eager"),
    ],
)
def test_a_step_is_foreseen(built, stage, checkpointing, attention):
    """From small steps, against what torch allocates in one of 512 tokens a sequence."""
    _, bits, model = built
    if attention == "eager" and bits == 4:
        pytest.skip("bits and attention do not meet")
    model.get_base_model().set_attn_implementation(attention)
    try:
        rows, trained = rows_and_trained(stage, model.config)
        most = measured_peak(model, stage, checkpointing, rows)
        logits = trained / (BATCH * LENGTH)
        step = foresee.measure(model).step(BATCH * LENGTH, LENGTH, logits)
    finally:
        model.get_base_model().set_attn_implementation("sdpa")
    ratio = step / (most - held_bytes(model, None))
    assert 0.9 < ratio < 1.2, ratio


def test_measuring_changes_nothing(built):
    _, _, model = built
    model.eval()
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    foresee.measure(model)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before))


def test_a_model_that_pads_to_a_length_of_its_own_is_not_estimated(monkeypatch):
    """As a scan in chunks of 256 does."""

    def small_step(model, rows, length):
        return [1000 + rows * 10 * -(-length // 256) * 256]

    monkeypatch.setattr(foresee, "_small_step", small_step)
    with pytest.raises(ValueError, match="the model pads sequences of 64 tokens"):
        foresee.measure(torch.nn.Module())


# ---- what a GPU gets: a device of stated size ----------------------------------------


def passes_of(out):
    """What run.json keeps of the passes, and the losses."""
    options = read_record(out)["options"]
    with open(out / "log.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    return options["batch_tokens"], options["gradient_checkpointing"], losses


@pytest.mark.parametrize("options", [["--both-orders", "1"]], ids=["both-orders"])
def test_a_gpu_splits_a_step_by_its_memory_and_learns_the_same(
    tmp_path, monkeypatch, capsys, options
):
    """64 pairs at once, in passes of whole thousands of tokens, and at last with checkpointing."""
    found = {}
    for mib in (4000, 60, 3):
        size = foresee.CONTEXT + mib * 2**20
        monkeypatch.setattr("gram_mini.runs.run.total_bytes", lambda device, size=size: size)
        run_reward(tmp_path / f"{mib}", monkeypatch, 2**33, "--log-every", "1", *options)
        found[mib] = passes_of(tmp_path / f"{mib}")
        said = capsys.readouterr().out
        assert f"of up to {found[mib][0]:,} tokens" in said
        assert ("with gradient checkpointing" in said) == found[mib][1]
        assert f"(of {size / foresee.GIB:.0f} GB)" in said, mib
    (whole, *_), (several, *_), (pair, *_) = found.values()
    assert whole > several > pair and several % foresee.ROUND == 0
    assert [checkpointing for _, checkpointing, _ in found.values()] == [False, False, True]
    for *_, losses in found.values():
        assert losses == pytest.approx(found[4000][2], rel=1e-5)


def test_a_given_split_is_kept_and_other_devices_have_theirs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gram_mini.runs.run.total_bytes", lambda _: foresee.CONTEXT + 2**30)
    run_reward(tmp_path / "given", monkeypatch, 2**33, "--batch-tokens", "700")
    assert passes_of(tmp_path / "given")[0] == 700
    monkeypatch.setattr("gram_mini.runs.run.total_bytes", lambda _: None)
    run_reward(tmp_path / "cpu", monkeypatch, 2**33)
    assert "in one pass of up to" in capsys.readouterr().out
    assert passes_of(tmp_path / "cpu")[0] is None
    model = ["--model", str(VILLAGE_FOLDER), "--batch-size", "64"]
    run_reward(tmp_path / "other", monkeypatch, 2**33, *model)
    assert passes_of(tmp_path / "other")[0] == 1024


def test_a_gpu_scores_as_many_prompts_at_once_as_fit(monkeypatch, capsys):
    found = []
    for mib in (2000, 40, 1):
        size = foresee.CONTEXT + mib * 2**20
        monkeypatch.setattr("gram_mini.runs.load.total_bytes", lambda device, size=size: size)
        found.append(load_judge("village", bits=32).batch_size)
        said = f"passes of up to {512 * found[-1]:,} tokens (of {size / foresee.GIB:.0f} GB)"
        assert said in capsys.readouterr().err
    assert found[0] == foresee.SCORED_AT_MOST > found[1] > found[2] == 1
    assert load_judge("village", bits=32, batch_size=7).batch_size == 7


def test_scoring_takes_no_more_than_was_foreseen(built):
    """Keys and values, and what the layers have in flight, against what torch allocates."""
    _, _, model = built
    judge = SharingJudge(model, load_tokenizer("village"), 512)
    rows = judge.encode(village_pairs("labelled", 16))
    trained = trainable(model)
    for p in trained:
        p.requires_grad_(False)
    try:
        step = foresee.measure(model)
        most = peak_bytes(model, None, judge.log_odds, rows) - held_bytes(model, None)
    finally:
        for p in trained:
            p.requires_grad_(True)
    length = max(row.length for row in rows) + judge.prompt.fixed_tokens
    assert 0.4 < most / step.step(2 * len(rows) * length, length) < 1.1


def test_long_sequences_train_without_square_matrices(fast_bfloat16):
    squares = {}
    for longest in (PLAIN_UP_TO, PLAIN_UP_TO + 1):
        model = common.build(SHAPES["llama"], 16, RANK, torch.device("cpu"))
        assert model.get_base_model().config._attn_implementation == "eager"
        keep_no_square(model, longest)
        step = foresee.measure(model)
        squares[longest] = step.step(longest, longest) - step.step(longest, 1)
    assert squares[PLAIN_UP_TO + 1] < 0.1 * squares[PLAIN_UP_TO]


# ---- the line before the first step --------------------------------------------------


def run_reward(out, monkeypatch, free, *options):
    """Stage 2 for a step on the village, where ``free`` bytes are free."""
    monkeypatch.setattr("gram_mini.runs.run.free_for_each", lambda *_: free)
    monkeypatch.setattr(foresee, "give_back_at_once", lambda: True)  # for the tests after this one
    train_reward.main(
        ["--steps", "1", "--limit", "100", "--bits", "32", "--held-out", "0", "--out", str(out)]
        + list(options)
    )


def test_too_large_a_batch_is_refused_with_one_that_fits(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError) as refused:
        run_reward(tmp_path / "run", monkeypatch, 80 * 2**20)
    assert not any(tmp_path.glob("run*"))
    options = re.search(r"give (--batch-tokens \d+) ", str(refused.value))
    assert options and "GRAM_MEMORY_CHECK=0" in str(refused.value), str(refused.value)
    run_reward(tmp_path / "run", monkeypatch, 80 * 2**20, *options[1].split())
    assert "tight" not in capsys.readouterr().out


def test_a_tight_run_is_warned_of_and_a_refused_one_can_be_tried(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="not even one pair .* fits; --gradient-checkpointing, a"):
        run_reward(tmp_path / "run", monkeypatch, 2**20)
    with pytest.raises(UserError, match="not even one pair .* fits; a smaller --max-length, "):
        run_reward(tmp_path / "run", monkeypatch, 2**20, "--gradient-checkpointing")
    monkeypatch.setenv(foresee.SKIP, "0")
    run_reward(tmp_path / "run", monkeypatch, 2**20)
    assert "tried all the same" in capsys.readouterr().out
    monkeypatch.setattr(foresee, "measure", lambda *_: Fixed())
    run_reward(tmp_path / "other", monkeypatch, 110)
    assert "which is tight; give --batch-tokens" in capsys.readouterr().out


def test_a_cpu_gives_back_what_it_frees_before_memory_is_tight(monkeypatch):
    asked = []
    monkeypatch.setattr(foresee, "measure", lambda *_: Fixed())
    monkeypatch.setattr(foresee, "give_back_at_once", lambda: not asked.append(1))
    longest = foresee.Longest(rows=2, sequences=1, length=64, logits=0.0)
    for device in ("cpu", "cuda"):
        model = SimpleNamespace(device=torch.device(device))
        line = lambda free, model=model: foresee.prepare_memory(model, longest, False, free)
        assert "which is tight" in line(124) and "tight" not in line(126)
        assert ("given back at once" in line(287)) == (device == "cpu")
        assert ("(about 0.0 MiB with freed" in line(288)) == (device == "cpu")
        assert "given back" not in line(288)
    assert len(asked) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_between_blocks_in_use_is_given_back_at_once():
    """In a process of its own, since it lasts as long as the process."""
    program = """
import psutil
from gram_mini.runs.memory import give_back_at_once

def kept():
    begin = psutil.Process().memory_info().rss
    bytearray(8 * 2**20)  # once this is freed, glibc keeps what is smaller
    blocks = [bytearray(b"x") * (2**21 if i % 2 else 2**16) for i in range(200)]
    blocks = blocks[::2]  # 100 of 64 KiB; between them 100 of 2 MiB are freed
    return (psutil.Process().memory_info().rss - begin) / 2**20

print(kept(), give_back_at_once(), kept())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    before, glibc, after = done.stdout.split()
    if glibc == "True":
        assert float(before) > 150 and float(after) < 30


class Fixed:
    """An estimate of 100 bytes for what the run would do, and of 50 for less."""

    def of(self, longest, tokens):
        return 100 if tokens == longest.tokens else 50


def test_where_nothing_can_be_measured_a_line_says_so(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(foresee, "measure", fail)
    run_reward(tmp_path / "run", monkeypatch, 2**30)
    assert "memory: not estimated: no such operator" in capsys.readouterr().out
    run_reward(tmp_path / "other", monkeypatch, None)
    assert "memory: not estimated on cpu" in capsys.readouterr().out


def cgroup(folder, limit, used):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("active_file 20\ninactive_file 30\nx 1\n")


def test_free_memory_is_the_least_that_system_and_cgroups_leave(tmp_path, monkeypatch):
    own, mounted = tmp_path / "cgroup", tmp_path / "sys"
    leaves = lambda: list(foresee.cgroups_leave(mounted, own))
    assert leaves() == []  # another system
    own.write_text("0::/a/b\n")
    assert leaves() == []  # no such group here
    cgroup(mounted / "a" / "b", "max", 700)
    cgroup(mounted / "a", 1000, 700)
    assert leaves() == [350]
    own.write_text("9:name=systemd:/\n4:memory:/gone\n0::/\n")
    cgroup(mounted, 5000, 1000)
    assert leaves() == [4050]

    (tmp_path / "meminfo").write_text(
        "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\nCached: 1 kB\nBuffers: 1 kB\n"
        "Active: 1 kB\nInactive: 1 kB\nShmem: 0 kB\nSlab: 0 kB\nSReclaimable: 0 kB\n"
    )
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    available = psutil.virtual_memory().available
    assert available == 3000 * 1024
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(shared=1000 * 1024))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    for limit, free in ((2**40, 2000 * 1024), (1500 * 1024, 500 * 1024), (100, 0)):
        monkeypatch.setattr(foresee, "cgroups_leave", lambda limit=limit: [limit])
        assert foresee.free_bytes(torch.device("cpu")) == free
    assert foresee.free_bytes(torch.device("meta")) is None

"""What the speed studies share: shapes of models, rows, a training step, and how it is measured."""

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces each start and stop

from gram_mini import batches
from gram_mini.batches import EncodedPair
from gram_mini.errors import UserError
from gram_mini.losses import reward_loss
from gram_mini.model import add_lora, hidden_states, output_logits
from gram_mini.prompts import PromptPieces
from gram_mini.reading.load import load_pairs
from gram_mini.runs import options
from gram_mini.runs.chunked import chunked_pair_loss
from gram_mini.runs.models import load_model
from gram_mini.runs.output import write_whole
from gram_mini.training import clip_gradients

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

GIB = 2**30
RESULTS = Path(__file__).parent.parent / "results"
STAGES = {"pretrain": "stage 1", "reward": "stage 2", "score": "scoring, both orders"}
LABELS = (5, 6)
# As many fixed tokens as our prompts have with Qwen's tokenizer. Which ones does not matter.
PIECES = {
    "pretrain": PromptPieces(start=[1] * 6, after_prompt=[1] * 18, between=[1] * 24, end=[1] * 12),
    "reward": PromptPieces(start=[1] * 82, after_prompt=[1] * 15, between=[1] * 24, end=[1] * 24),
}
PIECES["score"] = PIECES["reward"]
SHORTEST = 192  # tokens of a sequence


def shape(kind, hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary, tied):
    """The config of a model of these sizes; tied: the output matrix is the one of the embeddings"""
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )


MODELS = {  # as their public config.json
    "Qwen2.5-0.5B": shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen3-0.6B": shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Llama-3.2-1B": shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "SmolLM2-1.7B": shape("llama", 2048, 24, 32, 32, 64, 8192, 49152, True),
    "Qwen3-1.7B": shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    "Llama-3.2-3B": shape("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "Qwen3-8B": shape("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False),
}
SHAPES = {
    "village": shape("qwen2", 96, 4, 4, 4, 24, 288, 718, True),
    "SmolLM2-135M": shape("llama", 576, 30, 9, 3, 64, 1536, 49152, True),  # that of `make real`
    # a real vocabulary on a body that a CPU can train
    "mid": shape("qwen2", 512, 4, 8, 2, 64, 2048, 151936, True),
    **MODELS,
}


def linear(config) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a decoder layer: q, k, v, o, gate, up, down."""
    h, i = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads, config.num_key_value_heads
    q, k = (number * config.head_dim for number in heads)
    return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]


def save(config, folder) -> None:
    """Write a model with random weights, in bf16 as public ones are."""
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def build(config, bits: int, rank: int, device: torch.device):
    """An adapted model with random weights, written to disk and loaded as the scripts load one."""
    with tempfile.TemporaryDirectory() as folder:
        save(config, folder)
        return add_lora(load_model(folder, bits, device), rank)


NUMBER: dict[str, Any] = dict(type=options.positive_int, metavar="N")
OPTIONS: dict[str, dict[str, Any]] = {
    "shape": dict(choices=SHAPES, default="mid", help="sizes of the model"),
    "bits": dict(type=int, choices=(4, 16, 32), default=32, help="4: NF4; 16: bf16; 32: float32"),
    "lora-rank": dict(**NUMBER, default=32, help="rank of the LoRA adapter"),
    "device": dict(default="auto", help="cpu, cuda, ...; auto takes the GPU where there is one"),
    "data": dict(metavar="FILE", help="pairs whose lengths are taken (default: all are full)"),
    "max-length": dict(**NUMBER, default=512, help="tokens of a sequence at most"),
    "batch-size": dict(**NUMBER, help="pairs of a forward pass"),
    "rounds": dict(**NUMBER, help="times that everything is measured"),
    "record": dict(metavar="NAME", help="keep the figures under this name, for the page"),
    "gradient-checkpointing": dict(action="store_true", help="for all ways alike"),
    "peer": dict(choices=("trl",), help="another library to compare with"),
    "pairs": dict(**NUMBER, default=8, help="pairs of a turn"),
    "responses": dict(**NUMBER, default=16, help="responses of a ranking"),
}


def parser(description: str, examples: str, names: str) -> argparse.ArgumentParser:
    """A parser with some of the options above, named in one text without their dashes."""
    p = options.parser(description, examples)
    for name in names.split():
        p.add_argument(f"--{name}", **OPTIONS[name])
    return p


# ---- rows and steps ------------------------------------------------------------------


def rows_of(sizes: list, stage: str, vocabulary: int, max_length: int, seed: int = 0):
    """Pairs of random tokens, cut as real ones are; sizes are (prompt, response, response).

    Raises:
        UserError: the judge prompt leaves no room for them.
    """
    if max_length < SHORTEST:
        raise UserError(f"{max_length} tokens: too few for a judge prompt; give {SHORTEST} or more")
    rng, budget, rows = random.Random(seed), max_length - PIECES[stage].fixed_tokens, []
    for i, uncut in enumerate(sizes):
        prompt, a, b = (rng.choices(range(vocabulary), k=size) for size in uncut)
        cut = batches.truncate(prompt, a, b, budget)
        rows.append(EncodedPair(*cut, label=i % 2, row=i, uncut=uncut))
    return rows


def full_rows(count: int, stage: str, vocabulary: int, length: int, seed: int = 0):
    """Pairs that fill ``length`` tokens: half is question, a quarter each response."""
    room = length - PIECES[stage].fixed_tokens
    sizes = [(room - 2 * (room // 4), room // 4, room // 4)] * count
    return rows_of(sizes, stage, vocabulary, length, seed)


def rows_like(data: str | None, count: int, stage: str, vocabulary: int, length: int, seed: int):
    """Pairs as long as those of a file, a token for every four characters; full ones without it."""
    if data is None:
        return full_rows(count, stage, vocabulary, length, seed)
    tokens = lambda *texts: tuple(-(-len(text) // 4) for text in texts)
    pairs = load_pairs(data, labelled=False, seed=seed).pairs
    drawn = random.Random(seed).choices(pairs, k=count)
    sizes = [tokens(pair.prompt, pair.response_a, pair.response_b) for pair in drawn]
    return rows_of(sizes, stage, vocabulary, length, seed)


def loss_of(model, stage: str, rows: list[EncodedPair]) -> torch.Tensor:
    """The loss on one batch as in the loop of the stage's script."""
    if stage == "pretrain":
        ids, targets = batches.pair_batch(rows, PIECES[stage], model.device)  # (B, T), (B, T)
        hidden = hidden_states(model, ids)  # (B, T, H)
        return chunked_pair_loss(model, hidden, targets)
    ids, last, right = batches.judge_batch(rows, PIECES[stage], model.device)  # (B, T), (B,), (B,)
    hidden = hidden_states(model, ids)  # (B, T, H)
    logits = output_logits(model, hidden[torch.arange(len(rows)), last], LABELS)  # (B, 2)
    return reward_loss(logits, right, 0.05)


def take_step(model, optimizer, loss: Callable, stage: str, rows: list[EncodedPair]) -> None:
    """Loss, backward, clip, update."""
    loss(model, stage, rows).backward()
    clip_gradients(model)
    optimizer.step()
    optimizer.zero_grad()


def operations(config, stage: str, rows: list[EncodedPair], rank: int) -> float:
    """Floating-point operations that a step, or scoring in both orders, needs without padding.

    A frozen matrix is multiplied forward and for the gradient of its input. Attention (half of its
    square is masked) and LoRA cost twice as much backward as forward. Scoring is forward only. What
    gradient checkpointing computes again does not count.
    """
    adapted_passes = 2 if stage == "score" else 3  # scoring: both orders
    frozen = sum(i * o for i, o in linear(config))
    adapter = sum(rank * (i + o) for i, o in linear(config))
    queries = config.num_attention_heads * config.head_dim
    total = 0
    for row in rows:
        length = row.length + PIECES[stage].fixed_tokens
        adapted = length * adapter + length**2 * queries
        layer = 2 * 2 * length * frozen + adapted_passes * 2 * adapted
        logits = len(LABELS)
        if stage == "pretrain":
            logits = batches.trained_tokens(PIECES[stage], [row]) * config.vocab_size
        total += config.num_hidden_layers * layer + 2 * 2 * logits * config.hidden_size
    return total


# ---- measuring -----------------------------------------------------------------------


def held_bytes(model, optimizer) -> int:
    """Bytes of all weights, quantised or not, and of the state of the optimiser (or None)."""
    states = optimizer.state.values() if optimizer else ()
    tensors = [*model.parameters(), *(t for state in states for t in state.values())]
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_bytes(model, optimizer, action, *arguments) -> int:
    """Most bytes held during ``action(*arguments)``: by the model and the optimiser (or None), and
    by what torch allocates beside them.
    """
    held = held_bytes(model, optimizer)
    gc.collect()  # what is freed during the action must have been allocated in it
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        action(*arguments)
        return held + torch.cuda.max_memory_allocated(model.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action(*arguments)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return held + max(itertools.accumulate(sizes, initial=0))


def seconds(device: torch.device, action, *arguments) -> float:
    """How long ``action(*arguments)`` takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    began = time.perf_counter()
    action(*arguments)
    wait(device)
    return time.perf_counter() - began


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second in multiplying two large square matrices, the best of eight tries."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds(device, torch.matmul, a, b) for _ in range(8))


def compare(ways: dict[str, tuple], turns: list, amounts: list[int], unit: str):
    """Run all ways on the batch of each turn, one after the other; the first is "ours".

    A way is (action on a batch, model, optimiser or None); ``amounts`` are the tokens or pairs of
    each batch. Returns a row of figures for each other way, and the seconds of ours. Speeds are
    medians, with the ratios of the turns; peaks are those of the largest batch.
    """
    actions = [action for action, *_ in ways.values()]
    device = ways["ours"][1].device
    for action in actions:
        action(turns[0])  # warm-up
    times = [[seconds(device, action, batch) for action in actions] for batch in turns]
    largest = turns[amounts.index(max(amounts))]
    peaks = [peak_bytes(*held, action, largest) / GIB for action, *held in ways.values()]
    ours = [of_ours for of_ours, *_ in times]
    speed = lambda taken: f"{statistics.median(n / t for n, t in zip(amounts, taken)):,.4g}"
    rows = []
    for way, taken, peak in list(zip(ways, zip(*times), peaks))[1:]:
        ratios = sorted(t / of_ours for of_ours, t in zip(ours, taken))
        median = statistics.median(ratios)
        row = {"other way": way, f"ours, {unit}/s": speed(ours), f"other, {unit}/s": speed(taken)}
        row["ours is faster by"] = f"{median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        row["peak GiB, ours and other"] = f"{peaks[0]:.2f}, {peak:.2f}"
        rows.append(row)
    return rows, ours


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows (column -> text), the columns set under each other."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, [width * "-" for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines
    )


def report(file: str, rows: list[dict[str, str]], args, device: torch.device) -> None:
    """Print rows as a table. --record NAME also keeps them in this file of results."""
    place = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    place += f", torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{table(rows)}\n\n{place}")
    if args.record:
        path = RESULTS / file
        records = json.loads(path.read_text()) if path.is_file() else {}
        given = {name: str(value) for name, value in vars(args).items()}
        records[args.record] = {"measured": place, "options": given, "rows": rows}
        write_whole(path, [json.dumps(records, indent=1) + "\n"], "--record")
        print(f"kept as {args.record!r} in {path}")

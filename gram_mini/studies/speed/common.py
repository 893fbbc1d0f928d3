"""What the speed studies share: shapes of models, rows, a training step, and how it is measured."""

import gc
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces each start and stop

from gram_mini import batches
from gram_mini.batches import EncodedPair
from gram_mini.errors import UserError
from gram_mini.losses import reward_loss
from gram_mini.model import add_lora, hidden_states, output_logits
from gram_mini.prompts import PromptPieces
from gram_mini.runs import memory
from gram_mini.runs.chunked import chunked_pair_loss
from gram_mini.runs.memory import GIB
from gram_mini.runs.models import load_model
from gram_mini.runs.run import LORA_RANK
from gram_mini.training import clip_gradients

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

STAGES = {"pretrain": "stage 1", "reward": "stage 2", "score": "scoring, both orders"}
LABELS = (5, 6)
# About as many fixed tokens as a long judge prompt has. Which ones does not matter.
PIECES = {
    "pretrain": PromptPieces(
        start=[1] * 6, after_prompt=[1] * 18, between=[1] * 24, end=[1] * 12, ignored=5
    ),
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


SHAPES = {
    "village": shape("qwen2", 128, 4, 4, 4, 32, 384, 718, True),
    # a real vocabulary on a body that a CPU can train
    "mid": shape("qwen2", 512, 4, 8, 2, 64, 2048, 151936, True),
    # as their public config.json
    "SmolLM2-135M": shape("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "Qwen2.5-0.5B": shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen3-0.6B": shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Llama-3.2-1B": shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "Qwen3-1.7B": shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen3-8B": shape("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False),
}


def linear(config) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a decoder layer: q, k, v, o, gate, up, down."""
    h, i = config.hidden_size, config.intermediate_size
    q, k = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]


def save(config, folder) -> None:
    """Write a model with random weights, in bf16 as public ones are."""
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def build(config, bits: int, rank: int, device: torch.device):
    """An adapted model with random weights, written to disk and loaded as the scripts load one."""
    with tempfile.TemporaryDirectory() as folder:
        save(config, folder)
        return add_lora(load_model(folder, bits, device), rank)


# ---- rows and steps ------------------------------------------------------------------


def full_rows(count: int, stage: str, vocabulary: int, length: int) -> list[EncodedPair]:
    """Pairs of random tokens that fill ``length``: half is question, a quarter each response.

    Raises:
        UserError: the judge prompt leaves no room for them.
    """
    if length < SHORTEST:
        raise UserError(f"{length} tokens: too few for a judge prompt; give {SHORTEST} or more")
    room, rng = length - PIECES[stage].fixed_tokens, random.Random(0)
    sizes = room - 2 * (room // 4), room // 4, room // 4
    rows = []
    for i in range(count):
        prompt, a, b = (rng.choices(range(vocabulary), k=size) for size in sizes)
        rows.append(EncodedPair(prompt, a, b, label=i % 2, row=i, uncut=sizes))
    return rows


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


def tokens_of(stage: str, rows: list[EncodedPair]) -> int:
    """Tokens of the sequences of some pairs, each in one order."""
    return sum(row.length + PIECES[stage].fixed_tokens for row in rows)


def operations(config, stage: str, rows: list[EncodedPair]) -> float:
    """Floating-point operations of a step on rows of one length.

    A frozen matrix is multiplied forward and for the gradient of its input. Attention (half of its
    square is masked) and LoRA cost twice as much backward as forward.
    """
    tokens = tokens_of(stage, rows)
    sizes = linear(config)
    h, q = sizes[0]
    adapted = sum(LORA_RANK * (n + m) for n, m in sizes) + tokens / len(rows) * q
    layer = tokens * (2 * 2 * sum(n * m for n, m in sizes) + 3 * 2 * adapted)
    logits = len(LABELS) * len(rows)
    if stage == "pretrain":
        logits = batches.trained_tokens(PIECES[stage], rows) * config.vocab_size
    return config.num_hidden_layers * layer + 2 * 2 * logits * h


# ---- measuring -----------------------------------------------------------------------


def held_bytes(model, optimizer=None) -> int:
    """Bytes of all weights, quantised or not, and of the state of the optimiser."""
    states = optimizer.state.values() if optimizer else ()
    tensors = [*model.parameters(), *(t for state in states for t in state.values())]
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def foreseen_bytes(model, stage: str, rows: list[EncodedPair]) -> int:
    """What a run says at its start that such a batch takes, with the model itself."""
    tokens = tokens_of(stage, rows)
    trained = batches.trained_tokens(PIECES[stage], rows) if stage == "pretrain" else 0
    step = memory.measure(model).step(tokens, tokens // len(rows), trained / tokens)
    return held_bytes(model) + step


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


def compare(ways: dict[str, tuple], batch: list, rounds: int, amount: int, unit: str):
    """Run all ways on a batch of so many tokens or pairs, in turns; the first is "ours".

    A way is (action on a batch, model, optimiser or None). Returns a row of figures for each other
    way, and the median seconds of ours. Ratios are medians over the rounds, with their range.
    """
    actions, device = [action for action, *_ in ways.values()], ways["ours"][1].device
    for action in actions:
        action(batch)  # warm-up
    times = [[seconds(device, action, batch) for action in actions] for _ in range(rounds)]
    peaks = [peak_bytes(*held, action, batch) / GIB for action, *held in ways.values()]
    ours, *others = zip(*times)
    median, rows = statistics.median(ours), []
    for way, taken, peak in zip(list(ways)[1:], others, peaks[1:]):
        ratios = sorted(other / our for our, other in zip(ours, taken))
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        row = {"other way": way, "ours, seconds": f"{median:.3g}"}
        row[f"ours, {unit}/s"] = f"{amount / median:,.4g}"
        row[f"other, {unit}/s"] = f"{amount / statistics.median(taken):,.4g}"
        row["ours is faster by"] = f"{statistics.median(ratios):.2f} {spread}"
        row["peak GiB, ours and other"] = f"{peaks[0]:.2f}, {peak:.2f}"
        rows.append(row)
    return rows, median

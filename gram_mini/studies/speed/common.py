"""What the speed studies share: shapes of models, rows, a training step, and its memory."""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces each start and stop

from gram_mini.batches import IGNORED, EncodedPair, judge_batch, pair_batch, truncate
from gram_mini.losses import reward_loss
from gram_mini.model import add_lora, hidden_states, output_head, output_logits
from gram_mini.prompts import PromptPieces
from gram_mini.reading.load import load_pairs
from gram_mini.runs import options
from gram_mini.runs.chunked import chunked_pair_loss
from gram_mini.runs.models import load_model
from gram_mini.training import clip_gradients

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

GIB = 2**30
LABELS = (5, 6)
# (median, sigma of the logarithm) of the tokens of prompt and responses
LENGTHS = ((180, 0.9), (160, 0.8), (160, 0.8))
# As many fixed tokens as our prompts have with Qwen's tokenizer. Which ones does not matter.
PIECES = {
    "pretrain": PromptPieces(start=[1] * 6, after_prompt=[1] * 18, between=[1] * 24, end=[1] * 12),
    "reward": PromptPieces(start=[1] * 82, after_prompt=[1] * 15, between=[1] * 24, end=[1] * 24),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as in its public config.json."""

    kind: str  # transformers' model_type
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool  # whether the output matrix is the one of the embeddings

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a decoder layer: q, k, v, o, gate, up, down."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.intermediate
        return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]

    def config(self):
        """The config object that transformers builds the model from."""
        return AutoConfig.for_model(
            self.kind,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
        )


MODELS = {
    "Qwen2.5-0.5B": Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen3-0.6B": Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Llama-3.2-1B": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "SmolLM2-1.7B": Shape("llama", 2048, 24, 32, 32, 64, 8192, 49152, True),
    "Qwen3-1.7B": Shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    "Llama-3.2-3B": Shape("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "Qwen3-8B": Shape("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False),
}
OTHERS = {
    "village": Shape("qwen2", 96, 4, 4, 4, 24, 288, 718, True),
    # the model of `make real`
    "SmolLM2-135M": Shape("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    # a real vocabulary on a body that a CPU can train
    "mid": Shape("qwen2", 512, 4, 8, 2, 64, 2048, 151936, True),
}
SHAPES = {**OTHERS, **MODELS}


def add_models(parser, default: list[str]) -> None:
    """``--models`` of every study that computes from the shapes of real models."""
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=default,
        metavar="NAME",
        help="of " + ", ".join(MODELS),
    )


def add_lora_rank(parser) -> None:
    """``--lora-rank`` of every study."""
    parser.add_argument(
        "--lora-rank",
        type=options.positive_int,
        default=32,
        metavar="R",
        help="rank of the LoRA adapter",
    )


def add_model_options(parser) -> None:
    """Options of every study that builds one model."""
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="mid",
        help="sizes of the model; mid is 4 layers of width 512",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(4, 16, 32),
        default=32,
        help="4: NF4 weights; 16: bf16; 32: float32",
    )
    add_lora_rank(parser)
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes the GPU where there is one",
    )


def machine(device: torch.device) -> str:
    """What a figure was measured on."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )


def save_random(s: Shape, folder) -> None:
    """Write a model of this shape with random weights, in bf16 as public ones are."""
    AutoModelForCausalLM.from_config(s.config(), dtype=torch.bfloat16).save_pretrained(folder)


def build(s: Shape, bits: int, rank: int, device: torch.device):
    """An adapted model with random weights, written to disk and loaded as the scripts load one."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(s, folder)
        return add_lora(load_model(folder, bits, device), rank)


def random_rows(batch: int, length: int, vocabulary: int) -> list[EncodedPair]:
    """Pairs of random tokens that fill ``length``: a quarter prompt, the rest the two responses."""
    prompt = length // 4
    a = (length - prompt - 4) // 2
    sizes = (prompt, a, length - prompt - 4 - a)
    rows = []
    for i in range(batch):
        tokens = [torch.randint(vocabulary, (size,)).tolist() for size in sizes]
        rows.append(EncodedPair(tokens[0], tokens[1], tokens[2], label=i % 2, row=i, uncut=sizes))
    return rows


def lengths_of(data: str | None, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Tokens of prompt and responses of ``count`` pairs."""
    rng = random.Random(seed)
    if data is None:
        draw = lambda median, sigma: max(1, round(median * math.exp(rng.gauss(0, sigma))))
        prompt, a, b = LENGTHS
        return [(draw(*prompt), draw(*a), draw(*b)) for _ in range(count)]
    pairs = load_pairs(data, labelled=False, seed=seed).pairs
    tokens = lambda text: -(-len(text) // 4)  # a token for every four characters
    return [
        (tokens(pair.prompt), tokens(pair.response_a), tokens(pair.response_b))
        for pair in rng.choices(pairs, k=count)
    ]


def rows_of(
    lengths, pieces: PromptPieces, vocabulary: int, max_length: int, seed: int
) -> list[EncodedPair]:
    """Pairs of random tokens with these lengths, cut as real ones are."""
    rng, budget, rows = random.Random(seed), max_length - pieces.fixed_tokens, []
    for i, sizes in enumerate(lengths):
        prompt, a, b = (rng.choices(range(vocabulary), k=size) for size in sizes)
        prompt, a, b = truncate(prompt, a, b, budget)
        rows.append(EncodedPair(prompt, a, b, label=i % 2, row=i, uncut=sizes))
    return rows


def loss_of(model, stage: str, rows: list[EncodedPair], pieces: PromptPieces) -> torch.Tensor:
    """The loss on one batch as in the loop of the stage's script."""
    if stage == "pretrain":
        ids, targets = pair_batch(rows, pieces, model.device)  # (B, T), (B, T)
        hidden = hidden_states(model, ids)  # (B, T, H)
        trained = targets != IGNORED
        return chunked_pair_loss(hidden[trained], targets[trained], output_head(model))
    ids, last, right = judge_batch(rows, pieces, model.device)  # (B, T), (B,), (B,)
    hidden = hidden_states(model, ids)  # (B, T, H)
    logits = output_logits(model, hidden[torch.arange(len(rows)), last], LABELS)  # (B, 2)
    return reward_loss(logits, right, 0.05)


def take_step(model, optimizer, loss: torch.Tensor) -> None:
    """Backward, clip, update."""
    loss.backward()
    clip_gradients(model)
    optimizer.step()
    optimizer.zero_grad()


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


def growth(step) -> int:
    """Most bytes that torch's CPU allocator held during ``step`` beyond what it held before."""
    gc.collect()  # what is freed during the step must have been allocated in it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def synchronize(device: torch.device) -> None:
    """Wait until the GPU, where there is one, has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second in multiplying two large square matrices, the best of eight tries."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds(device, torch.matmul, a, b) for _ in range(8))


def seconds(device: torch.device, action, *arguments) -> float:
    """How long ``action(*arguments)`` takes."""
    synchronize(device)
    began = time.perf_counter()
    action(*arguments)
    synchronize(device)
    return time.perf_counter() - began


def peak_bytes(model, optimizer, action, *arguments) -> int:
    """Most bytes held during ``action(*arguments)``, with the model and the optimiser (or None)."""
    if model.device.type == "cpu":
        return held_bytes(model, optimizer) + growth(lambda: action(*arguments))
    torch.cuda.reset_peak_memory_stats(model.device)
    action(*arguments)
    return torch.cuda.max_memory_allocated(model.device)


def spread(ratios: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns set under each other."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, [w * "-" for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines
    )

"""How much memory a training step will take and how much is free, estimated before the first step.

The loaded model takes three small steps, and after each operation the bytes of all tensors that
exist are noted. With R rows of T tokens each of these figures is c + a R T + b R T^2: dequantised
matrices are in c, activations in a, attention without a fused kernel in b. Three steps give c, a
and b, and the largest figure of the longest pass is its peak. The logits of stage 1 come on top of
what the forward pass keeps (12 bytes each, or 8 for as many as are made at once), and the adapter's
gradients and Adam's two moments on top of all (12 bytes for each number).

The estimate is between 90% and 120% of what torch allocates (tests/wings/test_memory.py). On a CPU
the process grows by more, because freed memory lies scattered between what is kept. Where that
would be too much, freed memory is given back at once, which takes more time. On a GPU the same
estimate chooses the passes of a step, and how many prompts are scored at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gram_mini.errors import UserError, last_line
from gram_mini.model import decoder, half_precision, hidden_states
from gram_mini.runs.chunked import LOGITS_AT_ONCE
from gram_mini.runs.models import checkpoint_gradients
from gram_mini.training import trainable

import psutil
import torch
from accelerate.utils import gather_object
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
TIGHT = 0.8  # share of the free memory above which a run is warned of
SCATTERED = 2.3  # a process grew on a CPU to so many times what was foreseen (CHANGELOG.md)
AT_ONCE = 2**16  # bytes; blocks from this size on are given back as soon as they are freed
CONTEXT = GIB  # of a GPU's memory, what CUDA takes for itself and the allocator loses
ROUND = 1024  # passes chosen for a GPU are a multiple of it, so that small differences change none
SCORED_AT_MOST = 32  # judge prompts of max_length per forward pass; more keep no GPU busier
TOKENS = 64  # of a row of the small steps; kernels and scans round up to it
SKIP = "GRAM_MEMORY_CHECK"  # the environment variable; 0 turns the refusal into a warning


# ---- what a step takes ---------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, and notes them whenever they grow."""

    def __init__(self):
        super().__init__()
        self.bytes, self.noted = 0, [0]
        self._known: set[int] = set()  # addresses of what is counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # What shares the storage of an input that is not counted was there before.
        before = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            address, size = storage._cdata, storage.nbytes()
            if address in self._known or address in before:
                continue
            self._known.add(address)
            self.bytes += size
            self.noted.append(self.bytes)
            weakref.finalize(storage, self._freed, address, size)
        return out

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


def _storages(values) -> list:
    """The storages of all tensors in nested tuples, lists and dictionaries."""
    return [each.untyped_storage() for each in tree_leaves(values) if torch.is_tensor(each)]


def _small_step(model, rows: int, length: int) -> list[int]:
    """Bytes that are held after each operation of a step, without the adapter's gradients; the last
    one is what the forward pass keeps. A frozen model keeps keys and values, as in scoring.
    """
    parameters = trainable(model)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    ids = torch.arange(rows * length, device=model.device).view(rows, length)
    ids = ids % model.get_input_embeddings().num_embeddings  # (rows, length)
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            with _Live() as live:
                if parameters:
                    loss = hidden_states(model, ids).sum()
                else:
                    with half_precision(model), torch.no_grad():
                        loss = decoder(model)(input_ids=ids, use_cache=True).last_hidden_state
                kept = live.bytes
                if loss.requires_grad:  # not that of a head on a frozen model
                    loss.backward()
    finally:
        for p in parameters:
            p.grad = None
    return [*live.noted, kept]


@dataclass
class Estimate:
    """What a step takes beside the loaded model, from :func:`measure`."""

    noted: torch.Tensor  # (3, N): c, a and b of the figures of _small_step
    vocabulary: int
    adapter: int  # its numbers

    def step(self, tokens: int, length: int, logits: float = 0.0) -> int:
        """Bytes at the peak of a pass of ``tokens`` tokens, padding included.

        ``length`` are the tokens of a sequence; the share ``logits`` of all gets logits (stage 1).
        """
        at = torch.tensor([1, tokens, tokens * length], dtype=torch.float64)
        logits = self.vocabulary * logits * tokens
        logits = 12 * logits if logits <= LOGITS_AT_ONCE else 8 * LOGITS_AT_ONCE
        figures = at @ self.noted  # (N,)
        peak = max(float(figures.max()), float(figures[-1]) + logits)
        return round(peak) + 12 * self.adapter

    def of(self, longest: Longest, tokens: int) -> int:
        """Bytes at the peak of a pass of ``tokens`` tokens that is otherwise the longest one."""
        return self.step(tokens, longest.length, longest.logits)


def measure(model) -> Estimate:
    """Let a model take three small steps. It comes out as it was, and so do torch's random numbers.

    Raises:
        ValueError: if it pads these sequences to a length of its own; or what its code raises.
    """
    training = model.training
    model.train()  # as in the run: there may be dropout, and checkpointing is for training only
    try:
        sizes = (2, TOKENS), (3, TOKENS), (2, 2 * TOKENS)
        noted = [_small_step(model, *size) for size in sizes]
    finally:
        model.train(training)
    two, three, long = map(max, noted)
    if long - two < 1.5 * (three - two):  # twice the length should be at least two rows more
        raise ValueError(f"the model pads sequences of {TOKENS} tokens")
    if len(set(map(len, noted))) > 1:  # operations depend on the length (a mixture of experts)
        noted = [[max(each), each[-1]] for each in noted]
    first, second, third = torch.tensor(noted, dtype=torch.float64)  # (N,) each
    row, fixed = second - first, 3 * first - 2 * second  # the first step is fixed + 2 row
    b = ((third - fixed) / 2 - 2 * row).clamp(min=0) / (2 * TOKENS**2)
    adapter = sum(p.numel() for p in trainable(model))
    vocabulary = model.get_input_embeddings().num_embeddings
    return Estimate(torch.stack([fixed, row / TOKENS - b * TOKENS, b]), vocabulary, adapter)


# ---- what is free --------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still take on ``device``; None where nobody says.

    The files that it has mapped, such as weights, count as free on a CPU, but it needs them.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    mapped = getattr(psutil.Process().memory_info(), "shared", 0)
    return max(0, min([psutil.virtual_memory().available, *cgroups_leave()]) - mapped)


def free_for_each(accelerator, device: torch.device) -> int | None:
    """What is free for each process of a run, in bytes: the least of them, so that all agree.

    The processes of one machine share its memory; on GPUs each has its own.
    """
    accelerator.wait_for_everyone()  # until all models are loaded
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return least_of_all(free)


def least_of_all(size: int | None) -> int | None:
    """The least of the processes' sizes; None if one does not know its own."""
    every = gather_object([size])
    return None if None in every else min(every)


def total_bytes(device: torch.device) -> int | None:
    """The memory of a GPU, whatever is free of it; None for any other device."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def cgroups_leave(
    mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Yield what each limited cgroup (version 2) of this process leaves, in bytes.

    Its cached files are free: the kernel drops them first.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    for path in (line[3:] for line in lines if line.startswith("0::")):
        folder = mounted / path.strip("/")
        for group in (folder, *folder.parents):
            limit = group / "memory.max"
            if limit.is_file() and (text := limit.read_text().strip()) != "max":
                stat = dict(s.split() for s in (group / "memory.stat").read_text().splitlines())
                files = int(stat["active_file"]) + int(stat["inactive_file"])
                yield int(text) - int((group / "memory.current").read_text()) + files


def give_back_at_once() -> bool:
    """Let this process give blocks that it allocates from now on back to the system once freed.

    That is for blocks of AT_ONCE or more; otherwise glibc keeps those between others in use. False
    where there is no glibc.
    """
    set_option = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    return bool(set_option and set_option(threshold, AT_ONCE))


def most_held(device: torch.device) -> int:
    """Bytes that this process has held at most so far; on a GPU, what torch has allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass
class Longest:
    """The longest forward pass of a run: no other has more tokens or a longer sequence."""

    rows: int  # pairs
    sequences: int  # of a pair
    length: int  # tokens of a sequence
    logits: float  # share of the tokens whose logits are made
    limit: int | None = None  # --batch-tokens

    @property
    def row(self) -> int:
        """Tokens of a pair."""
        return self.sequences * self.length

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return max(self.row, min(self.limit or self.rows * self.row, self.rows * self.row))

    def __str__(self) -> str:
        passes = -(-self.rows // (self.tokens // self.row))
        counted = "one pass" if passes == 1 else f"at most {passes} passes"
        return f"a step of {self.rows} pairs in {counted} of up to {self.tokens:,} tokens"


# ---- the passes of a GPU -------------------------------------------------------------


def choose_passes(
    model, longest: Longest, checkpointing: bool, total: int
) -> tuple[int, bool] | None:
    """(tokens of a pass, gradient checkpointing) for a GPU with ``total`` bytes.

    The tokens are those of the whole step, a multiple of ROUND, or those of one pair. Checkpointing
    is switched on only if not even one pair fits without. What is free plays no part, so one
    machine always splits a step alike. None if nothing can be measured.
    """
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    room = room_on(total, weights)
    try:
        tokens = largest_pass(partial(measure(model).of, longest), longest, room)
        if not tokens and not checkpointing:
            checkpointing = True
            checkpoint_gradients(model)
            tokens = largest_pass(partial(measure(model).of, longest), longest, room)
    except Exception:  # prepare_memory says that nothing can be measured
        return None
    return tokens or longest.row, checkpointing


def prompts_at_once(model, max_length: int, total: int) -> int | None:
    """Judge prompts of ``max_length`` per forward pass in scoring, on a GPU with ``total`` bytes.

    At least one, at most SCORED_AT_MOST; None if nothing can be measured.
    """
    most = Longest(rows=SCORED_AT_MOST, sequences=1, length=max_length, logits=0.0)
    chosen = choose_passes(model, most, checkpointing=True, total=total)  # nothing to checkpoint
    return chosen and chosen[0] // max_length


def room_on(total: int, weights: int) -> float:
    """Bytes that a step may take beside the weights on an otherwise empty GPU."""
    return TIGHT * (total - CONTEXT - weights)


def largest_pass(step: Callable[[int], float], longest: Longest, room: float) -> int:
    """As :func:`most_tokens`: the whole step, a multiple of ROUND, or one pair."""
    tokens = most_tokens(step, longest, room)
    if tokens in (0, longest.tokens):
        return tokens
    return max(longest.row, tokens // ROUND * ROUND)


def most_tokens(step: Callable[[int], float], longest: Longest, room: float) -> int:
    """Most tokens of a pass that takes ``room`` bytes at most; 0 if not even one pair fits.

    ``step`` gives the bytes of a pass of so many tokens.
    """
    sizes = range(longest.row, longest.tokens + 1)
    fitting = bisect_right(sizes, room, key=step)
    return sizes[fitting - 1] if fitting else 0


# ---- the line before the first step --------------------------------------------------


def prepare_memory(model, longest: Longest, checkpointing: bool, free: int) -> str:
    """One line on what a step takes at most and what is free.

    Where a CPU would be short of memory, freed memory is given back at once from now on.

    Raises:
        UserError: if it takes more; names options that help, with their values.
    """
    try:
        estimate = measure(model)
    except Exception as error:  # no reason not to train
        return f"memory: not estimated: {last_line(error)}"
    need = estimate.of(longest, longest.tokens)
    room, note = TIGHT * free, ""
    if model.device.type == "cpu":
        note = f" (about {gib(SCATTERED * need)} with freed memory that the process keeps)"
        if SCATTERED * need > room and give_back_at_once():
            note = " (freed memory is given back at once, which takes more time)"
    line = f"memory: a step takes up to {gib(need)} beside the model{note}, {gib(free)} are free"
    if need <= room:
        return line
    if tokens := most_tokens(partial(estimate.of, longest), longest, room):
        size = gib(estimate.of(longest, tokens))
        helps = f"give --batch-tokens {tokens} ({size}), which trains the same"
    else:
        more = "" if checkpointing else "--gradient-checkpointing, "
        helps = (
            f"not even one pair of {longest.row} tokens fits; {more}a smaller --max-length, "
            "--lora-rank or --model, or --bits 4 helps"
        )
    if need <= free:
        return f"{line}, which is tight; {helps}"
    if os.environ.get(SKIP) == "0":
        return f"{line}, and it is tried all the same, as {SKIP}=0 wants; {helps}"
    raise UserError(f"{line}; {helps}; with {SKIP}=0 in the environment it is tried all the same")


def gib(size: float) -> str:
    """A size in GiB, a small one in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"

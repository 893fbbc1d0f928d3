"""How much memory a training step will take and how much is free, estimated before the first step.

No formula fits what the layers of all models keep for the backward pass. So the loaded model takes
three tiny steps, and after each operation the bytes of all tensors that exist are noted. With R
rows of T tokens each of these figures is c + a R T + b R T^2: adapters in half precision and
dequantised matrices are in c, activations in a, attention without a fused kernel in b. Three steps
give c, a and b, and the peak of the longest pass is the largest figure there. Added to it are

  logits         of stage 1, 12 bytes each, or 8 for as many as are made at once (chunked.py)
  the adapter's  gradients and Adam's two moments, 12 bytes for each number

If the operations of a model depend on the length (a mixture of experts, a scan), only the peaks of
the three steps are used. The estimate leaves out what a kernel takes within one operation, and the
judging of held-out pairs, which keeps nothing for a backward pass. It is between 90% and 120% of
what torch allocates (tests/wings/test_memory.py).

On a GPU the same estimate chooses the passes of a step, and how many prompts are scored at once.

glibc's malloc may take much more from the system than is allocated, because freed memory lies
scattered between what is kept: with glibc 2.36 up to 1.9 times as much, and 5 times with gradient
checkpointing. If that may not fit, blocks of 1 MiB and more are given back at once. Then the
estimate is what the system sees, but a step takes longer (1.8 times with SmolLM2-135M).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

GIB = 2**30
TIGHT = 0.8  # share of the free memory above which a run is warned of
CONTEXT = GIB  # of a GPU's memory, what CUDA takes for itself and the allocator loses
ROUND = 1024  # passes chosen for a GPU are a multiple of it, so that small differences change none
SCORED_AT_MOST = 32  # judge prompts of max_length per forward pass; more keep no GPU busier
TOKENS = {"cpu": 8, "cuda": 32}  # of a row of the tiny steps; GPU kernels round up to 32
SCATTERED = {False: 2.5, True: 6}  # by checkpointing: times as much as malloc may take at most
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
        for storage in _storages((out,)):
            address, size = storage._cdata, storage.nbytes()
            if address in self._known:
                continue
            # What shares the storage of an input that is not counted was there before.
            if any(storage._cdata == address for storage in _storages((args, kwargs))):
                continue
            self._known.add(address)
            self.bytes += size
            self.noted.append(self.bytes)
            weakref.finalize(storage, self._freed, address, size)
        return out

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


def _storages(values) -> Iterator:
    """The storages of all tensors in nested tuples, lists and dictionaries."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
        elif isinstance(value, (tuple, list)):
            yield from _storages(value)
        elif isinstance(value, dict):
            yield from _storages(value.values())


def _tiny_step(model, rows: int, length: int) -> tuple[list[int], int]:
    """Bytes that are held after each operation of a step, and how many the forward pass keeps.

    The gradients of the adapter are not among them. A frozen model has no backward pass, but keeps
    its keys and values, as in scoring. The model comes out as it was.
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
                    with half_precision(model):
                        loss = decoder(model)(input_ids=ids, use_cache=True).last_hidden_state
                kept = live.bytes
                if parameters and loss.requires_grad:  # not that of a head on a frozen model
                    loss.backward()
    finally:
        for p in parameters:
            p.grad = None
    return live.noted, kept


@dataclass
class Estimate:
    """What a training step takes beside the loaded model, from :func:`measure`."""

    noted: torch.Tensor  # (3, N): c, a and b after each of N operations of a step
    kept: torch.Tensor  # (3,): c, a and b of what the forward pass keeps
    vocabulary: int
    adapter: int  # its numbers

    def step(self, tokens: int, length: int, logits: float = 0.0) -> int:
        """Bytes at the peak of a pass of ``tokens`` tokens, padding included.

        ``length`` are the tokens of a sequence; the share ``logits`` of all gets logits (stage 1).
        """
        at = torch.tensor([1, tokens, tokens * length], dtype=torch.float64)
        logits = self.vocabulary * logits * tokens
        logits = 12 * logits if logits <= LOGITS_AT_ONCE else 8 * LOGITS_AT_ONCE
        peak = max(float((at @ self.noted).max()), float(at @ self.kept) + logits)
        return round(peak) + 12 * self.adapter


def measure(model, longest: int) -> Estimate:
    """Let a model take three tiny steps. It comes out as it was, and so do torch's random numbers.

    ``longest`` is the length of the longest sequence that it will get.
    """
    training, length = model.training, TOKENS.get(model.device.type, 32)
    model.train()  # as in the run: there may be dropout, and checkpointing is for training only
    try:
        while True:
            sizes = (2, length), (3, length), (2, 2 * length)
            noted, kept = zip(*(_tiny_step(model, *size) for size in sizes))
            alike = len(set(map(len, noted))) == 1
            # Some models pad every sequence to a length of their own. Then a longer one is tried.
            row, longer = kept[1] - kept[0], (kept[2] - 3 * kept[0] + 2 * kept[1]) / 2
            if longer >= 1.5 * row or 4 * length > longest:
                break
            length *= 2
    finally:
        model.train(training)
    head = model.get_input_embeddings().num_embeddings
    adapter = sum(p.numel() for p in trainable(model))
    figures = noted if alike else [[max(each)] for each in noted]
    return Estimate(_fit(figures, length), _fit(kept, length), head, adapter)


def _fit(figures, length: int) -> torch.Tensor:
    """c, a and b of the figures of the three tiny steps: (3, ...) -> (3, ...)."""
    two, three, long = torch.tensor(figures, dtype=torch.float64)
    row, fixed = three - two, 3 * two - 2 * three  # of `two`, fixed + 2 row
    b = ((long - fixed) / 2 - 2 * row).clamp(min=0) / (2 * length**2)
    return torch.stack([fixed, row / length - b * length, b])


def give_back_at_once() -> bool:
    """Let glibc's malloc give blocks of 1 MiB and more back as soon as they are free.

    Numbers stay the same, to the last bit. False where there is no such function.
    """
    M_MMAP_THRESHOLD = -3  # of malloc.h
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20))
    except (OSError, AttributeError, TypeError):
        return False


# ---- what is free --------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still take on ``device``; None where nobody says.

    On a CPU the smaller of what the system and the process's cgroups leave; less the files that the
    process has mapped, such as weights: they count as free there, but it needs them.
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
    """Yield what each limited cgroup (version 1 or 2) of this process leaves, in bytes.

    Its cached files are free: the kernel drops them first.
    """
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = mounted, ("memory.max", "memory.current", "")
        elif controllers == "memory":
            base = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = base / path.strip("/")  # within a container it may be there under no such name
        for group in (folder, *folder.parents):
            limit, used, prefix = group / names[0], group / names[1], names[2]
            if limit.is_file() and (text := limit.read_text().strip()) != "max":
                stat = dict(s.split() for s in (group / "memory.stat").read_text().splitlines())
                files = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                yield int(text) - int(used.read_text()) + files
            if group == base:
                break


@dataclass
class Longest:
    """The longest forward pass of a run: no other has more tokens or a longer sequence."""

    rows: int  # pairs
    sequences: int  # of a pair
    length: int  # tokens of a sequence
    logits: float  # share of the tokens whose logits are made
    limit: int | None = None  # --batch-tokens
    least: int = 1  # the smallest --max-length

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

    As many tokens as fit, at most the whole step; with checkpointing only if not even one pair fits
    without. What is free plays no part, so one machine always splits a step alike. None if nothing
    can be measured.
    """
    room = _room(model, total)
    try:
        tokens = largest_pass(_step(measure(model, longest.length), longest), longest, room)
        if not tokens and not checkpointing:
            checkpointing = True
            step = _step(_measure_checkpointed(model, longest.length), longest)
            tokens = largest_pass(step, longest, room)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # check_memory says that nothing can be measured
        return None
    return tokens or longest.row, checkpointing


def prompts_at_once(model, max_length: int, total: int) -> int | None:
    """Judge prompts of ``max_length`` per forward pass in scoring, on a GPU with ``total`` bytes.

    At least one, at most SCORED_AT_MOST; None if nothing can be measured.
    """
    most = Longest(rows=SCORED_AT_MOST, sequences=1, length=max_length, logits=0.0)
    chosen = choose_passes(model, most, checkpointing=True, total=total)  # nothing to checkpoint
    return chosen and chosen[0] // max_length


def largest_pass(step: Callable[[int], float], longest: Longest, room: float) -> int:
    """Most tokens of a pass that takes ``room`` bytes at most: the whole step, a multiple of ROUND,
    or one pair; 0 if not even one pair fits. ``step`` gives the bytes of a pass.
    """
    tokens = _most(step, longest, room)
    if tokens in (0, longest.tokens):
        return tokens
    return max(longest.row, tokens // ROUND * ROUND)


def room_on(total: int, weights: int) -> float:
    """Bytes that a step may take beside the weights on an otherwise empty GPU."""
    return TIGHT * (total - CONTEXT - weights)


def _room(model, total: int) -> float:
    held = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    storages = {storage.data_ptr(): storage.nbytes() for storage in held}
    return room_on(total, sum(storages.values()))


def _step(estimate: Estimate, longest: Longest) -> Callable[[int], int]:
    """Bytes of a pass of so many tokens."""
    return lambda tokens: estimate.step(tokens, longest.length, longest.logits)


def _most(step: Callable[[int], float], longest: Longest, room: float) -> int:
    sizes = range(longest.row, longest.tokens + 1)
    fitting = bisect_right(sizes, room, key=step)
    return sizes[fitting - 1] if fitting else 0


# ---- the line before the first step --------------------------------------------------


def check_memory(model, longest: Longest, checkpointing: bool, free: int) -> str:
    """One line on what a step takes at most and what is free.

    Raises:
        UserError: if it takes more; names options that help, with their values.
    """
    try:
        estimate = measure(model, longest.length)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no reason not to train
        return f"memory: not estimated: {last_line(error)}"
    need = estimate.step(longest.tokens, longest.length, longest.logits)
    line = f"memory: a step takes up to {gib(need)} beside the model, {gib(free)} are free"
    scattered = SCATTERED[checkpointing] * need
    if model.device.type == "cpu" and free < scattered and give_back_at_once():
        line += " (what is freed is given back at once, which takes up to twice the time)"
    if need <= TIGHT * free:
        return line
    helps = _what_helps(model, longest, estimate, checkpointing, TIGHT * free)
    if need <= free:
        return f"{line}, which is tight; {helps}"
    if os.environ.get(SKIP) == "0":
        return f"{line}, and it is tried all the same, as {SKIP}=0 wants; {helps}"
    raise UserError(f"{line}; {helps}; with {SKIP}=0 in the environment it is tried all the same")


def _what_helps(model, longest: Longest, estimate: Estimate, checkpointing: bool, room: float):
    """The options with which a step takes ``room`` bytes at most."""
    for option in ("",) if checkpointing else ("", "--gradient-checkpointing "):
        if option:
            estimate = _measure_checkpointed(model, longest.length)
        step = _step(estimate, longest)
        if tokens := _most(step, longest, room):
            size = "" if tokens == longest.tokens else f"--batch-tokens {tokens} "
            return f"give {option}{size}({gib(step(tokens))}), which trains the same"
    for length in range(longest.length - 1, longest.least - 1, -1):
        tokens = longest.sequences * length
        need = estimate.step(tokens, length, longest.logits)
        if need <= room:
            size = f"--batch-tokens {tokens} --max-length {length}"
            return (
                f"not even one pair of {longest.row} tokens fits; give {option}{size} ({gib(need)})"
            )
    return (
        "not even one short pair fits; a smaller --lora-rank, --bits 4 or a smaller --model helps"
    )


def _measure_checkpointed(model, length: int) -> Estimate:
    """:func:`measure` as with --gradient-checkpointing."""
    checkpoint_gradients(model)
    try:
        return measure(model, length)
    finally:
        model.gradient_checkpointing_disable()


def gib(size: float) -> str:
    """A size in GiB, a small one in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"

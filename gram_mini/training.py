"""What surrounds a training loop: processes, batches without end, optimiser. The loop itself stands in the scripts.

One optimiser step sees ``batch_size * grad_accum`` pairs in each of the processes that accelerate starts. Every process
draws the same pairs of a step, computes its share of them, a forward pass at a time, and gradients are added up at the
end. Each forward pass weighs by its share of the step, so neither accumulation nor processes change what is learned.
"""

from __future__ import annotations

import importlib.util
import math
import random
import signal
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from gram_mini.backbone import pick_device
from gram_mini.batches import EncodedPair, batch_order, split_by_tokens
from gram_mini.errors import UserError

warnings.filterwarnings("ignore", message=".*lr_scheduler.step.. before .optimizer.step")  # a first step may be skipped


def start_processes(device: str, report_to: str | None = None, folder=None) -> tuple[Accelerator, torch.device]:
    """The accelerator, which knows this process's place among those that ``accelerate launch`` started (or that it is
    the only one), and the device to compute on. ``report_to`` names a tracker that writes to ``folder``.

    Raises:
        UserError: for a device or a tracker that is not to be had.
    """
    place = pick_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if report_to and importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report-to {report_to}: is not installed; pip install {report_to}")
    accelerator = Accelerator(cpu=place.type == "cpu", log_with=report_to, project_dir=folder)
    return accelerator, place


def in_shares(accelerator: Accelerator, items: list, work) -> list:
    """``work(items)``, a list of as many results, with each process doing a share; every process gets all results."""
    n = accelerator.num_processes
    results = [None] * len(items)
    for rank, share in enumerate(gather_object([work(items[accelerator.process_index :: n])])):
        results[rank::n] = share
    return results


def number_of_steps(rows: int, rows_per_step: int, epochs: float, steps: int | None) -> int:
    """Optimiser steps: ``steps`` where given, else what ``epochs`` passes over ``rows`` pairs take."""
    return steps or max(1, math.ceil(epochs * math.ceil(rows / rows_per_step)))


def batches_forever(rows: list[EncodedPair], rows_per_step: int, seed: int, skip: int = 0):
    """Yield (rows, swaps) of one optimiser step, epoch after epoch, without the first ``skip`` of them.

    Each pair's responses change places with probability 1/2, anew each time.
    """
    rng = random.Random(seed)
    lengths = [row.length for row in rows]
    while True:
        for batch in batch_order(lengths, rows_per_step, rng):
            swaps = [rng.random() < 0.5 for _ in batch]
            if skip > 0:
                skip -= 1
            else:
                yield [rows[i] for i in batch], swaps


def forward_passes(
    rows: list[EncodedPair], swaps: list[bool], size: Callable, batch_size: int, tokens: int | None, accelerator: Accelerator
):
    """Yield (rows, swaps) of this process's share of a step, at most ``batch_size`` pairs and ``tokens`` tokens at a time.

    ``size`` of a row is how many tokens it takes.
    """
    mine = slice(accelerator.process_index, None, accelerator.num_processes)  # rows are sorted: equal work for all
    rows, swaps = rows[mine], swaps[mine]
    for some in split_by_tokens([size(row) for row in rows], tokens, most=batch_size):
        yield rows[some], swaps[some]


def optimizer_and_schedule(model, lr: float, steps: int):
    """AdamW on what is trainable; the rate rises over the first 5% of the steps, then falls to zero as a cosine."""
    warmup = math.ceil(0.05 * steps)

    def share_of_peak(step: int) -> float:  # steps count from 0; the first one moves already
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) if steps > warmup else 0.0

    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def trainable(model) -> list[torch.nn.Parameter]:
    """The parameters that are trained: the adapter's."""
    return [p for p in model.parameters() if p.requires_grad]


def add_up(accelerator: Accelerator, model, loss: torch.Tensor | float) -> float:
    """Add gradients and loss of a step up over the processes; returns the loss of the whole step."""
    if accelerator.num_processes > 1:
        for p in trainable(model):  # a process without a row in this step has no gradient
            p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
        loss = accelerator.reduce(torch.as_tensor(loss, dtype=torch.float32, device=accelerator.device), "sum")
    return float(loss)


def clip_gradients(model) -> float:
    """Clip the gradient of the adapter to norm 1; returns the norm it had."""
    return float(torch.nn.utils.clip_grad_norm_(trainable(model), 1.0))


class NonFinite:
    """Says whether a step can be taken, counts those that cannot, and gives up after ``limit`` of them in a row."""

    def __init__(self, limit: int, source: str, skipped: int = 0):
        self.limit, self.source, self.skipped, self.in_a_row = limit, source, skipped, 0

    def allows(self, loss: float, norm: float, rows: list[EncodedPair]) -> bool:
        """False where the loss or the gradient of a step on ``rows`` is infinite or not a number.

        Raises:
            UserError: if that happened ``limit`` times in a row; names the rows of the last time.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.limit} steps in a row had a loss or gradient that is not finite (loss {loss:.4g}, gradient norm "
                f"{norm:.4g}), the last one on rows {', '.join(map(str, sorted(row.row for row in rows)))} of {self.source}; "
                "lower --lr, or look at these rows"
            )
        return False


@contextmanager
def stopping_after_the_step(accelerator: Accelerator):
    """Ctrl-C and SIGTERM set the accelerator's trigger, so that the loop can save and stop; a second one stops at once."""
    before = {}

    def stop(number, frame):
        accelerator.set_trigger()
        accelerator.print("\nstopping after this step; once more stops at once, without saving")
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: a notebook server's worker, say
        pass
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)

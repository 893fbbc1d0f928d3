"""The batches of a run, the optimiser, clipping. The loops themselves stand in the scripts."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator

from gram_mini.batches import EncodedPair, batch_order

import torch

# It warns if the first step is skipped, which may happen here.
warnings.filterwarnings("ignore", message=".*lr_scheduler.step.. before .optimizer.step")


def draw_batches(
    rows: list[EncodedPair], rows_per_step: int, seed: int
) -> Iterator[list[EncodedPair]]:
    """Yield the rows of each optimiser step, epoch after epoch, without end.

    The responses of a pair change places with probability 1/2, drawn anew each time the pair is
    seen. So their order says nothing about which is better.
    """
    rng = random.Random(seed)
    lengths = [row.length for row in rows]
    while True:
        for batch in batch_order(lengths, rows_per_step, rng):
            yield [rows[i].swapped() if rng.random() < 0.5 else rows[i] for i in batch]


def number_of_steps(rows: int, rows_per_step: int, epochs: float, steps: int | None) -> int:
    """The number of optimiser steps: ``steps`` if given, else that of ``epochs`` over the rows."""
    return steps or max(1, math.ceil(epochs * math.ceil(rows / rows_per_step)))


def optimizer_and_schedule(model, lr: float, steps: int, own: dict[str, float] | None = None):
    """AdamW on what is trainable; the rate warms up over 5% of the steps and falls as a cosine.

    ``own`` gives parameters a rate of their own, by their names.
    """
    warmup = math.ceil(0.05 * steps)

    def fraction_of_peak(step: int) -> float:  # steps count from 0; the first one moves already
        if step < warmup:
            return (step + 1) / warmup
        return (
            0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            if steps > warmup
            else 0.0
        )

    others = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [others.pop(name)], "lr": rate} for name, rate in (own or {}).items()]
    groups.insert(0, {"params": list(others.values())})  # the adapter's
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, fraction_of_peak)


def trainable(model) -> list[torch.nn.Parameter]:
    """The parameters that are trained: the adapter's."""
    return [p for p in model.parameters() if p.requires_grad]


def clip_gradients(model) -> float:
    """Clip the gradient of the adapter to norm 1; returns the norm it had."""
    return float(torch.nn.utils.clip_grad_norm_(trainable(model), 1.0))

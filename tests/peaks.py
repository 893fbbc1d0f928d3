"""The peak memory of a training step, for the tests that hold the estimate against it."""

from functools import partial

from gram_mini.runs.models import checkpoint_gradients
from gram_mini.studies.speed.common import build, loss_of, peak_bytes, take_step
from gram_mini.training import optimizer_and_schedule

import torch


def built_fused(config, bits: int, rank: int, device=torch.device("cpu")):
    """An adapted model whose attention keeps no T x T matrix on a CPU either, as on a GPU."""
    model = build(config, bits, rank, device)
    model.get_base_model().set_attn_implementation("sdpa")
    return model


def measured_peak(model, stage: str, checkpointing: bool, rows) -> int:
    """Bytes of a second step; Adam's moments are made in the first."""
    model.zero_grad()
    model.train()
    if checkpointing:
        checkpoint_gradients(model)
    else:
        model.gradient_checkpointing_disable()
    optimizer, _ = optimizer_and_schedule(model, 1e-4, 2)
    step = partial(take_step, model, optimizer, loss_of, stage)
    step(rows)
    return peak_bytes(model, optimizer, step, rows)

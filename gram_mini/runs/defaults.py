"""Defaults that depend on the model: those of the village's backbone, and those of any other.

The village's were chosen on its seed 0. The rates of other models were chosen on SmolLM2-135M, seed
0: that of stage 2 by accuracy, that of stage 1 by its own loss. This loss is still lower at twice
the rate, but not all judges were trained from there. The batches were not searched; they are what a
laptop holds.
"""

from __future__ import annotations

from gram_mini.village import VILLAGE

MAX_LENGTH = (512, 1024)  # tokens per sequence, in training and for a judge that was not trained
BATCHES = {
    "batch_size": (64, 16),  # pairs
    "batch_tokens": (None, 1024),  # what a laptop or a small card holds, padding included
    "max_length": MAX_LENGTH,
}
# option: (for the village's backbone, for any other)
DEFAULTS = {
    "pretrain": {"lr": (3e-3, 1e-3), **BATCHES},
    "reward": {"lr": (3e-4, 1e-3), **BATCHES},
}
SCORED = (32, 8)  # judge prompts of max_length per forward pass
REQUESTS = 32  # to a server at a time


def for_model(values: tuple, model: str):
    """Of (the village's, any other's) the value for this model."""
    return values[model != VILLAGE]


def choose(args, stage: str) -> None:
    """Give each option of ``args`` that was left out the default of this stage and model."""
    for name, values in DEFAULTS[stage].items():
        if getattr(args, name) is None:
            setattr(args, name, for_model(values, args.model))


def both(name: str, stage: str) -> str:
    """Both defaults of an option, as its help shows them."""
    return shown(DEFAULTS[stage][name])


def shown(values: tuple) -> str:
    """The village's value and any other's, as a help shows them."""
    village, other = ("no limit" if value is None else f"{value:g}" for value in values)
    return f"(default: {village} for the village's backbone, {other} for any other model)"

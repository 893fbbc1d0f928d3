"""Defaults that depend on the model: those of the village's backbone, and those of any other.

The village's were chosen on its seed 0. For other models the rate follows from the width, by a rule
that was published for LoRA:

    rate = 5e-5 x 10 x (2000 / hidden size)^p,    p = 0.781 for Llama's family, 0.0775 for Qwen's

Source: Thinking Machines' tinker cookbook, after "LoRA Without Regret", 2025. We take p = 0.781 for
all models. In a search of our own, on SmolLM2-135M of width 576 and seed 0, 1e-3 was best for stage
2 and for a scalar head. The loss of stage 1 was still lower at 2e-3, but we took 1e-3 there, too.
The rule gives 1.3e-3, and with the other p 5.5e-4; at 5e-4 the judges were less accurate. So this
width keeps 1e-3, and all others are extrapolated. So is the adapter's scale: the rule was made with
alpha = 32, and ours is twice the rank. The batches were not searched.

At the village's width of 128 the rule gives 4.3e-3, which does nearly as well in stage 1. Stage
2 has far less, since from 1e-3 on it learns the village's trap, that right answers ramble
(CHANGELOG.md, 0.4.0).
"""

from __future__ import annotations

from gram_mini.village import VILLAGE

MAX_LENGTH = (512, 1024)  # tokens per sequence, in training and for a judge that was not trained
BATCHES = {
    "batch_size": (64, 16),  # pairs
    "batch_tokens": (None, 1024),  # on a CPU, padding included; runs/memory.py chooses for a GPU
    "max_length": MAX_LENGTH,
}
# option: (for the village's backbone, for any other); a rate of None is that of the width
DEFAULTS = {
    "pretrain": {"lr": (3e-3, None), **BATCHES},
    "reward": {"lr": (3e-4, None), **BATCHES},
}
SCALAR = (1e-3, None)  # the rate of a scalar head and the adapter under it
FROZEN = {"scalar": 0.1, "labels": 0.01}  # of a head alone, for any model; chosen on the village
SEARCHED = {576: 1e-3}  # width: rate; SmolLM2-135M
RULE = "5e-4 x (2000 / {})^0.78"
SCORED = (32, 8)  # judge prompts of max_length per forward pass
REQUESTS = 32  # to a server at a time


def for_model(values: tuple, model: str):
    """Of (the village's, any other's) the value for this model."""
    return values[model != VILLAGE]


def choose(args, stage: str) -> None:
    """Give batch size and length, if left out, the default of this stage and model.

    Rate and passes are chosen when the model is loaded.
    """
    for name in ("batch_size", "max_length"):
        if getattr(args, name) is None:
            setattr(args, name, for_model(DEFAULTS[stage][name], args.model))


def choose_rate(args, stage: str, width: int) -> str:
    """Give ``args.lr``, if left out, its default; returns a line that says where it comes from.

    ``width`` is the model's hidden size.
    """
    head, why = getattr(args, "head", ""), "as given"
    if args.lr is None and getattr(args, "freeze", False):
        args.lr, why = FROZEN[head], f"the one of a frozen model's {head} head, from the village"
    elif args.lr is None:
        values = SCALAR if head == "scalar" else DEFAULTS[stage]["lr"]
        args.lr, why = for_model(values, args.model), "chosen on the village"
    if args.lr is None:
        args.lr = rate_of_width(width)
        rule = f"{RULE.format(width)}, a published rule for LoRA"
        where = "searched on SmolLM2-135M" if width in SEARCHED else rule
        why = f"{where}, for a hidden size of {width:,}"
    return f"rate {args.lr:.1e}: {why} (--lr)"


def rate_of_width(width: int) -> float:
    """The peak rate for a model of this hidden size: the one searched for, or the rule's in two
    digits.
    """
    return SEARCHED.get(width) or float(f"{5e-4 * (2000 / width) ** 0.781:.1e}")


def both(name: str, stage: str) -> str:
    """Both defaults of an option, as its help shows them."""
    village, other = DEFAULTS[stage][name]
    return f"(default: {village} for the village's backbone, {other} for any other model)"


def shown_rate(rates: tuple) -> str:
    """Both defaults of a rate, as the help shows them."""
    rule = f"{RULE.format('hidden size')} for any other model, a published rule for LoRA"
    searched = ", ".join(f"{rate:g} at {width}, by a search" for width, rate in SEARCHED.items())
    return f"(default: {rates[0]:g} for the village's backbone, {rule}; {searched})"


def shown_rates_of_heads() -> str:
    """The same of the baselines."""
    alone = ", ".join(f"{rate:g} for {head}" for head, rate in FROZEN.items())
    return f"{shown_rate(SCALAR)}; with --freeze {alone}"

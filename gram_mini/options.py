"""The command-line options that the scripts share, so that a word means the same everywhere."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gram_mini.backbone import EMBEDDED

# Training options that change nothing in what is learned.
WITHOUT_EFFECT = (
    "out", "overwrite", "resume", "save_every", "log_every", "report_to", "device", "skip_limit", "gradient_checkpointing",
    "batch_tokens",
)  # fmt: skip


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help opens with commands to copy and shows every default."""
    return argparse.ArgumentParser(
        usage=f"\n{examples}",
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action):
        # Every default, but not "(default: None)" or that a switch is off; a computed default stands in the help text.
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def add_training_options(
    p: argparse.ArgumentParser, out: str, lr: float, epochs: float, held_out: float, lora_rank: int | None, data_help: str
) -> None:
    """Options of both stages; ``out`` to ``lora_rank`` are the stage's defaults."""
    g = p.add_argument_group("what to train on what")
    g.add_argument("--model", default=EMBEDDED, metavar="NAME", help="backbone: hub name or folder, or 'embedded'")
    g.add_argument("--data", default="world", metavar="SOURCE", help=data_help)
    add_reading_options(g)
    g.add_argument("--held-out", type=share, default=held_out, metavar="SHARE", help="share of the prompts kept for evaluation")
    g = p.add_argument_group("where to put it")
    g.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER", help="run folder to write")
    g.add_argument("--overwrite", action="store_true", help="replace a run that is already there, once the new one is done")
    g.add_argument("--save-every", type=positive_int, default=100, metavar="N", help="steps between checkpoints to resume from")
    g.add_argument("--resume", action="store_true", help="go on with the unfinished run of --out; give the same options again")
    g.add_argument("--log-every", type=positive_int, default=20, metavar="N", help="steps per line of log.csv")
    g.add_argument(
        "--report-to", choices=("tensorboard", "wandb"), help="a tracker that gets what log.csv gets (default: log.csv alone)"
    )
    g = p.add_argument_group("optimisation")
    g.add_argument(
        "--lr", type=positive_float, default=lr, help="peak learning rate (warmed up over 5%% of the steps, then cosine)"
    )
    g.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="pairs per forward pass and process")
    g.add_argument(
        "--batch-tokens", type=positive_int, metavar="N",
        help="at most so many tokens in a forward pass, padding included: long pairs go through in smaller batches, and an "
        "optimiser step is what it was (default: no limit but --batch-size)",
    )  # fmt: skip
    g.add_argument("--grad-accum", type=positive_int, default=1, metavar="N", help="forward passes per optimiser step")
    duration = g.add_mutually_exclusive_group()
    duration.add_argument("--epochs", type=positive_float, default=epochs, help="passes over the data")
    duration.add_argument("--steps", type=positive_int, metavar="N", help="optimiser steps, in the place of --epochs")
    g.add_argument("--seed", type=seed, default=0, help="draws the adapter, the order of rows and responses, the world's pairs")
    g.add_argument(
        "--skip-limit", type=positive_int, default=5, metavar="N",
        help="stop after N steps in a row whose loss or gradient is not finite; such steps are skipped and counted",
    )  # fmt: skip
    g = p.add_argument_group("model")
    g.add_argument(
        "--lora-rank", type=positive_int, metavar="R", default=lora_rank,
        help="rank of the LoRA adapter" + ("" if lora_rank else " (default: that of --init, else 32)"),
    )  # fmt: skip
    g.add_argument(
        "--gradient-checkpointing", action="store_true",
        help="compute activations twice to keep fewer of them: less memory, up to half more time",
    )  # fmt: skip
    add_model_options(g, bits_default=4, max_length_default=512)


def add_reading_options(group) -> None:
    """Options of everything that reads pairs by load_pairs."""
    group.add_argument("--split", default="train", help="split of a hub data set")
    group.add_argument("--subset", metavar="NAME", help="configuration of a hub data set (default: its default)")
    group.add_argument("--limit", type=positive_int, metavar="N", help="use the first N rows only (default: all)")
    group.add_argument(
        "--streaming", action="store_true",
        help="download no more rows of a hub data set than --limit needs (default: all of them, once)",
    )  # fmt: skip
    group.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error", help="what to do with a row that cannot be read"
    )
    group.add_argument(
        "--pairs", choices=("all", "best-worst"), default="all", help="which pairs of a row with several scored responses"
    )


def reading(args) -> dict:
    """What add_reading_options added, as arguments of load_pairs."""
    return {name: getattr(args, name) for name in ("split", "subset", "limit", "streaming", "on_bad_row", "pairs")}


def add_model_options(group, bits_default: int | None, max_length_default: int | None) -> None:
    """Options of everything that loads a model; None stands for 'as in training'."""
    group.add_argument(
        "--bits", type=int, choices=(4, 16, 32), default=bits_default,
        help="4: NF4 weights (QLoRA); 16: bf16; 32: float32" + ("" if bits_default else " (default: as in training, else 4)"),
    )  # fmt: skip
    group.add_argument(
        "--max-length", type=positive_int, default=max_length_default, metavar="N",
        help="tokens per sequence; longer texts are cut, prompt first, then both responses by the same share"
        + ("" if max_length_default else " (default: as in training, else 512)"),
    )  # fmt: skip
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes the GPU where there is one")


def add_judge_template(group, default: str) -> None:
    """The option for another judge prompt; ``default`` says which one is meant without it."""
    group.add_argument(
        "--judge-template", type=Path, metavar="FILE",
        help="text file of a judge prompt that holds {prompt}, {response_a} and {response_b}, once each and in this order "
        f"(default: {default})",
    )  # fmt: skip


def positive_int(text: str) -> int:
    """argparse type: a whole number above 0."""
    return _number(text, int, lambda v: v > 0, "a whole number above 0")


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _number(text, float, lambda v: 0 < v < math.inf, "a number above 0")


def seed(text: str) -> int:
    """argparse type: a seed, 0 to 2**32 - 1."""
    return _number(text, int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1")


def share(text: str) -> float:
    """argparse type: a share, 0 <= share < 1."""
    return _number(text, float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def weight(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    return _number(text, float, lambda v: 0 <= v < math.inf, "a number of at least 0")


def smoothing(text: str) -> float:
    """argparse type: our eps, 0 <= eps < 1/2."""
    return _number(text, float, lambda v: 0 <= v < 0.5, "a number of at least 0 and below 0.5")


def _number(text, kind, allowed, wanted):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value

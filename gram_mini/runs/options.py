"""The command-line options of all scripts, so that a name means the same everywhere.

The exception is --batch-size: pairs of an optimiser step in training, judge prompts of a forward
pass in scoring, and requests at a time with --server.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gram_mini.errors import UserError
from gram_mini.reading.columns import given_columns
from gram_mini.reading.usable import is_blank
from gram_mini.runs import defaults
from gram_mini.runs.partial import check_partial
from gram_mini.runs.ranking import METHODS
from gram_mini.runs.report import say
from gram_mini.village import VILLAGE

PRETRAIN_EXAMPLES = """\
  python train_pretrain.py                         # the village, 2 minutes on 2 CPU cores
  python train_pretrain.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --out runs/mine/pretrain"""

REWARD_EXAMPLES = """\
  python train_reward.py --init runs/pretrain      # the village, 40 seconds on 2 CPU cores
  python train_reward.py --model Qwen/Qwen3-0.6B --data labels.jsonl --both-orders 1 \\
      --init runs/mine/pretrain --out runs/mine/reward
  python train_reward.py --init runs/reward --data new.jsonl --out runs/adapted  # go on"""

SCORE_EXAMPLES = """\
  python score.py --data pairs.jsonl --out scores.jsonl
  python score.py --prompt "What does Bella eat?" \\
      --response "Bella eats apples." --response "Bella eats cake.\""""

DEFAULT_JUDGE = "runs/reward"  # the model of score.py
LIKELIHOODS = ("sum", "per-token", "over-backbone")  # of gram_mini/runs/likelihood.py

# Training options that do not change what is learned.
WITHOUT_EFFECT = (
    "out",
    "overwrite",
    "resume",
    "save_every",
    "log_every",
    "device",
    "gradient_checkpointing",
    "batch_tokens",
)


# ---- types ---------------------------------------------------------------------------


def checked(kind: Callable[[str], Any], allowed: Callable[[Any], bool], wanted: str):
    """An argparse type: a text that ``kind`` reads as a value that is ``allowed``."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return read


positive_int = checked(int, lambda v: v > 0, "a whole number above 0")
positive_float = checked(float, lambda v: 0 < v < math.inf, "a number above 0")
seed = checked(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1")
fraction = checked(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
weight = checked(float, lambda v: 0 <= v < math.inf, "a number of at least 0")
weight_up_to_one = checked(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
smoothing = checked(float, lambda v: 0 <= v < 0.5, "a number of at least 0 and below 0.5")
# An empty address would mean that the judge is computed here.
address = checked(str, lambda v: v.strip() != "", "an address such as http://127.0.0.1:8000")


# ---- the three scripts ---------------------------------------------------------------


def pretrain_options(description: str, argv=None) -> argparse.Namespace:
    """The options of train_pretrain.py."""
    p = parser(description, PRETRAIN_EXAMPLES)
    add_training_options(p, "pretrain", "runs/pretrain")
    args = p.parse_args(argv)
    defaults.choose(args, "pretrain")
    return args


def reward_options(description: str, argv=None) -> argparse.Namespace:
    """The options of train_reward.py."""
    p = parser(description, REWARD_EXAMPLES)
    add_reward_options(p, "runs/reward")
    add_both_orders(p.add_argument_group("ours, not the paper's"))
    args = p.parse_args(argv)
    defaults.choose(args, "reward")
    return args


def score_options(description: str, argv=None) -> argparse.Namespace:
    """The options of score.py.

    Raises:
        UserError: for an output that cannot be written, or a judge that has not been trained.
    """
    p = parser(description, SCORE_EXAMPLES)
    group = p.add_argument_group("what to score")
    add = group.add_argument
    add("--prompt", metavar="TEXT", help="the prompt that the responses answer")
    text = "a response; give it once for each"
    add("--response", action="append", default=[], metavar="TEXT", help=text)
    text = "reference response: each response gets P(better than it) as reward"
    add("--reference", metavar="TEXT", help=text)
    text = "score the rows of a file, folder or hub data set instead"
    add("--data", metavar="SOURCE", help=text)
    add_reading_options(group)
    text = "file to write the scores of --data to, a line for each pair or ranking"
    add("--out", type=Path, metavar="FILE.jsonl", help=text)
    add("--overwrite", action="store_true", help="replace a file that is already there")
    text = "go on with the unfinished file of --out; give the same options again"
    add("--resume", action="store_true", help=text)
    group = p.add_argument_group("how")
    add = group.add_argument
    text = "run folder, model folder, GGUF file, hub name, or 'village'"
    add("--model", default=DEFAULT_JUDGE, metavar="NAME", help=text)
    text = "how to rank (default: by the reference if there is one, else round-robin)"
    add("--rank", choices=METHODS, help=text)
    add(
        "--likelihood",
        choices=LIKELIHOODS,
        help="of a stage-1 run: ask which response it finds likelier, instead of for a verdict; by "
        "the log-probability of the whole response, its mean over the tokens, or what it is beyond "
        "that of the backbone (default: the verdict)",
    )
    add(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="judge prompts of --max-length per forward pass, or as many tokens of shorter ones "
        f"(default: on a GPU what its memory admits; elsewhere {defaults.SCORED[0]} for the "
        f"village's backbone, {defaults.SCORED[1]} for any other); with --server requests at a "
        f"time (default: {defaults.REQUESTS})",
    )
    add_model_options(group)
    add_server(group)
    add_judge_template(group)
    args = p.parse_args(argv)
    _check_scoring(p, args)
    if args.model == DEFAULT_JUDGE and not Path(args.model).is_dir():
        how = "run train_reward.py, or give --model (runs/demo/reward after make demo)"
        raise UserError(f"{args.model}: not trained yet; {how}")
    return args


def _check_scoring(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check that the options go together, which is a usage error, and that --out can be written."""
    if (args.data is not None) == (args.prompt is not None or bool(args.response)):
        p.error("give either --prompt with --response, or --data with --out")
    if args.served_name and not args.server:
        p.error("--served-name goes with --server")
    if args.server and (args.bits or args.device != "auto"):
        p.error("--bits and --device do not go with --server, which has its own")
    if args.likelihood and (args.server or args.judge_template):
        p.error("--likelihood goes with neither --server nor --judge-template; it asks no judge")
    if args.likelihood and args.reference is not None:
        p.error(
            "--likelihood ranks by nats, so P(better than a reference) says little; leave out "
            "--reference"
        )
    if args.reference is not None and args.rank:
        p.error(f"--reference does not go with --rank {args.rank}")
    given_columns(args.columns, args.labels)
    if args.data == VILLAGE:
        how = "python -m gram_mini.studies.village_table judges its test sets"
        raise UserError(f"--data village: is for training; {how}")
    if args.data is not None:
        if args.out is None or args.out.suffix != ".jsonl":
            p.error("--data needs --out FILE.jsonl, which gets a line for each pair or ranking")
        data, out = args.data, args.out
        if os.path.exists(data) and any(
            os.path.samefile(data, x) for x in (out, out.parent) if x.exists()
        ):
            p.error(f"--out {out}: is --data or stands in its folder; give another place")
        check_partial(args.out, args.overwrite, args.resume)
        return
    for name in ("out", "overwrite", "resume", *READING):
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} goes with --data")
    texts = args.prompt, args.reference, *args.response
    if not args.prompt or not args.response:
        p.error("give --prompt and at least one --response")
    if len(args.response) == 1 and args.reference is None:
        p.error("one response alone cannot be compared; give another --response or a --reference")
    if any(text is not None and is_blank(text) for text in texts):
        say("an empty text is judged as any other")


# ---- groups of options ---------------------------------------------------------------


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help begins with commands to copy and shows every default."""
    return argparse.ArgumentParser(
        usage=f"\n{examples}",
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # Show every default except None, False and []. Their help texts name a computed default.
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


def add_training_options(p: argparse.ArgumentParser, stage: str, out: str, rates: str = "") -> None:
    """Options of both stages. Their defaults are None where defaults.choose gives them.

    ``out`` is the default of --out. ``rates`` says what that of --lr is, if not the stage's.
    """
    group = p.add_argument_group("what to train on what")
    add = group.add_argument
    text = "backbone: hub name, folder or GGUF file, or 'village'"
    add("--model", default=VILLAGE, metavar="NAME", help=text)
    kind = "pairs of responses" if stage == "pretrain" else "labelled pairs"
    text = f"{kind}: file, folder, hub name, or 'village'"
    add("--data", default=VILLAGE, metavar="SOURCE", help=text)
    add_reading_options(group)
    text = "fraction of the prompts kept for evaluation"
    held_out = 0.0 if stage == "pretrain" else 0.05
    add("--held-out", type=fraction, default=held_out, metavar="FRACTION", help=text)

    add = p.add_argument_group("where to put it").add_argument
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help="run folder to write")
    text = "replace a run that is already there, once the new one is done"
    add("--overwrite", action="store_true", help=text)
    text = "steps between checkpoints to resume from"
    add("--save-every", type=positive_int, default=100, metavar="N", help=text)
    text = "go on with the unfinished run of --out; give the same options again"
    add("--resume", action="store_true", help=text)
    add("--log-every", type=positive_int, default=20, metavar="N", help="steps per line of log.csv")

    group = p.add_argument_group("optimisation")
    add = group.add_argument
    rates = rates or defaults.shown_rate(defaults.DEFAULTS[stage]["lr"])
    text = f"peak learning rate, warmed up over 5%% of the steps, then cosine {rates}"
    add("--lr", type=positive_float, help=text)
    text = "pairs in an optimiser step, in each process " + defaults.both("batch_size", stage)
    add("--batch-size", type=positive_int, metavar="N", help=text)
    add(
        "--batch-tokens",
        type=positive_int,
        metavar="N",
        help="at most N tokens in a forward pass, padding included: a step takes several passes, "
        "and learns the same (default: on a GPU what its memory admits, with "
        "--gradient-checkpointing if not even one pair fits without; elsewhere no limit for the "
        f"village's backbone, {defaults.BATCHES['batch_tokens'][1]} for any other model)",
    )
    add = group.add_mutually_exclusive_group().add_argument
    add("--epochs", type=positive_float, default=1, help="passes over the data")
    add("--steps", type=positive_int, metavar="N", help="optimiser steps, instead of --epochs")
    text = "draws the adapter, the order of rows and responses, the village's pairs"
    group.add_argument("--seed", type=seed, default=0, help=text)

    group = p.add_argument_group("model")
    add = group.add_argument
    text = "rank of the LoRA adapter (default: 32, or that of --init)"
    add("--lora-rank", type=positive_int, metavar="R", help=text)
    text = "compute activations twice to keep fewer of them: less memory, up to half more time"
    add("--gradient-checkpointing", action="store_true", help=text)
    add_model_options(group, bits_default=4, length_default=defaults.both("max_length", stage))


def add_reward_options(p: argparse.ArgumentParser, out: str, rates: str = "") -> None:
    """Options of stage 2 and of the baselines."""
    add_training_options(p, "reward", out, rates)
    group = p.add_argument_group("stage 2")
    add = group.add_argument
    text = "run to start from, usually of stage 1 (default: the plain backbone)"
    add("--init", type=Path, metavar="RUN", help=text)
    text = (
        "eps of the loss above, 0 <= eps < 0.5; half of torch's label_smoothing: 0.05 is the "
        "official 0.1 there"
    )
    add("--label-smoothing", type=smoothing, default=0.05, metavar="EPS", help=text)
    add_judge_template(group)


def add_both_orders(group) -> None:
    """The weight of our loss on both orders of a pair."""
    group.add_argument(
        "--both-orders",
        type=weight_up_to_one,
        default=0.0,
        metavar="C",
        help="show each pair in both orders, with one loss on the mean of the two margins (step 8 "
        "of gram_mini/losses.py): its weight falls from C to nearly 0, and the paper's "
        "loss has the rest; 0 is the paper's way",
    )


# The options of add_reading_options, which are arguments of load_pairs.
READING = (
    "split",
    "subset",
    "limit",
    "streaming",
    "on_bad_row",
    "pairs",
    "pairs_per_prompt",
    "columns",
    "labels",
)


def add_reading_options(group) -> None:
    """Options of every command that reads pairs."""
    add = group.add_argument
    text = "split of a folder with several, or of a hub data set (there the default is train)"
    add("--split", metavar="NAME", help=text)
    text = "configuration of a hub data set (default: its default)"
    add("--subset", metavar="NAME", help=text)
    text = "use the first N rows only (default: all)"
    add("--limit", type=positive_int, metavar="N", help=text)
    text = "download only the rows of a hub data set that --limit needs (default: all, once)"
    add("--streaming", action="store_true", help=text)
    text = "what to do with a row that cannot be read"
    add("--on-bad-row", choices=("error", "skip"), default="error", help=text)
    text = "which pairs of a row with several scored responses"
    add("--pairs", choices=("all", "best-worst"), default="all", help=text)
    text = "draw at most K pairs of several responses to one prompt (default: all)"
    add("--pairs-per-prompt", type=positive_int, metavar="K", help=text)
    text = (
        "which columns hold what, for a table of no known format: prompt=instruction+input, with "
        "chosen= and rejected=, or a= and b= and perhaps label=, or response= and perhaps score= "
        "(default: known by their names)"
    )
    add("--columns", metavar="TARGET=COLUMN,...", help=text)
    text = "values of label= in --columns, as in a=1,b=2,tie=0 (default: A, B and tie)"
    add("--labels", metavar="VERDICT=VALUE,...", help=text)


def reading_options(args) -> dict:
    """The options of add_reading_options, as arguments of load_pairs."""
    return {name: getattr(args, name) for name in READING}


def add_model_options(
    group,
    bits_default: int | None = None,
    max_length_default: int | None = None,
    length_default: str = "(default: as in training, else 512 for the village's backbone and 1024 "
    "for any other model)",
) -> None:
    """Options of every command that loads a model; a default of None means 'as in training'.

    ``length_default`` says in words what None means for --max-length.
    """
    add = group.add_argument
    text = "4: NF4 weights (QLoRA); 16: bf16, or what the device has instead; 32: float32"
    text += "" if bits_default else " (default: as in training, else 4)"
    add("--bits", type=int, choices=(4, 16, 32), default=bits_default, help=text)
    text = "tokens per sequence; longer texts are cut, prompt first, then both responses by the "
    text += "same share" if max_length_default else f"same share {length_default}"
    add("--max-length", type=positive_int, default=max_length_default, metavar="N", help=text)
    text = "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    add("--device", default="auto", help=text)


def add_server(group) -> None:
    """Options of every command that may have its judge computed by a server."""
    text = (
        "a server that computes the judge, such as http://127.0.0.1:8000; --model then gives only "
        "tokenizer and prompt (default: it is computed here)"
    )
    group.add_argument("--server", type=address, metavar="URL", help=text)
    text = "name of the judge there (default: the only one)"
    group.add_argument("--served-name", metavar="NAME", help=text)


def add_judge_template(group) -> None:
    """The option for another judge prompt."""
    text = (
        "text file of a judge prompt that holds {prompt}, {response_a} and {response_b}, once "
        "each and in this order (default: that of the run, else one of the two in "
        "gram_mini/prompts.py)"
    )
    group.add_argument("--judge-template", type=Path, metavar="FILE", help=text)


def as_record(args: argparse.Namespace) -> dict:
    """The options as run.json keeps them."""
    given = vars(args).items()
    return {name: str(value) if isinstance(value, Path) else value for name, value in given}

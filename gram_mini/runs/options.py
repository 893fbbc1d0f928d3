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

from gram_mini.errors import UserError
from gram_mini.judge import AVERAGES
from gram_mini.reading.columns import Columns, check_columns
from gram_mini.reading.usable import is_blank
from gram_mini.runs import defaults
from gram_mini.runs.output import check_output
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
  python train_reward.py --init runs/reward --data new.jsonl --lr 3e-4 --epochs 4 \\
      --batch-size 32 --held-out 0 --out runs/adapted      # go on with a few new labels"""

SCORE_EXAMPLES = """\
  python score.py --data pairs.jsonl --out scores.jsonl
  python score.py --prompt "What does Bella eat?" \\
      --response "Bella eats apples." --response "Bella eats cake.\""""

DEFAULT_JUDGE = "runs/reward"  # the model of score.py

# Training options that do not change what is learned.
WITHOUT_EFFECT = (
    "out",
    "overwrite",
    "resume",
    "save_every",
    "log_every",
    "report_to",
    "device",
    "skip_limit",
    "gradient_checkpointing",
    "batch_tokens",
)


# ---- the three scripts ---------------------------------------------------------------


def pretrain_options(description: str, argv=None) -> argparse.Namespace:
    """The options of train_pretrain.py."""
    p = parser(description, PRETRAIN_EXAMPLES)
    add_training_options(
        p,
        stage="pretrain",
        out="runs/pretrain",
        epochs=1,
        held_out=0.0,
        lora_rank=32,
        data_help="pairs of responses: file, folder, hub name, or 'village'",
    )
    args = p.parse_args(argv)
    defaults.choose(args, "pretrain")
    return args


def reward_options(description: str, argv=None) -> argparse.Namespace:
    """The options of train_reward.py."""
    p = parser(description, REWARD_EXAMPLES)
    add_reward_options(p, out="runs/reward")
    add_both_orders(p.add_argument_group("ours, not the paper's"))
    args = p.parse_args(argv)
    defaults.choose(args, "reward")
    return args


def add_both_orders(group) -> None:
    """The weight of our loss on both orders of a pair."""
    group.add_argument(
        "--both-orders",
        type=weight_up_to_one,
        default=0.0,
        metavar="C",
        help="show each pair in both orders, with one loss on the mean of the two margins (step 8 "
        "of gram_mini/losses.py): its weight falls from C to nearly 0, and the plain "
        "loss has the rest; 0 is the paper's way",
    )


def score_options(description: str, argv=None) -> argparse.Namespace:
    """The options of score.py.

    Raises:
        UserError: for an output that cannot be written, or a judge that has not been trained.
    """
    p = parser(description, SCORE_EXAMPLES)
    g = p.add_argument_group("what to score")
    g.add_argument("--prompt", metavar="TEXT", help="the prompt that the responses answer")
    g.add_argument(
        "--response",
        action="append",
        default=[],
        metavar="TEXT",
        help="a response; give it once for each",
    )
    g.add_argument(
        "--reference",
        metavar="TEXT",
        help="reference response: each response gets P(better than it) as reward",
    )
    g.add_argument(
        "--data",
        metavar="SOURCE",
        help="score the rows of a file, folder or hub data set instead",
    )
    add_removed_option(
        g, "--benchmark", "python -m gram_mini.studies.benchmarks gives the figures of a benchmark"
    )
    add_reading_options(g)
    g.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="file to write the scores of --data to, a line for each pair or ranking",
    )
    g.add_argument("--overwrite", action="store_true", help="replace a file that is already there")
    g.add_argument(
        "--resume",
        action="store_true",
        help="go on with the unfinished file of --out; give the same options again",
    )
    g = p.add_argument_group("how")
    g.add_argument(
        "--model",
        default=DEFAULT_JUDGE,
        metavar="NAME",
        help="run folder, model folder, GGUF file, hub name, or 'village'",
    )
    g.add_argument(
        "--rank",
        choices=METHODS,
        help="how to rank (default: reference if there is one, else round-robin)",
    )
    g.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        help="of a stage-1 run: ask which response it finds likelier, instead of for a verdict; by "
        "the log-probability of the whole response, its mean over the tokens, or what it is beyond "
        "that of the backbone (default: the verdict)",
    )
    g.add_argument(
        "--average",
        choices=AVERAGES,
        default="probabilities",
        help="average of the two orders: of probabilities or log-odds",
    )
    g.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="judge prompts of --max-length per forward pass; of shorter ones as many more as have "
        "the same number of tokens (default: "
        f"{defaults.SCORED[0]} for the village's backbone, {defaults.SCORED[1]} for any other); "
        f"with --server requests at a time (default: {defaults.REQUESTS})",
    )
    add_model_options(g, bits_default=None, max_length_default=None)
    add_server(g)
    add_judge_template(g, default="as in training, else one of the two in gram_mini/prompts.py")
    args = p.parse_args(argv)
    _check_scoring(p, args)
    return args


OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".gz")


def _check_scoring(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check that the options go together and that the outputs can be written.

    Options that do not go together are a usage error (exit status 2).

    Raises:
        UserError: anything else that is wrong.
    """
    single = args.prompt is not None or bool(args.response)
    if (args.data is not None) == single:
        p.error("give either --prompt with --response, or --data with --out")
    if args.data is not None:
        if args.data == VILLAGE:
            raise UserError(
                "--data village: is for training; python -m gram_mini.studies.village_table judges "
                "its test sets"
            )
        if args.out is None:
            p.error("--data needs --out FILE.jsonl")
        if args.out.suffix in OTHER_FORMATS:
            p.error(
                f"--out {args.out}: a line of JSON is written for each pair or ranking; give "
                "FILE.jsonl"
            )
        check_output(args.out, args.overwrite, "--out")
        check_partial(args.out, args.overwrite, args.resume, "--out")
    else:
        if args.out or args.overwrite or args.resume or args.limit:
            p.error("--out, --overwrite, --resume and --limit go with --data")
        for name in READING:
            if name != "limit" and getattr(args, name) != p.get_default(name):
                p.error(f"--{name.replace('_', '-')} goes with --data")
        if not args.prompt or not args.response:
            p.error("give --prompt and at least one --response")
        if len(args.response) == 1 and args.reference is None:
            p.error(
                "one response alone cannot be compared; give another --response or a --reference"
            )
        if args.rank == "reference" and args.reference is None:
            p.error("--rank reference needs --reference")
        texts = {"--prompt": [args.prompt], "--response": args.response}
        for name, given in {**texts, "--reference": [args.reference]}.items():
            if any(text is not None and is_blank(text) for text in given):
                say(f"{name}: an empty text is judged as any other")
    if args.served_name and not args.server:
        p.error("--served-name goes with --server")
    if args.server and (args.bits or args.device != "auto"):
        p.error("--bits and --device do not go with --server, which has its own")
    if args.likelihood and (args.server or args.judge_template):
        p.error("--likelihood goes with neither --server nor --judge-template; it asks no judge")
    if args.columns and args.labels:
        Columns(args.columns, args.labels)
    if args.reference is not None and args.rank not in (None, "reference"):
        p.error(f"--reference does not go with --rank {args.rank}")
    for text in (args.prompt, args.reference, *args.response):
        # The system turns bytes that are not UTF-8 into lone surrogates.
        if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(
                "a text on the command line is not UTF-8; give it in a file with --data"
            )
    if args.model == DEFAULT_JUDGE and not Path(args.model).is_dir():
        raise UserError(
            f"{args.model}: not trained yet; run train_reward.py, or give --model "
            "(runs/demo/reward after make demo)"
        )


# ---- groups of options ---------------------------------------------------------------


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help begins with commands to copy and shows every default."""
    p = argparse.ArgumentParser(
        usage=f"\n{examples}",
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--debug",
        action=_Debug,
        nargs=0,
        dest=argparse.SUPPRESS,
        help="show the traceback of an error, not its one line",
    )
    return p


class _Debug(argparse.Action):
    """--debug: errors show where they come from."""

    def __call__(self, parser, namespace, values, option_string=None):
        os.environ["GRAM_DEBUG"] = "1"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action):
        # Show every default except None, False and []. Their help texts name a computed default.
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


def add_training_options(
    p: argparse.ArgumentParser,
    stage: str,
    out: str,
    epochs: float,
    held_out: float,
    lora_rank: int | None,
    data_help: str,
    rates: str = "",
) -> None:
    """Options of both stages; ``out`` to ``lora_rank`` are the defaults of the stage.

    ``rates`` says what the default of --lr is, if it is not that of the stage.

    Those that depend on the backbone are None until defaults.choose has been called.
    """
    g = p.add_argument_group("what to train on what")
    g.add_argument(
        "--model",
        default=VILLAGE,
        metavar="NAME",
        help="backbone: hub name, folder or GGUF file, or 'village'",
    )
    g.add_argument("--data", default=VILLAGE, metavar="SOURCE", help=data_help)
    add_reading_options(g)
    g.add_argument(
        "--held-out",
        type=fraction,
        default=held_out,
        metavar="FRACTION",
        help="fraction of the prompts kept for evaluation",
    )
    g = p.add_argument_group("where to put it")
    g.add_argument(
        "--out", type=Path, default=Path(out), metavar="FOLDER", help="run folder to write"
    )
    g.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a run that is already there, once the new one is done",
    )
    g.add_argument(
        "--save-every",
        type=positive_int,
        default=100,
        metavar="N",
        help="steps between checkpoints to resume from",
    )
    g.add_argument(
        "--resume",
        action="store_true",
        help="go on with the unfinished run of --out; give the same options again",
    )
    g.add_argument(
        "--log-every", type=positive_int, default=20, metavar="N", help="steps per line of log.csv"
    )
    g.add_argument(
        "--report-to",
        choices=("tensorboard", "wandb"),
        help="a tracker that gets what log.csv gets (default: log.csv alone)",
    )
    g = p.add_argument_group("optimisation")
    g.add_argument(
        "--lr",
        type=positive_float,
        help="peak learning rate, warmed up over 5%% of the steps, then cosine "
        + (rates or defaults.shown_rate(defaults.DEFAULTS[stage]["lr"])),
    )
    g.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="pairs in an optimiser step, in each process " + defaults.both("batch_size", stage),
    )
    g.add_argument(
        "--batch-tokens",
        type=positive_int,
        metavar="N",
        help="at most N tokens in a forward pass, padding included: a step takes several passes, "
        "and learns the same (default: on a GPU what its memory admits, with "
        "--gradient-checkpointing if not even one pair fits without; elsewhere no limit for the "
        f"village's backbone, {defaults.BATCHES['batch_tokens'][1]} for any other model)",
    )
    add_removed_option(
        g,
        "--grad-accum",
        "a step is --batch-size pairs, and --batch-tokens splits it into forward passes",
    )
    duration = g.add_mutually_exclusive_group()
    duration.add_argument(
        "--epochs", type=positive_float, default=epochs, help="passes over the data"
    )
    duration.add_argument(
        "--steps", type=positive_int, metavar="N", help="optimiser steps, instead of --epochs"
    )
    g.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="draws the adapter, the order of rows and responses, the village's pairs",
    )
    g.add_argument(
        "--skip-limit",
        type=positive_int,
        default=5,
        metavar="N",
        help="stop after N steps in a row whose loss or gradient is not finite; such steps are "
        "skipped and counted",
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--lora-rank",
        type=positive_int,
        metavar="R",
        default=lora_rank,
        help="rank of the LoRA adapter"
        + ("" if lora_rank else " (default: that of --init, else 32)"),
    )
    g.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations twice to keep fewer of them: less memory, up to half more time",
    )
    add_model_options(g, bits_default=4, length_default=defaults.both("max_length", stage))


def add_reward_options(p: argparse.ArgumentParser, out: str, rates: str = "") -> None:
    """Options of stage 2 and of the baselines."""
    add_training_options(
        p,
        stage="reward",
        out=out,
        epochs=1,
        held_out=0.05,
        lora_rank=None,
        data_help="labelled pairs: file, folder, hub name, or 'village'",
        rates=rates,
    )
    g = p.add_argument_group("stage 2")
    g.add_argument(
        "--init",
        type=Path,
        metavar="RUN",
        help="run to start from, usually of stage 1 (default: the plain backbone)",
    )
    g.add_argument(
        "--label-smoothing",
        type=smoothing,
        default=0.05,
        metavar="EPS",
        help="eps of the loss above, 0 <= eps < 0.5; half of torch's label_smoothing: 0.05 is the "
        "official 0.1 there",
    )
    add_judge_template(g, default="that of --init, else one of the two in gram_mini/prompts.py")


LIKELIHOODS = ("sum", "per-token", "over-backbone")  # of gram_mini/runs/likelihood.py
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
    group.add_argument(
        "--split",
        metavar="NAME",
        help="split of a hub data set or of a folder with several (default: train)",
    )
    group.add_argument(
        "--subset", metavar="NAME", help="configuration of a hub data set (default: its default)"
    )
    group.add_argument(
        "--limit", type=positive_int, metavar="N", help="use the first N rows only (default: all)"
    )
    group.add_argument(
        "--streaming",
        action="store_true",
        help="download no more rows of a hub data set than --limit needs (default: all of them, "
        "once)",
    )
    group.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="what to do with a row that cannot be read",
    )
    group.add_argument(
        "--pairs",
        choices=("all", "best-worst"),
        default="all",
        help="which pairs of a row with several scored responses",
    )
    group.add_argument(
        "--pairs-per-prompt",
        type=positive_int,
        metavar="K",
        help="draw at most K pairs of several responses to one prompt (default: all)",
    )
    group.add_argument(
        "--columns",
        type=check_columns,
        metavar="TARGET=COLUMN,...",
        help="which columns hold what, for a table of no known format: prompt=instruction+input, "
        "with chosen= and rejected=, or a= and b= and perhaps label=, or response= and perhaps "
        "score= (default: known by their names)",
    )
    group.add_argument(
        "--labels",
        metavar="VERDICT=VALUE,...",
        help="the values of label= in --columns, for example a=1,b=2,tie=0 (default: A, B and tie)",
    )


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
    group.add_argument(
        "--bits",
        type=int,
        choices=(4, 16, 32),
        default=bits_default,
        help="4: NF4 weights (QLoRA); 16: bf16; 32: float32"
        + ("" if bits_default else " (default: as in training, else 4)"),
    )
    group.add_argument(
        "--max-length",
        type=positive_int,
        default=max_length_default,
        metavar="N",
        help="tokens per sequence; longer texts are cut, prompt first, then both responses by the "
        "same share" + ("" if max_length_default else f" {length_default}"),
    )
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one",
    )


def address(text: str) -> str:
    """argparse type of --server: an empty one would mean "compute it here"."""
    if not text.strip():
        raise argparse.ArgumentTypeError("give an address such as http://127.0.0.1:8000")
    return text


def add_server(group) -> None:
    """Options of every command that may have its judge computed by a server."""
    group.add_argument(
        "--server",
        type=address,
        metavar="URL",
        help="a server that computes the judge, such as http://127.0.0.1:8000; --model then gives "
        "only tokenizer and prompt (default: it is computed here)",
    )
    group.add_argument(
        "--served-name", metavar="NAME", help="name of the judge there (default: the only one)"
    )


def add_judge_template(group, default: str) -> None:
    """The option for another judge prompt; ``default`` says which one is used without it."""
    group.add_argument(
        "--judge-template",
        type=Path,
        metavar="FILE",
        help="text file of a judge prompt that holds {prompt}, {response_a} and {response_b}, once "
        f"each and in this order (default: {default})",
    )


class _Removed(argparse.Action):
    """An option of a former version: one line says what to give instead."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"{option_string}: is no option any more; {self.const}")


def add_removed_option(group, name: str, instead: str) -> None:
    """An option that was there in a former version; ``instead`` says what to give now."""
    group.add_argument(
        name,
        action=_Removed,
        nargs="?",
        const=instead,
        dest=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


class Distinct(argparse.Action):
    """Several values of an option, each once: of a study they would count twice."""

    def __call__(self, parser, namespace, values, option_string=None):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise argparse.ArgumentError(self, f"{twice[0]} is given twice")
        setattr(namespace, self.dest, values)


def as_record(args: argparse.Namespace) -> dict:
    """The options as run.json keeps them."""
    record = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    if "split" in record:  # what it comes to where there are splits
        record["split"] = record["split"] or "train"
    return record


# ---- types ---------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """argparse type: a whole number above 0."""
    return _number(text, int, lambda v: v > 0, "a whole number above 0")


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _number(text, float, lambda v: 0 < v < math.inf, "a number above 0")


def seed(text: str) -> int:
    """argparse type: a seed, 0 to 2**32 - 1."""
    return _number(text, int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1")


def fraction(text: str) -> float:
    """argparse type: a fraction, 0 <= fraction < 1."""
    return _number(text, float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def weight(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    return _number(text, float, lambda v: 0 <= v < math.inf, "a number of at least 0")


def weight_up_to_one(text: str) -> float:
    """argparse type: a weight, 0 <= weight <= 1."""
    return _number(text, float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def smoothing(text: str) -> float:
    """argparse type: our eps, 0 <= eps < 1/2."""
    return _number(text, float, lambda v: 0 <= v < 0.5, "a number of at least 0 and below 0.5")


def _number(text: str, kind: type, allowed: Callable[..., bool], wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value

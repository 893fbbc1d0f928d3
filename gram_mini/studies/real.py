"""A real language model on real texts: the main methods and our loss, with intervals over seeds.

  table   every method, trained on the labels and tested on held-out prompts and on other files
  curve   accuracy over the number of labels
  rates   learning rates of both stages and of the scalar head: to choose them, with --seeds 0

--labels, --unlabelled and each --test take a file, a folder or a name on the hub, as --data of the
training scripts does; their rows must need no --columns, --split or --subset. Of the labelled
prompts 15% are held out as the test "held out"; which ones is the same for all seeds. A seed draws
which pairs are used, their order, and the adapters. Rates are the defaults for a model that is not
the village's (gram_mini/runs/defaults.py), and 3e-4 for the scalar heads. "rates" leaves the
held-out prompts alone: it tests on others, which it takes from the labelled ones.

Trained models and figures stay in --runs, so a study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import train_pretrain
import train_reward
from gram_mini.baselines import __main__ as baselines
from gram_mini.errors import UserError
from gram_mini.evaluation import summarise
from gram_mini.pairs import Pair, split_by_prompt
from gram_mini.reading.load import load_pairs
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_place
from gram_mini.runs.report import say_doubts
from gram_mini.studies.lab import ITS_OWN, PLAIN, SCALAR, Lab, check_handed_on, write_json
from gram_mini.studies.metrics import calibration, pick_the_longer
from gram_mini.studies.seeds import add_folders, run_study

EXAMPLES = """\
  python -m gram_mini.studies.real table --model HuggingFaceTB/SmolLM2-135M-Instruct --bits 16 \\
      --labels polite.jsonl --unlabelled unlabelled.jsonl --test pandalm=pandalm.jsonl"""

HELD_OUT = "held out"  # what the test on the labelled data's own prompts is called
VALIDATION = "validation"  # prompts to choose rates on, never those that are held out
SPLITS = ("labelled", "unlabelled", "rest", HELD_OUT, VALIDATION)
COLUMNS = ("seed", "draw", "method", "labels", "rate", "seconds")  # of tables
BOTH = ["--both-orders", "1"]
METHODS = {  # name: (whether it starts from stage 1, script, options of the script)
    "D-Baseline": (False, baselines, SCALAR + PLAIN),
    "D from stage 1": (True, baselines, SCALAR + PLAIN),
    "G-Baseline": (False, train_reward, PLAIN),
    "G-Label-Smoothing": (False, train_reward, []),
    "GRAM": (True, train_reward, []),
    "G, both orders (ours)": (False, train_reward, BOTH),
    "GRAM, both orders (ours)": (True, train_reward, BOTH),
}
COUNTS = (100, 200, 400, 800, 1600, 3200, 8000)  # of labels, as far as there are so many
CURVE = ("D-Baseline", "G-Label-Smoothing", "GRAM", "G, both orders (ours)")
STAGE_1 = STAGE_2 = ("2e-4", "5e-4", "1e-3", "2e-3")
RATES = {  # method: rates of its stage 1 if it starts from one, else of its stage 2
    "D-Baseline": ("1e-4", "3e-4", "1e-3"),
    "G-Label-Smoothing": STAGE_2,
    "G, both orders (ours)": STAGE_2,
    "D from stage 1": STAGE_1,
    "GRAM": STAGE_1,
    "GRAM, both orders (ours)": STAGE_1,
}


def _read(option: str, source: str, labelled: bool):
    """The pairs of a source, whose own options this command does not have."""
    try:
        return load_pairs(source, labelled=labelled)
    except UserError as error:
        if not any(name in str(error) for name in ("--columns", "--split", "--subset")):
            raise
        raise UserError(
            f"{option} {source}: {error} (here there are no such options: first write the pairs "
            "to a file with prompt, chosen, rejected, or prompt, response_a, response_b)"
        ) from None


class RealLab(Lab):
    """A lab on files of real preferences; ``tests`` is {name: source}.

    Raises:
        UserError: as Lab; if a source cannot be read, or all labelled pairs have one prompt.
    """

    methods = METHODS

    def __init__(
        self,
        folder: Path,
        model: str,
        labels: str,
        unlabelled: str,
        tests: dict[str, str],
        counts: tuple[int, int, int],
        training: Sequence[str],
        loading: dict,
        stages: dict[str, Sequence[str]] | None = None,
    ):
        self.stages = stages or {}
        self.labels, self.unlabelled, self.tested = counts  # pairs to use, at most
        labelled = _read("--labels", labels, labelled=True)
        pool = _read("--unlabelled", unlabelled, labelled=False)
        self.used, held_out = split_by_prompt(labelled.pairs, 0.15, seed=0)
        if not held_out:
            raise UserError(
                f"--labels {labels}: all pairs have the same prompt; some must be held out"
            )
        self.pool = pool.pairs
        loaded = {n: _read("--test", source, labelled=True) for n, source in tests.items()}
        sets = {HELD_OUT: held_out, **{name: data.pairs for name, data in loaded.items()}}
        self.tests = {name: drawn(pairs, self.tested, "test") for name, pairs in sets.items()}
        for read in (labelled, pool, *loaded.values()):
            print(read.summary(), flush=True)
        for name, pairs in self.tests.items():
            print(f"{name}: {len(pairs)} pairs{self._seen(pairs)}", flush=True)
        data = {
            "labels": [labels, labelled.fingerprint, self.labels],
            "unlabelled": [unlabelled, pool.fingerprint, self.unlabelled],
            "tests": {name: [tests[name], data.fingerprint] for name, data in loaded.items()},
            "test pairs": self.tested,
            "options": self.stages,
        }
        self.set_up(folder, model, data, training, loading)

    def _seen(self, tested: list[Pair]) -> str:
        """How many of the prompts of a test training may see, with and without labels."""
        prompts = {pair.prompt for pair in tested}
        parts = {"the labelled pairs": self.used, "the unlabelled pairs": self.pool}
        found = {name: len(prompts & {p.prompt for p in pairs}) for name, pairs in parts.items()}
        told = [f"{count} occur in {name}" for name, count in found.items() if count]
        return f"; of their {len(prompts)} prompts {', '.join(told)}" if told else ""

    def pairs(self, split: str, seed: int) -> list[Pair]:
        if split == "labelled":
            return drawn(self.used, self.labels, seed)
        if split == "unlabelled":
            return drawn(self.pool, self.unlabelled, seed)
        if split in self.tests:
            return self.tests[split]
        rest, validation = split_by_prompt(self.used, 0.15, seed=0)
        validation = drawn(validation, self.tested, "test")
        return {"rest": drawn(rest, self.labels, seed), VALIDATION: validation}[split]

    def train(self, script, name: str, seed: int, *options: str) -> Path:
        """As in Lab, with the options of its stage; its seconds are kept beside the run.

        Of a run that was stopped and resumed they are those of the last part.
        """
        began = time.perf_counter()
        out = super().train(script, name, seed, *options, *self.stages.get(script.__name__, []))
        kept = seconds_of(out)
        if not kept.is_file():
            write_json(kept, {"seconds": round(time.perf_counter() - began)})
        return out

    def _evaluate(self, model: str | Path, split: str) -> dict[str, float]:
        pairs, began = self.pairs(split, 0), time.perf_counter()
        judge = self.judge(model)
        results = judge.compare_many(pairs, progress=split)
        say_doubts(f"{Path(model).name}, {split}", judge, results)
        figures = summarise(pairs, results)
        outcomes = [float(pair.label == 0) for pair in pairs]
        return {
            split: figures.accuracy,
            f"{split}, ± over prompts": figures.interval,
            f"{split}, position gap": figures.position_gap,
            f"{split}, calibration error": calibration(
                [result.probability for result in results], outcomes
            )[0],
            f"{split}, pairs cut": figures.truncated,
            f"{split}, mass on the labels": figures.label_mass,
            f"{split}, seconds": round(time.perf_counter() - began),
        }


def seconds_of(run: Path) -> Path:
    """The file beside a run that says how long its training took."""
    return run.with_name(f"{run.name}.seconds.json")


def drawn(pairs: list[Pair], count: int, seed: int | str) -> list[Pair]:
    """``count`` of the pairs, drawn at random; or all in random order, if there are fewer."""
    return random.Random(f"{seed}").sample(pairs, min(count, len(pairs)))


def table(lab: RealLab, seed: int):
    """Every method on real preferences: accuracy on held-out prompts and on other files."""
    longer = {
        name: summarise(pairs, list(map(pick_the_longer, pairs))).accuracy
        for name, pairs in lab.tests.items()
    }
    yield {"method": "the longer response", **longer}
    for name in ("zero-shot", *METHODS):
        run = lab.method(name, seed) if name in METHODS else lab.model
        row: dict[str, object] = {"method": name}
        for test in lab.tests:
            row |= lab.evaluate(run, test)
        kept = seconds_of(Path(run))
        seconds = json.loads(kept.read_text()) if name in METHODS else {"seconds": 0}
        yield {**row, "training, seconds": seconds["seconds"]}


def curve(lab: RealLab, seed: int):
    """Accuracy on held-out prompts over the number of labels."""
    whole = len(lab.pairs("labelled", seed))
    for count in (*(n for n in COUNTS if n < whole), None):  # None: all of them
        for name in CURVE:
            run = lab.method(name, seed, count)
            yield {"method": name, "labels": count or whole, **lab.evaluate(run, HELD_OUT)}


def rates(lab: RealLab, seed: int):
    """Accuracy by rate: of stage 1 for what starts from it, else of stage 2.

    Beside what starts from stage 1 stands the last loss that stage 1 wrote to its log.csv. In the
    first epoch it is of pairs that stage 1 had not seen yet, so it compares; later it does not.
    """
    for name, tried in RATES.items():
        for rate in tried:
            yield {"method": name, "rate": float(rate), **trial(lab, seed, name, rate)}


def trial(lab: RealLab, seed: int, name: str, rate: str) -> dict[str, float]:
    """Figures of a method on the validation prompts, with this rate."""
    starts, script, given = METHODS[name]
    figures: dict[str, float] = {}
    options = ["--data", lab.file(f"rest-{seed}", lab.pairs("rest", seed)), *given]
    if starts:
        pool = lab.file(f"stage1-{seed}", lab.pairs("unlabelled", seed))
        began = lab.train(train_pretrain, f"stage1 {rate}", seed, "--data", pool, "--lr", rate)
        options += ["--init", str(began)]
        *_, last = csv.DictReader((began / "log.csv").read_text().splitlines())
        figures["stage 1, last loss"] = float(last["loss"])
    else:
        options += ["--lr", rate]
    run = lab.train(script, f"{name} {rate}", seed, *options)
    return {**lab.evaluate(run, VALIDATION), **figures}


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "study", choices=("table", "curve", "rates"), metavar="STUDY", help="one of the above"
    )
    sources = parser.add_argument_group("data")
    sources.add_argument("--labels", required=True, metavar="SOURCE", help="labelled pairs")
    sources.add_argument("--unlabelled", required=True, metavar="SOURCE", help="pairs for stage 1")
    sources.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="labelled pairs to test on, beside the held-out ones; give it once for each",
    )
    numbers = {
        "labels-used": (480, "labelled pairs to train on, at most"),
        "unlabelled-used": (480, "pairs of stage 1, at most"),
        "tested": (200, "pairs of each test, at most; the same for all methods and seeds"),
    }
    for name, (default, text) in numbers.items():
        sources.add_argument(
            f"--{name}", type=options.positive_int, default=default, metavar="N", help=text
        )
    group = parser.add_argument_group("how")
    group.add_argument("--model", required=True, metavar="NAME", help="as in the training scripts")
    group.add_argument(
        "--seeds",
        type=options.seed,
        nargs="+",
        action=options.Distinct,
        default=[1, 2, 3],
        metavar="N",
        help="seeds to run",
    )
    group.add_argument(
        "--epochs", type=options.positive_float, default=1, help="passes over the data, both stages"
    )
    texts = {
        "training": "further options of all scripts, as one text: --training '--batch-size 8'",
        "stage-1": "further options of train_pretrain.py, as one text: --stage-1 '--lr 2e-4'",
        "stage-2": "further options of train_reward.py, as one text",
        "scalar": "further options of the scalar heads, as one text",
    }
    for name, text in texts.items():
        group.add_argument(f"--{name}", default=[], type=words, metavar="OPTIONS", help=text)
    group.add_argument("--name", default="real", help="the results are called NAME-STUDY")
    add_folders(group, "runs/real-study", "in --runs")
    options.add_model_options(group, bits_default=4, max_length_default=512)
    args = parser.parse_args(argv)
    tests = dict(test.partition("=")[::2] for test in args.test)
    if not all(name and source for name, source in tests.items()):
        parser.error("--test: give NAME=SOURCE")
    if len(tests) < len(args.test):
        parser.error("--test: a name was given twice")
    if taken := {*SPLITS, *COLUMNS} & {*tests}:
        parser.error(
            f"--test: {taken.pop()!r} is the name of a part of --labels or --unlabelled, or of a "
            "column of the table"
        )
    if odd := [name for name in tests if "/" in name or len(name) > 100]:
        parser.error(f"--test: {odd[0]!r} cannot be part of a file's name")
    check_handed_on("--training", args.training)
    check_handed_on("--stage-1", args.stage_1)
    check_handed_on("--stage-2", args.stage_2, (*ITS_OWN, "label-smoothing", "both-orders"))
    check_handed_on("--scalar", args.scalar, (*ITS_OWN, "label-smoothing", "head"))
    given = [*args.training, *args.stage_1, *args.stage_2, *args.scalar]
    if args.study == "rates" and any(text.startswith("--lr") for text in given):
        parser.error("rates tries the values of --lr; do not give one")
    if tests and args.study != "table":
        print(f"{args.study} does not test on --test", flush=True)
    check_place(args.runs, "--runs")
    results = args.results or args.runs / "results"
    check_place(results, "--results")
    loading = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    counts = args.labels_used, args.unlabelled_used, args.tested
    lab = RealLab(
        args.runs, args.model, args.labels, args.unlabelled, tests, counts,
        ["--epochs", str(args.epochs), *args.training], loading,
        {
            train_pretrain.__name__: args.stage_1,
            train_reward.__name__: args.stage_2,
            baselines.__name__: args.scalar,
        },
    )  # fmt: skip
    shown = (HELD_OUT, *tests)
    studies = {
        f"{args.name}-table": (table, ("method",), None, shown),
        f"{args.name}-curve": (curve, ("method", "labels"), "labels", (HELD_OUT,)),
        f"{args.name}-rates": (rates, ("method", "rate"), "rate", (VALIDATION,)),
    }
    run_study(f"{args.name}-{args.study}", lab, args.seeds, results, studies)


def words(text: str) -> list[str]:
    """Options given as one text, for argparse."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


if __name__ == "__main__":
    with clear_errors():
        main()

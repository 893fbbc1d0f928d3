"""A real language model on real texts: the main methods and our loss, with intervals over seeds.

  table   every method, trained on the labels and tested on held-out prompts and on other files
  start   the paper's loss with one thing changed at a time

--labels, --unlabelled and each --test take a file, a folder or a name on the hub, as --data of the
training scripts does; their rows must need no --columns, --split or --subset. Of the labelled
prompts 15% are held out as the test "held out"; which ones is the same for all seeds. A seed draws
which pairs are used, their order, and the adapters. Rates are the defaults of the model
(gram_mini/runs/defaults.py). Scalar heads take two epochs, as in the village, where --scalar gives
nothing else.

Trained models and figures stay in --runs, so a study goes on where it stopped, and the table and
the picture are in its folder results.
"""

from __future__ import annotations

import random
import shlex
from pathlib import Path
from typing import Any

import train_pretrain
from gram_mini.baselines import __main__ as baselines
from gram_mini.errors import UserError
from gram_mini.evaluation import summarise
from gram_mini.pairs import Pair, split_by_prompt
from gram_mini.reading.load import load_pairs
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_place
from gram_mini.studies.lab import JOINT_BOTH, LIKELIHOOD, LIKELIHOODS, Lab, beta_of
from gram_mini.studies.metrics import pick_the_longer
from gram_mini.studies.paper import Study
from gram_mini.studies.seeds import add_folder, add_seeds, run
from gram_mini.studies.start import start

EXAMPLES = """\
  python -m gram_mini.studies.real table --model HuggingFaceTB/SmolLM2-135M-Instruct --bits 16 \\
      --labels polite.jsonl --unlabelled unlabelled.jsonl --test pandalm=pandalm.jsonl"""

HELD_OUT = "held out"  # what the test on the labelled data's own prompts is called
# What a test cannot be called: parts of the data, and columns of the table.
TAKEN = {"labelled", "unlabelled", HELD_OUT, "seed", "method", "labels"}
COMPARED = (
    *("D-Baseline", "D from stage 1", "G-Baseline", "G-Label-Smoothing", "GRAM"),
    *("G, both orders (ours)", "GRAM, both orders (ours)", JOINT_BOTH),
)
# What --training and its like cannot give to the scripts, since the study does.
ITS_OWN = {
    *("--model", "--data", "--out", "--init", "--seed", "--held-out", "--bits", "--max-length"),
    *("--device", "--label-smoothing", "--both-orders", "--head"),
}


class Files:
    """Pairs of files of real preferences, as a lab takes them.

    Args:
        tests: {name: source}; "held out" is added to them.
        counts: how many labelled pairs, unlabelled pairs and pairs of each test to use, at most.

    Attributes:
        said: what was read, and how many prompts of a test training may see.

    Raises:
        UserError: if a source cannot be read, or all labelled pairs have one prompt.
    """

    def __init__(
        self, labels: str, unlabelled: str, tests: dict[str, str], counts: tuple[int, int, int]
    ):
        most_labelled, most_unlabelled, tested = counts
        self.most = {"labelled": most_labelled, "unlabelled": most_unlabelled}
        labelled = _read("--labels", labels, labelled=True)
        pool = _read("--unlabelled", unlabelled, labelled=False)
        used, held_out = split_by_prompt(labelled.pairs, 0.15, seed=0)
        if not held_out:
            raise UserError(
                f"--labels {labels}: all pairs have the same prompt; hold-out needs two"
            )
        self.used = {"labelled": used, "unlabelled": pool.pairs}
        loaded = {n: _read("--test", source, labelled=True) for n, source in tests.items()}
        sets = {HELD_OUT: held_out, **{name: data.pairs for name, data in loaded.items()}}
        self.tests = {name: drawn(pairs, tested, "test") for name, pairs in sets.items()}
        self.said = [read.summary() for read in (labelled, pool, *loaded.values())]
        for name, pairs in self.tests.items():
            self.said.append(f"{name}: {len(pairs)} pairs{self._seen(pairs)}")
        self.about = {
            "labels": [labels, labelled.fingerprint, most_labelled],
            "unlabelled": [unlabelled, pool.fingerprint, most_unlabelled],
            "tests": {name: [tests[name], data.fingerprint] for name, data in loaded.items()},
            "test pairs": tested,
        }

    def _seen(self, tested: list[Pair]) -> str:
        """How many of the prompts of a test training may see, with and without labels."""
        prompts, told = {pair.prompt for pair in tested}, []
        for split, pairs in self.used.items():
            if seen := len(prompts & {pair.prompt for pair in pairs}):
                told.append(f"{seen} occur in the {split} pairs")
        return f"; of their {len(prompts)} prompts {', '.join(told)}" if told else ""

    def pairs(self, split: str, seed: int) -> list[Pair]:
        """The pairs of a test, or those that this seed draws of the others."""
        if split in self.tests:
            return self.tests[split]
        return drawn(self.used[split], self.most[split], seed)


def _read(option: str, source: str, labelled: bool):
    """The pairs of a source, whose own options this command does not have."""
    try:
        return load_pairs(source, labelled=labelled)
    except UserError as error:
        raise UserError(
            f"{option} {source}: {error} (where --columns, --split or --subset are needed, write "
            "the pairs to a file first)"
        ) from None


def drawn(pairs: list[Pair], count: int, seed: int | str) -> list[Pair]:
    """``count`` of the pairs, drawn at random; or all in random order, if there are fewer."""
    return random.Random(f"{seed}").sample(pairs, min(count, len(pairs)))


def columns(
    lab: Lab, model: str | Path, test: str, likelihood: str | None = None
) -> dict[str, float]:
    """The figures of a judge on a test, each under a name with that of the test."""
    figures = lab.evaluate(model, test, likelihood)
    more = ("± over prompts", "position gap", "calibration error")
    return {test: figures["accuracy"], **{f"{test}, {name}": figures[name] for name in more}}


def table(lab: Lab, seed: int):
    """Every method on real preferences: accuracy on held-out prompts and on other files."""
    longer: dict[str, object] = {"method": "the longer response"}
    for test, pairs in lab.source.tests.items():
        longer[test] = summarise(pairs, list(map(pick_the_longer, pairs))).accuracy
    yield longer
    runs: dict[str, str | Path] = {"zero-shot": lab.model, LIKELIHOOD: lab.stage1(seed)}
    for name in (*runs, *COMPARED):
        run = runs.get(name) or lab.method(name, seed)
        row: dict[str, object] = {"method": name, **beta_of(Path(run))}
        for test in lab.source.tests:
            row |= columns(lab, run, test, LIKELIHOODS.get(name))
        yield row


STUDIES = {
    "real-table": Study(table, ("method",), None, (HELD_OUT,), COMPARED),
    "real-start": Study(start, ("method",), None, (HELD_OUT, f"{HELD_OUT}, position gap"), ()),
}


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    studied = [name.removeprefix("real-") for name in STUDIES]
    parser.add_argument("study", choices=studied, metavar="STUDY", help="one of the above")
    sources = parser.add_argument_group("data")
    sources.add_argument("--labels", required=True, metavar="SOURCE", help="labelled pairs")
    sources.add_argument("--unlabelled", required=True, metavar="SOURCE", help="pairs for stage 1")
    text = "labelled pairs to test on, beside the held-out ones; give it once for each"
    sources.add_argument("--test", action="append", default=[], metavar="NAME=SOURCE", help=text)
    count: dict[str, Any] = {"type": options.positive_int, "metavar": "N"}
    text = "labelled pairs to train on, at most"
    sources.add_argument("--labels-used", default=480, help=text, **count)
    text = "pairs of stage 1, at most"
    sources.add_argument("--unlabelled-used", default=480, help=text, **count)
    text = "pairs of each test, at most; the same for all methods and seeds"
    sources.add_argument("--tested", default=200, help=text, **count)
    group = parser.add_argument_group("how")
    group.add_argument("--model", required=True, metavar="NAME", help="as in the training scripts")
    add_seeds(group, [1, 2, 3])
    more: dict[str, Any] = {"type": shlex.split, "default": [], "metavar": "OPTIONS"}
    text = "further options of all scripts, as one text: --training '--batch-size 8'"
    group.add_argument("--training", help=text, **more)
    text = "further options of train_pretrain.py, as one text"
    group.add_argument("--stage-1", help=text, **more)
    text = "further options of the scalar heads, as one text"
    group.add_argument("--scalar", help=text, **more)
    add_folder(group, "--runs", Path("runs/real-study"), "where all is kept")
    options.add_model_options(group, bits_default=4, max_length_default=512)
    args = parser.parse_args(argv)
    for words in (args.training, args.stage_1, args.scalar):
        if own := ITS_OWN.intersection(word.partition("=")[0] for word in words):
            parser.error(f"the study sets {', '.join(own)} itself; leave it out")
    tests = dict(test.partition("=")[::2] for test in args.test)
    usable = [name for name in tests if name and tests[name] and "/" not in name]
    if len(usable) < len(args.test) or TAKEN.intersection(usable):
        taken = ", ".join(sorted(TAKEN))
        parser.error(f"--test: give NAME=SOURCE, each NAME once, without a / and none of {taken}")
    if tests and args.study != "table":
        print(f"{args.study} does not test on --test", flush=True)
    check_place(args.runs, "--runs")
    loading = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    counts = args.labels_used, args.unlabelled_used, args.tested
    files = Files(args.labels, args.unlabelled, tests, counts)
    print(*files.said, sep="\n", flush=True)
    stages = {train_pretrain.__name__: args.stage_1, baselines.__name__: args.scalar}
    lab = Lab(args.runs, args.model, files, args.training, loading, stages)
    run([f"real-{args.study}"], lab, args.seeds, args.runs / "results", studies=STUDIES)


if __name__ == "__main__":
    with clear_errors():
        main()

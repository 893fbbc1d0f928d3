"""The help desk with a real language model: what is a judge worth on the topics without labels?

Trains and tests every judge for each seed. A seed draws the first weights and the order of the
pairs, which are always the same. It goes on where it stopped, as the studies on the village do.
"""

from __future__ import annotations

import os
from pathlib import Path

import train_pretrain
import train_reward
from gram_mini.baselines import __main__ as baselines
from gram_mini.helpdesk.build import FOLDER, JUDGE_TEMPLATE, QUALITIES
from gram_mini.judge import Comparison
from gram_mini.likelihood import __main__ as joint
from gram_mini.pairs import Pair
from gram_mini.reading.load import load_pairs
from gram_mini.reading.template import read_template
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_place
from gram_mini.runs.report import say_doubts
from gram_mini.studies.helpdesk_table import GAP, OVER_PROMPTS, PARTS, WITHOUT, by_part
from gram_mini.studies.lab import JOINT_BOTH, LIKELIHOOD, Lab, beta_of
from gram_mini.studies.metrics import pick_the_longer
from gram_mini.studies.paper import Study
from gram_mini.studies.seeds import RESULTS, add_folder, add_seeds, run

EXAMPLES = """\
  python -m gram_mini.studies.helpdesk --model MODEL --seeds 1"""
# The scalar heads, the paper's loss, ours on both orders, and with the likelihood.
TRAINED = ("D-Baseline", "D from stage 1", "GRAM", "GRAM, both orders (ours)", JOINT_BOTH)
STEPS = ["--batch-size", "8"]  # chosen on seed 0 for both stages
ONCE = [*STEPS, "--epochs", "1"]  # stage 2, for all methods


def stages() -> dict[str, list[str]]:
    """The options of each script, by the name of its module."""
    short = ["--judge-template", os.path.relpath(JUDGE_TEMPLATE)]  # chosen on seed 0, too
    of_judges = {script.__name__: ONCE + short for script in (train_reward, joint)}
    return of_judges | {baselines.__name__: ONCE, train_pretrain.__name__: STEPS}


class HelpDesk:
    """The pairs of the help desk, as a lab takes them."""

    def __init__(self):
        self.data = {
            split: load_pairs(str(FOLDER / f"{split}.jsonl"), labelled=split != "unlabelled")
            for split in ("unlabelled", "labelled", "test")
        }
        self.about = {split: data.fingerprint for split, data in self.data.items()}
        self.about["judge prompt"] = read_template(JUDGE_TEMPLATE)

    def pairs(self, split: str, seed: int) -> list[Pair]:
        return self.data[split].pairs


def helpdesk(lab: Lab, seed: int):
    """The help desk: accuracy on topics with labels and on those without, by what decides."""
    pairs = lab.pairs("test", seed)
    yield {"method": "pick the longer", **accuracies(pairs, list(map(pick_the_longer, pairs)))}
    yield {"method": "zero-shot", **tested(lab, lab.model, lab.folder / "zero-shot")}
    stage1 = lab.stage1(seed)
    place = stage1.with_name("stage1-likelihood")
    yield {"method": LIKELIHOOD, **tested(lab, stage1, place, likelihood="sum")}
    for name in TRAINED:
        out = lab.method(name, seed)
        yield {"method": name, **tested(lab, out, out), **beta_of(out)}


def tested(
    lab: Lab, model: str | Path, place: Path, likelihood: str | None = None
) -> dict[str, float]:
    """The accuracies of a judge, kept beside ``place``."""

    def judged() -> dict[str, float]:
        judge = lab.judge(model, likelihood)
        pairs = lab.pairs("test", 0)  # the same for all seeds
        results = judge.compare_many(pairs, progress=place.name)
        say_doubts(place.name, judge, results)
        return accuracies(pairs, results)

    return lab.keep(place.with_name(f"{place.name}.test.json"), judged)


def accuracies(pairs: list[Pair], results: list[Comparison]) -> dict[str, float]:
    of = by_part(pairs, results)
    row = {name: of[name].accuracy for name in PARTS}
    return row | {OVER_PROMPTS: of[WITHOUT].interval, GAP: of["all"].position_gap}


STUDIES = {
    "helpdesk": Study(helpdesk, ("method",), None, (WITHOUT, *QUALITIES), TRAINED),
}


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    text = "as in the training scripts, such as the GGUF file that make real fetches"
    parser.add_argument("--model", required=True, metavar="NAME", help=text)
    add_seeds(parser, [1, 2, 3])
    add_folder(parser, "--runs", Path("runs/helpdesk"), "where trained models are kept")
    add_folder(parser, "--results", RESULTS, "where table and figure go")
    options.add_model_options(parser, bits_default=16, max_length_default=512)
    args = parser.parse_args(argv)
    check_place(args.runs, "--runs")
    check_place(args.results, "--results")
    loading = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    lab = Lab(args.runs, args.model, HelpDesk(), loading=loading, stages=stages())
    run(list(STUDIES), lab, args.seeds, args.results, studies=STUDIES)


if __name__ == "__main__":
    with clear_errors():
        main()

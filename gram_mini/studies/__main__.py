"""The claims of the paper, each as an experiment with a figure. On the village the truth is known.

  table       every method in and out of distribution, and by what the responses differ in
  bon         best of n: the judge's own score and the true reward, over KL
  adapt       a new topic with few labels, from each starting point
  smoothing   eps from 0 to 0.4: accuracy, margin, calibration
  noise       flipped labels, at random or by an adversary, with and without smoothing
  unlabelled  more or less stage 1, on the topics of the test or on others
  rl          a policy trained against the judge: the judge's reward and the true one, over KL
  all         these seven
  orders      ours, not the paper's: each pair in both orders, and one loss on their mean margin
  rewards     ours: from pairs to the rewards of n responses, by the number of comparisons
  certain     ours: where smoothing matters (noise of the labels x epochs x eps)
  beside      ours: does comparing help where a difference is plain side by side?
  writing-rl, writing-weak, writing-bon
              ours: the village's language model as a policy that writes (needs TRL)

Each study writes STUDY.json and STUDY.png to gram_mini/studies/results (--quick to runs/quick).
Trained models stay in runs/studies and are used again, by other studies too, so a study goes on
where it stopped. If you change a study, delete its files in runs/studies/rows. For pairs of your
own there is python -m gram_mini.studies.real.
"""

import argparse
from pathlib import Path

from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_place
from gram_mini.studies.lab import Lab, VillagePairs, check_handed_on
from gram_mini.studies.paper import STUDIES
from gram_mini.studies.seeds import (
    RESULTS,
    add_folders,
    add_seeds,
    run_side_by_side,
    run_study,
    words,
)
from gram_mini.village import VILLAGE

import torch

EXAMPLES = """\
  python -m gram_mini.studies table          # seeds 1 to 5
  python -m gram_mini.studies all --quick    # the paper's seven studies with one seed"""

# The studies of the paper's claims; the others are ours.
PAPERS = ("table", "bon", "adapt", "smoothing", "noise", "unlabelled", "rl")


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    names = (*STUDIES, "all")
    parser.add_argument("study", choices=names, metavar="STUDY", help="one of the above")
    quick = "one seed, 1, instead of --seeds; results go to runs/quick"
    parser.add_argument("--quick", action="store_true", help=quick)
    add_seeds(parser, [1, 2, 3, 4, 5])
    parser.add_argument(
        "--jobs",
        type=options.positive_int,
        metavar="N",
        help="studies and seeds at a time, which share the cores (default: 2 on a CPU, 1 on a "
        "GPU); the number of cores each has changes the last digits",
    )
    backbone = "backbone, as in the training scripts"
    parser.add_argument("--model", default=VILLAGE, metavar="NAME", help=backbone)
    options.add_model_options(parser, bits_default=4, max_length_default=512)
    parser.add_argument(
        "--training",
        default=[],
        type=words,
        metavar="OPTIONS",
        help="further options that both training scripts know, as one text: "
        '--training "--epochs 1 --lora-rank 16"',
    )
    add_folders(parser, "runs/studies", "gram_mini/studies/results")
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.data:
        parser.error(
            "--data: these studies are about the village; for other pairs give them to "
            "python -m gram_mini.studies.real as --labels"
        )
    check_handed_on("--training", args.training)
    seeds = [1] if args.quick else args.seeds
    results = args.results or (Path("runs/quick") if args.quick else RESULTS)
    check_place(args.runs, "--runs")
    check_place(results, "--results")
    loading = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    lab = Lab(args.runs, args.model, VillagePairs(), args.training, loading)
    all_of_them = [name for name in STUDIES if name in PAPERS]
    studies = all_of_them if args.study == "all" else [args.study]
    jobs = args.jobs or (1 if torch.cuda.is_available() else 2)
    if jobs > 1 and len(studies) * len(seeds) > 1:
        run_side_by_side(studies, lab, seeds, jobs)
    for name in studies:
        run_study(name, lab, seeds, results)


if __name__ == "__main__":
    with clear_errors():
        main()

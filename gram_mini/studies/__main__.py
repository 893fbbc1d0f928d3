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
  where       ours: where smoothing matters (noise of the labels x epochs x eps), on seed 0
  certain     ours: the corners of where, on other seeds
  recipes     ours: the search for the recipe of adapt, on seed 0
  beside      ours: does comparing help where a difference is plain side by side?

Each study writes STUDY.json and STUDY.png to gram_mini/studies/results (--quick to runs/quick).
Trained models stay in runs/studies and are used again, by other studies too, so a study goes on
where it stopped. If you change a study, delete its files in runs/studies/rows.
"""

import shlex
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.reading.load import VILLAGE
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_place
from gram_mini.studies.lab import Lab, check_handed_on
from gram_mini.studies.paper import STUDIES
from gram_mini.studies.seeds import RESULTS, add_folders, run_side_by_side, run_study

import torch

EXAMPLES = """\
  python -m gram_mini.studies table                             # seeds 1 to 5
  python -m gram_mini.studies all --quick                       # every study with one seed
  python -m gram_mini.studies table --data pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct \\
      --runs runs/mine --results runs/mine/results"""

SEEDS = (1, 2, 3, 4, 5)
SEARCHES = ("where", "recipes")  # on seed 0; others report
OURS = ("orders", "rewards", "where", "certain", "recipes", "beside")  # not claims of the paper
NEEDS_TRUTH = ("bon", "adapt", "rl", "rewards", "where", "certain", "recipes", "beside")


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "study", choices=(*STUDIES, "all"), metavar="STUDY", help="one of the above"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, 1, instead of --seeds; results go to runs/quick",
    )
    parser.add_argument(
        "--seeds",
        type=options.seed,
        nargs="+",
        action=options.Distinct,
        metavar="N",
        help="seeds to run (default: 1 to 5; of recipes and where, which search, 0)",
    )
    parser.add_argument(
        "--jobs",
        type=options.positive_int,
        metavar="N",
        help="studies and seeds at a time, which share the cores (default: 2 on a CPU, 1 on a "
        "GPU); the number of cores each has changes the last digits",
    )
    parser.add_argument(
        "--model",
        type=options.model_name,
        default=VILLAGE,
        metavar="NAME",
        help="backbone, as in the training scripts",
    )
    parser.add_argument(
        "--data",
        type=options.data_name,
        default=VILLAGE,
        metavar="SOURCE",
        help="labelled pairs; a fifth of the prompts is the test",
    )
    options.add_model_options(parser, bits_default=4, max_length_default=512)
    parser.add_argument(
        "--training",
        default="",
        metavar="OPTIONS",
        help="further options that both training scripts know, as one text: "
        '--training "--epochs 1 --lora-rank 16"',
    )
    add_folders(parser)
    args = parser.parse_args(argv)
    usual = (0,) if args.study in SEARCHES else SEEDS
    seeds = [1] if args.quick else args.seeds or list(usual)
    try:
        training = shlex.split(args.training)
    except ValueError as error:
        parser.error(f"--training {args.training}: {error}")
    check_handed_on("--training", training)
    results = args.results or (Path("runs/quick") if args.quick else RESULTS)
    studies = [name for name in STUDIES if name not in OURS]
    studies = studies if args.study == "all" else [args.study]
    if args.data != VILLAGE:
        if args.study in NEEDS_TRUTH:
            raise UserError(
                f"{args.study}: needs the true rewards, which only the village has; "
                "leave --data out"
            )
        studies = [name for name in studies if name not in NEEDS_TRUTH]
    check_place(args.runs, "--runs")
    check_place(results, "--results")
    loading = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    lab = Lab(args.runs, args.model, args.data, training, loading)
    jobs = args.jobs or (1 if torch.cuda.is_available() else 2)
    if jobs > 1 and len(studies) * len(seeds) > 1:
        run_side_by_side(studies, lab, seeds, jobs)
    for name in studies:
        run_study(name, lab, seeds, results)


if __name__ == "__main__":
    with clear_errors():
        main()

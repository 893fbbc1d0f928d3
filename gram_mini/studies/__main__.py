"""The claims of the paper, each as an experiment with a figure. On the village the truth is known.

  table       every method in and out of distribution, and by what the responses differ in
  bon         best of n: the judge's own score and the true reward, over KL
  adapt       a new topic with few labels, from each starting point
  smoothing   eps from 0 to 0.4: accuracy, margin, calibration
  noise       flipped labels, at random or by an adversary, with and without smoothing
  unlabelled  more or less stage 1, on the topics of the test or on others
  rl          a policy trained against the judge: the judge's reward and the true one, over KL
  orders      ours, not the paper's: each pair in both orders, and one loss on their mean margin
  rewards     ours: from pairs to the rewards of n responses, by the number of comparisons
  certain     ours: where smoothing matters (noise of the labels x epochs x eps)
  misled      ours: unlabelled pairs in which what is common is not what is good
  beside      ours: does comparing help where a difference is plain side by side?
  writing-rl, writing-weak, writing-bon
              ours: the village's language model as a policy that writes (rl and weak need TRL)
  all         all of these, seed by seed

Each study writes STUDY.json and STUDY.png to --results, anew after each seed. The same command goes
on where it stopped: a seed that is in STUDY.json is not run again, if it was made with this
backbone, these options, methods and versions of the packages. If you change what a study does,
delete its STUDY.json. Trained models stay in --runs, and other studies use them too.

python -m gram_mini.studies.real takes another model and pairs of your own.
"""

from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_place
from gram_mini.studies.lab import Lab, VillagePairs
from gram_mini.studies.paper import STUDIES
from gram_mini.studies.seeds import RESULTS, add_folder, add_seeds, run
from gram_mini.village import VILLAGE
from gram_mini.village.writer import require_trl

import torch

EXAMPLES = """\
  python -m gram_mini.studies table            # seeds 1 to 5
  python -m gram_mini.studies all --seeds 1    # every study with one seed"""
LOADING = {"bits": 4, "max_length": 512, "device": "auto"}
GONE = {  # options of former versions, and what to give instead
    "--quick": "give --seeds 1 --results runs/quick",
    "--device": "a GPU is taken if there is one; CUDA_VISIBLE_DEVICES= hides it",
    **dict.fromkeys(
        ("--model", "--data", "--bits", "--max-length", "--training"),
        "python -m gram_mini.studies.real takes other models, pairs and options",
    ),
}


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    studies = (*STUDIES, "all")
    parser.add_argument("study", choices=studies, metavar="STUDY", help="one of the above")
    add_seeds(parser, [1, 2, 3, 4, 5])
    parser.add_argument(
        "--jobs",
        type=options.positive_int,
        metavar="N",
        help="studies and seeds at a time (default: 2 on a CPU, 1 on a GPU); if there are several, "
        "each has one thread: the number of threads changes the last digits",
    )
    add_folder(parser, "--runs", Path("runs/studies"), "where trained models are kept")
    add_folder(parser, "--results", RESULTS, "where tables and figures go")
    for name, instead in GONE.items():
        options.add_removed_option(parser, name, instead)
    args = parser.parse_args(argv)
    check_place(args.runs, "--runs")
    check_place(args.results, "--results")
    lab = Lab(args.runs, VILLAGE, VillagePairs(), loading=LOADING)
    names = list(STUDIES) if args.study == "all" else [args.study]
    with_trl = [name for name in names if "trl" in STUDIES[name].packages]
    try:
        if with_trl:
            require_trl()
    except UserError as error:
        if args.study != "all":
            raise
        print(f"{len(with_trl)} studies are left out ({', '.join(with_trl)}): {error}", flush=True)
        names = [name for name in names if name not in with_trl]
    jobs = args.jobs or (1 if torch.cuda.is_available() else 2)
    run(names, lab, args.seeds, args.results, min(jobs, len(names) * len(args.seeds)))


if __name__ == "__main__":
    with clear_errors():
        main()

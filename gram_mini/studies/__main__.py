"""The claims of the paper and questions of ours, each as an experiment on the village.

Each study writes STUDY.json and STUDY.png to --results, anew after each seed. The same command goes
on where it stopped: a seed that is in STUDY.json is not run again, if it was made with this
backbone, these options, methods and versions of the packages. If you change what a study does,
delete its STUDY.json and give another --runs, where trained models and their figures are kept.

python -m gram_mini.studies.real takes another model and pairs of your own. The studies here:
"""

from pathlib import Path

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


def main(argv=None):
    listed = [f"  {name:14}{study.rows.__doc__}" for name, study in STUDIES.items()]
    parser = options.parser("\n".join([__doc__, *listed]), EXAMPLES)
    studies = (*STUDIES, "all")
    parser.add_argument("study", choices=studies, metavar="STUDY", help="one of the above, or all")
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
    args = parser.parse_args(argv)
    check_place(args.runs, "--runs")
    check_place(args.results, "--results")
    lab = Lab(args.runs, VILLAGE, VillagePairs(), loading=LOADING)
    names = list(STUDIES) if args.study == "all" else [args.study]
    if any("trl" in STUDIES[name].packages for name in names):
        require_trl()
    jobs = args.jobs or (1 if torch.cuda.is_available() else 2)
    run(names, lab, args.seeds, args.results, min(jobs, len(names) * len(args.seeds)))


if __name__ == "__main__":
    with clear_errors():
        main()

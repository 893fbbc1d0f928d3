"""Time and memory of our code on this machine, on models of random weights. See README.md here.

train is a training step of ours beside the usual one, and with --peer trl beside TRL's. score is
scoring in both orders beside one sequence at a time.
"""

from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.processes import pick_device
from gram_mini.runs.table import aligned
from gram_mini.studies.speed import common, scoring, training

import torch

EXAMPLES = "  python -m gram_mini.studies.speed train --shape Qwen2.5-0.5B --bits 4  # on a GPU"
STUDIES = {"train": training.measure, "score": scoring.measure}


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument("study", choices=STUDIES, help="train or score")
    parser.add_argument("--shape", choices=common.SHAPES, default="mid", help="sizes of the model")
    text = "4: NF4; 16: bf16; 32: float32"
    parser.add_argument("--bits", type=int, choices=(4, 16, 32), default=32, help=text)
    text = "cpu, cuda, ...; auto takes the GPU where there is one"
    parser.add_argument("--device", default="auto", help=text)
    for name, default, text in (
        ("--max-length", 512, "tokens of a sequence"),
        ("--batch-size", 4, "pairs of a batch"),
        ("--rounds", 5, "times that everything is measured"),
    ):
        parser.add_argument(name, type=options.positive_int, default=default, help=text)
    parser.add_argument("--peer", choices=("trl",), help="for train: a library to compare with")
    args = parser.parse_args(argv)
    if args.peer and args.study != "train":
        parser.error("--peer goes with train")
    device = pick_device(args.device)
    rows = STUDIES[args.study](args, device)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(aligned([columns, *([row.get(column, "") for column in columns] for row in rows)]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"\n{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    with clear_errors():
        main()

"""Time and memory of our code, measured on this machine.

  train    a training step of ours beside the usual one, and with --peer trl beside TRL's
  score    scoring in both orders beside one sequence at a time

Each has options of its own: python -m gram_mini.studies.speed train --help. What fits on a card is
computed by python -m gram_mini.studies.speed.memory.
"""

import sys

from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.processes import pick_device
from gram_mini.studies.speed import common, scoring, training

EXAMPLES = "  python -m gram_mini.studies.speed train --shape Qwen2.5-0.5B --bits 4  # on a GPU"
MODEL = "shape bits lora-rank device batch-size rounds record"
STUDIES = {
    "train": (training, f"{MODEL} data max-length gradient-checkpointing peer", (4, 7)),
    "score": (scoring, f"{MODEL} data max-length pairs responses", (16, 5)),
}


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument("study", choices=STUDIES, metavar="STUDY", help="one of the above")
    name = parser.parse_args(argv[:1]).study
    study, taken, (batch, rounds) = STUDIES[name]
    parser = common.parser(str(study.__doc__), EXAMPLES, taken)
    parser.set_defaults(batch_size=batch, rounds=rounds)
    args = parser.parse_args(argv[1:])
    device = pick_device(args.device)
    common.report(f"speed-{name}.json", study.measure(args, device), args, device)


if __name__ == "__main__":
    with clear_errors():
        main()

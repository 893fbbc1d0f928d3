"""Write any data that load_pairs reads as a data file of the official GRAM code.

  --to pre-training    instruction: the question; output: both answers between their markers;
                       labels are not needed
  --to fine-tuning     instruction: the judge's question with both answers; output: A or B

The order of the answers is drawn at random, since most sources put the better one first.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.load import load_pairs
from gram_mini.reading.template import read_template
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_output, write_whole

EXAMPLES = """\
  python -m gram_mini.serving.convert pairs.jsonl gram.json --to pre-training
  python -m gram_mini.serving.convert nvidia/HelpSteer3 gram.jsonl --to fine-tuning \\
      --subset preference"""

STAGES = ("pre-training", "fine-tuning")


def official_row(
    pair: Pair, to: str, swap: bool = False, template: str = prompts.JUDGE
) -> dict[str, str]:
    """One row of the official format (NiuTrans/GRAM, README.md, "Datasets").

    Args:
        pair: the pair.
        to: "pre-training" or "fine-tuning".
        swap: whether y_b comes first.
        template: the judge prompt of a fine-tuning row.

    Raises:
        ValueError: a fine-tuning row without a label.
    """
    a, b = (pair.response_b, pair.response_a) if swap else (pair.response_a, pair.response_b)
    texts = {"prompt": pair.prompt, "response_a": a, "response_b": b}
    if to == "pre-training":
        return {
            "instruction": prompts.fill(prompts.QUESTION, **texts) + "\n\n",
            "input": "",
            "output": prompts.fill(prompts.PAIR, **texts),
        }
    if pair.label is None:
        raise ValueError("a fine-tuning row needs a label")
    return {
        "instruction": prompts.fill(template, **texts),
        "input": "",
        "output": prompts.LABELS[pair.label ^ swap],
    }


def write_official(
    pairs: list[Pair], out: Path, to: str, seed: int = 0, template: str = prompts.JUDGE
) -> int:
    """Write pairs as a JSON list (``out`` ends in .json) or as lines of JSON (.jsonl).

    ``seed`` draws the order of the answers. Pairs whose own texts hold a marker of the format are
    left out. Returns the number of rows written.

    Raises:
        UserError: the file cannot be written, or no pair is left.
    """
    rng = random.Random(seed)
    rows = []
    for pair in pairs:
        swap = rng.random() < 0.5
        row = official_row(pair, to, swap, template)
        if _reads_back(row, pair, swap):
            rows.append(json.dumps(row, ensure_ascii=False))
    if not rows:
        raise UserError(
            f"{out}: no pair is left to write, since each holds a marker of the format itself"
        )
    before, between, after = ("[\n", ",\n", "\n]\n") if out.suffix == ".json" else ("", "\n", "\n")
    write_whole(out, [before, between.join(rows), after], "OUT")
    return len(rows)


def _reads_back(row: dict[str, str], pair: Pair, swap: bool) -> bool:
    """Whether reading the row gives the texts of the pair."""
    try:
        (copy,), _ = parse_pairs([("", row)])
    except UserError:
        return False
    texts = (copy.response_b, copy.response_a) if swap else (copy.response_a, copy.response_b)
    return (copy.prompt, *texts) == (pair.prompt, pair.response_a, pair.response_b)


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    g = parser.add_argument_group("what to convert")
    g.add_argument(
        "source",
        metavar="SOURCE",
        help="file, folder, hub name, or 'village'",
    )
    options.add_reading_options(g)
    g = parser.add_argument_group("what to write")
    g.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="file to write: .json for a list, .jsonl for one row a line",
    )
    g.add_argument("--to", choices=STAGES, required=True, help="the stage that the rows are for")
    g.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        help="draws which answer stands first, and the village's pairs",
    )
    g.add_argument("--overwrite", action="store_true", help="replace a file that is already there")
    options.add_judge_template(
        g, default="ours, in gram_mini/prompts.py; the official code evaluates with its own"
    )
    args = parser.parse_args(argv)
    if args.out.suffix not in (".json", ".jsonl"):
        parser.error("OUT must end in .json or .jsonl")
    check_output(args.out, args.overwrite, "OUT")
    template = read_template(args.judge_template) if args.judge_template else prompts.JUDGE
    data = load_pairs(
        args.source,
        labelled=args.to == "fine-tuning",
        seed=args.seed,
        **options.reading_options(args),
    )
    print(data.summary())
    written = write_official(data.pairs, args.out, args.to, args.seed, template)
    print(f"wrote {args.out}: {written} rows for {args.to}")
    left_out = len(data.pairs) - written
    if left_out:
        print(f"left out {left_out} pairs whose texts hold a marker of the format itself")


if __name__ == "__main__":
    with clear_errors():
        main()

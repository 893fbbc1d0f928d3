"""Write any data that load_pairs reads as a file of the official GRAM code, for pre-training or for
fine-tuning.

  --to pre-training    instruction: the question; output: both answers between their markers; labels are not needed
  --to fine-tuning     instruction: the judge's question with both answers; output: A or B

Which answer stands first is drawn at random, since most sources put the better one first.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from gram_mini import prompts
from gram_mini.errors import UserError, clear_errors
from gram_mini.pairs import Pair
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.load import load_pairs
from gram_mini.runs import options
from gram_mini.runs.output import check_output, write_whole

EXAMPLES = """\
  python -m gram_mini.serving.convert pairs.jsonl gram.json --to pre-training
  python -m gram_mini.serving.convert nvidia/HelpSteer3 gram.jsonl --to fine-tuning --subset preference"""

STAGES = ("pre-training", "fine-tuning")


def official_row(
    pair: Pair, to: str, swap: bool = False, template: str = prompts.JUDGE
) -> dict[str, str]:
    """One row of the official format (NiuTrans/GRAM, README.md, "Datasets"); ``swap`` puts y_b
    first.

    ``template`` is the judge prompt of a fine-tuning row.

    Raises:
        ValueError: a fine-tuning row needs a label.
    """
    if to == "fine-tuning" and pair.label is None:
        raise ValueError("a fine-tuning row needs a label")
    a, b = (pair.response_b, pair.response_a) if swap else (pair.response_a, pair.response_b)
    texts = {"prompt": pair.prompt, "response_a": a, "response_b": b}
    if to == "pre-training":
        return {
            "instruction": prompts.fill(prompts.QUESTION, **texts) + "\n\n",
            "input": "",
            "output": prompts.fill(prompts.PAIR, **texts),
        }
    return {
        "instruction": prompts.fill(template, **texts),
        "input": "",
        "output": prompts.LABELS[pair.label ^ swap],
    }


def write_official(
    pairs: list[Pair], out: Path, to: str, seed: int = 0, template: str = prompts.JUDGE
) -> int:
    """Write pairs as a JSON list (``out`` ends in .json) or as lines of JSON (.jsonl), the order
    drawn by ``seed``.

    Pairs whose own texts hold a marker that would be taken for the format's are left out. Returns
    how many rows were written.

    Raises:
        UserError: the file cannot be written, or no pair is left.
    """
    rng = random.Random(seed)
    rows = []
    for pair in pairs:
        swap = rng.random() < 0.5
        row = official_row(pair, to, swap, template)
        if _holds(row, pair, swap):
            rows.append(json.dumps(row, ensure_ascii=False))
    if not rows:
        raise UserError(
            f"{out}: no pair is left to write, since each holds a marker of the format itself"
        )
    before, between, after = ("[\n", ",\n", "\n]\n") if out.suffix == ".json" else ("", "\n", "\n")
    write_whole(out, [before, between.join(rows), after], "OUT")
    return len(rows)


def _holds(row: dict[str, str], pair: Pair, swap: bool) -> bool:
    """Whether the row, read again, gives the texts of the pair."""
    try:
        (again,), _ = parse_pairs([("", row)])
    except UserError:
        return False
    texts = (again.response_b, again.response_a) if swap else (again.response_a, again.response_b)
    return (again.prompt, *texts) == (pair.prompt, pair.response_a, pair.response_b)


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    g = parser.add_argument_group("what to convert")
    g.add_argument(
        "source",
        type=options.data_name,
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
    template = prompts.read_template(args.judge_template) if args.judge_template else prompts.JUDGE
    data = load_pairs(
        args.source, labelled=args.to == "fine-tuning", seed=args.seed, **options.reading(args)
    )
    print(data.summary())
    written = write_official(data.pairs, args.out, args.to, args.seed, template)
    print(f"wrote {args.out}: {written} rows for {args.to}")
    if written < len(data.pairs):
        print(
            f"left out {len(data.pairs) - written} pairs whose texts hold a marker of the format itself"
        )


if __name__ == "__main__":
    with clear_errors():
        main()

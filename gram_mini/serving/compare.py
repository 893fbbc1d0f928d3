"""Is the server my judge? The same pairs scored by a server and here.

Prints how far the log-odds are apart, and how often the verdicts agree.
Ends with status 1 where they are farther apart than rounding explains. The local judge computes as
score.py does; a plain model, which was not trained here, in bf16 where score.py would take NF4.
"""

from __future__ import annotations

import sys
from statistics import mean

from gram_mini.judge import preferred
from gram_mini.reading.load import load_pairs
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import find_record, load_judge
from gram_mini.serving.served import served_judge

EXAMPLES = """\
  python -m gram_mini.serving.compare --model runs/exported --server http://127.0.0.1:8000 \\
      --data pairs.jsonl --limit 300"""


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument("--model", required=True, metavar="NAME", help="the judge, as in score.py")
    options.add_server(parser)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="labelled pairs to score")
    parser.add_argument("--limit", type=options.positive_int, default=300, help="rows of them")
    options.add_model_options(parser)
    args = parser.parse_args(argv)
    if not args.server:
        parser.error("--server is needed")
    bits = args.bits or (None if find_record(args.model) else 16)

    pairs = load_pairs(args.data, labelled=True, limit=args.limit).pairs
    there = served_judge(args.model, args.server, args.served_name, args.max_length)
    here = load_judge(args.model, bits, args.device, args.max_length)
    rows = here.encode(pairs)
    ours, theirs = (x.compare_encoded(rows, progress="comparing") for x in (here, there))
    apart = [abs(x.log_odds_first - y.log_odds_first) for x, y in zip(ours, theirs)]
    apart += [abs(x.log_odds_second - y.log_odds_second) for x, y in zip(ours, theirs)]
    verdicts = [(preferred(x.probability), preferred(y.probability)) for x, y in zip(ours, theirs)]
    same = sum(x == y for x, y in verdicts)
    print(f"log-odds apart: mean {mean(apart):.2g}, at most {max(apart):.2g}")
    print(f"the same verdict on {same} of {len(pairs)} pairs")
    if max(apart) > there.rounding:
        sys.exit(
            f"the server is not this judge: rounding explains log-odds {there.rounding:.2g} apart"
        )


if __name__ == "__main__":
    with clear_errors():
        main()

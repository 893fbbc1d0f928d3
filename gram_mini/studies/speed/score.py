"""Our scoring against the usual way, in turns on the same pairs of one process.

The usual way is one sequence at a time with the logits of all its positions, in both orders, as the
official evaluation does. Ours is Judge: batches by tokens, two rows of the output matrix, and what
sequences begin with computed once. "unshared" is ours without the last of these. All score with the
same model; with --bits 32 the adapter is merged.

  pairs       pairs of different prompts, each in both orders
  reference   --responses responses to one prompt, ranked against a reference: as many pairs, which
              share the prompt
  round-robin six of these responses, each against each

For each: pairs and tokens per second (medians over --rounds turns; tokens of whole sequences,
padding and sharing apart), how many times as fast ours is (median and range of the turns' ratios),
the peak of memory, and the largest difference of log-odds.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

from gram_mini import prefixes
from gram_mini.batches import EncodedPair, join
from gram_mini.judge import Judge
from gram_mini.model import half_precision
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.models import VILLAGE, compute_dtype, load_tokenizer
from gram_mini.runs.processes import pick_device
from gram_mini.studies.speed.common import (
    GIB,
    LABELS,
    PIECES,
    SHAPES,
    Shape,
    add_model_options,
    build,
    lengths_of,
    machine,
    matrix_peak,
    peak_bytes,
    rows_of,
    seconds,
    spread,
    table,
)

import torch

EXAMPLES = """\
  # the mid shape, drawn lengths: 6 minutes on 2 CPU cores
  python -m gram_mini.studies.speed.score
  # lengths of a file
  python -m gram_mini.studies.speed.score --data pairs.jsonl
  # on a GPU
  python -m gram_mini.studies.speed.score --shape Qwen2.5-0.5B --bits 4 --max-length 1024"""


def judge_of(s: Shape, args, device: torch.device) -> Judge:
    """A reward model of this shape with random weights, for rows of token ids."""
    torch.manual_seed(args.seed)
    model = build(s, args.bits, args.lora_rank, device)
    if args.bits == 32:
        model = model.merge_and_unload()
    judge = Judge(model.eval(), load_tokenizer(VILLAGE), args.max_length, args.batch_size)
    judge.prompt, judge.labels = PIECES["reward"], LABELS
    return judge


@torch.no_grad()
def usual(judge: Judge, rows: list[EncodedPair]) -> torch.Tensor:
    """Log-odds (N, 2) as :meth:`Judge.log_odds` gives them: one sequence at a time, all logits."""
    odds = torch.zeros(len(rows), 2)
    for i, row in enumerate(rows):
        for k, order in enumerate((row, row.swapped())):
            ids = torch.tensor([join(judge.prompt, order)], device=judge.model.device)  # (1, T)
            with half_precision(judge.model):
                logits = judge.model(input_ids=ids, use_cache=False).logits[0].float()  # (T, V)
            z_a, z_b = logits[-1, list(judge.labels)].tolist()
            odds[i, k] = z_b - z_a if k else z_a - z_b
    return odds


def ours(judge: Judge, rows: list[EncodedPair]) -> torch.Tensor:
    """Log-odds (N, 2)."""
    return judge.log_odds(rows)[0]


def unshared(judge: Judge, rows: list[EncodedPair]) -> torch.Tensor:
    """Log-odds (N, 2) in batches, each sequence computed from its beginning."""
    can_share, prefixes.can_share = prefixes.can_share, lambda model: False
    try:
        return ours(judge, rows)
    finally:
        prefixes.can_share = can_share


def operations(s: Shape, rows: list[EncodedPair]) -> float:
    """Floating-point operations of both orders of these pairs, each sequence from its beginning."""
    total = 0
    for row in rows:
        length = row.length + PIECES["reward"].fixed_tokens
        layer = 2 * length * sum(i * o for i, o in s.linear()) + 2 * length**2 * s.queries
        total += s.layers * layer + 2 * s.hidden * s.vocabulary
    return 2 * total


def tasks(s: Shape, args) -> dict[str, list[list[EncodedPair]]]:
    """name -> the rows of each turn."""
    pieces = PIECES["reward"]
    rows_of_task: dict[str, list[list[EncodedPair]]]
    rows_of_task = {"pairs": [], "reference": [], "round-robin": []}
    for seed in range(args.seed, args.seed + args.rounds):
        lengths = lengths_of(args.data, args.pairs + args.responses + 1, seed)
        sizes = lengths[: args.pairs]
        rows_of_task["pairs"].append(rows_of(sizes, pieces, s.vocabulary, args.max_length, seed))
        # One prompt, and a response of each of the other pairs, cut so that any two of them fit.
        sizes = lengths[args.pairs :]
        group = rows_of(sizes, pieces, s.vocabulary, args.max_length, seed)
        room = (args.max_length - pieces.fixed_tokens - len(group[0].prompt)) // 2
        first, *others = [
            replace(row, prompt=group[0].prompt, response_a=row.response_a[:room]) for row in group
        ]
        rows_of_task["reference"].append(
            [replace(row, response_b=first.response_a) for row in others]
        )
        games = itertools.combinations(others[:6], 2)
        rows_of_task["round-robin"].append([replace(a, response_b=b.response_a) for a, b in games])
    return rows_of_task


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    add_model_options(parser)
    parser.add_argument(
        "--data", metavar="FILE", help="pairs whose lengths are taken (default: drawn)"
    )
    parser.add_argument(
        "--pairs", type=options.positive_int, default=8, metavar="N", help="pairs of a turn"
    )
    parser.add_argument(
        "--responses",
        type=options.positive_int,
        default=16,
        metavar="N",
        help="responses of a ranking",
    )
    parser.add_argument(
        "--batch-size", type=options.positive_int, default=16, metavar="N", help="Judge's"
    )
    parser.add_argument(
        "--max-length",
        type=options.positive_int,
        default=512,
        metavar="N",
        help="tokens per sequence",
    )
    parser.add_argument(
        "--rounds",
        type=options.positive_int,
        default=5,
        metavar="N",
        help="turns, each on pairs of its own",
    )
    parser.add_argument(
        "--seed", type=options.seed, default=0, help="draws lengths, tokens and adapters"
    )
    args = parser.parse_args(argv)
    device, s = pick_device(args.device), SHAPES[args.shape]
    best = matrix_peak(device, compute_dtype(args.bits, device))
    judge, lines, reached = judge_of(s, args, device), [], {}
    for name, turns in tasks(s, args).items():
        ways = {"ours": ours, "unshared": unshared, "usual": usual}
        for way in ways.values():
            way(judge, turns[0][:2])  # warm-up
        times: dict[str, list[float]] = {way: [] for way in ways}
        for rows in turns:
            for way, score in ways.items():
                times[way].append(seconds(device, score, judge, rows))
        results = {way: f(judge, turns[0]) for way, f in ways.items()}
        peaks = {
            way: peak_bytes(judge.model, None, f, judge, turns[0][:16]) for way, f in ways.items()
        }
        tokens = [
            2 * sum(row.length + PIECES["reward"].fixed_tokens for row in rows) for rows in turns
        ]
        for way, turn_times in times.items():
            pairs = statistics.median(len(rows) / t for rows, t in zip(turns, turn_times))
            per_second = statistics.median(n / t for n, t in zip(tokens, turn_times))
            faster = apart = ""
            if way != "ours":
                faster = spread([t / t_ours for t, t_ours in zip(turn_times, times["ours"])])
                apart = f"{(results[way] - results['ours']).abs().max():.0e}"
            cells = [f"{pairs:.2f}", f"{per_second:,.0f}", faster, f"{peaks[way] / GIB:.2f}", apart]
            lines.append([name, way, *cells])
        reached[name] = statistics.median(
            operations(s, rows) / t for rows, t in zip(turns, times["ours"])
        )
    # Something else may have run during the first measurement.
    best = max(best, matrix_peak(device, compute_dtype(args.bits, device)))
    head = ["task", "way", "pairs/s", "tokens/s", "ours is faster by", "peak GiB", "log-odds apart"]
    print(table(head, lines))
    print(
        f"\n{args.shape}, {args.bits} bits, at most {args.max_length} tokens "
        f"({'of ' + args.data if args.data else 'drawn'}), {args.pairs} pairs, "
        f"{args.responses} responses, {args.rounds} turns, {machine(device)}, "
        f"torch {torch.__version__}"
    )
    for name, speed in reached.items():
        print(
            f"{name}: as many results as unshared sequences without padding give at "
            f"{speed / 1e9:,.0f} GFLOP/s, {speed / best:.0%} of the {best / 1e9:,.0f} "
            "that matrix products reach here"
        )


if __name__ == "__main__":
    with clear_errors():
        main()

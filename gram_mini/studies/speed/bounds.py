"""On paper: operations, bytes and least time of a training step and of a scored pair.

Per pair of T tokens, with P weights in the matrices of a layer, L layers, Q the width of all
queries, V the vocabulary, H the hidden size, and r rank of LoRA (gram_mini/studies/speed/train.py
and score.py count the same way):

  frozen matrices   2 P T L forward, and 2 P T L for the gradient of their inputs; they have no
                    gradient of their own
  attention         2 T^2 Q L forward (scores and values, half of the square is masked), twice as
                    much backward
  LoRA              2 r (inputs + outputs) T per matrix forward, twice as much backward
  logits            2 H V per trained token forward, as much backward (stage 1); two rows in stage
                    2; V rows once in scoring
  bytes             weights once per pass; each byte that is kept for the backward pass is written
                    and read once (memory.py); 16 bytes per parameter of the adapter. Elementwise
                    kernels that are not fused move several times as much.

Scoring is of both orders. Shared, the instruction and the question (half of the pair here) are
computed once.
"""

from __future__ import annotations

from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.studies.speed.common import (
    MODELS,
    PIECES,
    Shape,
    add_lora_rank,
    add_models,
    rows_of,
    table,
)
from gram_mini.studies.speed.memory import adapter_parameters, layer_bytes
from gram_mini.studies.speed.score import operations as scoring_operations
from gram_mini.studies.speed.train import operations as training_operations

EXAMPLES = """\
  python -m gram_mini.studies.speed.bounds                                   # a second
  python -m gram_mini.studies.speed.bounds --length 2048 --reached 0.3"""

# Dense bf16 operations with float32 sums, and bytes, per second, from the vendor's data sheets.
CARDS = {"RTX 4090": (165e12, 1.008e12), "H100 SXM": (989e12, 3.35e12)}


def pair_of(s: Shape, stage: str, length: int):
    """A pair of ``length`` tokens: half of it instruction and question, a quarter each response."""
    pieces = PIECES[stage]
    answer = max(1, length // 4 - len(pieces.end))
    sizes = (length - pieces.fixed_tokens - 2 * answer, answer, answer)
    return rows_of([sizes], pieces, s.vocabulary, length, seed=0)


def training_bytes(s: Shape, pairs: int, length: int, rank: int) -> float:
    """Bytes of a step on so many pairs, in bf16."""
    weights = 2 * s.layers * sum(i * o for i, o in s.linear())
    kept = pairs * length * s.layers * layer_bytes(s, rank)
    return 2 * weights + 16 * adapter_parameters(s, rank) + 2 * kept


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    add_models(parser, ["Qwen2.5-0.5B", "Qwen3-1.7B", "Llama-3.2-3B", "Qwen3-8B"])
    parser.add_argument(
        "--length",
        type=options.positive_int,
        default=1024,
        metavar="N",
        help="tokens of a pair, at least 256",
    )
    parser.add_argument(
        "--batch-size",
        type=options.positive_int,
        default=8,
        metavar="N",
        help="pairs per training step",
    )
    add_lora_rank(parser)
    parser.add_argument(
        "--reached", type=options.share, default=0.4, help="share of the peak for the last column"
    )
    args = parser.parse_args(argv)
    if args.length < 256:
        parser.error(f"--length {args.length}: give at least 256")
    lines, scored = [], []
    for name in args.models:
        s = MODELS[name]
        for stage in ("pretrain", "reward"):
            pair = pair_of(s, stage, args.length)
            step = args.batch_size * training_operations(s, stage, pair, args.lora_rank, False)
            size = training_bytes(s, args.batch_size, args.length, args.lora_rank)
            times = [
                f"{1e3 * step / speed:.0f}, {1e3 * size / width:.0f}"
                for speed, width in CARDS.values()
            ]
            lines.append([name, stage, f"{step / 1e12:.1f}", f"{size / 1e9:.1f}", *times])
        whole = scoring_operations(s, pair_of(s, "reward", args.length))
        shared = whole * 3 / 4  # of two sequences with one half in common
        bounds = [f"{speed / whole:,.0f}, {speed / shared:,.0f}" for speed, _ in CARDS.values()]
        hours = 1e9 * shared / (args.reached * CARDS["H100 SXM"][0]) / 3600
        scored.append([name, f"{whole / 1e12:.2f}", *bounds, f"{hours:,.0f}"])
    print(
        f"A step on {args.batch_size} pairs of {args.length} tokens in bf16; "
        "at least ms for the operations, ms for the bytes:\n"
    )
    print(table(["model", "stage", "TFLOP", "GB", *CARDS], lines))
    print(
        f"\nScoring a pair of {args.length} tokens in both orders; "
        "at most pairs/s whole, shared; H100 hours for 10^9 pairs"
    )
    print(f"shared, at {args.reached:.0%} of the peak:\n")
    print(table(["model", "TFLOP", *CARDS, "hours"], scored))


if __name__ == "__main__":
    with clear_errors():
        main()

"""How time and memory grow: over the length of a pair, the pairs of a batch, and the responses to
one prompt.

Writes growth.json and growth.png to gram_mini/studies/results. Models, steps and ways of measuring
are those of train.py and score.py; every point is a median over --rounds runs. All sequences of a
batch have one length, so nothing is padded.
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from gram_mini.batches import EncodedPair
from gram_mini.errors import clear_errors
from gram_mini.runs import options
from gram_mini.runs.output import check_place, save_figure, write_whole
from gram_mini.runs.processes import pick_device
from gram_mini.studies.speed.common import (
    GIB,
    PIECES,
    SHAPES,
    add_model_options,
    build,
    loss_of,
    machine,
    peak_bytes,
    rows_of,
    seconds,
    take_step,
)
from gram_mini.studies.speed.score import judge_of, ours
from gram_mini.training import optimizer_and_schedule

EXAMPLES = """\
  python -m gram_mini.studies.speed.growth                                   # the mid shape: 7 minutes on 2 CPU cores
  python -m gram_mini.studies.speed.growth --shape village --out runs/growth"""

RESULTS = Path(__file__).parent.parent / "results"
STAGES = {"pretrain": "stage 1", "reward": "stage 2", "score": "scoring, both orders"}
RANKINGS = {"reference": "against a reference", "round-robin": "round robin"}


def points(values: list[int], make, rounds: int, device: torch.device) -> list[dict]:
    """[{"at", "seconds" of a pair, "gib"}] where make(value) -> (action, its pairs, model, optimiser or None)."""
    figures = []
    for value in tqdm(values, delay=2, leave=False):
        action, pairs, model, optimizer = make(value)
        taken = statistics.median(seconds(device, action) for _ in range(rounds))
        figures.append(
            {
                "at": value,
                "seconds": taken / pairs,
                "gib": peak_bytes(model, optimizer, action) / GIB,
            }
        )
    return figures


def rows_at(count: int, length: int, stage: str, vocabulary: int) -> list[EncodedPair]:
    """Pairs that fill ``length`` together with their prompt pieces: half of it question, a quarter each response."""
    pieces = PIECES["reward" if stage == "score" else stage]
    room = length - pieces.fixed_tokens
    return rows_of(
        [(room - 2 * (room // 4), room // 4, room // 4)] * count, pieces, vocabulary, length, seed=0
    )


def measure(args, device: torch.device) -> dict:
    """The three parts of the figure: {"length" | "batch" | "responses": {name: points}}."""
    s, figures = SHAPES[args.shape], {"length": {}, "batch": {}, "responses": {}}
    model = build(s, args.bits, args.lora_rank, device).train()
    optimizer, _ = optimizer_and_schedule(model, 1e-4, 100)
    args.max_length = max(*args.lengths, args.length)  # judge_of reads it
    judge = judge_of(s, args, device)

    def train(stage: str, rows: list[EncodedPair]):
        def step():
            take_step(model, optimizer, loss_of(model, stage, rows, PIECES[stage]))

        return step, len(rows), model, optimizer

    def score(rows: list[EncodedPair]):
        return lambda: ours(judge, rows), len(rows), judge.model, None

    def at(stage: str, count: int, length: int):
        rows = rows_at(count, length, stage, s.vocabulary)
        return score(rows) if stage == "score" else train(stage, rows)

    def ranking(method: str, count: int):
        first, *others = rows_at(count + 1, args.length, "score", s.vocabulary)
        if method == "reference":
            return score(
                [replace(row, prompt=first.prompt, response_b=first.response_b) for row in others]
            )
        games = itertools.combinations(others, 2)
        return score([replace(a, prompt=first.prompt, response_b=b.response_a) for a, b in games])

    for stage in STAGES:
        at(stage, 1, 256)[0]()  # warm-up
        longer = partial(at, stage, args.batch_size)
        figures["length"][stage] = points(args.lengths, longer, args.rounds, device)
        figures["batch"][stage] = points(
            args.batches, partial(at, stage, length=args.length), args.rounds, device
        )
    for method in RANKINGS:
        figures["responses"][method] = points(
            args.responses, partial(ranking, method), args.rounds, device
        )
    return figures


def draw(figures: dict, args, picture: Path) -> None:
    """Four panels: seconds a pair over length, batch and responses, and memory over length."""
    figure = Figure(figsize=(11, 7))
    panels = figure.subplots(2, 2).flat
    titles = (
        ("length", "seconds", f"{args.batch_size} at once", "tokens of a pair"),
        ("length", "gib", f"{args.batch_size} at once", "tokens of a pair"),
        ("batch", "seconds", f"pairs of {args.length} tokens", "pairs at once"),
        (
            "responses",
            "seconds",
            f"rankings, pairs of {args.length} tokens",
            "responses to one prompt",
        ),
    )
    for panel, (part, what, title, along) in zip(panels, titles):
        for name, line in figures[part].items():
            panel.plot(
                [p["at"] for p in line],
                [p[what] for p in line],
                "o-",
                ms=3,
                label={**STAGES, **RANKINGS}[name],
            )
        panel.set(
            title=title, xlabel=along, ylabel="GiB at most" if what == "gib" else "seconds a pair"
        )
        panel.set_xscale("log", base=2), panel.set_yscale("log", base=2)
        panel.grid(alpha=0.3), panel.legend()
        ticks = [p["at"] for p in next(iter(figures[part].values()))]
        panel.set_xticks(ticks, ticks)
    figure.tight_layout()
    save_figure(figure, picture)


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    several = dict(nargs="+", type=options.positive_int, metavar="N")
    add_model_options(parser)
    parser.add_argument(
        "--lengths", default=[256, 512, 1024, 2048, 4096], **several, help="tokens of a pair"
    )
    parser.add_argument("--batches", default=[1, 2, 4, 8], **several, help="pairs at once")
    parser.add_argument(
        "--responses", default=[2, 4, 8, 16], **several, help="responses to one prompt"
    )
    parser.add_argument(
        "--length",
        type=options.positive_int,
        default=512,
        metavar="N",
        help="tokens of a pair beside the lengths",
    )
    parser.add_argument(
        "--batch-size",
        type=options.positive_int,
        default=2,
        metavar="N",
        help="pairs at once beside the batches",
    )
    parser.add_argument(
        "--rounds", type=options.positive_int, default=3, metavar="N", help="runs of each point"
    )
    parser.add_argument("--seed", type=options.seed, default=0, help="draws the adapters")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="where growth.json and .png go"
    )
    args = parser.parse_args(argv)
    if (shortest := min(*args.lengths, args.length)) < 192:
        parser.error(
            f"{shortest} tokens: the judge prompt alone takes {PIECES['reward'].fixed_tokens}; give at least 192"
        )
    check_place(args.out, "--out")
    device = pick_device(args.device)
    place = machine(device)
    figures = measure(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    given = {
        name: value
        for name, value in vars(args).items()
        if name not in ("out", "device", "max_length")
    }
    record = {"options": given, "place": place, "torch": torch.__version__, **figures}
    write_whole(args.out / "growth.json", [json.dumps(record, indent=1) + "\n"], "results")
    draw(figures, args, args.out / "growth.png")
    print(f"wrote {args.out / 'growth.json'} and {args.out / 'growth.png'}")


if __name__ == "__main__":
    with clear_errors():
        main()

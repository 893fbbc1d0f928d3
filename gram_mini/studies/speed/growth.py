"""How time and memory grow with the length of a pair, the batch, and the responses to a prompt.

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
from typing import Any

from gram_mini.batches import EncodedPair
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
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

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

EXAMPLES = """\
  # the mid shape: 7 minutes on 2 CPU cores
  python -m gram_mini.studies.speed.growth
  python -m gram_mini.studies.speed.growth --shape village --out runs/growth"""

RESULTS = Path(__file__).parent.parent / "results"
STAGES = {"pretrain": "stage 1", "reward": "stage 2", "score": "scoring, both orders"}
RANKINGS = {"reference": "against a reference", "round-robin": "round robin"}


def points(values: list[int], make, rounds: int, device: torch.device) -> list[dict]:
    """A point {"at", "seconds" of a pair, "gib"} for each of the values.

    ``make(value)`` gives (action, how many pairs it is about, model, optimiser or None).
    """
    figures = []
    for value in tqdm(values, delay=2, leave=False):
        action, pairs, model, optimizer = make(value)
        duration = statistics.median(seconds(device, action) for _ in range(rounds))
        size = peak_bytes(model, optimizer, action) / GIB
        figures.append({"at": value, "seconds": duration / pairs, "gib": size})
    return figures


def rows_at(count: int, length: int, stage: str, vocabulary: int) -> list[EncodedPair]:
    """Pairs that fill ``length`` with the prompt pieces: half question, a quarter each response."""
    pieces = PIECES["reward" if stage == "score" else stage]
    room = length - pieces.fixed_tokens
    sizes = (room - 2 * (room // 4), room // 4, room // 4)
    return rows_of([sizes] * count, pieces, vocabulary, length, seed=0)


def measure(args, device: torch.device) -> dict:
    """The three parts of the figure: {"length" | "batch" | "responses": {name: points}}."""
    s = SHAPES[args.shape]
    figures: dict[str, dict[str, list[dict]]] = {"length": {}, "batch": {}, "responses": {}}
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
            games = [(row, first.response_b) for row in others]
        else:
            games = [(a, b.response_a) for a, b in itertools.combinations(others, 2)]
        return score([replace(a, prompt=first.prompt, response_b=b) for a, b in games])

    for stage in STAGES:
        at(stage, 1, 256)[0]()  # warm-up
        longer = partial(at, stage, args.batch_size)
        figures["length"][stage] = points(args.lengths, longer, args.rounds, device)
        larger = partial(at, stage, length=args.length)
        figures["batch"][stage] = points(args.batches, larger, args.rounds, device)
    for method in RANKINGS:
        more = partial(ranking, method)
        figures["responses"][method] = points(args.responses, more, args.rounds, device)
    return figures


def draw(figures: dict, args, picture: Path) -> None:
    """Four panels: seconds a pair over length, batch and responses, and memory over length."""
    figure = Figure(figsize=(11, 7))
    panels = figure.subplots(2, 2).flat
    pairs = f"pairs of {args.length} tokens"
    contents = (
        ("length", "seconds", f"{args.batch_size} at once", "tokens of a pair"),
        ("length", "gib", f"{args.batch_size} at once", "tokens of a pair"),
        ("batch", "seconds", pairs, "pairs at once"),
        ("responses", "seconds", f"rankings, {pairs}", "responses to one prompt"),
    )
    y_labels = {"seconds": "seconds a pair", "gib": "GiB at most"}
    for panel, (part, figure_name, title, x_label) in zip(panels, contents):
        for name, line in figures[part].items():
            label = {**STAGES, **RANKINGS}[name]
            x, y = [p["at"] for p in line], [p[figure_name] for p in line]
            panel.plot(x, y, "o-", ms=3, label=label)
        panel.set(title=title, xlabel=x_label, ylabel=y_labels[figure_name])
        panel.set_xscale("log", base=2), panel.set_yscale("log", base=2)
        panel.grid(alpha=0.3), panel.legend()
        ticks = [p["at"] for p in next(iter(figures[part].values()))]
        panel.set_xticks(ticks, ticks)
    figure.tight_layout()
    save_figure(figure, picture)


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    several: dict[str, Any] = dict(nargs="+", type=options.positive_int, metavar="N")
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
        fixed = PIECES["reward"].fixed_tokens
        parser.error(f"{shortest} tokens: the judge prompt alone has {fixed}; give at least 192")
    check_place(args.out, "--out")
    device = pick_device(args.device)
    place = machine(device)
    figures = measure(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    left_out = ("out", "device", "max_length")
    recorded = {name: value for name, value in vars(args).items() if name not in left_out}
    record = {"options": recorded, "place": place, "torch": torch.__version__, **figures}
    write_whole(args.out / "growth.json", [json.dumps(record, indent=1) + "\n"], "results")
    draw(figures, args, args.out / "growth.png")
    print(f"wrote {args.out / 'growth.json'} and {args.out / 'growth.png'}")


if __name__ == "__main__":
    with clear_errors():
        main()

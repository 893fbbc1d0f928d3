"""How time and memory grow with the length of a pair, the batch, and the responses to a prompt.

Models and steps are those of the studies train and score. Every cell has the seconds of a pair, the
median over --rounds runs, and the peak in GiB. All sequences of a batch have one length.
"""

import itertools
import statistics
from dataclasses import replace
from functools import partial

from gram_mini.errors import UserError
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import GIB, SHAPES, STAGES
from gram_mini.studies.speed.scoring import judge_of, ours
from gram_mini.training import optimizer_and_schedule

import torch
from tqdm import tqdm

COUNT = "at once (seconds a pair, peak GiB)"


def measure(args, device: torch.device) -> list[dict[str, str]]:
    """Rows over --lengths, over --batches and over --rankings."""
    if min(args.rankings) < 2:
        raise UserError("--rankings 1: a ranking needs at least 2 responses")
    shortest = min(*args.lengths, args.length)
    args.max_length = max(*args.lengths, args.length)
    config = SHAPES[args.shape]
    model = common.build(config, args.bits, args.lora_rank, device).train()
    optimizer, _ = optimizer_and_schedule(model, 1e-4, 100)
    judge = judge_of(config, args, device)
    rows_at = lambda stage, count, length: common.full_rows(count, stage, config.vocab_size, length)

    step = partial(common.take_step, model, optimizer, common.loss_of)
    ways = {stage: (partial(step, stage), model, optimizer) for stage in ("pretrain", "reward")}
    ways["score"] = partial(ours, judge), judge.model, None

    def cell(stage: str, rows) -> str:
        action, *held = ways[stage]
        taken = statistics.median(common.seconds(device, action, rows) for _ in range(args.rounds))
        return f"{taken / len(rows):#.3g}, {common.peak_bytes(*held, action, rows) / GIB:.2f}"

    settings = [(args.batch_size, length) for length in args.lengths]
    settings += [(count, args.length) for count in args.batches]
    table = []
    for stage in STAGES:
        cell(stage, rows_at(stage, 1, shortest))  # warm-up
    for count, length in tqdm(settings, delay=2, leave=False):
        row = {COUNT: f"{count} x {length:,} tokens"}
        for stage, title in STAGES.items():
            row[title] = cell(stage, rows_at(stage, count, length))
        table.append(row)
    for count in tqdm(args.rankings, delay=2, leave=False):
        first, *others = rows_at("score", count + 1, args.length)
        rankings = {
            "against a reference": [(row, first) for row in others],
            "round robin": list(itertools.combinations(others, 2)),
        }
        row = {COUNT: f"{count} responses"}
        for name, games in rankings.items():
            rows = [replace(a, prompt=first.prompt, response_b=b.response_a) for a, b in games]
            row[name] = cell("score", rows)
        table.append(row)
    return table

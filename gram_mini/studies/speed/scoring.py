"""Our scoring beside the usual way, in turns on the same pairs of one process.

The usual way is one sequence at a time with the logits of all its positions, in both orders, as the
official evaluation does. Ours is SharingJudge: batches by tokens, two rows of the output matrix,
and what sequences begin with computed once. "unshared" is ours without the last. The tasks are

  pairs        pairs of different prompts, each in both orders
  reference    --responses responses to one prompt, each against the same reference
  round robin  six of these responses, each against each

The figures are those of the study train, in pairs, and the largest difference of log-odds.
"""

import itertools
from dataclasses import replace
from functools import partial

from gram_mini.batches import EncodedPair, join
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.model import half_precision
from gram_mini.runs.models import VILLAGE, load_tokenizer
from gram_mini.runs.sharing import SharingJudge
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import LABELS, PIECES, SHAPES

import torch


def judge_of(config, args, device: torch.device) -> Judge:
    """A reward model with random weights, for rows of token ids."""
    torch.manual_seed(0)
    model = common.build(config, args.bits, args.lora_rank, device)
    if args.bits == 32:
        model = model.merge_and_unload()
    judge = SharingJudge(model.eval(), load_tokenizer(VILLAGE), args.max_length, args.batch_size)
    judge.prompt, judge.labels = PIECES["score"], LABELS
    return judge


def ours(judge: Judge, rows: list[EncodedPair]) -> torch.Tensor:
    """Log-odds (N, 2)."""
    return judge.log_odds(rows)[0]


def unshared(judge: Judge, rows: list[EncodedPair]) -> torch.Tensor:
    """Log-odds (N, 2) in batches by the plain Judge: each sequence from its beginning."""
    plain = Judge(judge.model, judge.tokenizer, judge.max_length, judge.batch_size)
    plain.prompt, plain.labels = judge.prompt, judge.labels
    return ours(plain, rows)


@torch.no_grad()
def usual(judge: Judge, rows: list[EncodedPair]) -> torch.Tensor:
    """Log-odds (N, 2): one sequence at a time, all logits."""
    odds = torch.zeros(len(rows), 2)
    for i, row in enumerate(rows):
        for k, order in enumerate((row, row.swapped())):
            ids = torch.tensor([join(judge.prompt, order)], device=judge.model.device)  # (1, T)
            with half_precision(judge.model):
                logits = judge.model(input_ids=ids, use_cache=False).logits[0].float()  # (T, V)
            z_a, z_b = logits[-1, list(judge.labels)].tolist()
            odds[i, k] = z_b - z_a if k else z_a - z_b
    return odds


def tasks(args) -> dict[str, list[list[EncodedPair]]]:
    """name -> the rows of each turn."""
    given = "score", SHAPES[args.shape].vocab_size, args.max_length
    count = args.pairs + args.responses + 1
    turns: dict[str, list[list[EncodedPair]]] = {"pairs": [], "reference": [], "round robin": []}
    for seed in range(args.rounds):
        rows = common.rows_like(args.data, count, *given, seed)
        turns["pairs"].append(rows[: args.pairs])
        # One prompt, and a response of each of the other pairs, cut so that any two of them fit.
        prompt = rows[args.pairs].prompt
        room = (args.max_length - PIECES["score"].fixed_tokens - len(prompt)) // 2
        group = [replace(row, prompt=prompt) for row in rows[args.pairs :]]
        first, *others = [replace(row, response_a=row.response_a[:room]) for row in group]
        turns["reference"].append([replace(row, response_b=first.response_a) for row in others])
        games = itertools.combinations(others[:6], 2)
        turns["round robin"].append([replace(a, response_b=b.response_a) for a, b in games])
    return turns


def measure(args, device: torch.device) -> list[dict[str, str]]:
    """The rows of all tasks."""
    if args.responses < 2:
        raise UserError("--responses 1: a ranking needs at least 2")
    judge, rows = judge_of(SHAPES[args.shape], args, device), []
    ways = {f.__name__: (partial(f, judge), judge.model, None) for f in (ours, unshared, usual)}
    for task, turns in tasks(args).items():
        figures, _ = common.compare(ways, turns, [len(batch) for batch in turns], "pairs")
        for row in figures:
            others = ways[row["other way"]][0](turns[0])
            apart = (others - ours(judge, turns[0])).abs().max()
            rows.append({"what": task, **row, "log-odds apart": f"{apart:.0e}"})
    return rows

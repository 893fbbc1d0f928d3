"""Our scoring beside the usual way, in turns on the same pairs of one process.

The usual way is one sequence at a time with the logits of all its positions, in both orders, as the
official evaluation does. Ours is SharingJudge: batches by tokens, two rows of the output matrix,
and what sequences begin with computed once. "unshared" is ours without the last.
"""

from functools import partial

from gram_mini.batches import EncodedPair, join
from gram_mini.judge import Judge
from gram_mini.model import half_precision
from gram_mini.runs.models import load_tokenizer
from gram_mini.runs.run import LORA_RANK
from gram_mini.runs.sharing import SharingJudge
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import LABELS, PIECES, SHAPES, STAGES
from gram_mini.village import VILLAGE

import torch


def judge_of(config, bits: int, length: int, pairs: int, device: torch.device) -> Judge:
    """A reward model with random weights, for rows of token ids, so many pairs in a pass."""
    torch.manual_seed(0)
    model = common.build(config, bits, LORA_RANK, device)
    if bits == 32:
        model = model.merge_and_unload()
    model.eval().requires_grad_(False)
    judge = SharingJudge(model, load_tokenizer(VILLAGE), length, batch_size=2 * pairs)
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


def measure(args, device: torch.device) -> list[dict[str, str]]:
    """A row for each way that ours is compared with."""
    config, ways = SHAPES[args.shape], (ours, unshared, usual)
    judge = judge_of(config, args.bits, args.max_length, args.batch_size, device)
    batch = common.full_rows(args.batch_size, "score", config.vocab_size, args.max_length)
    timed = {way.__name__: (partial(way, judge), judge.model, None) for way in ways}
    rows, _ = common.compare(timed, batch, args.rounds, args.batch_size, "pairs")
    for row, way in zip(rows, ways[1:]):
        apart = (way(judge, batch) - ours(judge, batch)).abs().max()
        row["log-odds apart"] = f"{apart:.0e}"
    return [{"what": STAGES["score"], **row} for row in rows]

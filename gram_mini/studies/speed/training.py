"""A training step of ours beside the usual one, in turns on the same batches of one process.

The usual step is that of SFT trainers: transformers' own forward pass with labels, so logits of the
whole sequence in float32, and a cross-entropy over the tokens that count (stage 1: the pair; stage
2: the one token of the verdict). Both take the same adapted model, the same pairs and AdamW.

Figures: tokens per second without padding (the median over --rounds turns), how many times as fast
ours is (median and range of the turns' ratios), the peak of memory, and the share of the speed at
which this machine multiplies large matrices. Weights are random, which changes none of these.
"""

import random
import statistics
from functools import partial

from gram_mini.batches import IGNORED, EncodedPair, batch_order, join, pad, pair_batch
from gram_mini.model import half_precision
from gram_mini.runs.models import checkpoint_gradients, compute_dtype
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import LABELS, PIECES, SHAPES, STAGES, take_step
from gram_mini.training import optimizer_and_schedule

import torch


def usual_batch(stage: str, rows: list[EncodedPair]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T) for transformers, which shifts the labels."""
    sequences = [join(PIECES[stage], row) for row in rows]
    if stage == "pretrain":
        _, targets = pair_batch(rows, PIECES[stage])  # (B, T)
        labels = torch.cat([torch.full((len(rows), 1), IGNORED), targets[:, :-1]], dim=1)
    else:
        verdicts = [LABELS[row.label or 0] for row in rows]
        targets = [[IGNORED] * len(ids) + [verdict] for ids, verdict in zip(sequences, verdicts)]
        labels = pad(targets, IGNORED)
        sequences = [ids + [verdict] for ids, verdict in zip(sequences, verdicts)]
    mask = pad([[1] * len(ids) for ids in sequences], 0)
    return {"input_ids": pad(sequences, 0), "attention_mask": mask, "labels": labels}


def usual_loss(model, stage: str, rows: list[EncodedPair]) -> torch.Tensor:
    """The loss of transformers' own forward pass, in half precision where trainers use it."""
    batch = {name: tensor.to(model.device) for name, tensor in usual_batch(stage, rows).items()}
    with half_precision(model):
        return model(**batch).loss


def compare(stage: str, args, device: torch.device) -> list[dict[str, str]]:
    """The figures of one stage: a row for each way that ours is compared with."""
    config, count = SHAPES[args.shape], args.batch_size * max(16, args.rounds)
    rows = common.rows_like(args.data, count, stage, config.vocab_size, args.max_length, 0)
    order = batch_order([row.length for row in rows], args.batch_size, random.Random(0))
    turns = [[rows[i] for i in batch] for batch in order][: args.rounds]
    torch.manual_seed(0)
    model = common.build(config, args.bits, args.lora_rank, device).train()
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    ways = {}
    for way, loss in {"ours": common.loss_of, "usual": usual_loss}.items():
        optimizer, _ = optimizer_and_schedule(model, 1e-4, 100)
        ways[way] = (partial(take_step, model, optimizer, loss, stage), model, optimizer)
    tokens = [sum(row.length + PIECES[stage].fixed_tokens for row in batch) for batch in turns]
    figures, times = common.compare(ways, turns, tokens, "tokens")
    needed = [common.operations(config, stage, batch, args.lora_rank) for batch in turns]
    best = common.matrix_peak(device, compute_dtype(args.bits, device))
    share = statistics.median(n / t for n, t in zip(needed, times)) / best
    figures[0]["ours, of matrix products"] = f"{share:.0%} of {best / 1e9:,.0f} GFLOP/s"
    return [{"what": STAGES[stage], **row} for row in figures]


def measure(args, device: torch.device) -> list[dict[str, str]]:
    """The rows of both stages."""
    return [row for stage in ("pretrain", "reward") for row in compare(stage, args, device)]

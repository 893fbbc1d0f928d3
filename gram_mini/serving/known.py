"""What an exported judge says of a few pairs: a server that says something else has other weights.

Export writes it beside the weights, as token ids and log-odds, so that it holds for any tokenizer
and any judge prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

from gram_mini.batches import join
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.village.pairs import village_pairs

import torch

KNOWN = "gram_scores.json"
PAIRS = 8


def write_known(folder: Path, judge: Judge, dtype: torch.dtype) -> None:
    """Score pairs of the village in both orders with a judge in float32, and write it down.

    ``dtype`` is that of the weights as they are written. A server rounds to it both labels' logits,
    and on the way to them: log-odds within twice its precision at the largest logit are equal.
    """
    rows = judge.encode(village_pairs("in-distribution")[:PAIRS])
    orders = [order for row in rows for order in (row, row.swapped())]
    z, _ = judge.verdicts(orders)  # (2 PAIRS, 2): Z_A, Z_B
    known = {
        "prompts": [join(judge.prompt, row) for row in orders],
        "log_odds": (z[:, 0] - z[:, 1]).tolist(),  # Z_A - Z_B after each
        "rounding": 0.01 + 2 * torch.finfo(dtype).eps * z.abs().max().item(),
    }
    (folder / KNOWN).write_text(json.dumps(known))


def read_known(folder: Path) -> dict | None:
    """What write_known has written, None if it has not.

    Raises:
        UserError: it cannot be read.
    """
    if not (folder / KNOWN).is_file():
        return None
    try:
        known = json.loads((folder / KNOWN).read_text())
        assert len(known["prompts"]) == len(known["log_odds"]) and known["rounding"] > 0
        return known
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{folder / KNOWN}: cannot be read; export the run anew") from None

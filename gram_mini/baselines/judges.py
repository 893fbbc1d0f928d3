"""Heads of their own on the last hidden state, and the judges that read them.

scalar head   (1, H)   a reward for each response by itself; the difference of two is a margin
label rows    (2, H)   a trained copy of the two rows of the output matrix, for a judge that is otherwise frozen
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from gram_mini.baselines.batches import response_prompt, response_segments
from gram_mini.batches import EncodedPair, Segments
from gram_mini.judge import Judge
from gram_mini.model import evaluating


def add_head(model, labels: tuple[int, int] | None = None) -> torch.nn.Linear:
    """Put a trainable head on ``model.head``: a scalar one, or, given the labels, a copy of their rows."""
    head = torch.nn.Linear(
        model.get_input_embeddings().weight.shape[1], 1 if labels is None else 2, bias=False
    )
    with torch.no_grad():
        if labels is None:
            head.weight.normal_(std=0.02)
        else:
            head.weight.copy_(model.get_output_embeddings().weight[list(labels)])
    model.head = head.to(model.device)
    return model.head


def load_head(model, file: Path, trainable: bool = False) -> torch.nn.Linear:
    """Put the head that a run saved on ``model.head``."""
    weight = load_file(file)["weight"]  # (1, H) or (2, H)
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.load_state_dict({"weight": weight})
    model.head = head.to(model.device).requires_grad_(trainable)
    return model.head


def freeze_all_but_head(model) -> None:
    """Leave model and adapter as they are: only the head is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))


def judge_with_head(model, *options) -> Judge:
    """The judge that reads ``model.head``, if there is one; ``options`` as Judge's."""
    head = getattr(model, "head", None)
    kind = Judge if head is None else ScalarJudge if head.out_features == 1 else LabelRowsJudge
    return kind(model, *options)


class LabelRowsJudge(Judge):
    """A judge whose two label rows were trained apart from the output matrix."""

    def label_logits(self, verdict: torch.Tensor) -> torch.Tensor:
        """Z_A and Z_B (B, 2) of hidden states (B, H), by the trained rows."""
        return self.model.head(verdict.to(self.model.head.weight.dtype))


class ScalarJudge(Judge):
    """A discriminative reward model behind the interface of a judge: both orders are one, and the label mass is 1."""

    def __init__(self, model, tokenizer, *options, **named):
        super().__init__(model, tokenizer, *options, **named)
        self.prompt = response_prompt(tokenizer)

    def segments(self, row: EncodedPair) -> Segments:
        """What the head reads: the prompt and the first response of a row."""
        return response_segments(self.prompt, row)

    def rewards(self, states: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) of hidden states (B, H) where a response is over."""
        return self.model.head(states.to(self.model.head.weight.dtype))[:, 0]

    def log_odds(
        self, rows: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """r_a - r_b as log-odds (N, 2), the same in both columns; a mass (N, 2) of 1; and which pairs (N,) were cut."""
        orders = [order for row in rows for order in (row, row.swapped())]  # a first, then b
        rewards = torch.zeros(len(orders))
        with evaluating(self.model):
            for places, states in self.verdict_states(orders, progress):  # (B,), (B, H)
                rewards[places] = self.rewards(states).float().cpu()
        r_a, r_b = rewards.view(-1, 2).T  # (N,), (N,)
        odds = (r_a - r_b)[:, None].expand(-1, 2)
        return (
            odds,
            torch.ones(len(rows), 2),
            torch.tensor([row.truncated for row in rows], dtype=torch.bool),
        )

    def plain_log_odds(self, rows: list[EncodedPair]) -> torch.Tensor:
        """The same as :meth:`log_odds`: there is no other way for a head that sees each response by itself."""
        return self.log_odds(rows)[0]

"""Trained heads on the last hidden state, and the judges that use them.

scalar head   (1, H)   a reward for each response by itself; the difference of two is a margin
label rows    (2, H)   a trained copy of two rows of the output matrix; the rest is frozen
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gram_mini.baselines.batches import response_prompt, response_segments
from gram_mini.batches import EncodedPair, Segments
from gram_mini.errors import UserError
from gram_mini.judge import Judge, check_finite
from gram_mini.model import OutputHead, evaluating, model_name, output_head, without_adapter

import torch
from safetensors.torch import load_file


def add_head(model, labels: tuple[int, int] | None = None) -> torch.nn.Linear:
    """Put a trainable head on ``model.trained_head``.

    Without ``labels`` it is a scalar head (1, H) with small random weights. With the token ids of A
    and B it is a copy of their rows of the output matrix (2, H).

    Raises:
        UserError: if the model's last hidden states cannot be read.
    """
    if getattr(without_adapter(model), "own_logits", False):
        raise UserError(
            f"{model_name(model)}: makes its logits in a way of its own, so no head can be put on "
            "its hidden states; train it with train_reward.py"
        )
    width = model.get_input_embeddings().weight.shape[1]
    head = torch.nn.Linear(width, 1 if labels is None else 2, bias=False)
    with torch.no_grad():
        if labels is None:
            head.weight.normal_(std=0.02)
        else:
            head.weight.copy_(model.get_output_embeddings().weight[list(labels)])
    model.trained_head = head.to(model.device)
    return model.trained_head


def load_head(model, file: Path, trainable: bool = False) -> torch.nn.Linear:
    """Put the head that a run saved on ``model.trained_head``."""
    weight = load_file(file)["weight"]  # (1, H) or (2, H)
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.load_state_dict({"weight": weight})
    model.trained_head = head.to(model.device).requires_grad_(trainable)
    return model.trained_head


def freeze_all_but_head(model) -> None:
    """Freeze model and adapter, so that only the head is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("trained_head."))


def judge_with_head(model, *arguments) -> Judge:
    """The judge that uses ``model.trained_head``, if there is one; takes the arguments of Judge."""
    head = getattr(model, "trained_head", None)
    kind = Judge if head is None else ScalarJudge if head.out_features == 1 else LabelRowsJudge
    return kind(model, *arguments)


class LabelRowsJudge(Judge):
    """A judge with two label rows that were trained apart from the output matrix."""

    def label_logits(self, verdict: torch.Tensor) -> torch.Tensor:
        """Z_A and Z_B (B, 2) of hidden states (B, H), by the trained rows."""
        head = output_head(self.model)  # its bias, scale and cap stay
        assert isinstance(head, OutputHead)  # add_head takes no other model
        bias = None if head.bias is None else head.bias[list(self.labels)].float()
        return replace(head, weight=self.model.trained_head.weight, bias=bias)(verdict)


class ScalarJudge(Judge):
    """A discriminative reward model with the interface of a judge.

    Both orders give the same log-odds, and the label mass is 1.
    """

    def __init__(self, model, tokenizer, *arguments, **keywords):
        super().__init__(model, tokenizer, *arguments, **keywords)
        self.prompt = response_prompt(tokenizer)

    def segments(self, row: EncodedPair) -> Segments:
        """What the head reads: the prompt and the first response of a row."""
        return response_segments(self.prompt, row)

    def rewards(self, states: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) of the hidden states (B, H) after each response."""
        return self.model.trained_head(states.to(self.model.trained_head.weight.dtype))[:, 0]

    def log_odds(
        self, rows: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge encoded pairs as in Judge.log_odds.

        Returns r_a - r_b as log-odds (N, 2), the same in both columns; the label mass (N, 2), which
        is 1; and which pairs (N,) were cut.
        """
        orders = [order for row in rows for order in (row, row.swapped())]  # a first, then b
        rewards = torch.zeros(len(orders))
        with evaluating(self.model):
            for places, states in self.verdict_states(orders, progress):  # (B,), (B, H)
                rewards[places] = self.rewards(states).float().cpu()
        r_a, r_b = rewards.view(-1, 2).T  # (N,), (N,)
        odds = (r_a - r_b)[:, None].expand(-1, 2)  # (N, 2)
        check_finite(odds, rows)
        truncated = torch.tensor([row.truncated for row in rows], dtype=torch.bool)  # (N,)
        return odds, torch.ones(len(rows), 2), truncated

    def plain_log_odds(self, rows: list[EncodedPair]) -> torch.Tensor:
        """The log-odds (N, 2) of :meth:`log_odds`; there is no plainer way for a scalar head."""
        return self.log_odds(rows)[0]

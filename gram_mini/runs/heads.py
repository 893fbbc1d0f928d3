"""Trained heads on the last hidden state, the judges that use them, and what they read.

scalar head   (1, H)   a reward for each response by itself; the difference of two is a margin
label rows    (2, H)   a trained copy of two rows of the output matrix; the rest is frozen

gram_mini/baselines trains them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gram_mini.batches import EncodedPair, Segments, judge_batch, right_labels
from gram_mini.chat import SLOTS, encode, encode_beginning, render, split_at_slots
from gram_mini.judge import Judge
from gram_mini.model import evaluating, output_head
from gram_mini.prompts import PromptPieces
from gram_mini.runs.sharing import SharingJudge

import torch
from safetensors.torch import load_file

# ---- heads ---------------------------------------------------------------------------


def add_head(model, labels: tuple[int, int] | None = None) -> torch.nn.Linear:
    """Put a trainable head on ``model.trained_head``.

    Without ``labels`` it is a scalar head (1, H) with small random weights. With the token ids of A
    and B it is a copy of their rows of the output matrix (2, H).
    """
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


# ---- judges --------------------------------------------------------------------------


def judge_with_head(model, *arguments) -> Judge:
    """The judge that uses ``model.trained_head``, if there is one; takes the arguments of Judge."""
    head = getattr(model, "trained_head", None)
    if head is None:
        return SharingJudge(model, *arguments)
    if head.out_features == 1:
        return ScalarJudge(model, *arguments)
    return LabelRowsJudge(model, *arguments)


class LabelRowsJudge(SharingJudge):
    """A judge with two label rows that were trained apart from the output matrix."""

    def label_logits(self, verdict: torch.Tensor) -> torch.Tensor:
        """Z_A and Z_B (B, 2) of hidden states (B, H), by the trained rows."""
        head = output_head(self.model)  # its bias, scale and cap stay
        bias = None if head.bias is None else head.bias[list(self.labels)].float()
        return replace(head, weight=self.model.trained_head.weight, bias=bias)(verdict)


class ScalarJudge(SharingJudge):
    """A discriminative reward model with the interface of a judge.

    Both orders give the same log-odds, and the label mass is 1.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.prompt = response_prompt(self.tokenizer)

    def segments(self, row: EncodedPair) -> Segments:
        """What the head reads: the prompt and the first response of a row."""
        return response_segments(self.prompt, row)

    def rewards(self, states: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) of the hidden states (B, H) after each response."""
        return self.model.trained_head(states.to(self.model.trained_head.weight.dtype))[:, 0]

    def verdicts(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards in the places A and B (M, 2), and the label mass (M,), which is 1.

        Of each two of the ``orders`` the second is the first one swapped, as in Judge.log_odds.
        """
        rewards = torch.zeros(len(orders))  # (M,), in the place A
        with evaluating(self.model):
            for places, states in self.verdict_states(orders, progress):  # (B,), (B, H)
                rewards[places] = self.rewards(states).float().cpu()
        swapped = rewards.view(-1, 2).flip(dims=[1]).flatten()  # (M,), in the place B
        return torch.stack([rewards, swapped], dim=1), torch.ones(len(orders))


# ---- what a scalar head reads --------------------------------------------------------


def response_prompt(tokenizer) -> PromptPieces:
    """The question as the user's turn, one response as the assistant's; ``between`` stays empty."""
    turn = [
        {"role": "user", "content": SLOTS["prompt"]},
        {"role": "assistant", "content": SLOTS["response_a"]},
    ]
    plain = "\n\n".join(part["content"] for part in turn)
    text = render(tokenizer, turn) if tokenizer.chat_template else plain
    before, after, end_text = split_at_slots(text, ["prompt", "response_a"])
    after_prompt, end = encode(tokenizer, after), encode(tokenizer, end_text)
    if not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]  # the reward is read after the response
    start = encode_beginning(tokenizer, before)
    return PromptPieces(start, after_prompt, [], end, ignored=len(after_prompt))


def response_segments(pieces: PromptPieces, row: EncodedPair) -> Segments:
    """The prompt and the first response of a row, as two lists of token ids."""
    return (*pieces.start, *row.prompt, *pieces.after_prompt), (*row.response_a, *pieces.end)


def response_batch(
    rows: list[EncodedPair], pieces: PromptPieces, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each response after its prompt: all first responses, then all second ones.

    Returns ids (2B, T); last (2B,), the position of the last token; and right (B,), the preferred
    response as in batches.judge_batch.
    """
    orders = [first_alone(order) for order in (*rows, *(row.swapped() for row in rows))]
    ids, last, _ = judge_batch(orders, pieces, device)
    return ids, last, right_labels(rows).to(device)


def preferred_alone(rows: list[EncodedPair]) -> list[EncodedPair]:
    """Labelled rows with the preferred response only, which the text loss reads."""
    return [first_alone(row.swapped() if row.label else row) for row in rows]


def first_alone(row: EncodedPair) -> EncodedPair:
    """A row without its second response."""
    return replace(row, response_b=())

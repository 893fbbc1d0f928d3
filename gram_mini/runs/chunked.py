"""losses.pair_loss with little memory: the same number and the same gradient.

With 151,936 tokens in the vocabulary the logits take 0.6 MB for each trained token, more than all
layers keep for it. Here the logits of a few hundred tokens are made, turned into their gradient in
place, and dropped before the next ones are made. This works because the output matrix is frozen:
only the gradient of the hidden states, (N, H), has to be kept.
"""

from __future__ import annotations

from gram_mini.batches import IGNORED
from gram_mini.losses import pair_loss
from gram_mini.model import output_head

import torch

LOGITS_AT_ONCE = 2**25  # as many logits take 128 MiB in float32


def chunked_pair_loss(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss per trained token, in nats.

    Args:
        model: its output matrix is taken as frozen.
        hidden: (B, T, H), the last hidden states.
        targets: (B, T), the token that follows, or IGNORED where none is trained.
    """
    trained = targets != IGNORED  # (B, T)
    return token_loss(hidden[trained], targets[trained], output_head(model))


def token_loss(hidden: torch.Tensor, targets: torch.Tensor, head) -> torch.Tensor:
    """``pair_loss(head(hidden), targets)`` for hidden states (N, H) and targets (N,); ``head`` is a
    model.OutputHead.
    """
    rows = max(1, LOGITS_AT_ONCE // len(head.weight))
    if len(hidden) <= rows:
        return pair_loss(head(hidden), targets)
    return _InChunks.apply(hidden, targets, head, rows)


class _InChunks(torch.autograd.Function):
    """Computes the gradient of each chunk right after its loss.

    torch 2.13 has F.linear_cross_entropy, which does the same, but in bfloat16 it adds up the loss
    in bfloat16 (with 100 chunks it was off by 2%), and it knows no cap.
    """

    @staticmethod
    def forward(ctx, hidden, targets, head, rows):
        chunks = zip(hidden.split(rows), targets.split(rows))  # (n, H), (n,)
        losses, gradients = zip(*(_chunk(h, t, head) for h, t in chunks))
        ctx.save_for_backward(torch.cat(gradients) / len(targets))  # (N, H)
        return torch.stack(losses).sum() / len(targets)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient, None, None, None


def _chunk(hidden: torch.Tensor, targets: torch.Tensor, head) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood of a few tokens, and its gradient (n, H).

    It needs the memory of one (n, V) of logits: they become probabilities, then their gradient.
    """
    hidden = hidden.detach().requires_grad_()  # (n, H)
    targets = targets[:, None]  # (n, 1)
    with torch.enable_grad():
        logits = head(hidden)  # (n, V)
    # z (n, V) is first the logits, then their exponentials, then probabilities, then the gradient.
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=bool(head.cap))
    largest, right = z.amax(dim=1, keepdim=True), z.gather(1, targets)  # (n, 1), (n, 1)
    z.sub_(largest).exp_()
    sums = z.sum(dim=1, keepdim=True)  # (n, 1)
    loss = (sums.log() + largest - right).sum()
    # d loss / d logits: probabilities, less 1 at the target
    z.div_(sums).scatter_add_(1, targets, -torch.ones_like(sums))
    return loss, torch.autograd.grad(logits, hidden, z.to(logits.dtype))[0]

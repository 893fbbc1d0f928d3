"""From label logits to preferences and rewards.

A judge prompt shows two responses in one order, and a judge may favour one place. So every pair is
judged in both orders. With Z_A and Z_B for the logits of the two labels, the log-odds that response
a is better are

    a shown as A:   Z_A - Z_B
    a shown as B:   Z_B - Z_A

The sigmoid of each is P(a better) in that order, and their mean is the judge's P(a better). The
reward of a response is P(better than a reference response).

Rankings are in gram_mini/runs/ranking.py. score.py takes the judge of gram_mini/runs/sharing.py,
which computes what prompts have in common only once; tests hold both equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gram_mini.batches import EncodedPair, encode_pairs, judge_batch, passes
from gram_mini.errors import UserError
from gram_mini.losses import label_mass
from gram_mini.model import evaluating, hidden_states, output_logits
from gram_mini.pairs import Pair
from gram_mini.prompts import default_judge, judge_prompt, label_tokens

import torch
from tqdm import tqdm

TIE = 1e-6  # scores that are closer than this are equal: float32 log-odds are no more exact


def preferred(p: float) -> int:
    """1 where P(a better) prefers a, -1 where it prefers b, 0 for a draw: P within TIE of 1/2."""
    if p > 0.5 + TIE:
        return 1
    return -1 if p < 0.5 - TIE else 0


def check_finite(odds: torch.Tensor, rows: list[EncodedPair]) -> None:
    """Check that all log-odds (N, 2) of ``rows`` are numbers.

    Raises:
        UserError: if one is not; names its row.
    """
    broken = (~odds.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
    if not broken:
        return
    row = rows[broken[0]].row
    where = f"row {row}" if row else "this pair"
    if len(broken) > 1:
        where += f" and {len(broken) - 1} more"
    raise UserError(
        f"{where}: the judge gives log-odds of {odds[broken[0]].tolist()}, which are no numbers; "
        "its weights may be broken, or too large for --bits 16: try --bits 32"
    )


@dataclass(frozen=True)
class Comparison:
    """The comparison of response a with response b; every field is about a."""

    probability: float  # P(a better), averaged over both orders
    a_first: float  # P(a better) with a shown as assistant A
    a_second: float  # P(a better) with a shown as assistant B
    log_odds_first: float  # the same as log-odds, Z_a - Z_b
    log_odds_second: float
    label_mass: float  # mean probability that the model answers with A or B at all
    truncated: bool  # whether the texts were cut to fit max_length

    @property
    def position_gap(self) -> float:
        """How far the two orders disagree, 0 to 1; 0 for a judge that ignores the order."""
        return abs(self.a_first - self.a_second)


class Judge:
    """A generative reward model: a language model that answers A or B after a judge prompt.

    Args:
        model: causal language model, with or without an adapter.
        tokenizer: its tokenizer; the label tokens are looked up in it.
        max_length: tokens per judge prompt; longer texts are cut (see batches.truncate).
        batch_size: a forward pass holds at most batch_size x max_length tokens.
        template: the judge prompt, with placeholders as in prompts.JUDGE; by default
            prompts.default_judge.

    runs.load.load_judge makes a judge from a run folder, a model folder or a name on the hub.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_length: int = 512,
        batch_size: int = 32,
        template: str | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.batch_tokens: int | None = None  # if given, a forward pass holds no more
        self.template = template or default_judge(tokenizer)
        self.prompt = judge_prompt(tokenizer, self.template)
        self.labels = label_tokens(tokenizer, self.template)
        self.trained = False  # whether the label tokens were trained to be compared

    # ---- log-odds --------------------------------------------------------------------

    def encode(self, pairs: list[Pair]) -> list[EncodedPair]:
        """Tokenise pairs, cut to ``max_length``."""
        return encode_pairs(pairs, self.prompt, self.tokenizer, self.max_length)

    def log_odds(
        self, rows: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge encoded pairs in both orders.

        Returns the log-odds (N, 2) that a is better, with a shown as A and with a shown as B; the
        mass (N, 2) on the two labels; and which pairs (N,) were cut. ``progress`` is the name of a
        progress bar, or None for no bar.

        Raises:
            UserError: if a log-odds is not a number; names its row.
        """
        orders = [order for row in rows for order in (row, row.swapped())]
        z, mass = self.verdicts(orders, progress)  # (2N, 2), (2N,)
        difference = (z[:, 0] - z[:, 1]).view(-1, 2)  # (N, 2): Z_A - Z_B in both orders
        odds = difference * torch.tensor([1, -1])  # (N, 2): in the second order a is called B
        check_finite(odds, rows)
        truncated = torch.tensor([row.truncated for row in rows], dtype=torch.bool)  # (N,)
        return odds, mass.view(-1, 2), truncated

    def verdicts(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Z_A and Z_B (M, 2) of M judge prompts, and the mass (M,) on the two labels.

        A served judge gives log P(A) and log P(B): they differ from Z_A and Z_B by one constant.
        """
        z, mass = torch.zeros(len(orders), 2), torch.ones(len(orders))
        with evaluating(self.model):
            for places, verdict in self.verdict_states(orders, progress):  # (B,), (B, H)
                z[places] = self.label_logits(verdict).float().cpu()
                mass[places] = self.label_mass(verdict).cpu()
        return z, mass

    def verdict_states(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield for each pass (places (B,) in ``orders``, hidden states (B, H) of the verdicts)."""
        lengths = [row.length + self.prompt.fixed_tokens for row in orders]
        with tqdm(total=len(orders), desc=progress, delay=2, disable=not progress) as bar:
            for places in passes(lengths, self.pass_tokens):
                ids, last, _ = judge_batch([orders[i] for i in places], self.prompt)  # (B, T), (B,)
                hidden = hidden_states(self.model, ids)  # (B, T, H)
                yield torch.tensor(places), hidden[torch.arange(len(ids)), last]  # (B,), (B, H)
                bar.update(len(places))

    @property
    def pass_tokens(self) -> int:
        """Tokens that a forward pass holds at most, padding included."""
        tokens = self.batch_size * self.max_length
        return min(tokens, self.batch_tokens) if self.batch_tokens else tokens

    def label_logits(self, verdict: torch.Tensor) -> torch.Tensor:
        """Z_A and Z_B (B, 2) of the verdict's hidden states (B, H): two rows of the matrix."""
        return output_logits(self.model, verdict, self.labels)

    def label_mass(self, verdict: torch.Tensor) -> torch.Tensor:
        """Probability (B,) of answering A or B at all, of the verdict's hidden states (B, H)."""
        return label_mass(output_logits(self.model, verdict), self.labels)

    # ---- comparisons -----------------------------------------------------------------

    def compare_many(self, pairs: list[Pair], *, progress: str | None = None) -> list[Comparison]:
        """Compare the two responses of each pair in both orders; ``progress`` as in log_odds.

        P is the mean of the two probabilities, as the official evaluation takes it (NiuTrans/GRAM,
        evaluation/gram_eval.py).
        """
        return self.compare_encoded(self.encode(pairs), progress=progress)

    def compare_encoded(
        self, rows: list[EncodedPair], *, progress: str | None = None
    ) -> list[Comparison]:
        """:meth:`compare_many` for pairs that :meth:`encode` has made."""
        odds, mass, truncated = self.log_odds(rows, progress)  # (N, 2), (N, 2), (N,)
        p = odds.sigmoid()  # (N, 2): P(a better) in each order
        mean, mass = p.mean(dim=1), mass.mean(dim=1)  # (N,), (N,)
        return [
            Comparison(
                probability=mean[i].item(),
                a_first=p[i, 0].item(),
                a_second=p[i, 1].item(),
                log_odds_first=odds[i, 0].item(),
                log_odds_second=odds[i, 1].item(),
                label_mass=mass[i].item(),
                truncated=truncated[i].item(),
            )
            for i in range(len(rows))
        ]

    def compare(self, prompt: str, response_a: str, response_b: str) -> Comparison:
        """Compare ``response_a`` with ``response_b``."""
        return self.compare_many([Pair(prompt, response_a, response_b)])[0]

    def reward(self, prompt: str, response: str, reference: str) -> float:
        """P(better than the reference), 0 to 1; 1/2 is a draw (NiuTrans/GRAM, README.md, "PPO")."""
        return self.compare(prompt, response, reference).probability

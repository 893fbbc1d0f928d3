"""How likely the model of stage 1 finds a response: a judge without labels, and a part of another.

    log pi_1(y | x)        in nats, a sum over the tokens of y and of the two markers after it

Here pi_1 is the model after stage 1, and y stands in the place of answer A. So this is the part of
stage 1's loss that is about the first response, with its sign turned.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

from gram_mini.batches import EncodedPair
from gram_mini.evaluation import pair_losses
from gram_mini.judge import Judge
from gram_mini.prompts import pair_prompt
from gram_mini.runs.record import BETA, LIKELIHOOD
from gram_mini.runs.sharing import SharingJudge

import torch
from safetensors.torch import load_file

Key = tuple[bytes, bytes]  # the tokens of a prompt and of a response to it


class Likelihoods:
    """Log-likelihoods of responses.

    Args:
        model: the model of stage 1, or one that holds its adapter under the name ``adapter``.
        tokenizer: its tokenizer.
        pass_tokens: tokens that a forward pass holds at most, padding included.
        kind: one of options.LIKELIHOODS. "sum" is log pi_1 itself, "per-token" its mean over the
            tokens, and "over-backbone" takes off the model's own without the adapter.
        adapter: None if the model's only adapter is that of stage 1.
        unit: nats in which the log-likelihoods are given.
    """

    def __init__(
        self,
        model,
        tokenizer,
        pass_tokens: int,
        kind: str = "sum",
        adapter: str | None = None,
        unit: float = 1.0,
    ):
        self.model, self.pass_tokens, self.kind = model, pass_tokens, kind
        self.adapter, self.unit = adapter, unit
        pair = pair_prompt(tokenizer)
        # start x after_prompt y end: the marker before y is ignored, the one after it is not
        self.prompt = replace(pair, between=[], end=pair.between, ignored=len(pair.after_prompt))
        self.kept: dict[Key, float] = {}  # in nats

    def keep(self, rows: list[EncodedPair]) -> None:
        """Compute what these rows need and keep it, before the model is trained on."""
        self.kept.update(self._compute(rows, "likelihoods"))

    def of(self, rows: list[EncodedPair], progress: str | None = None) -> torch.Tensor:
        """Those of the responses in the places A and B, (N, 2); computed unless they were kept."""
        unknown = [row for row in rows if not self.kept.keys() >= set(keys(row))]
        new = self._compute(unknown, progress)
        found = [[new[k] if k in new else self.kept[k] for k in keys(row)] for row in rows]
        return torch.tensor(found).view(-1, 2) / self.unit  # (N, 2)

    def _compute(self, rows: list[EncodedPair], progress: str | None) -> dict[Key, float]:
        if not rows:
            return {}
        alone: dict[Key, EncodedPair] = {}  # each response once, without the other one
        for row in rows:
            for key, order in zip(keys(row), (row, row.swapped())):
                alone[key] = replace(order, response_b=array("i"))
        arguments = self.model, list(alone.values()), self.prompt, self.pass_tokens, progress or ""
        if self.adapter:
            self.model.set_adapter(self.adapter)
        try:
            after = pair_losses(*arguments)
            if self.kind == "over-backbone":
                with self.model.disable_adapter():
                    before = pair_losses(*arguments)
                return {key: x - y for key, (x, _), (y, _) in zip(alone, before, after)}
        finally:
            if self.adapter:
                self.model.set_adapter("default")  # the one that judges
        if self.kind == "per-token":
            return {key: -nats / tokens for key, (nats, tokens) in zip(alone, after)}
        return {key: -nats for key, (nats, _) in zip(alone, after)}


def keys(row: EncodedPair) -> tuple[Key, Key]:
    """What identifies the responses of a row in the places A and B."""
    x = bytes(array("i", row.prompt))
    return (x, bytes(array("i", row.response_a))), (x, bytes(array("i", row.response_b)))


class LikelihoodJudge(Judge):
    """Prefers the likelier response. Its log-odds are the difference in nats, in both orders alike.

    Its probabilities are not calibrated, since nothing ties a nat to how sure a rater is. The label
    mass is 1.
    """

    def __init__(self, *arguments, kind: str = "sum"):
        super().__init__(*arguments)
        self.prompt = pair_prompt(self.tokenizer)  # pairs are cut as in stage 1
        self.likelihoods = Likelihoods(self.model, self.tokenizer, self.pass_tokens, kind)

    def verdicts(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihoods in the places A and B (M, 2), and the label mass (M,), which is 1."""
        return self.likelihoods.of(orders, progress), torch.ones(len(orders))


class JointJudge(SharingJudge):
    """A judge with the log-odds Z_A - Z_B + beta (log pi_1(y_A | x) - log pi_1(y_B | x)).

    Args:
        arguments: as for Judge; the model has a parameter ``beta`` (1,), and the adapter of stage 1
            under the name LIKELIHOOD.
        unit: nats in which log pi_1 is given, as when beta was trained.
    """

    def __init__(self, *arguments, unit: float = 1.0):
        super().__init__(*arguments)
        self.likelihoods = Likelihoods(
            self.model, self.tokenizer, self.pass_tokens, adapter=LIKELIHOOD, unit=unit
        )

    def verdicts(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Z + beta log pi_1 in the places A and B (M, 2), and the mass (M,) on the two labels."""
        z, mass = super().verdicts(orders, progress)  # (M, 2), (M,)
        log_pi = self.likelihoods.of(orders, progress and f"{progress}, likelihoods")  # (M, 2)
        return z + self.model.beta.detach().cpu() * log_pi, mass


def stored_beta(run: Path) -> tuple[torch.Tensor, float]:
    """beta (1,) of a run of gram_mini.likelihood, and the nats that its unit has."""
    stored = load_file(run / LIKELIHOOD / BETA)
    return stored["beta"], stored["unit"].item()

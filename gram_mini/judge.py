"""From label logits to preferences, rewards and rankings.

A judge prompt shows two responses in one order, and a judge may favour a place. So every pair is
judged in both orders. With Z_A and Z_B for the logits of the two labels, the log-odds that response
a is better are

    a shown as A:   Z_A - Z_B
    a shown as B:   Z_B - Z_A

The sigmoid of each is P(a better) in that order, and their mean is the judge's P(a better). The
reward of a response is P(better than a reference response).

:meth:`Judge.plain_log_odds` is that in a few lines. :meth:`Judge.log_odds`, which everything else
calls, gives the same numbers faster (gram_mini/prefixes.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gram_mini import prefixes
from gram_mini.batches import EncodedPair, Segments, encode_pairs, judge_batch, pair_segments
from gram_mini.chunked import rows_at_once
from gram_mini.errors import UserError
from gram_mini.losses import label_mass
from gram_mini.model import evaluating, hidden_states, output_head, output_logits
from gram_mini.pairs import Pair
from gram_mini.prompts import default_judge, judge_prompt, label_tokens

import torch

AVERAGES = ("probabilities", "logits")
METHODS = ("round-robin", "knock-out", "reference")
TIE = 1e-6  # scores that are closer than this are equal: float32 log-odds are no more exact


def preferred(p: float) -> int:
    """1 where P(a better) prefers a, -1 where it prefers b, 0 for a draw: P within TIE of 1/2."""
    return (p > 0.5 + TIE) - (p < 0.5 - TIE)


def check_finite(odds: torch.Tensor, rows: list[EncodedPair]) -> None:
    """See that all log-odds (N, 2) of ``rows`` are numbers: what is not a number is no verdict.

    Raises:
        UserError: if one is not; names its row.
    """
    broken = (~odds.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
    if broken:
        row = rows[broken[0]].row
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"{f'row {row}' if row else 'this pair'}{more}: the judge gives log-odds of "
            f"{odds[broken[0]].tolist()}, which are no numbers; its weights may be broken, or too "
            "large for --bits 16: try --bits 32"
        )


@dataclass(frozen=True)
class Comparison:
    """How response a fares against response b; every field is about a."""

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


@dataclass(frozen=True)
class Ranking:
    """Responses from best to worst."""

    # positions in the list of responses, best first; equal scores in the order they were given
    order: list[int]
    scores: list[float]  # one per response, in the order they were given
    comparisons: int  # pairs compared, each in both orders
    truncated: int  # how many of them had their texts cut to fit max_length
    label_mass: float  # mean over them of how likely the model is to answer A or B; 1 for none
    method: str


class Judge:
    """A generative reward model: a language model that answers A or B after a judge prompt.

    Args:
        model: causal language model, with or without an adapter.
        tokenizer: its tokenizer; the label tokens are looked up in it.
        max_length: tokens per judge prompt; longer texts are cut (see batches.truncate).
        batch_size: a forward pass holds at most batch_size x max_length tokens.
        template: the judge prompt, with placeholders as in prompts.JUDGE; by default
            prompts.default_judge.
        batch_tokens: and at most these, if given.

    runs.load_judge makes one from a run folder, a model folder or a name on the hub.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_length: int = 512,
        batch_size: int = 32,
        template: str | None = None,
        batch_tokens: int | None = None,
    ):
        template = template or default_judge(tokenizer)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.trained = False  # whether the label tokens were trained to be compared
        self.max_length, self.batch_size, self.batch_tokens = max_length, batch_size, batch_tokens
        self.prompt = judge_prompt(tokenizer, template)
        self.labels = label_tokens(tokenizer, template)

    # ---- log-odds --------------------------------------------------------------------

    def encode(self, pairs: list[Pair]) -> list[EncodedPair]:
        """Tokenise pairs, cut to ``max_length``."""
        return encode_pairs(pairs, self.prompt, self.tokenizer, self.max_length)

    def plain_log_odds(self, rows: list[EncodedPair]) -> torch.Tensor:
        """Log-odds (N, 2) that a is better, with a shown as A and with a shown as B."""
        z = []
        with evaluating(self.model):
            for order in (rows, [row.swapped() for row in rows]):
                ids, last, _ = judge_batch(order, self.prompt)  # (N, T), (N,)
                hidden = hidden_states(self.model, ids)  # (N, T, H)
                verdict = hidden[torch.arange(len(order)), last]  # (N, H), where A or B comes next
                z.append(self.label_logits(verdict).float())  # (N, 2): Z_A, Z_B
        a_is_a, a_is_b = z
        odds = a_is_a[:, 0] - a_is_a[:, 1], a_is_b[:, 1] - a_is_b[:, 0]  # (N,), (N,): Z_a - Z_b
        return torch.stack(odds, dim=1).cpu()  # (N, 2)

    def log_odds(
        self, rows: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge encoded pairs in both orders: :meth:`plain_log_odds`, computed the fast way.

        Returns log-odds (N, 2) that a is better, with a shown as A and with a shown as B; the mass
        (N, 2) on the two labels; and which pairs (N,) were cut. ``progress`` names a progress bar,
        if there is to be one.

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

        log P(A) and log P(B) will do as well: they differ from Z_A and Z_B by the same amount.
        """
        z, mass = torch.zeros(len(orders), 2), torch.ones(len(orders))
        with evaluating(self.model):
            for places, verdict in self.verdict_states(orders, progress):  # (B,), (B, H)
                z[places] = self.label_logits(verdict).float().cpu()
                mass[places] = self.label_mass(verdict).cpu()
        return z, mass

    def verdict_states(self, orders: list[EncodedPair], progress: str | None = None) -> Iterable:
        """Yield (places (B,) in ``orders``, hidden states (B, H) of their verdicts) by passes."""
        tokens = min(self.batch_size * self.max_length, self.batch_tokens or math.inf)
        return prefixes.end_states_in_passes(self.model, orders, self.segments, tokens, progress)

    def segments(self, row: EncodedPair) -> Segments:
        """The sequence that the judge reads for a pair in one order."""
        return pair_segments(self.prompt, row)

    def label_logits(self, verdict: torch.Tensor) -> torch.Tensor:
        """Z_A and Z_B (B, 2) of the verdict's hidden states (B, H): two rows of the matrix."""
        return output_logits(self.model, verdict, self.labels)

    def label_mass(self, verdict: torch.Tensor) -> torch.Tensor:
        """Probability (B,) of answering A or B at all, of the verdict's hidden states (B, H)."""
        head = output_head(self.model)
        chunks = verdict.split(rows_at_once(head))
        return torch.cat([label_mass(head(states), self.labels) for states in chunks])

    # ---- comparisons -----------------------------------------------------------------

    def compare_many(
        self, pairs: list[Pair], average: str = "probabilities", progress: str | None = None
    ) -> list[Comparison]:
        """Compare the two responses of each pair in both orders.

        Args:
            average: "probabilities" takes the mean of the two probabilities, as the official
                evaluation does (NiuTrans/GRAM, evaluation/gram_eval.py); "logits" the sigmoid of
                the mean of the log-odds.
            progress: the name of a progress bar, if there is to be one.

        Raises:
            ValueError: for another ``average``.
        """
        return self.compare_encoded(self.encode(pairs), average, progress)

    def compare_encoded(
        self, rows: list[EncodedPair], average: str = "probabilities", progress: str | None = None
    ) -> list[Comparison]:
        """:meth:`compare_many` for pairs that :meth:`encode` has made."""
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {AVERAGES}, got {average!r}")
        odds, mass, truncated = self.log_odds(rows, progress)
        each = odds.sigmoid()  # (N, 2)
        # (N,)
        mean = each.mean(dim=1) if average == "probabilities" else odds.mean(dim=1).sigmoid()
        columns = (mean, *each.T, *odds.T, mass.mean(dim=1), truncated)  # seven of (N,)
        return [Comparison(*row) for row in zip(*(column.tolist() for column in columns))]

    def compare(
        self, prompt: str, response_a: str, response_b: str, average: str = "probabilities"
    ) -> Comparison:
        """How ``response_a`` fares against ``response_b``."""
        return self.compare_many([Pair(prompt, response_a, response_b)], average)[0]

    def reward(
        self, prompt: str, response: str, reference: str, average: str = "probabilities"
    ) -> float:
        """P(better than the reference), 0 to 1; 1/2 is a draw (NiuTrans/GRAM, README.md, "PPO")."""
        return self.compare(prompt, response, reference, average).probability

    # ---- rankings --------------------------------------------------------------------

    def rank(
        self,
        prompt: str,
        responses: list[str],
        method: str | None = None,
        reference: str | None = None,
        average: str = "probabilities",
    ) -> Ranking:
        """Order n responses to one prompt from best to worst. Equal texts get one score.

        The method is "reference" where there is a ``reference``, else round-robin by default.

        round-robin: all against all, n (n - 1) / 2 comparisons.
                     The score is the mean P(better than another response).
        knock-out:   winners meet until one is left, n - 1 comparisons. The score is the rounds
                     survived plus P in the last comparison: only the first place is certain.
        reference:   each against ``reference``, n comparisons. The score is the reward.

        Raises:
            ValueError: no response, unknown method, method "reference" without a reference, or a
                reference with another method.
        """
        method = method or ("round-robin" if reference is None else "reference")
        if not responses:
            raise ValueError("rank needs at least one response")
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if (method == "reference") != (reference is not None):
            raise ValueError(f"a reference goes with method 'reference', got {method!r}")
        comparisons: list[Comparison] = []

        def compare(games: list[tuple[str, str]]) -> list[float]:
            results = self.compare_many([Pair(prompt, a, b) for a, b in games], average)
            comparisons.extend(results)
            return [result.probability for result in results]

        texts = [response.strip() for response in responses]  # white space around them is nothing
        if method == "round-robin":
            scores = round_robin(texts, compare)
        else:
            distinct = list(dict.fromkeys(texts))
            if reference is not None and method == "reference":
                of_distinct = compare([(text, reference) for text in distinct])
            else:
                of_distinct = knock_out(distinct, compare)
            score = dict(zip(distinct, of_distinct))
            scores = [score[text] for text in texts]
        truncated = sum(result.truncated for result in comparisons)
        masses = [result.label_mass for result in comparisons] or [1.0]
        mass = math.fsum(masses) / len(masses)
        return Ranking(best_first(scores), scores, len(comparisons), truncated, mass, method)


def round_robin(
    texts: list[str], compare: Callable[[list[tuple[str, str]]], list[float]]
) -> list[float]:
    """Mean P(better than another text) of each text.

    ``compare`` takes pairs of texts and gives P(the first is better) of each. Equal texts are a
    draw and are not compared. Their scores are equal to the last bit: the same numbers are added,
    and fsum does not mind the order.
    """
    games = list(itertools.combinations(dict.fromkeys(texts), 2))
    better = {}
    for (a, b), p in zip(games, compare(games) if games else []):
        better[a, b], better[b, a] = p, 1 - p
    scores = []
    for i, text in enumerate(texts):
        others = [better.get((text, other), 0.5) for j, other in enumerate(texts) if j != i]
        scores.append(math.fsum(others) / max(1, len(others)))
    return scores


def knock_out(
    texts: list[str], compare: Callable[[list[tuple[str, str]]], list[float]]
) -> list[float]:
    """Rounds survived plus P in the last game, of each of several different texts."""
    scores, alive, rounds = [0.0] * len(texts), list(range(len(texts))), 0
    while len(alive) > 1:
        games = list(zip(alive[0::2], alive[1::2]))
        left_over = alive[2 * len(games) :]  # an odd one goes through
        alive = []
        for (i, j), p in zip(games, compare([(texts[i], texts[j]) for i, j in games])):
            scores[i], scores[j] = rounds + p, rounds + 1 - p
            alive.append(i if preferred(p) >= 0 else j)
        alive, rounds = alive + left_over, rounds + 1
    return scores


def best_first(scores: list[float]) -> list[int]:
    """Positions of the scores, the highest first; those of a tie stay in the order they have."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    placed: list[int] = []
    while order:
        equal = [i for i in order if scores[order[0]] - scores[i] < TIE]
        placed += sorted(equal)
        order = order[len(equal) :]
    return placed

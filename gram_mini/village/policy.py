"""A policy small enough to see through: tables of probabilities of what it says.

A response is an opening, a claim and an ending, which may be a digression. Each question has its
own table of claims. All questions share one table of openings and one of endings. So the KL from
the initial policy and the true reward are exact sums, not samples, and show any over-optimisation.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from gram_mini.pairs import Pair
from gram_mini.village import (
    COURTEOUS,
    CURT,
    FACTS,
    RAMBLING,
    Topic,
    question,
    reward_of,
    statement,
)

import torch

OPENINGS = COURTEOUS + CURT
ENDINGS = ("", *RAMBLING)
PLACES = torch.tensor([12, 3, 1])  # a claim, an opening and an ending @ PLACES: which response
RATE, BATCH = 0.1, 64  # of the policy's training; questions per step
BETA = 0.02  # weight of the penalty on the KL


def responses(topic: Topic) -> list[tuple[str, float]]:
    """All 72 responses that the policy can give to a question, with their true rewards."""
    rewarded = []
    for value, opening, ending in itertools.product(topic[1].values, OPENINGS, ENDINGS):
        text = f"{opening} {statement(*topic, value)} {ending}".strip()
        reward = reward_of(value == FACTS[topic], opening in COURTEOUS, ending in RAMBLING)
        rewarded.append((text, reward))
    return rewarded


def score_responses(
    judge, topics: list[Topic], progress: str | None = None
) -> dict[Topic, list[float]]:
    """The judge's scores of all :func:`responses` to each question.

    A score is the log-odds against the first of the responses, the mean over both orders.
    """
    texts = {topic: [text for text, _ in responses(topic)] for topic in topics}
    pairs = [Pair(question(*t), text, texts[t][0]) for t in topics for text in texts[t]]
    log_odds = (
        (result.log_odds_first + result.log_odds_second) / 2
        for result in judge.compare_many(pairs, progress=progress)
    )
    return {topic: [next(log_odds) for _ in texts[topic]] for topic in topics}


def best_of_n(
    scores: list[float], rewards: list[float], drawn: list[int], n: int
) -> tuple[float, float]:
    """Best-of-n: mean score and mean true reward of the responses with the highest scores.

    ``drawn`` holds numbers of responses. The best is chosen from each n of them in a row.
    """
    best = [
        max(drawn[start : start + n], key=lambda i: scores[i]) for start in range(0, len(drawn), n)
    ]
    return sum(scores[i] for i in best) / len(best), sum(rewards[i] for i in best) / len(best)


def best_of_n_curve(
    judge,
    topics: list[Topic],
    sizes: Sequence[int],
    rng: random.Random,
    progress: str | None = None,
) -> list[tuple[int, float, float]]:
    """(n, mean score, mean true reward) of best-of-n by the judge, for each n of ``sizes``.

    For each question 256 of its :func:`responses` are drawn, with replacement, the same for all n.
    """
    rewards = {topic: [reward for _, reward in responses(topic)] for topic in topics}
    drawn = {topic: [rng.randrange(len(rewards[topic])) for _ in range(256)] for topic in topics}
    scores = score_responses(judge, topics, progress)
    curve = []
    for n in sizes:
        best = [best_of_n(scores[topic], rewards[topic], drawn[topic], n) for topic in topics]
        curve.append((n, *(sum(column) / len(topics) for column in zip(*best))))
    return curve


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to single draws in nats, log n - (n - 1) / n.

    An upper bound if a text can be drawn twice.
    """
    return math.log(n) - (n - 1) / n


class Policy:
    """Independent choices of claim (Q, 6), opening (4,) and ending (3,) from softmax tables."""

    def __init__(self, topics: list[Topic]):
        right = [[value == FACTS[topic] for value in topic[1].values] for topic in topics]
        self.right = torch.tensor(right)  # (Q, 6)
        self.tables = [
            torch.where(self.right, math.log(0.5), math.log(0.1)),  # half are right
            torch.zeros(len(OPENINGS)),
            torch.tensor([0.0, -math.log(2), -math.log(2)]),
        ]
        self.start = self.log_probabilities()
        for table in self.tables:
            table.requires_grad_(True)

    def log_probabilities(self) -> list[torch.Tensor]:
        """log pi of claims (Q, 6), openings (4,) and endings (3,)."""
        return [table.log_softmax(-1) for table in self.tables]

    def choose(self, topics: torch.Tensor, how) -> torch.Tensor:
        """A response to each of N questions, (N, 3); ``how``: log-probabilities (N, K) -> (N,)."""
        claims, openings, endings = self.log_probabilities()
        shared = [table.expand(len(topics), -1) for table in (openings, endings)]
        return torch.stack([how(table) for table in (claims[topics], *shared)], 1)

    def sample(self, topics: torch.Tensor) -> torch.Tensor:
        """Draw a response to each question: (N,) numbers of questions -> (N, 3) choices."""
        return self.choose(topics, lambda table: table.exp().multinomial(1)[:, 0])

    def greedy(self, topics: torch.Tensor) -> torch.Tensor:
        """The likeliest response to each question, (N, 3); of tied ones the first."""
        return self.choose(topics, lambda table: table.argmax(1))

    def log_ratio(
        self, topics: torch.Tensor, choices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi(y | x), (N,), and log pi(y | x) - log pi_0(y | x), (N,)."""
        pick = lambda tables: (
            tables[0][topics, choices[:, 0]] + tables[1][choices[:, 1]] + tables[2][choices[:, 2]]
        )
        now = pick(self.log_probabilities())
        return now, now.detach() - pick(self.start)

    @torch.no_grad()
    def kl(self) -> float:
        """KL(pi || pi_0) in nats, mean over the questions."""
        parts = [
            (p.exp() * (p - q)).sum(-1).mean() for p, q in zip(self.log_probabilities(), self.start)
        ]
        return float(sum(parts))

    @torch.no_grad()
    def true_reward(self) -> float:
        """Expected true reward, mean over the questions."""
        claims, openings, endings = (p.exp() for p in self.log_probabilities())
        right = (claims * self.right).sum(1).mean()
        courteous = openings[: len(COURTEOUS)].sum()
        rambling = endings[1:].sum()
        return float(reward_of(right, courteous, rambling))


def train_policy(
    judge, topics: list[Topic], seed: int, steps: int = 200
) -> Iterator[tuple[int, float, float, float]]:
    """Policy gradient with a KL penalty; the reward is P(better than the greedy response).

    The greedy response is the baseline too. Against itself it is a draw, 1/2, so reward - 1/2 is
    ReMax's difference to the greedy response (NiuTrans/GRAM, README.md, "PPO"; ReMax, arXiv
    2310.10505).

    Yields (step, KL to the initial policy in nats, proxy reward, true reward) every 10 steps. The
    proxy reward is the judge's mean P(better than the initial greedy response), by one draw for
    each question. That response is the best possible one (right, courteous, to the point: the first
    of the tied likeliest), so a judge that knows the truth never gives more than 1/2.
    """
    torch.manual_seed(seed)
    policy = Policy(topics)
    optimizer = torch.optim.Adam(policy.tables, lr=RATE)
    all_topics = torch.arange(len(topics))  # (Q,)
    texts = [[text for text, _ in responses(topic)] for topic in topics]  # Q lists of 72
    known: dict[Pair, float] = {}

    def better(drawn: torch.Tensor, choices: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """P(choices better than others) by the judge, (N,)."""
        numbers = zip(drawn.tolist(), (choices @ PLACES).tolist(), (others @ PLACES).tolist())
        pairs = [Pair(question(*topics[t]), texts[t][a], texts[t][b]) for t, a, b in numbers]
        new = [pair for pair in dict.fromkeys(pairs) if pair.response_a != pair.response_b]
        new = [pair for pair in new if pair not in known]
        for pair, result in zip(new, judge.compare_many(new)):
            known[pair] = result.probability
        return torch.tensor([known.get(pair, 0.5) for pair in pairs])  # (N,); equal: a draw

    first = policy.greedy(all_topics)  # (Q, 3)
    for step in range(steps + 1):
        if step % 10 == 0:
            proxy = better(all_topics, policy.sample(all_topics), first).mean()
            yield step, policy.kl(), float(proxy), policy.true_reward()
        drawn = torch.randint(len(topics), (BATCH,))  # (N,)
        choices = policy.sample(drawn)  # (N, 3)
        reward = better(drawn, choices, policy.greedy(drawn)) - 0.5  # (N,)
        log_probability, log_ratio = policy.log_ratio(drawn, choices)
        loss = -((reward - BETA * log_ratio) * log_probability).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

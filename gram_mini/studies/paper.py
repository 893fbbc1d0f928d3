"""The paper's studies and ours: each yields the rows of one seed; STUDIES says how they are
shown.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import train_reward
from gram_mini.pairs import Pair
from gram_mini.studies.beside import beside
from gram_mini.studies.certain import MEASURES, certain, where
from gram_mini.studies.few import adapt, recipes
from gram_mini.studies.lab import MAIN, METHODS, Lab
from gram_mini.studies.rewards import rewards
from gram_mini.village.pairs import topics
from gram_mini.village.policy import best_of_n_curve, best_of_n_kl, train_policy


def table(lab: Lab, seed: int):
    """The paper's Table 1 and Figure 2: every method, in and out of distribution."""
    for name in ("zero-shot", *METHODS):
        run = lab.method(name, seed) if name in METHODS else lab.model
        yield {"method": name, **lab.evaluate(run, "in-distribution"), **lab.evaluate(run)}


def bon(lab: Lab, seed: int):
    """Figure 4: best of n by the judge; its score (log-odds against one response) and the truth."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for name in MAIN:
        judge, draws = lab.judge(lab.method(name, seed)), random.Random(f"bon/{seed}")
        test_topics = topics("out-of-distribution")[:40]
        for n, proxy, true in best_of_n_curve(judge, test_topics, sizes, draws, progress=name):
            means = {"proxy score": proxy, "true reward": true}
            yield {"method": name, "n": n, "KL": best_of_n_kl(n), **means}


def smoothing(lab: Lab, seed: int):
    """What eps does to accuracy, margin and calibration, from stage 1."""
    for eps in (0.0, 0.05, 0.1, 0.2, 0.4):
        bound = math.log((1 - eps) / eps) if eps else None
        figures = lab.evaluate(smoothed(lab, seed, eps))
        yield {"method": "GRAM", "eps": eps, "bound": bound, **figures}


def smoothed(lab: Lab, seed: int, eps: float) -> Path:
    """GRAM with another eps."""
    known = {0.0: "G from stage 1, eps = 0", 0.05: "GRAM"}
    if eps in known:
        return lab.method(known[eps], seed)
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    options = ["--label-smoothing", str(eps), "--init", str(lab.stage1(seed))]
    return lab.train(train_reward, f"smoothing-{eps}", seed, "--data", data, *options)


def noise(lab: Lab, seed: int):
    """A share of the labels flipped: at random, or the clearest or hardest ones (no ties)."""
    clean = lab.pairs("labelled", seed)
    shares = {"random": (0.2, 0.4), "clearest": (0.2,), "hardest": (0.2,)}
    for side in shares if lab.village else ("random",):
        for eps in (0.0, 0.1):
            method = f"{side}, eps {eps}"
            yield {"method": method, "flipped": 0.0, **lab.evaluate(smoothed(lab, seed, eps))}
            for share in shares[side]:
                name = f"noise-{side}-{share}"
                data = lab.file(f"{name}-{seed}", flipped(clean, share, side, seed))
                options = ["--label-smoothing", str(eps), "--init", str(lab.stage1(seed))]
                run = lab.train(train_reward, f"{name}-{eps}", seed, "--data", data, *options)
                yield {"method": method, "flipped": share, **lab.evaluate(run)}


def flipped(pairs: list[Pair], share: float, side: str, seed: int) -> list[Pair]:
    """The pairs with a share of labels flipped: at random, or the clearest or hardest ones.

    Clear is a pair whose true probability is far from 1/2, hard is one near 1/2.
    """

    def clearness(i: int) -> float:
        probability = pairs[i].probability
        assert probability is not None  # the village knows it of all labelled pairs
        return abs(probability - 0.5)

    order = random.Random(f"noise/{seed}").sample(range(len(pairs)), len(pairs))
    if side != "random":
        # The label of a tie is a coin flip already.
        order = [i for i in order if pairs[i].probability != 0.5]
        order.sort(key=clearness, reverse=side == "clearest")
    noisy = list(pairs)
    for i in order[: round(share * len(pairs))]:
        label = pairs[i].label
        assert label is not None  # the pairs are labelled ones
        noisy[i] = replace(pairs[i], label=1 - label)
    return noisy


def unlabelled(lab: Lab, seed: int):
    """Stage 1 on more or fewer pairs and steps, about the villagers of the test or about others."""
    everything = lab.pairs("unlabelled", seed)
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    parts = [
        ("in domain", share, everything[: round(share * len(everything))])
        for share in (1 / 16, 1 / 4, 1 / 2)
    ]
    domains = ["in domain"]
    if lab.village:
        tested = {pair.prompt for pair in lab.pairs(lab.target, 0)}
        # They are half of all pairs, within half a percent.
        elsewhere = [pair for pair in everything if pair.prompt not in tested]
        parts.append(("out of domain", 1 / 2, elsewhere[: len(everything) // 2]))
        domains.append("out of domain")
    for domain in domains:
        figures = lab.evaluate(lab.method("G-Label-Smoothing", seed))
        yield {"method": domain, "share": 0.0, **figures}
    for domain, share, pairs in parts:
        options = ["--init", str(lab.stage1(seed, f"stage1-{domain}-{share}", pairs))]
        name = f"unlabelled-{domain}-{share}"
        run = lab.train(train_reward, name, seed, "--data", data, *options)
        yield {"method": domain, "share": share, **lab.evaluate(run)}
    yield {"method": "in domain", "share": 1.0, **lab.evaluate(lab.method("GRAM", seed))}


def rl(lab: Lab, seed: int):
    """A policy trained against the judge: what the judge thinks of it, and what it is worth."""
    for name in MAIN:
        judge = lab.judge(lab.method(name, seed))
        for step, kl, proxy, true in train_policy(judge, topics("out-of-distribution")[:40], seed):
            rewards = {"proxy reward": proxy, "true reward": true}
            yield {"method": name, "step": step, "KL": kl, **rewards}


def orders(lab: Lab, seed: int):
    """Ours, not the paper's: each pair in both orders (step 8 of losses.py), from stage 1."""
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    start = ["--data", data, "--init", str(lab.stage1(seed))]
    longer, both = ["--epochs", "4"], ["--both-orders", "1"]
    yield {"method": "GRAM", **lab.evaluate(lab.method("GRAM", seed))}
    # as many forward passes as both orders take
    run = lab.train(train_reward, "GRAM, 4 epochs", seed, *start, *longer)
    yield {"method": "GRAM, 4 epochs", **lab.evaluate(run)}
    run = lab.train(train_reward, "GRAM, both orders", seed, *start, *both)
    yield {"method": "GRAM, both orders", **lab.evaluate(run)}


# name: (study, columns that tell the rows apart, x axis of the figure, panels of the figure)
STUDIES = {  # the longest first
    "table": (
        table,
        ("method",),
        None,
        ("in-distribution", "out-of-distribution", "fact", "courtesy", "length"),
    ),
    "unlabelled": (unlabelled, ("method", "share"), "share", ("out-of-distribution", "fact")),
    "adapt": (adapt, ("method", "labels"), "labels", ("out-of-distribution", "fact")),
    "noise": (
        noise,
        ("method", "flipped"),
        "flipped",
        ("out-of-distribution", "calibration error"),
    ),
    "smoothing": (
        smoothing,
        ("method", "eps"),
        "eps",
        ("out-of-distribution", "margin", "calibration error"),
    ),
    "where": (where, ("method", "eps"), "eps", MEASURES),
    "certain": (certain, ("method", "eps"), "eps", MEASURES),
    "recipes": (recipes, ("method",), None, ("out-of-distribution", "fact")),
    "beside": (
        beside,
        ("method",),
        None,
        ("accuracy", "length, same claim", "length, other claim", "position gap"),
    ),
    "orders": (orders, ("method",), None, ("out-of-distribution", "fact", "position gap")),
    "bon": (bon, ("method", "n"), "KL", ("proxy score", "true reward")),
    "rl": (rl, ("method", "step"), "KL", ("proxy reward", "true reward")),
    "rewards": (
        rewards,
        ("method", "n"),
        "comparisons",
        (
            "agreement, GRAM",
            "true reward of the first, GRAM",
            "agreement, votes",
            "true reward of the first, votes",
        ),
    ),
}

"""The paper's studies: each yields rows of one seed, and STUDIES says how they are told apart and shown."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import train_reward
from gram_mini.pairs import Pair
from gram_mini.studies.lab import MAIN, METHODS, Lab
from gram_mini.village.pairs import topics
from gram_mini.village.policy import (
    best_of_n,
    best_of_n_kl,
    responses,
    score_responses,
    train_policy,
)


def table(lab: Lab, seed: int):
    """The paper's Table 1 and Figure 2: every method, in and out of distribution."""
    for name in ("zero-shot", *METHODS):
        run = lab.method(name, seed) if name in METHODS else lab.model
        yield {"method": name, **lab.evaluate(run, "in-distribution"), **lab.evaluate(run)}


def bon(lab: Lab, seed: int):
    """Figure 4: the best of n by the judge, by the judge's own score (its log-odds against one of the responses) and in truth."""
    places, draws = topics("out-of-distribution")[:40], random.Random(f"bon/{seed}")
    rewards = {topic: [reward for _, reward in responses(topic)] for topic in places}
    drawn = {topic: [draws.randrange(len(rewards[topic])) for _ in range(256)] for topic in places}
    for name in MAIN:
        scores = score_responses(lab.judge(lab.method(name, seed)), places, progress=name)
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            proxy, true = zip(
                *(best_of_n(scores[topic], rewards[topic], drawn[topic], n) for topic in places)
            )
            means = {"proxy score": statistics.mean(proxy), "true reward": statistics.mean(true)}
            yield {"method": name, "n": n, "KL": best_of_n_kl(n), **means}


def adapt(lab: Lab, seed: int):
    """Figure 5: labels on the unlabelled villagers, 0 to 2,000 of them, from each starting point."""
    new = lab.pairs("adaptation", seed)
    everything = lab.file(f"everything-{seed}", lab.pairs("labelled", seed) + new)
    oracle = lab.evaluate(
        lab.train(
            train_reward, "oracle", seed, "--data", everything, "--init", str(lab.stage1(seed))
        )
    )
    starts = {name: lab.method(name, seed) for name in MAIN} | {"nothing": None}
    for count in (0, 50, 100, 200, 500, 1000, len(new)):
        yield {"method": "oracle", "labels": count, **oracle}
        for name, start in starts.items():
            run = start or lab.model
            if count:
                data = lab.file(f"adaptation-{count}-{seed}", new[:count])
                _, script, given = METHODS.get(name, (False, train_reward, []))
                init = ["--init", str(start)] if start else []
                run = lab.train(
                    script,
                    f"adapt-{count}-{name}",
                    seed,
                    "--data",
                    data,
                    *given,
                    *init,
                    "--batch-size",
                    "32",
                )
            yield {"method": name, "labels": count, **lab.evaluate(run)}


def smoothing(lab: Lab, seed: int):
    """What eps does to accuracy, margin and calibration, from stage 1."""
    for eps in (0.0, 0.05, 0.1, 0.2, 0.4):
        bound = math.log((1 - eps) / eps) if eps else None
        yield {
            "method": "GRAM",
            "eps": eps,
            "bound": bound,
            **lab.evaluate(smoothed(lab, seed, eps)),
        }


def smoothed(lab: Lab, seed: int, eps: float) -> Path:
    """GRAM with another eps."""
    known = {0.0: "G from stage 1, eps = 0", 0.05: "GRAM"}
    if eps in known:
        return lab.method(known[eps], seed)
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    given = ["--label-smoothing", str(eps), "--init", str(lab.stage1(seed))]
    return lab.train(train_reward, f"smoothing-{eps}", seed, "--data", data, *given)


def noise(lab: Lab, seed: int):
    """A share of the labels flipped: at random, or by an adversary, the clearest or the hardest ones (no ties)."""
    clean = lab.pairs("labelled", seed)
    shares = {"random": (0.2, 0.4), "clearest": (0.2,), "hardest": (0.2,)}
    for side in shares if lab.village else ("random",):
        for eps in (0.0, 0.1):
            method = f"{side}, eps {eps}"
            yield {"method": method, "flipped": 0.0, **lab.evaluate(smoothed(lab, seed, eps))}
            for share in shares[side]:
                name = f"noise-{side}-{share}"
                data = lab.file(f"{name}-{seed}", flipped(clean, share, side, seed))
                given = [
                    "--data",
                    data,
                    "--label-smoothing",
                    str(eps),
                    "--init",
                    str(lab.stage1(seed)),
                ]
                run = lab.train(train_reward, f"{name}-{eps}", seed, *given)
                yield {"method": method, "flipped": share, **lab.evaluate(run)}


def flipped(pairs: list[Pair], share: float, side: str, seed: int) -> list[Pair]:
    """The pairs with a share of the labels turned round: any, or those whose true probability is farthest from 1/2 or nearest."""
    order = random.Random(f"noise/{seed}").sample(range(len(pairs)), len(pairs))
    if side != "random":
        order = [i for i in order if pairs[i].probability != 0.5]  # a tie's label is a coin already
        order.sort(key=lambda i: abs(pairs[i].probability - 0.5), reverse=side == "clearest")
    turned = set(order[: round(share * len(pairs))])
    return [
        replace(pair, label=1 - pair.label) if i in turned else pair for i, pair in enumerate(pairs)
    ]


def unlabelled(lab: Lab, seed: int):
    """Stage 1 on more or fewer pairs (and as many fewer steps), about the test's villagers too or, out of domain, not."""
    everything = lab.pairs("unlabelled", seed)
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    parts = [
        ("in domain", share, everything[: round(share * len(everything))])
        for share in (1 / 16, 1 / 4, 1 / 2)
    ]
    domains = ["in domain"]
    if lab.village:
        tested = {pair.prompt for pair in lab.pairs(lab.target, 0)}
        # half of them, within half a percent
        elsewhere = [pair for pair in everything if pair.prompt not in tested]
        parts.append(("out of domain", 1 / 2, elsewhere[: len(everything) // 2]))
        domains.append("out of domain")
    for domain in domains:
        yield {
            "method": domain,
            "share": 0.0,
            **lab.evaluate(lab.method("G-Label-Smoothing", seed)),
        }
    for domain, share, pairs in parts:
        stage1 = lab.stage1(seed, f"stage1-{domain}-{share}", pairs)
        run = lab.train(
            train_reward,
            f"unlabelled-{domain}-{share}",
            seed,
            "--data",
            data,
            "--init",
            str(stage1),
        )
        yield {"method": domain, "share": share, **lab.evaluate(run)}
    yield {"method": "in domain", "share": 1.0, **lab.evaluate(lab.method("GRAM", seed))}


def rl(lab: Lab, seed: int):
    """A policy trained against the judge: what the judge thinks of it, and what it is worth."""
    for name in MAIN:
        judge = lab.judge(lab.method(name, seed))
        for step, kl, proxy, true in train_policy(judge, topics("out-of-distribution")[:40], seed):
            yield {
                "method": name,
                "step": step,
                "KL": kl,
                "proxy reward": proxy,
                "true reward": true,
            }


#         study       what a row is told apart by, the figure's x axis, what is shown
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
    "bon": (bon, ("method", "n"), "KL", ("proxy score", "true reward")),
    "rl": (rl, ("method", "step"), "KL", ("proxy reward", "true reward")),
}

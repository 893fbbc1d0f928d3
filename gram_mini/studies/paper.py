"""The studies of the paper and ours: each yields the rows of a seed, and STUDIES lists them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import train_reward
from gram_mini.likelihood import __main__ as joint
from gram_mini.losses import best_margin
from gram_mini.pairs import Pair
from gram_mini.studies import writing
from gram_mini.studies.beside import beside
from gram_mini.studies.certain import MEASURES, certain, chance
from gram_mini.studies.few import adapt
from gram_mini.studies.lab import JOINT, LIKELIHOODS, MAIN, METHODS, TEST, Lab
from gram_mini.studies.misled import ERROR, misled
from gram_mini.studies.rewards import rewards
from gram_mini.village.pairs import topics
from gram_mini.village.policy import best_of_n_curve, best_of_n_kl, train_policy

PAPERS = tuple(name for name in METHODS if "(ours)" not in name)
PLAIN = "G from stage 1, eps = 0"


def table(lab: Lab, seed: int):
    """The paper's Table 1 and Figure 2: every method, in and out of distribution."""
    untrained: dict[str, str | Path] = {"zero-shot": lab.model, "stage 1 alone": lab.stage1(seed)}
    for name, run in untrained.items():
        yield {"method": name, **lab.row(run, "in-distribution"), **lab.row(run)}
    for name in (*PAPERS, *LIKELIHOODS, JOINT):
        row = {**lab.row_of(name, seed, "in-distribution"), **lab.row_of(name, seed)}
        yield {"method": name, **row}


def bon(lab: Lab, seed: int):
    """Figure 4: best of n by the judge; its score (log-odds against one response) and the truth."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for name in MAIN:
        judge, draws = lab.judge_of(name, seed), random.Random(f"bon/{seed}")
        test_topics = topics(TEST)[:40]
        for n, proxy, true in best_of_n_curve(judge, test_topics, sizes, draws, progress=name):
            means = {"proxy score": proxy, "true reward": true}
            yield {"method": name, "n": n, "KL": best_of_n_kl(n), **means}


def smoothing(lab: Lab, seed: int):
    """What eps does to accuracy, margin and calibration, from stage 1."""
    for eps in (0.0, 0.05, 0.1, 0.2, 0.4):
        bound = best_mean_margin(lab.pairs("labelled", seed), eps)
        yield {"method": "GRAM", "eps": eps, "bound": bound, **lab.row(smoothed(lab, seed, eps))}


def best_mean_margin(pairs: list[Pair], eps: float) -> float:
    """Mean of the best margins of labelled pairs, for the better response (step 5 of losses.py).

    A pair's probability says which share of the raters agrees with it, so noise counts, too.
    """
    chances = map(chance, pairs)
    return statistics.mean(best_margin(eps, max(p, 1 - p)) for p in chances)


def smoothed(lab: Lab, seed: int, eps: float) -> Path:
    """GRAM with another eps."""
    known = {0.0: PLAIN, 0.05: "GRAM"}
    if eps in known:
        return lab.method(known[eps], seed)
    return on_labels(lab, f"smoothing-{eps}", seed, "--label-smoothing", str(eps))


def on_labels(lab: Lab, name: str, seed: int, *options: str) -> Path:
    """Stage 2 from stage 1 on the labelled pairs, with these options."""
    return lab.train(train_reward, name, seed, lab.labelled(seed), lab.stage1(seed), options)


def noise(lab: Lab, seed: int):
    """A share of the labels flipped: at random, or the clearest or hardest ones (no ties)."""
    clean = lab.pairs("labelled", seed)
    shares = {"random": (0.2, 0.4), "clearest": (0.2,), "hardest": (0.2,)}
    for side in shares:
        for eps in (0.0, 0.1):
            method, options = f"{side}, eps {eps}", ["--label-smoothing", str(eps)]
            yield {"method": method, "flipped": 0.0, **lab.row(smoothed(lab, seed, eps))}
            for share in shares[side]:
                data = lab.file(f"noise-{side}-{share}-{seed}", flipped(clean, share, side, seed))
                name = f"noise-{side}-{share}-{eps}"
                run = lab.train(train_reward, name, seed, data, lab.stage1(seed), options)
                yield {"method": method, "flipped": share, **lab.row(run)}
    yield {"method": f"random, {JOINT}", "flipped": 0.0, **lab.row_of(JOINT, seed)}
    for share in shares["random"]:
        data = lab.file(f"noise-random-{share}-{seed}", flipped(clean, share, "random", seed))
        run = lab.train(joint, f"noise-joint-{share}", seed, data, lab.stage1(seed))
        yield {"method": f"random, {JOINT}", "flipped": share, **lab.row(run)}


def flipped(pairs: list[Pair], share: float, side: str, seed: int) -> list[Pair]:
    """The pairs with a share of labels flipped: at random, or the clearest or hardest ones.

    Clear is a pair whose true probability is far from 1/2, hard is one near 1/2.
    """
    clearness = [abs(chance(pair) - 0.5) for pair in pairs]
    order = random.Random(f"noise/{seed}").sample(range(len(pairs)), len(pairs))
    if side != "random":
        order = [i for i in order if clearness[i]]  # the label of a tie is a coin flip already
        order.sort(key=clearness.__getitem__, reverse=side == "clearest")
    noisy = list(pairs)
    for i in order[: round(share * len(pairs))]:
        noisy[i] = replace(pairs[i], label=int(not pairs[i].label))
    return noisy


def unlabelled(lab: Lab, seed: int):
    """Stage 1 on more or fewer pairs and steps, on the villagers of the test or on others."""
    everything = lab.pairs("unlabelled", seed)
    tested = {pair.prompt for pair in lab.pairs(TEST, 0)}
    # They are half of all pairs, within half a percent.
    elsewhere = [pair for pair in everything if pair.prompt not in tested]
    parts = [
        ("in domain", share, everything[: round(share * len(everything))])
        for share in (1 / 16, 1 / 4, 1 / 2)
    ]
    parts.append(("out of domain", 1 / 2, elsewhere[: len(everything) // 2]))
    for domain in ("in domain", "out of domain"):
        none = lab.row(lab.method("G-Label-Smoothing", seed))
        yield {"method": domain, "share": 0.0, **none}
    for domain, share, pairs in parts:
        start = lab.stage1(seed, f"stage1-{domain}-{share}", pairs)
        name = f"unlabelled-{domain}-{share}"
        run = lab.train(train_reward, name, seed, lab.labelled(seed), start)
        yield {"method": domain, "share": share, **lab.row(run)}
        likelihood = lab.row(start, likelihood=LIKELIHOODS["likelihood"])
        yield {"method": f"likelihood, {domain}", "share": share, **likelihood}
        if domain == "in domain":
            both = lab.train(joint, f"joint {name}", seed, lab.labelled(seed), start)
            yield {"method": f"{JOINT}, {domain}", "share": share, **lab.row(both)}
    for name, row in {"GRAM": "", "likelihood": "likelihood, ", JOINT: f"{JOINT}, "}.items():
        yield {"method": f"{row}in domain", "share": 1.0, **lab.row_of(name, seed)}


def rl(lab: Lab, seed: int):
    """A policy trained against the judge: what the judge thinks of it, and what it is worth."""
    for name in MAIN:
        judge = lab.judge_of(name, seed)
        for step, kl, proxy, true in train_policy(judge, topics(TEST)[:40], seed):
            rewards = {"proxy reward": proxy, "true reward": true}
            yield {"method": name, "step": step, "KL": kl, **rewards}


def orders(lab: Lab, seed: int):
    """Ours, not the paper's: each pair in both orders (step 8 of losses.py), from stage 1."""
    runs = {
        "GRAM": lab.method("GRAM", seed),
        # as many forward passes as both orders take
        "GRAM, 2 epochs": on_labels(lab, "GRAM, 2 epochs", seed, "--epochs", "2"),
        "GRAM, both orders": lab.method("GRAM, both orders (ours)", seed),
    }
    for name, run in runs.items():
        yield {"method": name, **lab.row(run)}


class Study(NamedTuple):
    """How the rows of one seed are made, and how those of all seeds are shown."""

    rows: Callable[[Lab, int], Iterable[dict]]  # its docstring is printed above the table
    keys: tuple[str, ...]  # the columns that tell rows apart
    x: str | None  # x axis of the figure; None for dots side by side
    shown: tuple[str, ...]  # its panels
    methods: tuple[str, ...]  # of METHODS, those that the rows depend on
    after: Callable[[str, Lab, int, set[int], Path], None] | None = None  # writes more
    packages: tuple[str, ...] = ()  # that it needs beside requirements.txt


def of_writing(kind: str, rows, key: str, x: str, *shown: str, packages=()) -> Study:
    panels = (*shown, "true reward", "no answer")
    judges = tuple(name for name in writing.JUDGES_OF[kind] if name in METHODS)
    return Study(rows, ("method", key), x, panels, judges, writing.write_answers, packages)


FACT = (TEST, "fact only")
BESIDE = ("accuracy", "length, same claim", "length, other claim", "position gap")
REWARDS = (
    *("agreement, GRAM", "true reward of the first, GRAM"),
    *("agreement, votes", "true reward of the first, votes"),
)
TABLE = ("in-distribution", *FACT, "courtesy only")
ORDERS = (*FACT, "position gap", "calibration error")
TRAINED = tuple(name for name in MAIN if name in METHODS)
GRPO = ("step", "step", "KL", "judge's reward")
STUDIES = {  # the longest first
    "table": Study(table, ("method",), None, TABLE, (*PAPERS, JOINT)),
    "unlabelled": Study(
        unlabelled, ("method", "share"), "share", FACT, ("G-Label-Smoothing", "GRAM", JOINT)
    ),
    "writing-rl": of_writing("rl", writing.rl, *GRPO, packages=("trl",)),
    "adapt": Study(adapt, ("method", "labels"), "labels", FACT, TRAINED),
    "noise": Study(
        noise, ("method", "flipped"), "flipped", (TEST, "calibration error"), (PLAIN, JOINT)
    ),
    "writing-weak": of_writing("weak", writing.weak, *GRPO, packages=("trl",)),
    "smoothing": Study(
        smoothing, ("method", "eps"), "eps", (TEST, "margin", "calibration error"), (PLAIN, "GRAM")
    ),
    "certain": Study(certain, ("method", "eps"), "eps", MEASURES, ()),
    "beside": Study(beside, ("method",), None, BESIDE, ("D from stage 1", "GRAM")),
    "orders": Study(orders, ("method",), None, ORDERS, ("GRAM", "GRAM, both orders (ours)")),
    "bon": Study(bon, ("method", "n"), "KL", ("proxy score", "true reward"), TRAINED),
    "rl": Study(rl, ("method", "step"), "KL", ("proxy reward", "true reward"), TRAINED),
    "writing-bon": of_writing("bon", writing.bon, "n", "KL", "judge's score"),
    "misled": Study(misled, ("method",), None, (TEST, ERROR), ("GRAM", JOINT)),
    "rewards": Study(rewards, ("method", "n"), "comparisons", REWARDS, ("GRAM",)),
}

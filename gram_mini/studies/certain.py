"""Where does smoothing matter? Step 4 of losses.py says where to look.

  certain labels   without smoothing the best margin is infinite, with it log((1 - eps)/eps)
  many epochs      on few noisy labels a judge that knows them by heart takes them for certain
  a cue that fits  the preferred response always rambles
  its own pairs    asked about the very pairs it learned by heart, against the truth

These cells were chosen on a finer grid with seed 0 (CHANGELOG.md).
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import train_reward
from gram_mini.pairs import Pair
from gram_mini.studies.lab import TEST, Lab, figures_of, shown
from gram_mini.village import RAMBLING
from gram_mini.village.pairs import topics
from gram_mini.village.policy import best_of_n_curve, train_policy

LABELS = 500  # few: GRAM has 6,000
EPOCHS = (2, 32)
EPS = (0.0, 0.2)
# name: temperature of the raters (the village's is 1), whether the cue fits all labels
LABELLING = {"noisy": (1.0, False), "certain": (0.0, False), "cue": (0.0, True)}
MEASURES = (
    *("accuracy", "cross-entropy", "calibration error", "position gap"),
    *("best of 16", "policy", "own pairs"),
)


def certain(lab: Lab, seed: int):
    """Ours: where smoothing matters, by the noise of the labels, epochs and eps."""
    for labelling, epochs in itertools.product(LABELLING, EPOCHS):
        plain: dict[str, float] = {}
        for eps in EPS:
            row = cell(lab, seed, labelling, epochs, eps)
            plain = plain or row
            changes = {f"{name}, change": row[name] - plain[name] for name in MEASURES}
            yield {"method": f"{labelling}, {epochs} epochs", "eps": eps, **row, **changes}


def cell(lab: Lab, seed: int, labelling: str, epochs: int, eps: float) -> dict[str, float]:
    """The figures of one judge, trained from stage 1 on few labels of one kind."""
    temperature, cue = LABELLING[labelling]
    name = f"certain-{labelling}-{epochs}-{eps}"

    def make() -> dict[str, float]:
        own = rated(lab.pairs("labelled", seed), temperature, seed)
        own = [pair for pair in own if not cue or the_better_rambles(pair)][:LABELS]
        data = lab.file(f"certain-{labelling}-{seed}", own)
        options = ["--epochs", str(epochs), "--label-smoothing", str(eps)]
        run = lab.train(train_reward, name, seed, data, lab.stage1(seed), options)
        judge = lab.judge(run)
        # As the raters of this temperature see the test; its labels name the better response.
        test = rated(lab.pairs(TEST, 0), temperature, seed)
        row, on_own = (
            shown(figures_of(judge, [replace(p, label=better(p)) for p in pairs], run.name))
            for pairs in (test, own)
        )
        places = topics(TEST)[:40]
        draws = random.Random(f"bon/{seed}")
        best = {n: true for n, _, true in best_of_n_curve(judge, places, (16, 256), draws)}
        *_, (_, kl, proxy, true) = train_policy(judge, places, seed)
        return {
            **row,
            "best of 16": best[16],
            "best of 256": best[256],
            "policy": true,
            "policy's KL": kl,
            "policy's proxy reward": proxy,
            "own pairs": on_own["accuracy"],
            "own cross-entropy": on_own["cross-entropy"],
            "own margin": on_own["margin"],
        }

    return lab.keep(lab.folder / f"seed{seed}" / f"{name}.certain.json", make)


def rated(pairs: list[Pair], temperature: float, seed: int) -> list[Pair]:
    """The pairs as raters of this temperature label them; 0 is certain. Ties are left out.

    The draws are the same for every temperature.
    """
    draws, again = random.Random(f"rated/{seed}"), []
    for pair in pairs:
        draw, p = draws.random(), chance(pair)
        if p == 0.5:
            continue
        odds = math.log(p / (1 - p))  # at the village's temperature, 1
        p = 1 / (1 + math.exp(-odds / temperature)) if temperature else float(odds > 0)
        again.append(replace(pair, probability=p, label=int(draw >= p)))
    return again


def chance(pair: Pair) -> float:
    """P(the first response is better), which the village knows of all labelled pairs."""
    assert pair.probability is not None
    return pair.probability


def better(pair: Pair) -> int:
    """The truly better response, as a label."""
    return int(chance(pair) < 0.5)


def the_better_rambles(pair: Pair) -> bool:
    """Whether the better response rambles and the other one does not."""
    rambles = [any(text in y for text in RAMBLING) for y in (pair.response_a, pair.response_b)]
    return rambles[better(pair)] and not rambles[1 - better(pair)]

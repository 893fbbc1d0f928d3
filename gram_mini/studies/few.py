"""Few labels on a new topic: Figure 5."""

from __future__ import annotations

from typing import NamedTuple

import train_reward
from gram_mini.studies.lab import JOINT, LIKELIHOOD, METHODS, Lab

NOTHING = "nothing"  # the plain backbone as a starting point
COUNTS = (0, 50, 100, 200, 2000)  # new labels


class Recipe(NamedTuple):
    """How a judge is trained on new labels, as options of the training script."""

    lr: str
    epochs: int
    batch_size: int = 32

    def __str__(self) -> str:
        return f"lr {self.lr}, {self.epochs} epochs of {self.batch_size}"

    @property
    def options(self) -> list[str]:
        sizes = ["--epochs", str(self.epochs), "--batch-size", str(self.batch_size)]
        return ["--lr", self.lr, *sizes]


# The rate of stage 2, and a third of it for twice as long. By a search on seed 0 with 200 labels
# the longer way is better after a stage 1, and no different without one.
FULL, FULL_SCALAR = Recipe("3e-4", 2), Recipe("1e-3", 2)
SLOW, SLOW_SCALAR = Recipe("1e-4", 4), Recipe("3e-4", 4)
ADAPT = {
    "D-Baseline": FULL_SCALAR,
    "D from stage 1": SLOW_SCALAR,
    "G-Baseline": FULL,
    "GRAM": SLOW,
    JOINT: SLOW,
    NOTHING: FULL,
}


def adapt(lab: Lab, seed: int):
    """Figure 5: 0 to 2,000 labels on the unlabelled villagers, from each starting point."""
    everything = lab.pairs("labelled", seed) + lab.pairs("adaptation", seed)
    data = lab.file(f"everything-{seed}", everything)
    oracle = lab.row(lab.train(train_reward, "oracle", seed, data, lab.stage1(seed)))
    for count in COUNTS:
        yield {"method": "oracle", "labels": count, **oracle}
        yield {"method": LIKELIHOOD, "labels": count, **lab.row_of(LIKELIHOOD, seed)}
        for name, recipe in ADAPT.items():
            yield {"method": name, "labels": count, **adapted(lab, seed, name, recipe, count)}
        if count:  # for comparison: as it was trained
            figures = adapted(lab, seed, "GRAM", FULL, count)
            yield {"method": "GRAM, full rate", "labels": count, **figures}


def adapted(lab: Lab, seed: int, name: str, recipe: Recipe, count: int) -> dict[str, float]:
    """Figures out of distribution of a starting point that went on with new labels by a recipe."""
    start = None if name == NOTHING else lab.method(name, seed)
    if not count:
        return lab.row(start or lab.model)
    _, script, options = METHODS.get(name, (False, train_reward, []))
    data = lab.file(f"few-{count}-{seed}", lab.pairs("adaptation", seed)[:count])
    run = f"few-{name}-{count}-{recipe}"
    given = [*options, *recipe.options]  # the last of two rates counts
    return lab.row(lab.train(script, run, seed, data, start, given))

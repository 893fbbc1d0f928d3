"""Few labels on a new topic: a recipe, searched on seed 0 (``recipes``), and Figure 5 (``adapt``).

A recipe is a mixture of new labels with old ones, and options of the training script. On the
command line: a folder that holds a file of old and a file of new labels, and

    python train_reward.py --init runs/reward --data FOLDER --lr 3e-4 --epochs 2
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import train_reward
from gram_mini.pairs import Pair
from gram_mini.studies.lab import METHODS, Lab

COUNTS = (50, 100, 200, 500, 1000, 2000)  # new labels


@dataclass(frozen=True)
class Recipe:
    """How a trained judge goes on with new labels.

    ``times`` is how often each new label stands in the file, ``old`` how many labels of stage 2
    stand beside them.
    """

    lr: str
    epochs: str
    batch_size: str = "64"
    eps: str = "0.05"
    old: int = 0
    times: int = 1

    def __str__(self) -> str:
        old = f", {self.old} old, new x {self.times}" if self.old else ""
        return f"lr {self.lr}, {self.epochs} epochs of {self.batch_size}, eps {self.eps}{old}"

    @property
    def options(self) -> list[str]:
        """The options of the training script."""
        options = {"lr": self.lr, "epochs": self.epochs, "batch-size": self.batch_size}
        options["label-smoothing"] = self.eps
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def rows(self, new: list[Pair], labelled: list[Pair], draw: str) -> list[Pair]:
        """The pairs to train on; ``draw`` draws the old ones."""
        return new * self.times + random.Random(f"replay/{draw}").sample(labelled, self.old)


def adapted(
    lab: Lab, seed: int, name: str, recipe: Recipe, new: list[Pair], draw: int = 0
) -> dict[str, float]:
    """Figures out of distribution of a method that went on with new labels by a recipe.

    Args:
        name: a key of METHODS, or "nothing": the plain backbone.
        draw: number of this draw of new labels.
    """
    tag = f"few-{name}-{len(new)}-{draw}-{recipe}".replace(" ", "")

    def make() -> dict[str, float]:
        rows = recipe.rows(new, lab.pairs("labelled", seed), f"{seed}/{draw}")
        content = f"few-{len(new)}-{draw}-{recipe.old}-{recipe.times}-{seed}"
        _, script, options = METHODS.get(name, (False, train_reward, []))
        init = ["--init", str(lab.method(name, seed))] if name in METHODS else []
        data = ["--data", lab.file(content, rows)]
        run = lab.train(script, tag, seed, *data, *options, *recipe.options, *init)
        return lab.evaluate(run)

    return lab.keep(lab.folder / f"seed{seed}" / f"{tag}.adapted.json", make)

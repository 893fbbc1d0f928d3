"""Few labels on a new topic: the search for a recipe (``recipes``), and Figure 5 (``adapt``).

What the search found is ADAPT; gram_mini/runs/README.md says it as a command.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import train_reward
from gram_mini.studies.lab import MAIN, METHODS, Lab

from safetensors.torch import load_file, save_file

NOTHING = "nothing"  # the plain backbone as a starting point
STARTS = (*MAIN, NOTHING)
COUNTS = (0, 50, 100, 200, 2000)  # new labels, of adapt


@dataclass(frozen=True)
class Recipe:
    """How a judge goes on with new labels: options of the training script; how many ``old`` labels
    of stage 2 stand beside the new ones, and how often (``times``) each new one stands there.
    ``pull`` is the share of the starting point in the adapter's weights afterwards.
    """

    lr: str
    epochs: int
    batch_size: int = 32
    old: int = 0
    times: int = 1
    eps: float | None = None  # None: the script's own
    pull: float = 0.0

    def __str__(self) -> str:
        beside = f", {self.old} old labels" if self.old else ""
        often = f", new ones x {self.times}" if self.times > 1 else ""
        smoothed = "" if self.eps is None else f", eps {self.eps:g}"
        pulled = f", pulled back by {self.pull:g}" if self.pull else ""
        steps = f"lr {self.lr}, {self.epochs} epochs of {self.batch_size}"
        return f"{steps}{beside}{often}{smoothed}{pulled}"

    @property
    def options(self) -> list[str]:
        """The options of the training script."""
        sizes = ["--epochs", str(self.epochs), "--batch-size", str(self.batch_size)]
        eps = [] if self.eps is None else ["--label-smoothing", str(self.eps)]
        return ["--lr", self.lr, *sizes, *eps]


# The rate of stage 2 (it is 3e-4 with a scalar head) and its two epochs; less of a rate and longer.
FULL, FULL_SCALAR = Recipe("1e-3", 2), Recipe("3e-4", 2)
SLOW, SLOW_SCALAR = Recipe("3e-4", 4), Recipe("1e-4", 4)
SEARCH = [  # starting point, recipe, {number of new labels: draws of them}
    ("GRAM", FULL, {50: 4, 200: 4, 2000: 1}),
    ("GRAM", SLOW, {50: 4, 200: 4, 2000: 1}),
    ("GRAM", Recipe("1e-4", 8), {200: 2}),
    ("GRAM", Recipe("3e-4", 2, 64, old=1000), {0: 3, 50: 4, 200: 4}),
    ("GRAM", Recipe("3e-4", 2, 64, old=1000, times=5), {50: 4, 200: 3}),
    ("GRAM", Recipe("3e-4", 4, 64, old=1000), {50: 4}),
    ("GRAM", Recipe("1e-3", 2, 64, old=1000), {50: 4, 200: 3}),
    ("GRAM", Recipe("1e-3", 2, 64, old=1000, times=5), {50: 4, 200: 2}),
    ("GRAM", Recipe("1e-4", 4, 64, old=1000, times=5), {50: 4}),
    ("GRAM", Recipe("3e-4", 4, eps=0.0), {50: 4, 200: 4}),
    ("GRAM", Recipe("3e-4", 4, eps=0.2), {50: 4, 200: 4}),
    ("GRAM", Recipe("1e-3", 2, pull=0.5), {50: 4, 200: 4}),
    ("GRAM", Recipe("3e-4", 4, pull=0.5), {50: 4, 200: 4}),
    ("D from stage 1", FULL_SCALAR, {200: 2}),
    ("D from stage 1", SLOW_SCALAR, {200: 2}),
    ("D-Baseline", FULL_SCALAR, {200: 2}),
    ("D-Baseline", SLOW_SCALAR, {200: 2}),
    ("G-Baseline", FULL, {200: 2}),
    ("G-Baseline", SLOW, {200: 2}),
    (NOTHING, FULL, {200: 2}),
    (NOTHING, SLOW, {200: 2}),
]
# By the search on seed 0. Without stage 1 the two recipes differ by less than 0.006, so these
# starting points keep the rate of stage 2.
ADAPT = {
    "D-Baseline": FULL_SCALAR,
    "D from stage 1": SLOW_SCALAR,
    "G-Baseline": FULL,
    "GRAM": SLOW,
    NOTHING: FULL,
}


def recipes(lab: Lab, seed: int):
    """Ours: ways to go on with few new labels; the intervals are over draws of the labels."""
    for name in STARTS:
        yield {"method": f"{name}, no new labels", "draw": 0, **before(lab, seed, name)}
    for name, recipe, counts in SEARCH:
        for count, draws in counts.items():
            for draw in range(draws):
                figures = adapted(lab, seed, name, recipe, count, draw)
                yield {"method": f"{name}, {count} labels: {recipe}", "draw": draw, **figures}


def adapt(lab: Lab, seed: int):
    """Figure 5: 0 to 2,000 labels on the unlabelled villagers, from each starting point."""
    everything = lab.pairs("labelled", seed) + lab.pairs("adaptation", seed)
    data = lab.file(f"everything-{seed}", everything)
    init = ["--init", str(lab.stage1(seed))]
    oracle = lab.evaluate(lab.train(train_reward, "oracle", seed, "--data", data, *init))
    for count in COUNTS:
        yield {"method": "oracle", "labels": count, **oracle}
        for name, recipe in ADAPT.items():
            figures = adapted(lab, seed, name, recipe, count) if count else before(lab, seed, name)
            yield {"method": name, "labels": count, **figures}
        if count:  # for comparison: as it was trained
            figures = adapted(lab, seed, "GRAM", FULL, count)
            yield {"method": "GRAM, full rate", "labels": count, **figures}


def before(lab: Lab, seed: int, name: str) -> dict[str, float]:
    """Figures out of distribution of a starting point, without new labels."""
    return lab.evaluate(lab.model if name == NOTHING else lab.method(name, seed))


def adapted(
    lab: Lab, seed: int, name: str, recipe: Recipe, count: int, draw: int = 0
) -> dict[str, float]:
    """Figures out of distribution of a method that went on with new labels by a recipe.

    Args:
        name: one of STARTS.
        count: number of new labels.
        draw: which of the draws of new labels; up to 200 labels they do not overlap.
    """
    tag, trained = (
        f"few-{name}-{count}-{draw}-{by}".replace(" ", "-")
        for by in (recipe, replace(recipe, pull=0.0))  # pulled back or not, it is one training
    )

    def make() -> dict[str, float]:
        new = lab.pairs("adaptation", seed)[draw * 200 :][:count]
        rows = new * recipe.times
        if recipe.old:
            drawn = random.Random(f"replay/{seed}/{draw}")
            rows += drawn.sample(lab.pairs("labelled", seed), recipe.old)
        content = f"few-{count}-{draw}-{recipe.old}-{recipe.times}-{seed}"
        _, script, options = METHODS.get(name, (False, train_reward, []))
        start = None if name == NOTHING else lab.method(name, seed)
        init = ["--init", str(start)] if start else []
        data = ["--data", lab.file(content, rows)]
        run = lab.train(script, trained, seed, *data, *options, *init, *recipe.options)
        return lab.evaluate(pulled_back(run, start, recipe.pull) if recipe.pull and start else run)

    return lab.keep(lab.folder / f"seed{seed}" / f"{tag}.adapted.json", make)


def pulled_back(run: Path, start: Path, share: float) -> Path:
    """A copy of a run whose adapter lies between where it started (``share``) and where it came to.

    Wortsman et al., arXiv 2109.01903, average all weights; here it is LoRA's A and B, each by
    itself.
    """
    copy = run.with_name(f"{run.name}, averaged {share:g}")
    shutil.copytree(run, copy, dirs_exist_ok=True)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run, start))
    mean = {name: (1 - share) * weight + share * theirs[name] for name, weight in ours.items()}
    save_file(mean, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return copy

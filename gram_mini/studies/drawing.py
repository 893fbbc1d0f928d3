"""The pictures of the studies: methods side by side, or methods over an x.

Seeds are small dots or thin lines, and what stands out is their mean.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from gram_mini.studies.figures import average, figure_text
from gram_mini.studies.paper import Study
from gram_mini.studies.style import color_of, dash_of, name_lines, without_stage_1

import matplotlib
from matplotlib.figure import Figure  # not pyplot: its state belongs to the notebook that calls us

WIDTH = 8.0  # inches; a page shows them in about 800 pixels
FONT = {"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "axes.titlelocation": "left"}
GREY, PALE = "#777777", "#DDDDDD"


class Scale(NamedTuple):
    """The axis of a figure: its unit, where it begins and ends at most, and what chance gives."""

    unit: str
    begin: float | None = None
    end: float | None = None
    chance: float | None = None


ACCURACY = Scale("share judged right", 0.5, 1.0, 0.5)  # of all figures that SCALES does not name
BETTER_THAN_START, REWARD = Scale("P(better than the start)"), Scale("points, at most 3")
SCALES = {
    "KL": Scale("KL to the start, nats", 0.0),
    "agreement": Scale("share of pairs in true order", 0.5, 1.0, 0.5),
    "best of 16": REWARD,
    "calibration error": Scale("mean error of P", 0.0, 1.0),
    "cross-entropy": Scale("nats"),
    "judge's reward": BETTER_THAN_START,
    "judge's score": Scale("log-odds, nats"),
    "margin": Scale("log-odds, nats", 0.0),
    "no answer": Scale("share of the texts", 0.0, 1.0),
    "policy": REWARD,
    "position gap": Scale("mean change of P", 0.0, 1.0),
    "proxy reward": BETTER_THAN_START,
    "proxy score": Scale("log-odds, nats"),
    "true reward": REWARD,
    "true reward of the first": REWARD,
}
X_LABELS = {
    "KL": SCALES["KL"].unit,
    "comparisons": "number of comparisons",
    "eps": "eps of the smoothing",
    "flipped": "share of the labels flipped",
    "labels": "number of labels",
    "share": "share of the unlabelled pairs in stage 1",
    "step": "step of training",
}
PATHS = ("KL", "step")  # the x of which a seed is a thin line; over another x it is dots
BOUND = "mean best margin, noisy labels"  # of paper.smoothing


@matplotlib.rc_context(FONT)
def picture_of(name: str, study: Study, rows: list[dict]) -> Figure:
    """The picture of a study from the rows of all seeds; ``study`` says what is shown over what."""
    means = average(rows, study.keys)
    counts = Counter(tuple(row[key] for key in study.keys) for row in rows).values()
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    panels = [panel for panel in study.shown if any(panel in row for row in rows)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    dots = study.x is None
    # Each panel of lines needs room for names; a row of panels of dots shares them.
    columns = min(len(panels), 2 if dots or len(panels) > 3 else 1)
    down = math.ceil(len(panels) / columns)
    height = 0.7 + 0.19 * len(methods) if dots else 2.4
    figure = Figure((WIDTH, 0.8 + down * height), layout="constrained")
    axes = list(figure.subplots(down, columns, squeeze=False, sharey=dots).flat)
    about: dict[str, str] = {}  # what the picture's marks mean, of those that are in it
    if any(map(without_stage_1, methods)):
        about["hollow" if dots else "dashed"] = "without stage 1"
    while len(axes) > len(panels):
        axes.pop().remove()
    for axis, panel in zip(axes, panels):
        shown = [row for row in rows if panel in row]
        if study.x is None:
            _dots(axis, panel, shown, means, methods)
        else:
            _lines(axis, panel, shown, means, study.x)
        axis.grid(color=PALE, lw=0.6)
        axis.set_title(panel)
        begin = (axis.get_xlim() if dots else axis.get_ylim())[0]
        if (chance := _scale(panel).chance) is not None and chance > begin:  # not on the frame
            (axis.axvline if dots else axis.axhline)(chance, color=GREY, ls=":", lw=1)
            about["dotted"] = "chance"
    figure.suptitle(f"{name} ({seeds} seed{'s' * (max(counts) > 1)})")
    if dots:
        told = {"small dots": "seeds", "large dots and numbers": "mean ± 95% interval"}
    else:
        seeds = "thin lines" if study.x in PATHS else "dots"
        told = {seeds: "seeds", "thick lines": "their mean"}
    said = "; ".join(f"{mark}: {meaning}" for mark, meaning in {**told, **about}.items())
    figure.supxlabel(said, fontsize=FONT["font.size"], color=GREY)
    if not dots:
        name_lines(figure)
    return figure


def _scale(panel: str) -> Scale:
    """The scale of a figure, such as "agreement" for "agreement, GRAM"."""
    return SCALES.get(panel) or SCALES.get(panel.partition(", ")[0], ACCURACY)


def _limits(scale: Scale, values: list[float]) -> tuple[float, float]:
    """Where an axis begins and ends: where its scale says, or at a tenth below if a value is."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    begin = low - room if scale.begin is None else min(scale.begin, math.floor(10 * low) / 10)
    if scale.end is None:
        return begin, high + room
    return begin, scale.end if scale.chance else min(scale.end, high + room)


def _dots(axis, panel: str, rows: list[dict], means: list[dict], methods: list[str]) -> None:
    """A line for each method: its seeds, and their mean with figures."""
    for place, method in enumerate(methods):
        values = [row[panel] for row in rows if row["method"] == method]
        if not values:
            continue
        color, (mean,) = color_of(method), [m[panel] for m in means if m["method"] == method]
        face = "white" if without_stage_1(method) else color
        axis.plot(values, [place] * len(values), ".", color=color, alpha=0.5, clip_on=False)
        axis.plot(mean[0], place, "o", color=color, mfc=face, ms=7, label=method, clip_on=False)
        at_the_right = axis.get_yaxis_transform()
        axis.text(1.06, place, figure_text(mean), transform=at_the_right, va="center")
    axis.set(xlabel=_scale(panel).unit, ylim=(len(methods) - 0.5, -0.5))
    axis.set_xlim(_limits(_scale(panel), [row[panel] for row in rows]))
    axis.set_yticks(range(len(methods)), methods)
    axis.tick_params(length=0)


def _lines(axis, panel: str, rows: list[dict], means: list[dict], x: str) -> None:
    """Each method over x: its seeds, and a line of their means."""
    seen = [row[panel] for row in rows]
    for method in dict.fromkeys(row["method"] for row in rows):
        style = {"color": color_of(method), "ls": dash_of(method), "clip_on": False}
        thin = {"lw": 0.6} if x in PATHS else {"ls": "", "marker": "."}
        of_method = [row for row in rows if row["method"] == method]
        for seed in dict.fromkeys(row["seed"] for row in of_method):
            path = [(row[x], row[panel]) for row in of_method if row["seed"] == seed]
            axis.plot(*zip(*path), **{**style, **thin}, alpha=0.45)
        mean = [row for row in means if row["method"] == method and panel in row]
        places = [row[x][0] if isinstance(row[x], list) else row[x] for row in mean]
        axis.plot(places, [row[panel][0] for row in mean], lw=1.8, label=method, **style)
    bounds = {row[x]: row["bound"][0] for row in means if panel == "margin" and "bound" in row}
    if bounds:
        axis.plot(bounds.keys(), bounds.values(), color=GREY, lw=1.2, label=BOUND)
    axis.set(xlabel=X_LABELS.get(x, x), ylabel=_scale(panel).unit)
    axis.set_ylim(_limits(_scale(panel), [*seen, *bounds.values()]))
    axis.margins(x=0.02)
    if x == "labels":
        counts = sorted({row[x] for row in rows})
        axis.set_xscale("symlog", linthresh=50)
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
    elif x == "comparisons":
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")

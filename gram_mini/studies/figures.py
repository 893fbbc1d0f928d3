"""Tables and figures of the studies: means over the seeds, with their intervals."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from gram_mini.evaluation import Evaluation, student_t, summarise
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.runs.output import save_figure
from gram_mini.runs.table import aligned

X_LABELS = {
    "KL": "KL, nats",
    "flipped": "share of the labels flipped",
    "share": "share of the unlabelled pairs",
}


def on_part(pairs: list[Pair], results: list[Comparison], places: list[int]) -> Evaluation:
    """The figures of some of the pairs."""
    return summarise([pairs[i] for i in places], [results[i] for i in places])


def average(rows: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Means of each figure over the seeds (and draws), as [mean, half of the 95% interval].

    For one value there is no interval, and its half is None.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    means = []
    for group, members in groups.items():
        mean = dict(zip(keys, group))
        for name in dict.fromkeys(name for row in members for name in row):
            values = [row[name] for row in members if row.get(name) is not None]
            if name not in (*keys, "seed", "draw") and len(values) == len(members):
                spread = statistics.stdev(values) if len(values) > 1 else None
                half = spread and student_t(len(values) - 1) * spread / math.sqrt(len(values))
                mean[name] = [statistics.mean(values), half]
        means.append(mean)
    return means


def table(means: list[dict], keys: tuple[str, ...]) -> str:
    """The means, a line each; cuts and mass stand in the file alone."""
    names = dict.fromkeys(name for row in means for name in row)
    head = [name for name in names if not name.endswith((", pairs cut", ", mass on the labels"))]
    lines = [head]
    for row in means:
        lines.append([str(row[name]) if name in keys else _figure(row.get(name)) for name in head])
    return aligned(lines)


def _figure(value: list | None) -> str:
    if value is None:
        return ""
    mean, half = value
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def draw(
    means: list[dict], x: str | None, shown: tuple[str, ...], picture: Path, title: str
) -> None:
    """Lines over x with their intervals, one panel for each figure; bars where there is no x."""
    # Not pyplot: its state belongs to the notebook that calls us.
    from matplotlib.figure import Figure

    panels = [name for name in shown if any(name in row for row in means)]
    methods = list(dict.fromkeys(row["method"] for row in means))
    if x is None:  # long names and many bars need more room
        names = 0.07 * max(0, max(map(len, methods)) - 24)
        size = 2.6 * len(panels) + names, max(3.8, 0.2 * len(methods))
    else:
        size = 5.0 * len(panels), 3.8
    figure = Figure(figsize=size)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=x is None)[0]
    for axis, name in zip(axes, panels):
        # The narrow panels of bars have no room for "accuracy" in their titles.
        unit = "accuracy" if name.endswith(("-distribution", " only")) else ""
        axis.set(title=name.replace("-", " "))
        for place, method in enumerate(methods):
            rows = [row for row in means if row["method"] == method and name in row]
            values, halves = [row[name][0] for row in rows], [row[name][1] or 0.0 for row in rows]
            if x is None:
                axis.barh(place, values, xerr=halves, height=0.7, color="tab:blue")
                continue
            places = [row[x][0] if isinstance(row[x], list) else row[x] for row in rows]
            style = ("-", "--")[place % 2]
            (line,) = axis.plot(places, values, marker=".", label=method, ls=style)
            low, high = ([v - s * h for v, h in zip(values, halves)] for s in (1, -1))
            if x != "comparisons":  # there the seeds move all lines together
                axis.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        axis.grid(alpha=0.3)
        if x is None:
            axis.set(xlabel=unit, ylim=(len(methods) - 0.5, -0.5))
            axis.set_yticks(range(len(methods)), methods)
            axis.axvline(0.5, color="black", lw=0.8)  # chance
            continue
        axis.set(xlabel=X_LABELS.get(x, x), ylabel=unit)
        bounds = {row[x]: row["bound"][0] for row in means if "bound" in row}
        if name == "margin" and bounds:
            label = "best for certain labels, log((1 - eps) / eps)"
            axis.plot(bounds.keys(), bounds.values(), "--", color="gray", label=label)
            axis.legend(fontsize=8)
        if x == "labels":
            counts = sorted({row[x] for row in means})
            axis.set_xscale("symlog", linthresh=50)
            axis.set_xticks(counts, counts, fontsize=8)
        elif x == "comparisons":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
    if x is not None:
        axes[-1].legend(fontsize=7, framealpha=0.5)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, picture)


def draw_changes(means: list[dict], measures: dict[str, bool], picture: Path, title: str) -> None:
    """What eps changes against eps = 0, as a table: green is better, red is worse, white is within
    the interval over the seeds. (One seed has none, so all of it is coloured.)

    Args:
        means: rows with "method", "eps" and, for each measure, "MEASURE, change".
        measures: whether more is better.
    """
    from matplotlib.figure import Figure

    rows = [row for row in means if row["eps"]]  # eps = 0 changes nothing
    figure = Figure(figsize=(6.5, 1.2 + 0.34 * len(rows)))
    axis = figure.subplots()
    for column, (name, more_is_better) in enumerate(measures.items()):
        changes = [row[f"{name}, change"] for row in rows]
        largest = max(abs(change) for change, _ in changes) or 1.0
        for line, (change, half) in enumerate(changes):
            color = "tab:green" if (change > 0) == more_is_better else "tab:red"
            color = color if abs(change) > (half or 0.0) else "white"
            strength = 0.15 + 0.6 * abs(change) / largest
            sides = [column, column + 1]
            axis.fill_between(sides, line, line + 1, color=color, alpha=strength, lw=0)
            text = f"{change:+.3f}"
            axis.text(column + 0.5, line + 0.5, text, ha="center", va="center", fontsize=7)
    methods = [row["method"] for row in rows]
    axis.set(title=f"eps = {rows[0]['eps']:g}", xlim=(0, len(measures)), ylim=(len(rows), 0))
    axis.set_xticks([i + 0.5 for i in range(len(measures))], measures, fontsize=7, rotation=25)
    axis.set_yticks([i + 0.5 for i in range(len(rows))], methods, fontsize=8)
    axis.tick_params(length=0)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, picture)

"""Tables and figures of the studies: means over the seeds, with their intervals."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from gram_mini.evaluation import student_t
from gram_mini.runs.output import save_figure

ACCURACIES = ("in-distribution", "out-of-distribution", "fact", "courtesy", "length")


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


def print_table(means: list[dict], keys: tuple[str, ...]) -> None:
    """The means, a line each; cuts and mass stand in the file alone."""
    names = dict.fromkeys(name for row in means for name in row)
    head = [name for name in names if not name.endswith((", pairs cut", ", mass on the labels"))]
    lines = [head]
    for row in means:
        lines.append([str(row[name]) if name in keys else _figure(row.get(name)) for name in head])
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


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
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=x is None)
    x_labels = {
        "KL": "KL, nats",
        "flipped": "share of the labels flipped",
        "share": "share of the unlabelled pairs",
    }
    for axis, name in zip(axes[0], panels):
        for place, method in enumerate(methods):
            rows = [row for row in means if row["method"] == method and name in row]
            values, halves = [row[name][0] for row in rows], [row[name][1] or 0.0 for row in rows]
            if x is None:
                axis.barh(place, values, xerr=halves, height=0.7, color="tab:blue")
            else:
                places = [row[x][0] if isinstance(row[x], list) else row[x] for row in rows]
                (line,) = axis.plot(
                    places, values, marker=".", label=method, ls=("-", "--")[place % 2]
                )
                low, high = ([v - s * h for v, h in zip(values, halves)] for s in (1, -1))
                if x != "comparisons":  # there the seeds move all lines together
                    axis.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        bounds = {
            row[x]: row["bound"][0] for row in means if x and name == "margin" and "bound" in row
        }
        if bounds:
            label = "best for certain labels, log((1 - eps) / eps)"
            axis.plot(bounds.keys(), bounds.values(), "--", color="gray", label=label)
            axis.legend(fontsize=8)
        # The narrow panels of bars have no room for "accuracy" in their titles.
        unit = "accuracy" if name in ACCURACIES else ""
        title_of_panel = name.replace("-", " ")
        if x is None:
            axis.set(title=title_of_panel, xlabel=unit)
        else:
            axis.set(title=title_of_panel, xlabel=x_labels.get(x, x), ylabel=unit)
        axis.grid(alpha=0.3)
        if x is None:
            axis.set_yticks(range(len(methods)), methods)
            axis.set_ylim(len(methods) - 0.5, -0.5)
            axis.axvline(0.5, color="black", lw=0.8)  # chance
        elif x == "labels":
            counts = sorted({row[x] for row in means})
            axis.set_xscale("symlog", linthresh=50)
            axis.set_xticks(counts, counts, fontsize=8)
        elif x == "rate":
            axis.set_xscale("log")
        elif x == "comparisons":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
    if x is not None:
        axes[0][-1].legend(fontsize=7, framealpha=0.5)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, picture)


def draw_changes(means: list[dict], measures: dict[str, bool], picture: Path, title: str) -> None:
    """What each eps changes against eps = 0, as a table: green is better, red is worse, white is
    within the interval over the seeds. (One seed has none, so all of it is coloured.)

    Args:
        means: rows with "method", "eps" and, for each measure, "MEASURE, change".
        measures: whether more is better.
    """
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(row["method"] for row in means))
    sizes = [eps for eps in dict.fromkeys(row["eps"] for row in means) if eps]
    figure = Figure(figsize=(1.0 + 5.5 * len(sizes), 1.2 + 0.34 * len(methods)))
    axes = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axis, eps in zip(axes, sizes):
        for column, (name, more_is_better) in enumerate(measures.items()):
            changes = {row["method"]: row[f"{name}, change"] for row in means if row["eps"] == eps}
            largest = max(abs(mean) for mean, _ in changes.values()) or 1.0
            for line, method in enumerate(methods):
                change, half = changes[method]
                beyond = abs(change) > (half or 0.0)
                good = (change > 0) == more_is_better
                color = ("tab:green" if good else "tab:red") if beyond else "white"
                strength = 0.15 + 0.6 * abs(change) / largest
                axis.fill_between(
                    [column, column + 1], line, line + 1, color=color, alpha=strength, lw=0
                )
                text = f"{change:+.3f}"
                axis.text(column + 0.5, line + 0.5, text, ha="center", va="center", fontsize=7)
        axis.set(title=f"eps = {eps:g}", xlim=(0, len(measures)), ylim=(len(methods), 0))
        axis.set_xticks([i + 0.5 for i in range(len(measures))], measures, fontsize=7, rotation=25)
        axis.set_yticks([i + 0.5 for i in range(len(methods))], methods, fontsize=8)
        axis.tick_params(length=0)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, picture)

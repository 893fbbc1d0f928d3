"""Figures of the studies: means over the seeds, with their intervals, and tables of them."""

from __future__ import annotations

import math
import statistics

from gram_mini.evaluation import Evaluation, student_t, summarise
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.runs.table import aligned


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


def table(means: list[dict]) -> str:
    """Rows of figures for the terminal, a line each."""
    head = list(dict.fromkeys(name for row in means for name in row))
    return aligned([head, *([figure_text(row.get(name)) for name in head] for row in means)])


def figure_text(value, form: str = ".3f") -> str:
    """0.869, 0.869 ± 0.012, or 0.589 (0.544–0.637); an exact zero is 0.

    Text, and what is no figure with its interval, stays as it is; None is empty.
    """
    if not isinstance(value, list):
        return "" if value is None else str(value)
    center, *interval = value
    if len(interval) == 2:
        low, high = interval
        return f"{center:{form}} ({low:{form}}–{high:{form}})"
    text = f"{center:{form}}" if center or any(interval) else "0"
    text = text.removeprefix("-") if not text.strip("-0.") else text  # no -0.00
    return f"{text} ± {interval[0]:{form}}" if any(interval) else text

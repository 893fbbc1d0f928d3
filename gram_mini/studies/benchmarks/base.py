"""What a benchmark is: how a row is read, what its comparisons are worth, what the figures are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gram_mini.errors import UserError
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.messages import read_prompt
from gram_mini.reading.sources import Notes

import torch


@dataclass(frozen=True)
class Row:
    """One row of a benchmark: better (chosen) and worse (rejected) responses to a prompt."""

    group: str  # subset, domain or source, as the benchmark names it
    section: str  # what it counts towards
    unit: str  # rows of one unit are drawn together by the bootstrap: those of one prompt
    prompt: str
    chosen: list[str]
    rejected: list[str]


@dataclass(frozen=True)
class Judged:
    """A row after it was judged."""

    row: Row
    credit: Any  # what the official figures are made of
    # P(chosen better), orders agree, position gap, sign of how much longer the chosen one is
    pairs: torch.Tensor  # (chosen x rejected, 4)


Results = dict[tuple[int, int], Comparison]  # of responses i and j, the chosen ones numbered first
Units = list[list[Judged]]  # the rows of each prompt
Figures = dict[str, float | None]  # None where rows are missing


class Benchmark:
    """A public benchmark; to add one, fill in its groups, read, credit and figures."""

    groups: dict[str, str]  # the section of each group that the official figures need
    all_pairs = False  # compare all responses of a row, not only chosen with rejected ones

    def files(self, source: str, notes: Notes) -> list[str]:
        """The sources to read in place of the one that was given."""
        return [source]

    def read(self, where: str, row: dict, notes: Notes) -> Row:
        """A row; one that is not this benchmark's is a UserError with its place and column."""
        raise NotImplementedError

    def credit(self, row: Row, results: Results) -> Any:
        """What the comparisons of a row are worth."""
        raise NotImplementedError

    def figures(self, units: Units) -> Figures:
        """The official figures."""
        raise NotImplementedError


# ---- means ---------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def complete_mean(values: Iterable[float | None]) -> float | None:
    """The plain mean; None where there is no value, or one is missing."""
    every = list(values)
    there = [value for value in every if value is not None]
    return mean(there) if there and len(there) == len(every) else None


def credits(units: Units, name: str) -> dict[str, list]:
    """The credits of the rows of each "group" or "section"."""
    by_name = defaultdict(list)
    for unit in units:
        for judged in unit:
            by_name[getattr(judged.row, name)].append(judged.credit)
    return by_name


def means(units: Units, name: str) -> dict[str, float]:
    """Mean credit of each "group" or "section"."""
    return {key: mean(values) for key, values in credits(units, name).items()}


# ---- columns -------------------------------------------------------------------------


def known(what: str, value, values: Iterable[str], where: str) -> str:
    """A name, which must be one of these."""
    if value not in list(values):
        raise UserError(f"{where}: unknown {what} {value!r}; known are {', '.join(values)}")
    return value


def texts(row: dict, column: str, where: str, count: int | None = None) -> list[str]:
    """The texts of a column: a list of ``count`` of them, or of one or more."""
    value = row.get(column)
    if not isinstance(value, list) or not value or len(value) != (count or len(value)):
        wanted = count or "one or more"
        raise UserError(f"{where}: column {column!r} must be a list of {wanted} texts")
    return [read_prompt(text, where, column) for text in value]


def one_pair(row: dict, where: str, notes: Notes) -> Pair:
    """The labelled pair of a row in any format of reading/formats.py."""
    pairs, _ = parse_pairs([(where, row)], notes=notes)
    if len(pairs) != 1 or pairs[0].label is None:
        raise UserError(
            f"{where}: needs one pair with a label: 'chosen' and 'rejected' texts, "
            "or 'label' with A or B (A>B or B>A)"
        )
    return pairs[0]


def row_of(pair: Pair, group: str, section: str) -> Row:
    """A labelled pair as a row."""
    a, b = [pair.response_a], [pair.response_b]
    chosen, rejected = (b, a) if pair.label == 1 else (a, b)
    return Row(group, section, pair.prompt, pair.prompt, chosen, rejected)

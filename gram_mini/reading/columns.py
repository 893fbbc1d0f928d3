"""Which columns of a table hold a pair: what --columns and --labels say.

    --columns prompt=instruction+input,a=output_1,b=output_2,label=preference
    --labels a=1,b=2,tie=0

A target is a part of a pair. A source is where a row holds it: a column, a path into one (text.0,
output.-1.content), or several texts joined with +.
"""

from __future__ import annotations

import json
import re
from typing import Any

from gram_mini.errors import UserError
from gram_mini.reading.messages import is_nothing, read_number, read_text

# The targets of each kind of row, and those that it may have besides.
KINDS: tuple[tuple[set[str], set[str]], ...] = (
    ({"chosen", "rejected"}, {"prompt"}),
    ({"a", "b"}, {"prompt", "label"}),
    ({"a", "b", "score_a", "score_b"}, {"prompt"}),
    ({"prompt", "response"}, {"score"}),
)
TEXTS = ("prompt", "chosen", "rejected", "a", "b", "response")
TARGETS = (*TEXTS, "label", "score_a", "score_b", "score")

Scores = tuple[float | None, float | None]  # of two responses, the higher the better; or unknown

VERDICTS: dict[str, Scores] = {"a": (1, 0), "b": (0, 1), "tie": (0, 0)}
LABELS = "a=A,a=A>B,b=B,b=B>A,tie=tie,tie=A=B"  # what a label means without --labels

# Beside 'chosen' and 'rejected' these say that neither is better, where they are equal.
TIED = ("score_chosen", "score_rejected")


class Columns:
    """What --columns and --labels say, and what a row holds for it.

    Raises:
        UserError: what they say cannot be understood, or does not make a pair.
    """

    def __init__(self, columns: str, labels: str | None = None):
        self.sources = dict(_assignments("--columns", columns, TARGETS, "COLUMN"))
        targets = self.sources.keys()
        if not any(needed <= targets <= needed | more for needed, more in KINDS):
            raise UserError(
                f"--columns {columns}: the targets {', '.join(targets)} make no pair; give prompt "
                "with chosen and rejected, with a and b (perhaps label, or score_a and score_b), "
                "or with response (perhaps score)"
            )
        if labels and "label" not in targets:
            raise UserError(f"--labels {labels}: goes with a label in --columns; add label=COLUMN")
        listed = _assignments("--labels", labels or LABELS, tuple(VERDICTS), "VALUE")
        self.labels = {comparable(value): VERDICTS[name] for name, value in listed}
        if len(self.labels) < len(listed):
            raise UserError(f"--labels {labels}: gives one value two meanings; give each once")

    def names(self, row: dict) -> set[str]:
        """The columns that are read of a row."""
        paths = [path for source in self.sources.values() for path in source.split("+")]
        if "chosen" in self.sources:
            paths += [name for name in TIED if name in row]
        return {path if path in row else path.split(".")[0] for path in paths}

    def value(self, row: dict, target: str, where: str):
        """What a row holds for a target: any value, or texts with a blank line between them.

        Empty ones of several texts are left out.

        Raises:
            UserError: the row holds none.
        """
        paths = self.sources[target].split("+")
        values = [self._look_up(row, path, target, where) for path in paths]
        if len(paths) == 1:
            return values[0]
        there = [(path, value) for path, value in zip(paths, values) if not is_nothing(value)]
        return "\n\n".join(read_text(value, where, path) for path, value in there)

    def _look_up(self, row: dict, path: str, target: str, where: str) -> Any:
        column, *steps = [path] if path in row else path.split(".")
        try:
            value = row[column]
            for step in steps:
                value = json.loads(value) if isinstance(value, str) else value
                value = value[int(step)] if isinstance(value, list) else value[step]
        except (LookupError, ValueError, TypeError, RecursionError):
            raise UserError(
                f"{where}: --columns {target}={self.sources[target]}: the row holds no {path!r}; "
                f"its columns are {', '.join(map(str, row))}"
            ) from None
        return value

    def scores(self, row: dict, where: str) -> Scores:
        """What a row says about its two responses.

        Raises:
            UserError: a label that is not listed, or a score that is no number.
        """
        if "chosen" in self.sources:
            chosen, rejected = (comparable(row.get(name)) for name in TIED)
            return (0, 0) if chosen == rejected and chosen != "" else (1, 0)
        if "score_a" in self.sources:
            return self.score(row, "score_a", where), self.score(row, "score_b", where)
        label = self.value(row, "label", where) if "label" in self.sources else None
        if comparable(label) in self.labels:
            return self.labels[comparable(label)]
        if label is None or label == "":
            return None, None
        raise UserError(
            f"{where}: the label in column {self.sources['label']!r} is "
            f"{json.dumps(label, default=str)[:60]}, which is not listed; say what it means with "
            "--columns and --labels a=...,b=...,tie=..."
        )

    def score(self, row: dict, target: str, where: str) -> float | None:
        """A score; None where a row holds an empty one."""
        if target not in self.sources:
            raise UserError(f"{where}: no label; --columns needs score=COLUMN to compare responses")
        value = self.value(row, target, where)
        missing = value is None or value == ""
        return None if missing else read_number(value, where, self.sources[target])


def given_columns(columns: str | None, labels: str | None) -> Columns | None:
    """What the options --columns and --labels say; None without --columns."""
    if labels and not columns:
        raise UserError(f"--labels {labels}: goes with --columns; add --columns with label=COLUMN")
    return Columns(columns, labels) if columns else None


def _assignments(
    option: str, text: str, names: tuple[str, ...], kind: str
) -> list[tuple[str, str]]:
    """The (name, value) pairs of name=value,name=value; a value may hold commas."""
    pairs: list[tuple[str, str]] = []
    for part in re.split(r",(?=\s*\w+=)", text):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in names or not equals or (not value and option == "--columns"):
            raise UserError(
                f"{option} {text}: cannot read {part!r}; give {names[0]}={kind},... with the names "
                f"{', '.join(names)}"
            )
        if option == "--columns" and name in dict(pairs):
            raise UserError(f"{option} {text}: gives {name} twice; join columns with +")
        pairs.append((name, value))
    return pairs


def comparable(value):
    """What is equal for equal values: 1, "1" and 1.0 are, true and 1 are not."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value).strip()

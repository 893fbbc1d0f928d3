"""Any table in, rows of a known format out: what --columns and --labels say.

    --columns prompt=instruction+input,a=output_1,b=output_2,label=preference
    --labels a=1,b=2,tie=0

A target is a part of a pair, a source is where a row holds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from gram_mini.errors import UserError
from gram_mini.reading.messages import is_nothing, literal, read_number, read_text
from gram_mini.reading.sources import Notes, Row

# The targets of each kind of row, and those that it may have besides.
KINDS: tuple[tuple[set[str], set[str]], ...] = (
    ({"chosen", "rejected"}, {"prompt"}),
    ({"prompt", "a", "b"}, {"label"}),
    ({"prompt", "a", "b", "score_a", "score_b"}, set()),
    ({"prompt", "response"}, {"score"}),
)
TARGETS = (
    "prompt", "chosen", "rejected", "a", "b", "label", "score_a", "score_b", "response", "score",
)  # fmt: skip
VERDICTS = {"a": "A", "b": "B", "tie": "tie"}

MISSING = object()


class Columns:
    """What --columns and --labels say, and the rows that they make.

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
        self.labels = None
        if labels:
            listed = _assignments("--labels", labels, tuple(VERDICTS), "VALUE")
            self.labels = {_comparable(value): VERDICTS[name] for name, value in listed}
            if len(self.labels) < len(listed):
                raise UserError(f"--labels {labels}: gives one value two meanings; give each once")

    # ---- rows ------------------------------------------------------------------------

    def rows(self, rows: Iterator[Row], notes: Notes) -> Iterator[Row]:
        """Each row with the columns of a format that exists, or the reason why it cannot be."""
        for where, row in rows:
            if isinstance(row, dict):
                try:
                    row = self._row(row, where, notes)
                except UserError as error:
                    row = error
            yield where, row

    def _row(self, row: dict, where: str, notes: Notes) -> dict:
        read: set[str] = {"id"}  # score.py repeats it
        text = lambda target: self._text(row, target, where, read)

        def later(value):
            """A label or a score is wrong only where it is needed: stage 1 reads none."""
            try:
                return value()
            except UserError as error:
                return error

        s = self.sources
        mapped: dict[str, Any]
        if "chosen" in s:
            mapped = {name: text(name) for name in ("prompt", "chosen", "rejected") if name in s}
        elif "response" in s:
            mapped = {"prompt": text("prompt"), "response": text("response")}
            mapped["helpfulness"] = later(lambda: self._score(row, "score", where, read))
        else:
            mapped = {"prompt": text("prompt"), "response_a": text("a"), "response_b": text("b")}
            if "label" in s:
                mapped["label"] = later(lambda: self._label(row, where, read))
            elif "score_a" in s:
                mapped["label"] = later(lambda: self._by_scores(row, where, read))
        notes.unread.update(
            str(name) for name, value in row.items() if name not in read and value not in (None, "")
        )
        return {**({"id": row["id"]} if "id" in row else {}), **mapped}

    # ---- values ----------------------------------------------------------------------

    def _value(self, row: dict, target: str, source: str, where: str, read: set[str]):
        """The value of a column, or of a path into one.

        Raises:
            UserError: the row holds none.
        """
        name, value = _look_up(row, source)
        if value is MISSING:
            raise UserError(
                f"{where}: --columns {target}={self.sources[target]}: the row holds no {source!r}; "
                f"its columns are {', '.join(map(str, row))}"
            )
        read |= {name}
        return value

    def _text(self, row: dict, target: str, where: str, read: set[str]):
        """What one column holds, or the texts of several with a blank line between; empty ones are
        left out.
        """
        source = self.sources[target]
        if source in row or "+" not in source:
            return self._value(row, target, source, where, read)
        texts = []
        for part in source.split("+"):
            value = self._value(row, target, part, where, read)
            if not is_nothing(value):
                texts.append(read_text(value, where, part))
        return "\n\n".join(texts)

    def _label(self, row: dict, where: str, read: set[str]) -> str:
        source = self.sources["label"]
        value = self._value(row, "label", source, where, read)
        twin = source[:-1] + {"a": "b", "b": "a"}.get(source[-1], source[-1])
        if twin != source and twin in row:
            raise UserError(
                f"{where}: the verdict stands in {source!r} and {twin!r}, and one alone does not "
                "tell a tie; give both as score_a= and score_b=, and no label"
            )
        if self.labels is None:
            if value in (*VERDICTS.values(), "A>B", "B>A", "A=B"):
                return value
            wanted = "say what it means with --labels a=...,b=...,tie=..."
        elif _comparable(value) in self.labels:
            return self.labels[_comparable(value)]
        else:
            wanted = "add it to --labels"
        raise UserError(
            f"{where}: the label in column {source!r} is {json.dumps(value, default=str)[:60]}, "
            f"which is not listed; {wanted}"
        )

    def _score(self, row: dict, target: str, where: str, read: set[str]) -> float:
        if target not in self.sources:
            raise UserError(f"{where}: no label; --columns needs score=COLUMN to compare responses")
        source = self.sources[target]
        return read_number(self._value(row, target, source, where, read), where, source)

    def _by_scores(self, row: dict, where: str, read: set[str]) -> str:
        a, b = (self._score(row, target, where, read) for target in ("score_a", "score_b"))
        return "tie" if a == b else "A" if a > b else "B"


def check_columns(text: str) -> str:
    """argparse type of --columns: errors come before any work."""
    Columns(text)
    return text


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


def _look_up(row: dict, path: str) -> tuple[str, Any]:
    """The column and the value of a name or a dotted path; MISSING if there is no value."""
    steps = path.split(".")
    for n in range(len(steps), 0, -1):
        name = ".".join(steps[:n])
        if name in row:
            value = row[name]
            for step in steps[n:]:
                value = literal(value) if isinstance(value, str) else value
                try:
                    value = value[int(step)] if isinstance(value, list) else value[step]
                except (ValueError, IndexError, KeyError, TypeError):
                    return name, MISSING
            return name, value
    return path, MISSING


def _comparable(value):
    """What is equal for equal values: 1, "1" and 1.0 are, true and 1 are not."""
    if isinstance(value, bool) or isinstance(value, str) and value.lower() in ("true", "false"):
        return str(value).lower()
    try:
        return read_number(value, "", "")
    except UserError:
        return "" if value is None else str(value).strip()

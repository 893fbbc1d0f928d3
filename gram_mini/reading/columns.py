"""Any table in, rows of a known format out: what --columns and --labels say.

    --columns prompt=instruction+input,a=output_1,b=output_2,label=preference
    --labels a=1,b=2,tie=0

A target is a part of a pair, a source is where a row holds it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from gram_mini.errors import UserError
from gram_mini.reading.formats import prompt_columns, prompt_of_one, twins
from gram_mini.reading.messages import literal
from gram_mini.reading.sources import Notes, Row

# The targets of each kind of row, and those that it may have besides.
KINDS = (
    ({"chosen", "rejected"}, {"prompt"}),
    ({"a", "b"}, {"prompt", "label"}),
    ({"a", "b", "score_a", "score_b"}, {"prompt"}),
    ({"response"}, {"prompt", "score"}),
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
        self.one_response = "response" in targets
        self._there: dict[str, bool] = {}  # whether any row has a column, by column

    # ---- rows ------------------------------------------------------------------------

    def rows(self, rows: Iterator[Row], notes: Notes) -> Iterator[Row]:
        """Each row with the columns of a format that exists.

        Raises:
            UserError: after the last row, if no row has one of several columns joined with "+".
        """
        names: list[str] = []
        for where, row in rows:
            if isinstance(row, dict):
                names = names or [str(name) for name in row]
                try:
                    row = self._row(row, where, notes)
                except UserError as error:
                    row = error
            yield where, row
        for name, there in self._there.items():
            if not there:
                raise UserError(
                    f"--columns: no row has a column {name!r}; the columns are {', '.join(names)}"
                )

    def groups(self, rows: Iterator[Row]) -> Iterator[tuple[int, list[Row]]]:
        """All rows of one prompt, wherever they stand, as formats.group_rows yields neighbours."""
        groups: dict[Any, tuple[int, list[Row]]] = {}
        for number, (where, row) in enumerate(rows, start=1):
            shared = prompt_of_one(row)
            name = number if shared is None else json.dumps(shared, default=str)
            groups.setdefault(name, (number, []))[1].append((where, row))
        yield from groups.values()

    def _row(self, row: dict, where: str, notes: Notes) -> dict:
        read: set[str] = {"id"}  # score.py repeats it

        def text(target: str):
            source = self.sources.get(target) or prompt_columns(row)
            return self._text(row, target, source, where, notes, read)

        def later(value):
            """A label or a score is wrong only where it is needed: stage 1 reads none."""
            try:
                return value()
            except UserError as error:
                return error

        s = self.sources
        if "chosen" in s:
            names = ("prompt", "chosen", "rejected") if "prompt" in s else ("chosen", "rejected")
            mapped = {name: text(name) for name in names}
        elif self.one_response:
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

    def _text(self, row: dict, target: str, source: str, where: str, notes: Notes, read: set[str]):
        """The text of one column, or of several with a blank line between; empty ones are left out.

        One column alone may hold messages.
        """
        parts = [source] if source in row else source.split("+")
        values = [(part, *_look_up(row, part)) for part in parts]
        for part, name, value in values:
            if len(parts) > 1:
                self._there[part] = self._there.get(part, False) or value is not MISSING
            read |= {name}
        there = [(part, value) for part, _, value in values if value is not MISSING]
        if not there:
            raise _missing(row, target, source, where)
        if len(parts) == 1 and isinstance(there[0][1], (list, dict)):
            return there[0][1]
        texts = []
        for part, value in there:
            if isinstance(value, (list, dict)):
                raise UserError(
                    f"{where}: --columns {target}={source}: {part!r} holds a "
                    f"{type(value).__name__}, which cannot be joined; name a text in it, for "
                    f"example {part}.0"
                )
            if value is None or isinstance(value, float) and math.isnan(value):
                continue
            if not isinstance(value, str):
                notes.rows[f"with a number or a truth value as text in {part!r}"] += 1
                value = json.dumps(value, default=str)
            if value.strip():
                texts.append(value.strip())
        return "\n\n".join(texts)

    def _label(self, row: dict, where: str, read: set[str]) -> str:
        source = self.sources["label"]
        name, value = _look_up(row, source)
        read |= {name}
        if value is MISSING:
            raise _missing(row, "label", source, where)
        of_one = re.search("win|better|prefer|chosen|best", source)
        for pair in twins(row) if of_one else []:
            if source in pair:
                raise UserError(
                    f"{where}: the verdict stands in {pair[0]!r} and {pair[1]!r}, and one alone "
                    f"does not tell a tie; give score_a={pair[0]},score_b={pair[1]} and no label"
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
        source = self.sources.get(target)
        if source is None:
            raise UserError(f"{where}: no label; --columns needs score=COLUMN to compare responses")
        name, value = _look_up(row, source)
        read |= {name}
        if value is MISSING:
            raise _missing(row, target, source, where)
        number = _number(value)
        if number is None:
            raise UserError(
                f"{where}: the score in column {source!r} must be a number, found "
                f"{json.dumps(value, default=str)[:60]}; put it right or leave the row out"
            )
        return number

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


def _missing(row: dict, target: str, source: str, where: str) -> UserError:
    return UserError(
        f"{where}: --columns {target}={source or 'COLUMN'}: the row holds no {source or target!r}; "
        f"its columns are {', '.join(map(str, row))}"
    )


def _number(value) -> float | None:
    """A finite number, or text that reads as one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _comparable(value):
    """What is equal for equal values: 1, "1" and 1.0 are, true and 1 are not."""
    if isinstance(value, bool) or isinstance(value, str) and value.lower() in ("true", "false"):
        return str(value).lower()
    number = _number(value)
    if number is not None:
        return number
    return "" if value is None else str(value).strip()

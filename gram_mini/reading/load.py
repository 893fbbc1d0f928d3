"""Pairs for training, with the record of what was read, what was dropped, and why.

sources.py reads rows, formats.py makes pairs of them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.reading.columns import given_columns
from gram_mini.reading.formats import group_rows, parse_pairs, readable
from gram_mini.reading.sources import Notes, Row, read_rows
from gram_mini.reading.usable import unusable
from gram_mini.village import VILLAGE
from gram_mini.village.pairs import village_pairs

NOT_DRAWN = "not drawn by --pairs-per-prompt"


@dataclass
class PairData:
    """Pairs with the record of how they were read, which is printed and written to run.json."""

    source: str
    pairs: list[Pair]
    rows: int
    dropped: Counter = field(default_factory=Counter)
    unreadable: str | None = None  # the error of the first row that could not be read
    notes: Notes = field(default_factory=Notes)  # what was skipped, changed or assumed besides

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pairs in order, the first 16 hex digits."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(
                json.dumps([pair.prompt, pair.response_a, pair.response_b, pair.label]).encode()
            )
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line: rows read, pairs used, what was dropped and why."""
        line = (
            f"{self.source}: {self.rows} rows read, {len(self.pairs)} pairs used, "
            f"{sum(self.dropped.values())} dropped"
        )
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        if reasons:
            line += f" ({reasons})"
        if self.unreadable:
            line += f"; the first that cannot be read: {self.unreadable}"
        return "; ".join([line, *self.notes.lines()])

    def record(self) -> dict:
        """What run.json keeps."""
        return {
            "source": self.source,
            "rows": self.rows,
            "used": len(self.pairs),
            "dropped": dict(self.dropped),
            "unreadable": self.unreadable,
            "notes": vars(self.notes),
            "fingerprint": self.fingerprint,
        }


def draw_pairs(pairs: list[Pair], count: int | None, seed: int = 0) -> list[Pair]:
    """At most ``count`` of the pairs of one prompt, in their order; all of them if it is None."""
    if count is None or len(pairs) <= count:
        return pairs
    places = random.Random(f"{seed}/{pairs[0].prompt}").sample(range(len(pairs)), count)
    return [pairs[i] for i in sorted(places)]


def load_pairs(
    source: str,
    labelled: bool,
    limit: int | None = None,
    split: str | None = None,
    seed: int = 0,
    subset: str | None = None,
    streaming: bool = False,
    on_bad_row: str = "error",
    pairs: str = "all",
    columns: str | None = None,
    labels: str | None = None,
    pairs_per_prompt: int | None = None,
) -> PairData:
    """Read pairs for stage 1 or stage 2, with the record of what was read and dropped.

    Args:
        source: see sources.py; "village" gives the unlabelled or the labelled pairs of the village.
        labelled: True for stage 2; False for stage 1, where labels are dropped and ties are used.
        seed: draws the pairs of the village, and those of ``pairs_per_prompt``.

    The others are the options of the same names, see README.md.

    Raises:
        UserError: no such source, a row that cannot be read (names file and line), or no usable row
            left.
    """
    if source == VILLAGE:
        options: dict[str, object] = {"split": split, "subset": subset, "columns": columns}
        options |= {"labels": labels, "pairs-per-prompt": pairs_per_prompt}
        options["pairs"] = None if pairs == "all" else pairs
        for name, value in options.items():
            if value:
                raise UserError(f"--{name} {value}: the village's pairs have none; leave it out")
        drawn = village_pairs("labelled" if labelled else "unlabelled", seed=seed)[:limit]
        return PairData(VILLAGE, drawn, len(drawn))
    data = PairData(source, [], 0)
    form = given_columns(columns, labels)

    def read(group: list[Row], notes: Notes | None = None) -> tuple[list[Pair], Counter]:
        read_pairs, left_out = parse_pairs(group, labelled, pairs, notes, form)
        if labelled and any(pair.label is None and not pair.tied for pair in read_pairs):
            raise UserError(
                f"{group[0][0]}: no label; stage 2 and evaluation need to know the preferred "
                "response: give 'chosen' and 'rejected', 'label' with A or B, or --columns with "
                "label=COLUMN and --labels"
            )
        return read_pairs, left_out

    rows = read_rows(source, split, limit, subset, streaming, data.notes, "reading")
    for number, group in group_rows(rows, form):
        data.rows += len(group)
        if on_bad_row == "skip":
            good, reason = readable(group, read)
            data.unreadable = data.unreadable or reason
            data.dropped += Counter({"that cannot be read": len(group) - len(good)})
            group = good
        read_pairs, left_out = read(group, data.notes) if group else ([], Counter())
        data.dropped.update(left_out)
        usable = []
        for pair in read_pairs:
            reason = unusable(pair) or ("tied" if labelled and pair.tied else None)
            if reason:
                data.dropped[reason] += 1
            else:
                pair = pair if labelled else replace(pair, label=None, tied=False)
                usable.append(replace(pair, row=number))
        drawn = draw_pairs(usable, pairs_per_prompt, seed)
        data.dropped += Counter({NOT_DRAWN: len(usable) - len(drawn)})
        data.pairs += drawn
    if not data.pairs:
        raise UserError(
            f"{data.summary()}: nothing left to use; give a file with at least one usable row"
        )
    return data

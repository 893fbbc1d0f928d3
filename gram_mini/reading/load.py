"""Pairs for training, with the record of what was read, what was dropped, and why.

sources.py reads rows, formats.py makes pairs of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

from tqdm import tqdm

from gram_mini.errors import UserError
from gram_mini.pairs import Pair, unusable
from gram_mini.reading.formats import group_rows, has_literal_breaks, parse_pairs
from gram_mini.reading.sources import Row, read_rows
from gram_mini.village.pairs import village_pairs

VILLAGE = "village"  # the name of the village's pairs in --data


@dataclass
class PairData:
    """Pairs with the record of how they were read, which is printed and written to run.json."""

    source: str
    pairs: list[Pair]
    rows: int
    dropped: Counter = field(default_factory=Counter)
    literal_breaks: int = 0  # rows with a backslash and an n beside markers, which were removed
    unreadable: str | None = None  # the error of the first row that could not be read

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
        if self.literal_breaks:
            line += f"; {self.literal_breaks} with a literal \\n beside the markers, taken off"
        if self.unreadable:
            line += f"; the first that cannot be read: {self.unreadable}"
        return line

    def record(self) -> dict:
        """What run.json keeps."""
        return {
            "source": self.source,
            "rows": self.rows,
            "used": len(self.pairs),
            "dropped": dict(self.dropped),
            "literal_breaks": self.literal_breaks,
            "unreadable": self.unreadable,
            "fingerprint": self.fingerprint,
        }


def load_pairs(
    source: str,
    labelled: bool,
    limit: int | None = None,
    split: str = "train",
    seed: int = 0,
    subset: str | None = None,
    streaming: bool = False,
    on_bad_row: str = "error",
    pairs: str = "all",
) -> PairData:
    """Read pairs for stage 1 or stage 2, with the record of what was read and dropped.

    Args:
        source: see sources.py; "village" gives the unlabelled or the labelled pairs of the village.
        labelled: True for stage 2; False for stage 1, where labels are dropped and ties are used.
        limit: use the first ``limit`` rows only.
        split: the split of a hub data set.
        seed: draws the pairs of the village; files are read as they are.
        subset: the configuration of a hub data set.
        streaming: download no more rows of a hub data set than are read.
        on_bad_row: "error", or "skip" to drop and count rows that cannot be read.
        pairs: "all" pairs of a row with several scored responses, or only "best-worst".

    Raises:
        UserError: no such source, a row that cannot be read (names file and line), or no usable row
            left.
    """
    if source == VILLAGE:
        drawn = village_pairs("labelled" if labelled else "unlabelled", seed=seed)[:limit]
        return PairData(VILLAGE, drawn, len(drawn))
    data = PairData(source, [], 0)

    def read(group: list[Row]) -> tuple[list[Pair], Counter]:
        read_pairs, left_out = parse_pairs(group, labelled, pairs)
        if labelled and any(pair.label is None and not pair.tied for pair in read_pairs):
            raise UserError(
                f"{group[0][0]}: no label; stage 2 and evaluation need to know the preferred "
                "response: give columns 'chosen' and 'rejected', or 'label' with A or B"
            )
        return read_pairs, left_out

    def readable(row: Row) -> bool:
        try:
            read([row])
        except UserError as error:
            data.unreadable = data.unreadable or str(error)
            return False
        return True

    rows = read_rows(source, split, limit, subset, streaming)
    for number, group in group_rows(tqdm(rows, desc="reading", unit=" rows", delay=2, leave=False)):
        data.rows += len(group)
        data.literal_breaks += sum(has_literal_breaks(row) for _, row in group)
        if on_bad_row == "skip":
            readable_rows = [row for row in group if readable(row)]
            data.dropped += Counter({"that cannot be read": len(group) - len(readable_rows)})
            group = readable_rows
        read_pairs, left_out = read(group) if group else ([], Counter())
        data.dropped.update(left_out)
        for pair in read_pairs:
            reason = unusable(pair) or ("tied" if labelled and pair.tied else None)
            if reason:
                data.dropped[reason] += 1
            elif labelled:
                data.pairs.append(replace(pair, row=number))
            else:
                data.pairs.append(replace(pair, row=number, label=None, tied=False))
    if not data.pairs:
        raise UserError(
            f"{data.summary()}: nothing left to use; give a file with at least one usable row"
        )
    return data

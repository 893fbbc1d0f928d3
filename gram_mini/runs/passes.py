"""Which sequences share a forward pass, where their order matters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

ENOUGH = 1024  # tokens of a forward pass; below this, smaller passes cost more than padding


def split_by_tokens(
    lengths: list[int],
    tokens: float | None,
    padding: float = 1.0,
    groups: Sequence | None = None,
) -> Iterator[slice]:
    """Yield slices of consecutive sequences, each for one forward pass.

    Padded, the sequences of a slice take ``tokens`` at most (None: no limit). A sequence that is
    too long for ``tokens`` comes by itself. A slice ends, too, where more than the fraction
    ``padding`` of it would be padding, if it is large enough to keep a processor busy (ENOUGH).
    That never happens within one of the ``groups``, whose sequences may share their beginning.
    """
    start, longest, total = 0, 0, 0
    tokens = tokens or math.inf
    for i, length in enumerate(lengths):
        whole = (i - start) * longest  # tokens of the slice as it is, padded
        longest, total = max(longest, length), total + length
        padded = (i - start + 1) * longest
        seam = groups is None or i == 0 or groups[i] != groups[i - 1]
        too_much_padding = seam and whole >= ENOUGH and padded - total > padding * padded
        if i > start and (padded > tokens or too_much_padding):
            yield slice(start, i)
            start, longest, total = i, length, length
    if lengths:
        yield slice(start, len(lengths))

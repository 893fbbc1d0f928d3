"""Tables of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table of lines of cells: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        text.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(text)

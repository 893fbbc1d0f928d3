"""A printed table of judges as a JSON file, from which pages.py writes the table of a page."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from gram_mini.runs.record import PACKAGES
from gram_mini.runs.table import aligned
from gram_mini.studies.lab import write_json


def add_record_option(parser) -> None:
    """The option of a command whose table stands on a page."""
    parser.add_argument(
        "--record", type=Path, metavar="FILE.json", help="write the table to this file, too"
    )


def show_table(lines: list[list[str]], caption: str, record: Path | None) -> None:
    """Print a table, its heading first, and write it to the file ``record`` if one is given."""
    print(aligned(lines))
    print(caption)
    if record:
        record_table(record, lines)


def record_table(path: Path, lines: list[list[str]]) -> None:
    """Write a table, its heading first, to a file, with what made it.

    A cell "0.820 ± 0.090" becomes [0.82, 0.09], and "0.677" becomes [0.677, None].
    """
    heading, *rows = lines
    means = []
    for row in rows:
        cells = {name: figure(text) for name, text in zip(heading[1:], row[1:]) if text}
        means.append({"method": row[0], **cells})
    record = {
        "study": path.stem,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in PACKAGES},
        "note": "± is the 95% interval over the prompts",
        "means": means,
    }
    write_json(path, record)


def figure(text: str) -> list | str:
    """A cell as a figure and half of its interval, or as it is if it holds no figure."""
    value, _, half = text.partition(" ± ")
    try:
        return [float(value), float(half) if half else None]
    except ValueError:
        return text


def processor() -> str:
    """The processor's name, as Linux gives it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""Rows from files, folders and the hub, each with its place in the source for error messages."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gram_mini.errors import UserError, first_line

from tqdm import tqdm

# (where, row): the place, and the row by column or the reason why it cannot be read
Row = tuple[str, dict | UserError]


@dataclass
class Notes:
    """What reading skipped, changed, joined or assumed without dropping a row, for the summary."""

    source: list[str] = field(default_factory=list)  # about whole files
    rows: Counter = field(default_factory=Counter)  # number of rows, by what was done with them
    unread: Counter = field(default_factory=Counter)  # rows with a value in a column, by column

    def update(self, other: Notes) -> None:
        """Add the notes on other rows of the source."""
        self.source += other.source
        self.rows += other.rows
        self.unread += other.unread

    def lines(self) -> list[str]:
        """Everything in a few words each."""
        names = sorted(self.unread)
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        unread = [f"columns not read: {', '.join(names[:12])}{more}"] if names else []
        counted = [f"{count} rows {what}" for what, count in sorted(self.rows.items())]
        return [*self.source, *counted, *unread]


def read_rows(
    source: str,
    split: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    streaming: bool = False,
    notes: Notes | None = None,
    progress: str | None = None,
) -> Iterator[Row]:
    """Yield (where, row) for the first ``limit`` rows of a source; ``where`` names file and line.

    A row is a dictionary by column. A row that cannot be read comes as the UserError that says why,
    so that the caller may go on with the next one. Only a .json list is held in memory as a whole.

    Args:
        split, limit, subset, streaming: the options of the same names, see README.md.
        notes: gets what was skipped or joined.
        progress: the name of a progress bar, if there is to be one.

    Raises:
        UserError: no such source, no such split, or a source that cannot be read as a whole.
    """
    count = 0
    rows = _read(source, split, subset, streaming, notes or Notes())
    bar = {"desc": progress, "unit": " rows", "delay": 2, "leave": False}
    for count, row in enumerate(tqdm(rows, **bar, disable=progress is None), start=1):
        yield row
        if count == limit:
            return
    if count == 0:
        raise UserError(f"{source}: holds no rows; give a file with at least one row")


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist here looks like a path and not like owner/name."""
    return name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1 or "\\" in name


def _read(
    source: str, split: str | None, subset: str | None, streaming: bool, notes: Notes
) -> Iterator[Row]:
    path = Path(source)
    if not os.path.exists(source):  # which takes any text
        if looks_like_path(source) or _kind(path) in READERS:
            raise UserError(f"{source[:200]}: no such file or folder; give one that there is")
        return _read_dataset(source, split or "train", subset, streaming)
    if subset:
        raise UserError(f"--subset {subset}: {source} has no subsets; leave it out")
    if path.is_dir():
        files = _of_folder(path, split, notes)
    elif split:
        raise UserError(f"--split {split}: {path} is a single file and has no splits; leave it out")
    elif _kind(path) not in READERS:
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(READERS)}")
    else:
        files = [path]
    return (row for file in files for row in READERS[_kind(file)](file))


def _kind(file: Path) -> str:
    """The suffix of a file without .gz."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _split_name(file: Path) -> str:
    """The name of a file without suffixes and number: train_prefs of train_prefs-00000-of-00001."""
    stem = Path(file.name.removesuffix(".gz")).stem
    return re.sub(r"[-_.]?\d+(-of-\d+(-[0-9a-f]+)?)?$", "", stem)


def _of_folder(folder: Path, split: str | None, notes: Notes) -> list[Path]:
    """The files of a folder that are parts of one split; notes several, and what else is there.

    Raises:
        UserError: none, several splits and none of them is given, or files of several kinds, which
            may be the same rows twice.
    """
    there = sorted(file for file in folder.iterdir() if file.name[0] != ".")
    if {"dataset_dict.json", "state.json"} & {file.name for file in there}:
        raise UserError(
            f"{folder}: was written by save_to_disk of datasets; write its rows with to_json or "
            "to_parquet, and give that file"
        )
    splits: dict[str, list[Path]] = {}
    for file in there:
        if _kind(file) in READERS:
            splits.setdefault(_split_name(file), []).append(file)
    if not splits:
        raise UserError(f"{folder}: no {', '.join(READERS)} file in this folder; give one that has")
    if split is None and len(splits) == 1:
        (split,) = splits
    files = splits.get(split or "", [])
    if len({(_kind(file), file.suffix) for file in files}) != 1:
        raise UserError(
            f"{folder}: give --split with one of {', '.join(splits)} whose files are of one kind, "
            "or give one file"
        )
    if len(files) > 1:
        notes.source.append(f"files of this folder, read one after the other: {_names(files)}")
    if left := [file for file in there if file not in files]:
        notes.source.append(f"not read in this folder: {_names(left)}")
    return files


def _names(files: list[Path]) -> str:
    return ", ".join([file.name for file in files[:5]] + ["..."] * (len(files) > 5))


# ---- files ---------------------------------------------------------------------------


@contextmanager
def _opened(path: Path):
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; save or download it again") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _as_row(_parsed(line, where), where)


def _read_json(path: Path) -> Iterator[Row]:
    """The rows of a list, or one row a line although the name says .json."""
    with _opened(path) as file:
        text = file.read()
    if not text.decode("utf-8-sig", "replace").lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    rows = _parsed(text, str(path))
    if isinstance(rows, UserError):
        raise rows
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _as_row(row, where)


def _parsed(text: bytes, where: str):
    """The JSON value of a text, or why it has none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also not UTF-8, numbers too long
        reason = str(error).replace("line 1 column", "column")
        return UserError(
            f"{where}: invalid JSON: {reason}; write one whole object a line into a .jsonl file, "
            "or a list of them into a .json file"
        )


def _as_row(row, where: str) -> dict | UserError:
    if isinstance(row, (dict, UserError)):
        return row
    return UserError(f"{where}: expected an object with named columns, found {type(row).__name__}")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a response may be long
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(text, strict=True)
        try:
            names = reader.fieldnames or []
            if len({*names}) < len(names):
                raise UserError(f"{path}: a column stands there twice; rename one")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                other = "has another number of fields than the header; quote texts with commas"
                whole = None not in row and None not in row.values()
                yield where, row if whole else UserError(f"{where}: {other}")
        except (UnicodeDecodeError, csv.Error) as error:  # text is decoded in blocks
            where = f"{path}, line {max(1, reader.line_num)} or after"
            raise UserError(f"{where}: invalid CSV: {error}; save it again as UTF-8") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1000)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet: {first_line(error)}; save it again"
        ) from None


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_dataset(name: str, split: str, subset: str | None, streaming: bool) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        for number, row in enumerate(rows, start=1):
            yield f"{name}, row {number}", row
    except Exception as error:  # of many kinds; each means that the name gave no data
        # Its second line often names the available subsets or splits.
        reason = " ".join(str(error).splitlines()[:2]) or type(error).__name__
        raise UserError(
            f"data set {name!r}: no such file here, and it cannot be loaded from the hub: {reason}"
        ) from None

"""Rows from files, folders and the hub, each with its place in the source for error messages.

A source is one of these:

    a file            .jsonl, .json or .csv, each also gzipped (.gz), or .parquet
    a folder          of such files, all of one kind
    owner/name        a data set on the hub
"""

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
from typing import Any

from gram_mini.errors import UserError

# (where, row): the place, and the row by column or the reason why it cannot be read
Row = tuple[str, dict | UserError]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

SPLITS = re.compile(r"(train|test|valid|validation|val|dev|eval)(?![a-z])")


@dataclass
class Notes:
    """What reading skipped, changed or assumed without dropping a row; the summary says it."""

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

    def record(self) -> dict:
        """What run.json keeps."""
        return {"source": self.source, "rows": dict(self.rows), "unread": dict(self.unread)}


def read_rows(
    source: str,
    split: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    streaming: bool = False,
    notes: Notes | None = None,
) -> Iterator[Row]:
    """Yield (where, row) for the first ``limit`` rows of a source; ``where`` names file and line.

    A row is a dictionary by column. A row that cannot be read comes as the UserError that says why,
    so that the caller may go on with the next one. Only a .json list is held in memory as a whole.

    Args:
        split: the split of a hub data set, "train" by default, or of a folder that holds several.
        subset: the configuration of a hub data set.
        streaming: hub only; download rows when they are needed.
        notes: gets what was skipped or assumed.

    Raises:
        UserError: no such source, no such split, or a source that cannot be read as a whole.
    """
    notes = Notes() if notes is None else notes
    count = 0
    for count, item in enumerate(_read(source, split, subset, streaming, notes), start=1):
        yield item
        if count == limit:
            return
    if count == 0:
        raise UserError("the data holds no rows; give a file with at least one row")


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist here looks like a path and not like owner/name."""
    return name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1 or "\\" in name


def _read(
    source: str, split: str | None, subset: str | None, streaming: bool, notes: Notes
) -> Iterator[Row]:
    path = Path(source)
    if os.path.isdir(source):
        files = _of_folder(path, split, notes)
    elif os.path.exists(source):
        files = [path]
        if split and _split_name(path) != split:
            raise UserError(
                f"--split {split}: {path} is a single file and has no splits; leave --split out"
            )
    elif looks_like_path(source) or _suffix(path) in SUFFIXES:
        raise UserError(f"{source[:200]}: no such file or folder; give one that there is")
    else:
        return _read_dataset(source, split or "train", subset, streaming)
    if subset:
        raise UserError(
            f"--subset {subset}: {source} has no subsets; leave it out, or give the name of a hub "
            "data set"
        )
    return (item for file in files for item in _read_file(file))


# ---- files ---------------------------------------------------------------------------


def _unpacked(path: Path) -> Path:
    """The name of a file without .gz."""
    return Path(path.name.removesuffix(".gz"))


def _suffix(path: Path) -> str:
    return _unpacked(path).suffix.lower()


# The number of a part of a split: -00000-of-00002, perhaps with a hash, or _1, or -part-1.
_PART = re.compile(r"[-_.]((part|shard|chunk)[-_.]?)?\d+(-of-\d+(-[0-9a-f]{8,})?)?$")


def _split_name(file: Path) -> str:
    """The whole name of a file without suffixes and number: train_prefs-00000-of-00001 is a file of
    the split train_prefs, not of train.
    """
    return _PART.sub("", _unpacked(file).stem)


def _of_folder(folder: Path, split: str | None, notes: Notes) -> list[Path]:
    """The files of a folder, or those of one split; names what else is there.

    Raises:
        UserError: none, files of several kinds, or of several splits and none is given.
    """
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise UserError(
            f"{folder}: was written by save_to_disk of datasets; write its rows with to_json or "
            "to_parquet, and give that file"
        )
    there = sorted(folder.iterdir())
    files = [file for file in there if _suffix(file) in SUFFIXES and file.name[0] != "."]
    if not files:
        raise UserError(
            f"{folder}: no {', '.join(SUFFIXES)} file in this folder; give a folder that has one"
        )
    kinds = sorted({file.name.removeprefix(_unpacked(file).stem) for file in files})
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: holds files of several kinds ({', '.join(kinds)}), which may be the same "
            "rows twice; give one of the files, or a folder with one kind"
        )
    splits = sorted({*map(_split_name, files)})
    if split and split not in splits:
        raise UserError(
            f"{folder}: holds no file of the split {split!r}; give --split with one of "
            f"{', '.join(splits)}, or leave it out"
        )
    if (
        not split
        and len(splits) > 1
        and (any(map(SPLITS.match, splits)) or any("-of-" in file.name for file in files))
    ):
        raise UserError(
            f"{folder}: seems to hold several splits; give --split with one of {', '.join(splits)}"
        )
    files = [file for file in files if not split or _split_name(file) == split]
    others = (".md", ".png", ".jpg", ".pdf", ".py", ".yaml")
    left = [
        file.name
        for file in there
        if file not in files and file.suffix not in others
        if file.name[0] != "." or _suffix(file) in SUFFIXES
    ]
    if left:
        more = ", ..." * (len(left) > 5)
        notes.source.append(f"not read in this folder: {', '.join(left[:5])}{more}")
    return files


def _read_file(path: Path) -> Iterator[Row]:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if _suffix(path) not in readers:
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    return readers[_suffix(path)](path)


@contextmanager
def _opened(path: Path):
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; save or download it again") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    empty = True
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where, empty = f"{path}, line {number}", False
                yield where, _parse_line(line, where)
    if empty:
        raise _empty(path)


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """json's object_pairs_hook: of a key that stands twice Python would take the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key stands twice in one object, of {', '.join(value)}")
    return value


def _parse_line(line: bytes, where: str) -> dict | UserError:
    try:
        return _as_row(json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object), where)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8")
    except (ValueError, RecursionError) as error:  # also numbers too long, lists too deep
        reason = str(error).replace("line 1 column", "column")
        return UserError(f"{where}: invalid JSON: {reason}; write one whole object a line")


def _read_json(path: Path) -> Iterator[Row]:
    """The rows of a list, a single row, or one row a line although the name says .json."""
    text = ""
    try:
        with _opened(path) as file:
            text = file.read().decode("utf-8-sig")
        rows = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _read_jsonl(path)
            return
        if not text.strip():
            raise _empty(path) from None
        raise UserError(f"{path}: invalid JSON: {error}; save it as a list of rows") from None
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of rows, found {type(rows).__name__}; for one row a line use "
            ".jsonl"
        )
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _as_row(row, where)


def _read_csv(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        csv.field_size_limit(2**31 - 1)  # a response may be long
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        names: list[str] = []
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                break
            except UnicodeDecodeError:
                # Text is decoded in blocks, so this is the line where the block begins.
                raise UserError(f"{where} or after: not UTF-8 text; save it as UTF-8") from None
            except csv.Error as error:
                raise UserError(f"{where}: invalid CSV: {error}; save it again") from None
            if not names:
                names = fields
                twice = [name for name, n in Counter(names).items() if n > 1]
                if twice:
                    raise UserError(f"{where}: column {twice[0]!r} stands there twice; rename one")
            elif fields and len(fields) != len(names):
                other = "has another number of fields than the header; quote texts with commas"
                yield where, UserError(f"{where}: {other}")
            elif fields:  # not an empty line
                yield where, dict(zip(names, fields))
    if not names:
        raise _empty(path)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (
                row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist()
            )
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}; save or download it "
            "again"
        ) from None


def _as_row(row, where: str) -> dict | UserError:
    if isinstance(row, dict):
        return row
    return UserError(f"{where}: expected an object with named columns, found {type(row).__name__}")


def _empty(path: Path) -> UserError:
    return UserError(f"{path}: the file is empty; give a file with at least one row")


# ---- the datasets library ------------------------------------------------------------


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

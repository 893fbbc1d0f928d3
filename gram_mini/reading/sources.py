"""Rows from files, folders and the hub, each with its place in the source for error messages.

A source is one of these:

    a file            .jsonl, .json or .csv, each also gzipped (.gz), or .parquet
    a folder          of such files, one that datasets saved, or one with the layout of the hub
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gram_mini.errors import UserError

# (where, row): the place, and the row by column or the reason why it cannot be read
Row = tuple[str, dict | UserError]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(
    source: str,
    split: str = "train",
    limit: int | None = None,
    subset: str | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """Yield (where, row) for the first ``limit`` rows of a source; ``where`` names file and line.

    A row is a dictionary by column. A row that cannot be read comes as the UserError that says why,
    so that the caller may go on with the next one. Only a .json list is held in memory as a whole.

    Args:
        split: the split of a hub data set, or of a folder that holds several.
        subset: the configuration of a hub data set, or of a folder that holds several.
        streaming: hub only; download rows when they are needed.

    Raises:
        UserError: no such source, or one that cannot be read as a whole.
    """
    count = 0
    for count, item in enumerate(_read(source, split, subset, streaming), start=1):
        yield item
        if count == limit:
            return
    if count == 0:
        raise UserError("the data holds no rows; give a file with at least one row")


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist here looks like a path and not like owner/name."""
    return (
        name.startswith((".", "/", "~", "runs/"))
        or name.count("/") > 1
        or os.sep != "/"
        and os.sep in name
    )


def _read(source: str, split: str, subset: str | None, streaming: bool) -> Iterator[Row]:
    path = Path(source)
    if len(path.name) > 255:
        raise UserError(f"{source[:40]}...: no such file or folder")
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if _suffix(file) in SUFFIXES and file.name != "dataset_infos.json"
        )
        if not files and any(
            _suffix(file) in SUFFIXES for depth in ("*/*", "*/*/*") for file in path.glob(depth)
        ):
            return _read_dataset(source, split, subset, streaming, "cannot be read as a data set")
        files = _of_split(files, split, source)
        if not files:
            raise UserError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
    elif path.exists():
        files = [path]
    elif looks_like_path(source) or _suffix(path) in SUFFIXES:
        raise UserError(f"{source}: no such file or folder")
    else:
        problem = "no such file here, and it cannot be loaded from the hub"
        return _read_dataset(source, split, subset, streaming, problem)
    if subset:
        raise UserError(
            f"--subset {subset}: {source} has no subsets; leave it out, or give the name of a hub "
            "data set"
        )
    if _is_saved(path):
        return _read_saved(path, split)
    return (item for file in files for item in _read_file(file))


# ---- files ---------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _of_split(files: list[Path], split: str, source: str) -> list[Path]:
    """The files of one split, if all are named after splits (train-00000-of-00002.parquet).

    Otherwise all files.
    """
    names = ("train", "test", "validation", "valid", "val", "dev")
    pattern = rf"({'|'.join(names)})(?![a-z])"
    matches = [(file, re.match(pattern, file.name.lower())) for file in files]
    split_of = {file: match[1] for file, match in matches if match}
    if not files or len(split_of) < len(files):
        return files
    synonyms = names[2:] if split in names[2:] else (split,)
    chosen = [file for file in files if split_of[file] in synonyms]
    if not chosen:
        available = ", ".join(sorted(set(split_of.values())))
        raise UserError(
            f"{source}: holds no file of the split {split!r}; give --split with one of {available}"
        )
    return chosen


def _read_file(path: Path) -> Iterator[Row]:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    suffix = _suffix(path)
    if suffix not in readers:
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    return readers[suffix](path)


@contextmanager
def _opened(path: Path):
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    empty = True
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where, empty = f"{path}, line {number}", False
                yield where, _parse_line(line, where)
    if empty:
        raise _empty(path)


def _parse_line(line: bytes, where: str) -> dict | UserError:
    try:
        return _as_row(json.loads(line.decode("utf-8-sig")), where)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: invalid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        return UserError(f"{where}: invalid JSON: {error}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        with _opened(path) as file:
            text = file.read().decode("utf-8-sig")
        if not text.strip():
            raise _empty(path)
        # One row a line, although the name says .json.
        if text.lstrip().startswith("{") and "\n" in text.strip():
            yield from _read_jsonl(path)
            return
        rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: invalid JSON: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of rows, found {type(rows).__name__}; "
            "for one row a line use .jsonl"
        )
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _as_row(row, where)


def _read_csv(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        csv.field_size_limit(2**31 - 1)  # a response may be long
        reader = csv.DictReader(
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True
        )
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                if not reader.fieldnames:
                    raise _empty(path)
                where = f"{path}, line {reader.line_num + 1}"
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError:
                # Text is decoded in blocks, so this is the line where the block begins.
                raise UserError(f"{where} or after: not UTF-8 text; save it as UTF-8") from None
            except csv.Error as error:
                raise UserError(f"{where}: invalid CSV: {error}") from None
            if None in row or None in row.values():
                yield (
                    where,
                    UserError(
                        f"{where}: has another number of fields than the header; "
                        "quote texts that hold commas"
                    ),
                )
            else:
                yield where, row


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
            f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}"
        ) from None


def _as_row(row, where: str) -> dict | UserError:
    if isinstance(row, dict):
        return row
    return UserError(f"{where}: expected an object with named columns, found {type(row).__name__}")


def _empty(path: Path) -> UserError:
    return UserError(f"{path}: the file is empty; give a file with at least one row")


# ---- the datasets library ------------------------------------------------------------


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder: a data set, or one for each split."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def _read_saved(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # as in _read_dataset
        raise UserError(f"{folder}: cannot be read as a saved data set: {_reason(error)}") from None
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise UserError(
                f"{folder}: no split {split!r}; give --split with one of {', '.join(rows)}"
            )
        rows = rows[split]
    for number, row in enumerate(rows, start=1):
        yield f"{folder}, row {number}", row


def _read_dataset(
    name: str, split: str, subset: str | None, streaming: bool, problem: str
) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        for number, row in enumerate(rows, start=1):
            yield f"{name}, row {number}", row
    except Exception as error:  # of many kinds; each means that the name gave no data
        raise UserError(f"data set {name!r}: {problem}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first two lines of an exception as one line.

    The second often names the available subsets or splits.
    """
    return " ".join(str(error).splitlines()[:2]) or type(error).__name__

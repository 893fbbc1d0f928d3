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

VALIDATION = ("validation", "valid", "val", "dev")  # names of one and the same split
SPLITS = ("train", "test", *VALIDATION)

# A file with one of these columns on its outside is one row, whatever lists it holds.
OF_A_ROW = {
    "prompt", "chosen", "rejected", "conversations", "conv_A", "instruction", "question", "context",
    "completions", "responses",
}  # fmt: skip


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
        split: the split of a hub data set, or of a folder that holds several; None is "train"
            there, and everything where there are no splits.
        subset: the configuration of a hub data set, or of a folder that holds several.
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
    return (
        name.startswith((".", "/", "~", "runs/"))
        or name.count("/") > 1
        or os.sep != "/"
        and os.sep in name
    )


def _read(
    source: str, split: str | None, subset: str | None, streaming: bool, notes: Notes
) -> Iterator[Row]:
    path = Path(source)
    if len(path.name) > 255:
        raise UserError(f"{source[:40]}...: no such file or folder; give one that there is")
    if path.is_dir():
        if _is_saved(path):
            _refuse_subset(subset, source)
            return _read_saved(path, split)
        there = sorted(path.iterdir())
        files = [file for file in there if _suffix(file) in SUFFIXES]
        hidden = [file for file in files if file.name.startswith(".")]
        files = [file for file in files if file not in hidden and file.name != "dataset_infos.json"]
        if not files and any(
            _suffix(file) in SUFFIXES and not _is_hidden(file.relative_to(path))
            for depth in ("*/*", "*/*/*")
            for file in path.glob(depth)
        ):
            problem = "cannot be read as a data set"
            return _read_dataset(source, split or "train", subset, streaming, problem)
        if hidden:
            names = ", ".join(file.name for file in hidden[:3]) + ", ..." * (len(hidden) > 3)
            notes.source.append(f"{len(hidden)} hidden files skipped: {names}")
        if not files:
            only = f" but hidden ones ({names})" if hidden else ""
            raise UserError(
                f"{source}: no {', '.join(SUFFIXES)} file in this folder{only}; give a folder that "
                "has one"
            )
        _refuse_twice(files)
        files = _of_split(files, split, source, notes)
        _note_left_out([file for file in there if file not in (*files, *hidden)], notes)
    elif path.exists():
        files = [path]
        _check_split_of_file(path, split)
    elif looks_like_path(source) or _suffix(path) in SUFFIXES:
        raise UserError(f"{source}: no such file or folder; give one that there is")
    else:
        problem = "no such file here, and it cannot be loaded from the hub"
        return _read_dataset(source, split or "train", subset, streaming, problem)
    _refuse_subset(subset, source)
    return (item for file in files for item in _read_file(file, notes))


def _refuse_twice(files: list[Path]) -> None:
    """Refuse one data set in two files: train.jsonl beside train.jsonl.gz or train.parquet."""
    by_name: dict[str, Path] = {}
    for file in files:
        first = by_name.setdefault(_unpacked(file).stem, file)
        if first != file:
            raise UserError(
                f"{file.parent}: {first.name} and {file.name} seem to hold the same rows; give one "
                "of the files, or rename one if they do not"
            )


def _note_left_out(left: list[Path], notes: Notes) -> None:
    """Name what is not read beside the files of a folder; pages and pictures are no data."""
    others = (".md", ".png", ".jpg", ".pdf", ".py", ".yaml")
    names = [
        f"{file.name}{'/' * file.is_dir()}"
        for file in left
        if not (file.name.startswith((".", "LICENSE", "dataset_info")) or file.suffix in others)
    ]
    if names:
        shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
        notes.source.append(f"not read in this folder: {shown}")


def _refuse_subset(subset: str | None, source: str) -> None:
    if subset:
        raise UserError(
            f"--subset {subset}: {source} has no subsets; leave it out, or give the name of a hub "
            "data set"
        )


# ---- files ---------------------------------------------------------------------------


def _unpacked(path: Path) -> Path:
    """The name of a file without .gz."""
    return Path(path.name.removesuffix(".gz"))


def _suffix(path: Path) -> str:
    return _unpacked(path).suffix.lower()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# The number of a part of a split: -00000-of-00002, perhaps with a hash, or _1, or -part-1.
_PART = re.compile(r"[-_.]((part|shard|chunk)[-_.]?)?\d+(-of-\d+(-[0-9a-f]{8,})?)?$")


def _split_name(file: Path) -> str:
    """The whole name of a file without suffixes and number: train_prefs-00000-of-00001 is a file of
    the split train_prefs, not of train.
    """
    return _PART.sub("", _unpacked(file).stem.lower())


def _named_after_split(file: Path) -> bool:
    return bool(re.match(rf"({'|'.join(SPLITS)})(?![a-z])", file.name.lower()))


def _same_split(split: str) -> tuple[str, ...]:
    return VALIDATION if split in VALIDATION else (split.lower(),)


def _of_split(files: list[Path], split: str | None, source: str, notes: Notes) -> list[Path]:
    """The files of one split, if all are named after splits; otherwise all files."""
    names = [_split_name(file) for file in files]
    after_splits = [file for file in files if _named_after_split(file)]
    in_parts = all(re.search(r"-\d+-of-\d+", file.name) for file in files)
    if len(after_splits) == len(files) or in_parts and (len(set(names)) > 1 or split):
        wanted = _same_split(split or "train")
        chosen = [file for file, name in zip(files, names) if name in wanted]
        if not chosen:
            raise UserError(
                f"{source}: holds no file of the split {split or 'train'!r}; give --split with one "
                f"of {', '.join(sorted(set(names)))}"
            )
        return chosen
    if split:
        other = next(file.name for file in files if file not in after_splits)
        raise UserError(
            f"--split {split}: {source} has no splits, since {other} is not named after one; leave "
            "--split out to read all files, or give the files of the split as the source"
        )
    if after_splits:
        other = next(file.name for file in files if file not in after_splits)
        notes.source.append(f"all {len(files)} files read, since {other} is named after no split")
    return files


def _check_split_of_file(file: Path, split: str | None) -> None:
    if split and not any(
        re.match(rf"{re.escape(name)}(?![a-z0-9])", file.name.lower())
        for name in _same_split(split)
    ):
        raise UserError(
            f"--split {split}: {file} is a single file and has no splits; leave --split out"
        )


def _read_file(path: Path, notes: Notes) -> Iterator[Row]:
    suffix = _suffix(path)
    if suffix == ".json":
        return _read_json(path, notes)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if suffix not in readers:
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    return readers[suffix](path)


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


class Twice(ValueError):
    """A key stands twice in a JSON object, and Python would take the last of its values."""


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """json's object_pairs_hook."""
    value = dict(pairs)
    if len(value) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise Twice(f"the key {key!r} stands twice in one object")
    return value


def _parse_line(line: bytes, where: str) -> dict | UserError:
    try:
        return _as_row(json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object), where)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 text (byte {error.start}); save it as UTF-8")
    except json.JSONDecodeError as error:
        several_lines = line.strip() in (b"{", b"[")
        return UserError(
            f"{where}: invalid JSON: {error.msg} at column {error.colno}; "
            + ("name the file .json" if several_lines else "write one object a line")
        )
    except Twice as error:
        return UserError(f"{where}: {error}; leave one of them out")
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        return UserError(f"{where}: invalid JSON: {error}; take this row out")


def _read_json(path: Path, notes: Notes) -> Iterator[Row]:
    text = ""
    try:
        with _opened(path) as file:
            text = file.read().decode("utf-8-sig")
        if not text.strip():
            raise _empty(path)
        content = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except Twice as error:
        raise UserError(f"{path}: {error}; leave one of them out") from None
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n{" in text.strip():
            yield from _read_jsonl(path)  # one row a line, although the name says .json
            return
        place, reason = str(path), str(error)
        if isinstance(error, json.JSONDecodeError):
            place, reason = f"{path}, line {error.lineno}", f"{error.msg} at column {error.colno}"
        raise UserError(f"{place}: invalid JSON: {reason}; save it as a list of rows") from None
    rows = _unwrap(content, path, notes) if isinstance(content, dict) else content
    if not isinstance(rows, list) or content == {}:
        raise UserError(
            f"{path}: expected a list of rows or one row with named columns, found "
            f"{'an empty object' if content == {} else type(content).__name__}; for one row a line "
            "use .jsonl"
        )
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _as_row(row, where)


def _unwrap(content: dict, path: Path, notes: Notes) -> list:
    """The rows of an object: its one list of objects, or else the object itself."""
    lists = [
        name
        for name, value in content.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if not lists or OF_A_ROW & content.keys():
        return [content]
    if len(lists) > 1:
        raise UserError(
            f"{path}: holds several lists of rows ({', '.join(map(str, lists))}); save the one you "
            "want as a file of its own"
        )
    notes.source.append(f"{path}: the rows are those of its list {lists[0]!r}")
    notes.unread += Counter(f"{name} (beside {lists[0]})" for name in content if name != lists[0])
    return content[lists[0]]


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
                twice = [name for name, n in Counter(reader.fieldnames).items() if n > 1]
                if twice:
                    raise UserError(
                        f"{where}: the column {twice[0]!r} stands there twice; rename one"
                    )
                for other in (";", "\t"):
                    if len(reader.fieldnames) == 1 and other in reader.fieldnames[0]:
                        raise UserError(
                            f"{where}: the columns are separated by {other!r}; save the table with "
                            "commas between them"
                        )
                where = f"{path}, line {reader.line_num + 1}"
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError:
                # Text is decoded in blocks, so this is the line where the block begins.
                raise UserError(f"{where} or after: not UTF-8 text; save it as UTF-8") from None
            except csv.Error as error:
                raise UserError(f"{where}: invalid CSV: {error}; save it again") from None
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
            f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}; save or download it "
            "again"
        ) from None


def _as_row(row, where: str) -> dict | UserError:
    if isinstance(row, dict):
        return row
    hint = "; a list of rows goes into a .json file" if isinstance(row, list) else ""
    return UserError(
        f"{where}: expected an object with named columns, found {type(row).__name__}{hint}"
    )


def _empty(path: Path) -> UserError:
    return UserError(f"{path}: the file is empty; give a file with at least one row")


# ---- the datasets library ------------------------------------------------------------


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder: a data set, or one for each split."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def _read_saved(folder: Path, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # as in _read_dataset
        raise UserError(f"{folder}: cannot be read as a saved data set: {_reason(error)}") from None
    if isinstance(rows, datasets.DatasetDict):
        split = split or "train"
        if split not in rows:
            raise UserError(
                f"{folder}: no split {split!r}; give --split with one of {', '.join(rows)}"
            )
        rows = rows[split]
    elif split and split != str(rows.split):
        raise UserError(f"--split {split}: {folder} was saved without splits; leave --split out")
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

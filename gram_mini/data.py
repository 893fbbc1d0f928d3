"""Preference rows in, pairs of responses out: formats, splits, and what was dropped and why.

A format is recognised by its columns:

    prompt, chosen, rejected                  text, or lists of {"role", "content"} messages (TRL)
    chosen, rejected                          whole dialogues with a shared beginning (hh-rlhf, TRL implicit prompt)
    conversations, chosen, rejected           ShareGPT: {"from", "value"}
    instruction, input, output                the official GRAM files, pre-training and fine-tuning
    prompt, response_a, response_b [, label]  unlabelled triples; label is "A" or "B" where there is one

A source is a file (.jsonl, .json, .csv, .parquet, each also .gz but the last), a folder of such files, the name
of a hub data set, or "world", the embedded village.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.prompts import END_A, END_B, PREFERRED, START_A, START_B, USER_QUESTION

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Pair:
    """A prompt x with two responses y_a and y_b.

    ``label`` is 0 where y_a is preferred, 1 where y_b is, None where nobody said. ``probability`` is the
    true P(y_a preferred) and ``differs`` what the responses differ in; only the embedded world knows them.
    """

    prompt: str
    response_a: str
    response_b: str
    label: int | None = None
    probability: float | None = None
    differs: frozenset[str] = frozenset()
    row: int = field(default=0, compare=False)


@dataclass
class PairData:
    """Pairs with the record of how they were read, as it is printed and written to run.json."""

    source: str
    pairs: list[Pair]
    rows: int
    dropped: Counter = field(default_factory=Counter)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pairs in order, the first 16 hex digits."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(json.dumps([pair.prompt, pair.response_a, pair.response_b, pair.label]).encode())
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line: rows read, used, dropped and why."""
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{self.source}: {self.rows} rows read, {len(self.pairs)} used, {sum(self.dropped.values())} dropped" + (
            f" ({why})" if why else ""
        )

    def record(self) -> dict:
        """What run.json keeps."""
        return {
            "source": self.source,
            "rows": self.rows,
            "used": len(self.pairs),
            "dropped": dict(self.dropped),
            "fingerprint": self.fingerprint,
        }


def load_pairs(source: str, labelled: bool, limit: int | None = None, split: str = "train", seed: int = 0) -> PairData:
    """Read pairs for stage 1 (``labelled=False``: labels are dropped) or stage 2 (``labelled=True``).

    Args:
        source: see the head of this module; "world" gives the unlabelled or the labelled pairs of the village.
        limit: use the first ``limit`` rows only.
        split: which split of a hub data set.
        seed: draws the pairs of the embedded world; files are read as they are.

    Raises:
        UserError: no such source, a row that cannot be read (names file and line), or no usable row left.
    """
    if source == "world":
        from gram_mini.world.pairs import world_pairs  # the world builds on this module

        pairs = world_pairs("labelled" if labelled else "unlabelled", seed=seed)[:limit]
        return PairData("world", pairs, len(pairs))
    data = PairData(source, [], 0)
    for where, row in tqdm(read_rows(source, split, limit), desc="reading", unit=" rows", delay=2, leave=False):
        pair = parse_pair(row, where, labelled)
        data.rows += 1
        if labelled and pair.label is None:
            raise UserError(
                f"{where}: no label; stage 2 and evaluation need to know the preferred response: give columns "
                "'chosen' and 'rejected', or 'label' with A or B"
            )
        reason = unusable(pair)
        if reason:
            data.dropped[reason] += 1
        else:
            data.pairs.append(pair if labelled else replace(pair, label=None))
    if not data.pairs:
        raise UserError(f"{data.summary()}: nothing left to use; give a file with at least one usable row")
    return data


def split_by_prompt(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Hold out about ``share`` of the pairs; all pairs of one prompt fall on the same side.

    Returns (training pairs, held-out pairs), each in the order of ``pairs``. Nothing is held out where
    ``share`` is 0 or there is one prompt only.
    """
    prompts_seen = sorted({pair.prompt for pair in pairs})
    if share <= 0 or len(prompts_seen) < 2:
        return list(pairs), []
    random.Random(seed).shuffle(prompts_seen)
    held = set(prompts_seen[: min(max(1, round(share * len(prompts_seen))), len(prompts_seen) - 1)])
    return [p for p in pairs if p.prompt not in held], [p for p in pairs if p.prompt in held]


# ---- rows: (where, {column: value}) -------------------------------------------------------------------


def read_rows(source: str, split: str = "train", limit: int | None = None):
    """Yield (where, row) from a file, a folder or the hub; ``where`` names file and line for error messages.

    Raises:
        UserError: no such source, an empty or undecodable file, invalid JSON (names the line).
    """
    path = Path(source)
    if len(path.name) > 255:
        raise UserError(f"{source[:40]}...: no such file or folder")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
        if not files:
            raise UserError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
    elif path.exists():
        files = [path]
    elif looks_like_path(source) or _suffix(path) in SUFFIXES:
        raise UserError(f"{source}: no such file or folder")
    else:
        yield from _first(_read_hub(source, split), limit)
        return
    yield from _first((item for file in files for item in _read_file(file)), limit)


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path rather than as ``owner/name`` on the hub."""
    return name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1 or os.sep != "/" and os.sep in name


def _first(rows, limit):
    count = 0
    for count, item in enumerate(rows, start=1):
        yield item
        if count == limit:
            return
    if count == 0:
        raise UserError("the data holds no rows; give a file with at least one row")


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read_file(path: Path):
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; give a file with at least one row")
    yield from {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[suffix](path, text)


def _read_jsonl(path: Path, text: str):
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: invalid JSON: {error.msg} at column {error.colno}") from None
            except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
                raise UserError(f"{where}: invalid JSON: {error}") from None
            yield where, _as_row(row, where)


def _read_json(path: Path, text: str):
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, found {type(rows).__name__}; for one row a line use .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", _as_row(row, f"{path}, row {number}")


def _read_csv(path: Path, text: str):
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where}: invalid CSV: {error}") from None
        if None in row or None in row.values():
            raise UserError(f"{where}: has another number of fields than the header; quote texts that hold commas")
        yield where, row


def _read_parquet(path: Path):
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", row


def _read_hub(name: str, split: str):
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds; each means that the name gave no data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data set {name!r}: no such file here, and not to be had from the hub: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _as_row(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with named columns, found {type(row).__name__}")
    return row


# ---- one row -> one pair ------------------------------------------------------------------------------


def parse_pair(row: dict, where: str, labelled: bool = True) -> Pair:
    """Recognise the format of one row by its columns and read it; a column 'label' only where ``labelled``.

    Raises:
        UserError: columns missing or of the wrong type; names ``where`` and the column.
    """
    if {"conversations", "chosen", "rejected"} <= row.keys():
        prompt = read_prompt(row["conversations"], where, "conversations")
        return Pair(prompt, _reply(row["chosen"], where, "chosen"), _reply(row["rejected"], where, "rejected"), 0)
    if {"prompt", "chosen", "rejected"} <= row.keys():
        return Pair(
            read_prompt(row["prompt"], where, "prompt"),
            _reply(row["chosen"], where, "chosen"),
            _reply(row["rejected"], where, "rejected"),
            label=0,
        )
    if {"chosen", "rejected"} <= row.keys():
        return _shared_prefix(row["chosen"], row["rejected"], where)
    if {"prompt", "response_a", "response_b"} <= row.keys():
        texts = [_text(row[name], where, name) for name in ("prompt", "response_a", "response_b")]
        return Pair(*texts, label=_label(row.get("label"), where) if labelled else None)
    if {"instruction", "output"} <= row.keys():
        return _official(row, where)
    raise UserError(
        f"{where}: columns {sorted(map(str, row))} are of no known format; give 'prompt', 'chosen' and 'rejected' "
        "(the README lists the others)"
    )


def _text(value, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} must be text, found {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: column {column!r} holds half a character (a lone surrogate); save the text as UTF-8")
    return value.strip()


def _label(value, where: str) -> int | None:
    if value is None or value == "":
        return None
    if value not in prompts.LABELS:
        raise UserError(f"{where}: column 'label' must be A or B, found {value!r}")
    return prompts.LABELS.index(value)


def _messages(value, where: str, column: str) -> list[tuple[str, str]]:
    """Messages of either spelling as (speaker, text); speaker is Human, Assistant or System."""
    speakers = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: column {column!r} must be text or a list of messages, found {type(value).__name__}")
    messages = []
    for message in value:
        role, text = (
            (message.get("role", message.get("from")), message.get("content", message.get("value")))
            if isinstance(message, dict)
            else (None, None)
        )
        if not isinstance(role, str) or role not in speakers or not isinstance(text, str):
            raise UserError(f"{where}: column {column!r}: a message needs a role (one of {', '.join(speakers)}) and a text")
        messages.append((speakers[role], _text(text, where, column)))
    return messages


def _transcript(messages: list[tuple[str, str]]) -> str:
    """Several turns as one text; a single question stays as it is."""
    if len(messages) == 1 and messages[0][0] == "Human":
        return messages[0][1]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in messages)


def read_prompt(value, where: str, column: str) -> str:
    """A prompt: text, or a list of messages as one text."""
    return _text(value, where, column) if isinstance(value, str) else _transcript(_messages(value, where, column))


def _reply(value, where: str, column: str) -> str:
    """A response: text, one message, or a list whose last message is the response."""
    if isinstance(value, str):
        return _text(value, where, column)
    return _messages([value] if isinstance(value, dict) else value, where, column)[-1][1]


def _shared_prefix(chosen, rejected, where: str) -> Pair:
    """Two whole dialogues: the prompt is what they share, the responses what follows (Anthropic/hh-rlhf)."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        a, b = _messages(chosen, where, "chosen"), _messages(rejected, where, "rejected")
        if len(a) < 2 or a[:-1] != b[:-1]:
            raise UserError(f"{where}: 'chosen' and 'rejected' must share all messages but the last")
        return Pair(_transcript(a[:-1]), a[-1][1], b[-1][1], label=0)
    for value, column in ((chosen, "chosen"), (rejected, "rejected")):
        if not isinstance(value, str):
            raise UserError(f"{where}: column {column!r} must be text, found {type(value).__name__}")
    turn = "\n\nAssistant:"
    shared = os.path.commonprefix([chosen, rejected])
    # The turn in which they part begins at the last marker that both still share.
    cut = shared.rfind(turn)
    if cut < 0:
        raise UserError(
            f"{where}: no column 'prompt', and 'chosen' and 'rejected' share no dialogue up to 'Assistant:'; add 'prompt'"
        )
    turns = re.split(r"\n\n(Human|Assistant):", chosen[:cut])
    messages = [(speaker, text.strip()) for speaker, text in zip(turns[1::2], turns[2::2])]
    prompt = _transcript(messages) if not turns[0].strip() and messages else chosen[:cut].strip()
    begin = cut + len(turn)
    return Pair(prompt, chosen[begin:].strip(), rejected[begin:].strip(), label=0)


def _official(row: dict, where: str) -> Pair:
    """The official files (NiuTrans/GRAM, README.md): both answers between markers, in output or in instruction."""
    instruction, output = _text(row["instruction"], where, "instruction"), _text(row["output"], where, "output")
    if row.get("input"):
        instruction = f"{instruction}\n{_text(row['input'], where, 'input')}"
    if START_A in output:
        label, question, answers = None, instruction, output
    else:
        label = _label(output, where)
        question, found, answers = instruction.partition(START_A)
        answers = found + answers
        if label is None or not found:
            raise UserError(
                f"{where}: 'output' must hold both answers between {START_A!r} and {END_B!r}, or be A or B with both "
                "answers in 'instruction'"
            )
    try:
        a = answers.split(START_A, 1)[1].split(END_A, 1)[0]
        b = answers.split(END_A, 1)[1].split(START_B, 1)[1]
    except IndexError:
        raise UserError(f"{where}: a marker of the official format is missing, {END_A!r} or {START_B!r}") from None
    if END_B not in b:
        raise UserError(f"{where}: a marker of the official format is missing, {END_B!r}")
    b = b.rsplit(END_B, 1)[0]
    question = question.split(USER_QUESTION, 1)[-1].removesuffix(PREFERRED)
    return Pair(question.strip(), a.strip(), b.strip(), label)


def unusable(pair: Pair) -> str | None:
    """Why a pair says nothing about preference, or None if it does."""
    if not pair.prompt:
        return "with an empty prompt"
    if not pair.response_a or not pair.response_b:
        return "with an empty response"
    if pair.response_a == pair.response_b:
        return "with equal responses"
    return None

"""The rows that score.py reads, and the lines of JSON that it writes in the same order."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from gram_mini.errors import Interrupted, UserError
from gram_mini.judge import Comparison, Judge, preferred
from gram_mini.pairs import Pair
from gram_mini.reading.columns import Columns, given_columns
from gram_mini.reading.formats import group_rows, parse_pairs, read_ranking, readable
from gram_mini.reading.load import NOT_DRAWN, draw_pairs
from gram_mini.reading.messages import read_text
from gram_mini.reading.sources import Notes, Row, read_rows
from gram_mini.reading.usable import is_blank, unusable
from gram_mini.runs import options
from gram_mini.runs.partial import PartialFile
from gram_mini.runs.ranking import Ranking
from gram_mini.runs.record import judge_fingerprint, tokenizer_fingerprint
from gram_mini.runs.report import say_if_seldom, say_if_spelled

from tqdm import tqdm

UNREADABLE = "that cannot be read"
UNLABELLED = "rows whose label cannot be read"  # their texts can
CHUNK = 2000  # comparisons that are held, made and written together: see README.md
NOTED = ("batch_size", "device", "server")  # change no score by more than rounding


@dataclass
class Question:
    """What a row asks for: pairs to compare, or responses to rank."""

    head: dict  # the beginning of every line of the row
    rows: int = 1  # rows of the source: one, or all of one prompt
    pairs: list[Pair] = field(default_factory=list)
    prompt: str = ""
    responses: list[str] | None = None  # None if there are pairs to compare
    reference: str | None = None
    left_out: Counter = field(default_factory=Counter)  # what cannot be scored, by reason
    notes: Notes = field(default_factory=Notes)  # what reading skipped, changed or assumed
    errors: dict[str, str] = field(default_factory=dict)  # of UNREADABLE and UNLABELLED, the first

    @property
    def lines(self) -> int:
        """Lines of the output: one for each pair, one for a ranking, one that says why not."""
        return max(1, len(self.pairs))

    @property
    def comparisons(self) -> int:
        """How many comparisons it takes at most, and 1 if it takes none."""
        n = len(self.responses or ())
        return max(1, len(self.pairs), n * (n - 1) // 2 if self.reference is None else n)

    @property
    def texts(self) -> list[str]:
        """The texts that are judged."""
        of_pairs = [t for p in self.pairs for t in (p.prompt, p.response_a, p.response_b)]
        return [*of_pairs, self.prompt, *(self.responses or ())]

    @property
    def in_no_accuracy(self) -> Counter:
        """What is scored but says nothing about the judge, by reason."""
        counts = Counter(filter(None, map(unusable, self.pairs)))
        counts[UNLABELLED] = self.rows if UNLABELLED in self.errors else 0
        texts = self.prompt, *(self.responses or ()), self.reference
        if self.responses is not None and any(x is not None and is_blank(x) for x in texts):
            counts["ranked with an empty text"] = 1
        return +counts  # without zeros

    def digest(self) -> bytes:
        """A hash of what is asked."""
        pairs = [(p.prompt, p.response_a, p.response_b, p.label) for p in self.pairs]
        asked = self.head, pairs, self.prompt, self.responses, self.reference, [*self.left_out]
        return hashlib.sha256(repr(asked).encode("utf-8", "surrogatepass")).digest()


def read_questions(
    args, notes: Notes | None = None, progress: str | None = None
) -> Iterator[Question]:
    """What the rows of ``--data`` ask for, one question after the other.

    ``notes`` gets what was skipped or assumed on the whole source; what is noted on a row is with
    its question. ``progress`` is the name of a progress bar, if there is to be one.

    Raises:
        UserError: a row that cannot be read (names file and line); with ``--on-bad-row skip`` such
            rows are counted.
    """
    notes = Notes() if notes is None else notes
    columns = given_columns(args.columns, args.labels)
    given = args.split, args.limit, args.subset, args.streaming
    rows = read_rows(args.data, *given, notes, progress)
    for number, group in group_rows(rows, columns):
        row = group[0][1]
        head = {"row": number}
        if isinstance(row, dict) and "id" in row:
            head["id"] = row["id"]
        good, reason = group, None
        if args.on_bad_row == "skip":
            good, reason = readable(
                group, lambda rows: _read(Question({"row": 0}), rows, args, columns)
            )
        question = Question(head, len(group))
        if good:
            _read(question, good, args, columns)
        if reason:
            question.left_out[UNREADABLE] = len(group) - len(good)
            question.errors[UNREADABLE] = reason
        yield question


def _read(question: Question, group: list[Row], args, columns: Columns | None) -> None:
    """Fill in the pairs or responses of a question."""
    where, row = group[0]
    if isinstance(row, UserError):
        raise row
    if columns or row.get("responses") is None:
        if args.rank or args.reference is not None:
            alone = ", and go without --columns" if columns else ""
            raise UserError(f"{where}: --rank and --reference need a column 'responses'{alone}")
        try:
            pairs, question.left_out = parse_pairs(group, True, args.pairs, question.notes, columns)
        except UserError as error:  # a pair whose label cannot be read can still be scored
            pairs, question.errors[UNLABELLED] = [], str(error)
        if not pairs:
            question.notes = Notes()
            pairs, question.left_out = parse_pairs(
                group, False, args.pairs, question.notes, columns
            )
        drawn = draw_pairs(pairs, args.pairs_per_prompt)
        question.pairs = [replace(pair, row=question.head["row"]) for pair in drawn]
        question.left_out += Counter({NOT_DRAWN: len(pairs) - len(drawn)})
        return
    question.prompt, question.responses = read_ranking(row, where, question.notes)
    reference = args.reference
    if row.get("reference") is not None:
        reference = read_text(row["reference"], where, "reference")
    if reference is not None and args.likelihood and not args.rank:
        raise UserError(f"{where}: --likelihood takes no reference; give --rank round-robin")
    if reference is None and len(question.responses) == 1:
        raise UserError(f"{where}: needs a column 'reference', or --reference")
    question.reference = None if args.rank else reference


@dataclass
class Contents:
    """What a source holds, without its texts: the sums of what its questions hold."""

    rows: int = 0
    lines: int = 0
    left_out: Counter = field(default_factory=Counter)
    in_no_accuracy: Counter = field(default_factory=Counter)
    notes: Notes = field(default_factory=Notes)
    errors: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


def read_through(args) -> Contents:
    """Read the rows of ``--data`` once and keep none.

    So a row that cannot be read is named before any work, and what is begun can be told from
    another file.

    Raises:
        UserError: as read_questions; a source that cannot be read twice.
    """
    source = args.data  # os.path takes any text
    if os.path.exists(source) and not (os.path.isfile(source) or os.path.isdir(source)):
        raise UserError(f"{source}: is read twice, which a pipe cannot be; save it as a file first")
    contents, digest = Contents(), hashlib.sha256()
    for question in read_questions(args, contents.notes, "reading"):
        contents.rows += question.rows
        contents.lines += question.lines
        contents.left_out += question.left_out
        contents.in_no_accuracy += question.in_no_accuracy
        contents.notes.update(question.notes)
        contents.errors = question.errors | contents.errors
        digest.update(question.digest())
    contents.fingerprint = digest.hexdigest()[:16]
    return contents


# ---- chunk by chunk ------------------------------------------------------------------


@dataclass
class Totals:
    """What the lines that are written come to."""

    cut: int = 0  # lines
    judged: int = 0  # pairs and rankings
    mass: float = 0.0  # the sum of their masses on the labels
    labelled: int = 0  # pairs that say something about the judge
    draws: int = 0
    hits: float = 0.0  # a draw counts half, as in evaluation.summarise

    def add(self, answer: Comparison | Ranking) -> None:
        """Add the verdict on a pair or a ranking."""
        self.cut += bool(answer.truncated)
        self.judged += 1
        self.mass += answer.label_mass

    def add_hit(self, pair: Pair, answer: Comparison) -> None:
        """Add whether a pair is judged as labelled, if it says something about the judge."""
        if pair.label is None or unusable(pair):
            return
        verdict, as_labelled = preferred(answer.probability), 1 if pair.label == 0 else -1
        self.labelled += 1
        self.draws += verdict == 0
        self.hits += 0.5 if verdict == 0 else float(verdict == as_labelled)


class Scores:
    """The rows of ``--data``, a chunk at a time, and the file of their scores, which grows.

    Use it in a ``with`` statement: score what :meth:`chunks` yields and give it to :meth:`write`.
    At the end of the statement the file gets its name, and a summary is printed. Where an error
    or Ctrl-C ends it, what is written stays, and --resume goes on.

    Raises:
        UserError: as read_questions and PartialFile.
    """

    def __init__(self, args, judge: Judge):
        self.args, self.judge = args, judge
        self.contents = read_through(args)
        same, noted = settings(args, judge, self.contents)
        self.file = PartialFile(args.out, same, noted, args.resume, args.overwrite)
        self.totals = Totals(**self.file.totals)
        self.changed = False  # whether the data are not those that were read through
        if args.resume:
            print(f"--resume: {self.file.lines} of {self.contents.lines} lines are there")
        total, done = self.contents.lines, self.file.lines
        self.bar = tqdm(total=total, initial=done, desc="scoring", unit=" lines", delay=2)

    def chunks(self) -> Iterator[list[Question]]:
        """Yield the chunks that have no lines yet, in order.

        Where a chunk ends depends on the data alone, never on where a run was stopped: which
        sequences share a forward pass can change the last digits of a score.
        """
        digest, written = hashlib.sha256(), self.file.chunks
        for number, chunk in enumerate(in_chunks(read_questions(self.args))):
            for question in chunk:
                digest.update(question.digest())
            if number >= written:
                yield chunk
            if number == 0:
                texts = [text for question in chunk for text in question.texts]
                say_if_spelled(self.judge.tokenizer, texts)
        same = digest.hexdigest()[:16] == self.contents.fingerprint
        if not same or self.file.lines != self.contents.lines:
            self.changed = True
            raise UserError(
                f"{self.args.data}: has changed while it was read; score it again with --overwrite"
            )

    def write(self, chunk: list[Question], answers: Sequence[list[Comparison] | Ranking]) -> None:
        """Write the lines of a chunk; its answers are comparisons of pairs, or rankings."""
        lines: list[dict] = []
        for question, answer in zip(chunk, answers, strict=True):
            if isinstance(answer, Ranking):
                lines.append(question.head | asdict(answer))
                self.totals.add(answer)
                continue
            if not question.pairs:
                lines.append(question.head | {"skipped": ", ".join(question.left_out)})
            for k, (pair, comparison) in enumerate(zip(question.pairs, answer), start=1):
                number = {"pair": k} if len(question.pairs) > 1 else {}
                lines.append(question.head | number | comparison_line(comparison))
                self.totals.add(comparison)
                self.totals.add_hit(pair, comparison)
        texts = [json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines]
        self.file.add(texts, asdict(self.totals))
        self.bar.update(len(lines))

    def __enter__(self) -> Scores:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        if kind is None:
            self.file.finish()
            self._summary()
            return
        self.file.leave()
        if self.changed:
            return
        done = f"{self.file.lines} of {self.contents.lines} lines are kept in {self.file.partial}"
        how = f"{done}; go on with the same command and --resume"
        if kind is KeyboardInterrupt:
            raise Interrupted(how if self.file.lines else "nothing was written") from None
        if self.file.lines:
            print(how, file=sys.stderr)

    def _summary(self) -> None:
        """Say what was scored, cut and left out."""
        contents, totals = self.contents, self.totals
        print(
            f"scored {contents.rows} rows from {self.args.data}: {self.file.lines} lines, "
            f"{totals.cut} of them cut to fit {self.judge.max_length} tokens; wrote {self.args.out}"
        )
        first = {reason: f"; the first: {error}" for reason, error in contents.errors.items()}
        for reason, count in contents.left_out.items():
            print(f"not scored: {count} {reason}{first.get(reason, '')}")
        for line in contents.notes.lines():
            print(line)
        for reason, count in contents.in_no_accuracy.items():
            print(f"{count} {reason}: scored, and in no accuracy{first.get(reason, '')}")
        if totals.judged:
            say_if_seldom(self.judge, totals.mass / totals.judged)
        if totals.labelled:
            half = f", {totals.draws} draws as half" if totals.draws else ""
            print(
                f"{totals.hits:g} of {totals.labelled} labelled pairs judged as labelled{half}: "
                f"accuracy {totals.hits / totals.labelled:.3f}"
            )


def in_chunks(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Chunks of CHUNK comparisons, rows that ask for none counted as one; the last question of a
    chunk may ask for more.
    """
    chunk: list[Question] = []
    size = 0
    for question in questions:
        chunk.append(question)
        size += question.comparisons
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def settings(args, judge: Judge, contents: Contents) -> tuple[dict, dict]:
    """What must be the same for an unfinished file to go on, and what may change but is noted."""
    left_out = ("out", "overwrite", "resume", "judge_template", *NOTED)
    given = options.as_record(args)
    return {
        **{name: value for name, value in given.items() if name not in left_out},
        "served": getattr(judge, "served_as", None),
        "max_length": judge.max_length,
        "judge": judge_fingerprint(args.model, getattr(judge, "model", None)),
        "judge prompt": judge.template,
        "tokenizer and chat template": tokenizer_fingerprint(judge.tokenizer),
        "contents of the data": contents.fingerprint,
        "comparisons in a chunk": CHUNK,
    }, {
        **{name: given[name] for name in NOTED},
        "batch_size": judge.batch_size,
        "log-odds of a probe": getattr(judge, "probe", None),
    }


def comparison_line(result: Comparison) -> dict:
    """The fields of a pair's line, all about response a."""
    return {
        "probability": result.probability,
        "a_first": result.a_first,
        "a_second": result.a_second,
        "position_gap": result.position_gap,
        "label_mass": result.label_mass,
        "truncated": result.truncated,
        "better": {1: "A", -1: "B", 0: None}[preferred(result.probability)],
    }

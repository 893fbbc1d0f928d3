"""The rows that score.py reads, and the lines of JSON that it writes in the same order."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

from gram_mini.errors import UserError
from gram_mini.judge import Comparison, Judge, Ranking, preferred
from gram_mini.pairs import Pair, unusable
from gram_mini.prompts import LABELS
from gram_mini.reading.formats import has_literal_breaks, parse_pairs, read_ranking
from gram_mini.reading.load import NOT_DRAWN, draw_pairs, read_groups
from gram_mini.reading.sources import Notes, Row
from gram_mini.runs.output import write_whole

UNREADABLE = "that cannot be read"
SELDOM = 0.5  # mass on the labels; below it the model hardly ever answers A or B


@dataclass
class Question:
    """What a row asks for: pairs to compare, or responses to rank."""

    head: dict  # the beginning of every line of the row
    rows: int = 1  # rows of the source: one, or all of one prompt
    literal_breaks: int = 0  # rows with a backslash and an n beside markers, which were removed
    pairs: list[Pair] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)  # what cannot be scored, by reason
    notes: Notes = field(default_factory=Notes)  # what reading skipped, changed or assumed
    prompt: str = ""
    responses: list[str] | None = None  # None if there are pairs to compare
    reference: str | None = None


def read_questions(args) -> list[Question]:
    """What every row of ``--data`` asks for.

    Raises:
        UserError: a row that cannot be read (names file and line); with ``--on-bad-row skip`` such
            rows are counted.
    """
    questions = []
    notes = Notes()  # on the whole source; those on a row are with its question
    options = args.split, args.limit, args.subset, args.streaming, args.columns, args.labels
    for number, group in read_groups(args.data, *options, notes):
        row = group[0][1]
        head = {"row": number}
        if isinstance(row, dict) and "id" in row:
            head["id"] = row["id"]
        question = Question(head, len(group))
        question.literal_breaks = sum(has_literal_breaks(row) for _, row in group)
        try:
            _read(question, group, args)
        except UserError:
            if args.on_bad_row == "error":
                raise
            question.left_out = Counter({UNREADABLE: len(group)})
        questions.append(question)
    if questions:
        questions[0].notes.update(notes)
    return questions


def _read(question: Question, group: list[Row], args) -> None:
    """Fill in the pairs or responses of a question."""
    where, row = group[0]
    if isinstance(row, UserError):
        raise row
    if row.get("responses") is None:
        if args.rank or args.reference is not None:
            raise UserError(
                f"{where}: --rank and --reference need rows with a column 'responses', a list of "
                "texts"
            )
        try:
            pairs, question.left_out = parse_pairs(group, True, args.pairs, question.notes)
        except UserError:  # a pair whose label or rating cannot be read can still be scored
            pairs = []
        if not pairs:
            question.notes = Notes()
            pairs, question.left_out = parse_pairs(group, False, args.pairs, question.notes)
        drawn = draw_pairs(pairs, args.pairs_per_prompt)
        question.pairs = [replace(pair, row=question.head["row"]) for pair in drawn]
        question.left_out += Counter({NOT_DRAWN: len(pairs) - len(drawn)})
        return
    prompt, responses = read_ranking(row, where, question.notes)
    reference = args.reference if row.get("reference") is None else row["reference"]
    if reference is not None and not isinstance(reference, str):
        raise UserError(
            f"{where}: column 'reference' must be text, found {type(reference).__name__}"
        )
    if reference is None and (len(responses) == 1 or args.rank == "reference"):
        raise UserError(f"{where}: needs a column 'reference', or --reference")
    question.prompt, question.responses = prompt, responses
    question.reference = None if args.rank not in (None, "reference") else reference


def write_scores(
    args, questions: list[Question], answers: list[list[Comparison] | Ranking], judge: Judge
) -> None:
    """Write the lines of ``--out`` and say what was scored, cut and left out.

    The file appears when it is complete.

    Args:
        args: the options of score.py.
        questions: the rows.
        answers: for each of them, the comparisons of its pairs or the ranking of its responses.
        judge: what has compared them.

    Raises:
        UserError: the file cannot be written.
    """
    lines, hits = [], []
    for question, answer in zip(questions, answers):
        if isinstance(answer, Ranking):
            lines.append(question.head | asdict(answer))
        elif not question.pairs:
            lines.append(question.head | {"skipped": ", ".join(question.left_out)})
        else:
            for k, (pair, comparison) in enumerate(zip(question.pairs, answer), start=1):
                number = {"pair": k} if len(question.pairs) > 1 else {}
                line = question.head | number | comparison_line(comparison)
                if pair.label is not None and not unusable(pair):
                    hits.append(line["better"] == LABELS[pair.label])
                lines.append(line)
    write_whole(
        args.out,
        (json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines),
        "--out",
    )
    rows = sum(question.rows for question in questions)
    cut = sum(bool(line.get("truncated")) for line in lines)
    print(
        f"scored {rows} rows from {args.data}: {len(lines)} lines, {cut} of them cut to "
        f"{judge.max_length} tokens; wrote {args.out}"
    )
    for reason, count in sum((question.left_out for question in questions), Counter()).items():
        print(f"not scored: {count} {reason}")
    notes = Notes()
    for question in questions:
        notes.update(question.notes)
    print(*notes.lines(), sep="\n", end="\n" * bool(notes.lines()))
    if breaks := sum(question.literal_breaks for question in questions):
        print(f"{breaks} rows with a literal \\n beside the markers, taken off")
    masses = [line["label_mass"] for line in lines if "label_mass" in line]
    if masses and sum(masses) / len(masses) < SELDOM and not judge.trained:
        mean = sum(masses) / len(masses)
        print(
            f"The model hardly ever answers A or B (mean mass on the labels {mean:.2g}): "
            "do not rely on this."
        )
    if hits:
        print(
            f"{sum(hits)} of {len(hits)} labelled pairs judged as labelled: "
            f"accuracy {sum(hits) / len(hits):.3f}"
        )


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

"""Preference rows in, pairs of responses out.

A format is recognised by its columns: FORMATS below, and README.md in more words. messages.py reads
the values. Beside a format, the column ``system`` goes before the prompt, NOT_TEXT and CONTEXT are
refused, and every other column that holds something is named in the notes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations, groupby
from operator import itemgetter

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import END_A, END_B, START_A, START_B
from gram_mini.reading.columns import TEXTS, Columns
from gram_mini.reading.messages import (
    NOT_TEXT,
    Messages,
    is_nothing,
    is_quoted,
    prompt_messages,
    read_dialogue,
    read_text,
    split_dialogues,
    transcript,
)
from gram_mini.reading.sources import Notes, Row

# The first format whose columns a row has is used.
FORMATS = (
    # nvidia/HelpSteer2: one response a row; the rows of one prompt follow each other
    Columns("prompt=prompt,response=response,score=helpfulness"),
    # openbmb/UltraFeedback, each of its completions
    Columns("prompt=instruction,response=response,score=overall_score"),
    # LLaMA-Factory's ShareGPT
    Columns("prompt=conversations,chosen=chosen,rejected=rejected"),
    # TRL, HuggingFaceH4/ultrafeedback_binarized
    Columns("prompt=prompt,chosen=chosen,rejected=rejected"),
    # Intel/orca_dpo_pairs
    Columns("prompt=question,chosen=chosen,rejected=rejected"),
    # LLaMA-Factory's Alpaca
    Columns("prompt=instruction+input,chosen=chosen,rejected=rejected"),
    Columns("prompt=instruction,chosen=chosen,rejected=rejected"),
    # Anthropic/hh-rlhf; TRL without a prompt, Skywork/Skywork-Reward-Preference-80K-v0.2
    Columns("chosen=chosen,rejected=rejected"),
    # llm-blender/Unified-Feedback
    Columns("a=conv_A,b=conv_B,score_a=conv_A_rating,score_b=conv_B_rating"),
    # ours
    Columns("prompt=prompt,a=response_a,b=response_b,label=label"),
    Columns("prompt=prompt,a=response_a,b=response_b"),
    # ScalerLab/JudgeBench
    Columns("prompt=question,a=response_A,b=response_B,label=label"),
    # nvidia/HelpSteer3: from -3, response1 is much better, to 3
    Columns(
        "prompt=context,a=response1,b=response2,label=overall_preference",
        "a=-3,a=-2,a=-1,tie=0,b=1,b=2,b=3",
    ),
)

# Columns that belong to the prompt in a way we cannot know.
CONTEXT = (
    "system_prompt", "system_message", "history", "chat_history", "context", "instruction", "input",
)  # fmt: skip

Response = tuple[str, float | None]  # text, and its score where it is known


# ---- rows -> pairs -------------------------------------------------------------------


def group_rows(
    rows: Iterable[Row], columns: Columns | None = None
) -> Iterator[tuple[int, list[Row]]]:
    """Group neighbouring rows that hold one response each to the same prompt.

    Every other row is a group of its own. Takes (where, row) as read_rows yields them, and reads
    them when they are needed. Yields the number of the first row of each group, from 1, and the
    list of its (where, row).
    """
    for _, numbered in groupby(enumerate(rows, start=1), partial(_group_of, columns)):
        group = list(numbered)
        yield group[0][0], [row for _, row in group]


def _group_of(columns: Columns | None, numbered: tuple[int, Row]):
    """What the rows of a group share; the number of a row that is alone."""
    number, (where, row) = numbered
    try:
        form = columns or _recognise(row, where)
        if isinstance(row, dict) and "response" in form.sources:
            prompt = form.value(row, "prompt", where)
            system = None if columns else row.get("system")
            return number if is_nothing(prompt) else [prompt, system]
    except UserError:  # said where the row is read
        pass
    return number


def readable(group: Sequence[Row], read: Callable) -> tuple[list[Row], str | None]:
    """The rows of a group that ``read([row])`` reads, and why the first of the others is none."""
    good, reason = [], None
    for row in group:
        try:
            read([row])
            good.append(row)
        except UserError as error:
            reason = reason or str(error)
    return good, reason


def parse_pairs(
    group: Sequence[Row],
    labelled: bool = True,
    pairs: str = "all",
    notes: Notes | None = None,
    columns: Columns | None = None,
) -> tuple[list[Pair], Counter]:
    """Read the pairs of a row, or of several rows that hold one response each to one prompt.

    Args:
        group: list of (where, row), usually one; see group_rows.
        labelled: whether to read ratings and labels. If not, they may hold anything.
        pairs: "all" pairs of several scored responses, or only "best-worst", which reads ratings.
        notes: gets what was changed, and the columns that are not read.
        columns: which column holds what; if it is None, one of FORMATS, by the columns of the row.

    Returns the pairs, ties included, and a count of the responses that are in no pair, by reason.

    Raises:
        UserError: columns missing, of the wrong type, or not for a judge of text; names the place
            and the column.
    """
    notes = notes or Notes()
    rows = [each for where, row in group for each in _plain_rows(where, row, columns, notes)]
    messages: Messages = []
    responses: list[Response] = []
    several, scored = True, labelled or pairs == "best-worst"
    for where, row in rows:
        form = columns or _recognise(row, where)
        several = "response" in form.sources
        own, more = _read(row, form, where, scored if several else labelled)
        if columns:
            _note_unread(row, form.names(row), notes)
        else:
            own = _with_beside(own, row, form.names(row), where, notes)
        messages = messages or own
        responses += more
    left_out: Counter[str] = Counter()
    if several:
        responses, left_out = _to_compare(responses, scored, pairs)
    _note_markers([text for text, _ in responses], notes)
    prompt = transcript(messages)
    return [_pair(prompt, *two) for two in combinations(responses, 2)], +left_out


def _read(row: dict, form: Columns, where: str, scored: bool) -> tuple[Messages, list[Response]]:
    """The prompt of a row, and its one or two responses.

    Raises:
        UserError: as parse_pairs, and a list that is written as text. One of two responses may be
            such a list and mean it.
    """
    values = {name: form.value(row, name, where) for name in TEXTS if name in form.sources}
    quoted = [name for name, value in values.items() if is_quoted(value)]
    if "prompt" in quoted or len(quoted) > 1:
        raise UserError(
            f"{where}: column {form.sources[quoted[0]]!r} holds a list written as text; save the "
            "table as JSON or Parquet, or say with --columns which part is meant (COLUMN.0)"
        )
    messages: Messages = []
    if "prompt" in values:
        messages = prompt_messages(values.pop("prompt"), where, form.sources["prompt"])
    if "response" in values:
        text = read_text(values["response"], where, form.sources["response"])
        return messages, [(text, form.score(row, "score", where) if scored else None)]
    a, b = (
        read_dialogue(messages, value, where, form.sources[name]) for name, value in values.items()
    )
    messages, *texts = split_dialogues(a, b, where)
    scores = form.scores(row, where) if scored else (None, None)
    return messages, list(zip(texts, scores))


def _to_compare(
    responses: list[Response], scored: bool, pairs: str
) -> tuple[list[Response], Counter]:
    """Those of several responses that are compared, and a count of the others."""
    left_out: Counter[str] = Counter()
    if scored:
        with_score = [response for response in responses if response[1] is not None]
        left_out["without a score"] = len(responses) - len(with_score)
        responses = with_score
    if len(responses) < 2:
        left_out["without a second response"] = 1
        return [], left_out
    if pairs == "best-worst":
        ordered = sorted(responses, key=itemgetter(1), reverse=True)
        responses = [ordered[0], ordered[-1]]
    return responses, left_out


def _pair(prompt: str, first: Response, second: Response) -> Pair:
    """A pair labelled by two scores, the higher the better; unlabelled if one is None."""
    (a, score_a), (b, score_b) = first, second
    if score_a is None or score_b is None:
        return Pair(prompt, a, b)
    if score_a == score_b:
        return Pair(prompt, a, b, tied=True)
    return Pair(prompt, a, b, label=int(score_b > score_a))


# ---- which format, and what stands beside it -----------------------------------------


def _recognise(row: dict | UserError, where: str) -> Columns:
    if isinstance(row, UserError):
        raise row
    for form in FORMATS:
        if form.names(row) <= row.keys():
            return form
    raise UserError(
        f"{where}: columns {sorted(map(str, row))} are of no known format; say which column holds "
        "what: --columns prompt=COLUMN with chosen=COLUMN,rejected=COLUMN, or with "
        "a=COLUMN,b=COLUMN,label=COLUMN and --labels (gram_mini/reading/README.md)"
    )


def _with_beside(
    messages: Messages, row: dict, names: set[str], where: str, notes: Notes
) -> Messages:
    """The prompt after a system message beside it, if it does not hold that already.

    Raises:
        UserError: pictures, tools, or more of the prompt beside the columns that are read.
    """
    for name in (*NOT_TEXT, *CONTEXT):
        if name not in names and not is_nothing(row.get(name)):
            raise UserError(
                f"{where}: column {name!r} holds more than the texts of a prompt and its answers; "
                "say what to read with --columns (prompt=COLUMN+COLUMN joins texts), or leave such "
                "rows out (--on-bad-row skip)"
            )
    _note_unread(row, {*names, "system"}, notes)
    if is_nothing(row.get("system")):
        return messages
    system = ("System", read_text(row["system"], where, "system"))
    return messages if system in messages else [system, *messages]


def _note_unread(row: dict, names: set[str], notes: Notes) -> None:
    """Note the columns that hold something and are not read; id is the row's name."""
    unread = {name for name, value in row.items() if not is_nothing(value)} - names - {"id"}
    notes.unread.update(map(str, unread))


def _note_markers(responses: list[str], notes: Notes) -> None:
    if any(marker in text for text in responses for marker in prompts.MARKERS):
        notes.rows["with a marker of the judge prompt in a response, read as plain letters"] += 1


# ---- rows that hold pairs in another way ---------------------------------------------


def _plain_rows(
    where: str, row: dict | UserError, columns: Columns | None, notes: Notes
) -> list[tuple[str, dict]]:
    """A row in columns of FORMATS, with its place; one of openbmb/UltraFeedback makes several."""
    if isinstance(row, UserError):
        raise row
    if columns is None and {"instruction", "completions"} <= row.keys():
        completions = row["completions"]
        if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
            raise UserError(f"{where}: column 'completions' must be a list of objects")
        others = {name: row[name] for name in row if name != "completions"}
        read = [{name: c.get(name) for name in ("response", "overall_score")} for c in completions]
        return [(where, {**others, **completion}) for completion in read]
    if columns is None and {"instruction", "output"} <= row.keys() and "rejected" not in row:
        row = _official(row, where, notes)
    return [(where, row)]


_START_A, _END_A, _START_B, _END_B = map(re.escape, (START_A, END_A, START_B, END_B))
_ANSWERS = re.compile(f"{_START_A}(.*?){_END_A}.*?{_START_B}(.*){_END_B}", re.DOTALL)

# A backslash and an n, which data/clean_data.py of NiuTrans/GRAM writes instead of line breaks.
_MARKER = "|".join(map(re.escape, (prompts.USER_QUESTION, START_A, END_A, START_B, END_B)))
_BREAK_BESIDE_A_MARKER = re.compile(rf"(?:{_MARKER})\\n|\\n(?:{_MARKER})")
_BREAKS_AT_THE_ENDS = re.compile(r"^(\s|\\n)+|(\s|\\n)+$")


def _official(row: dict, where: str, notes: Notes) -> dict:
    """A row of the official files (NiuTrans/GRAM, README.md) in our own columns.

    Both answers stand between markers, in output (pre-training) or in instruction (fine-tuning).
    """
    instruction, output = (read_text(row[name], where, name) for name in ("instruction", "output"))
    if row.get("input"):
        instruction = f"{instruction}\n{read_text(row['input'], where, 'input')}"
    label = output if output in prompts.LABELS else None
    answers = _ANSWERS.search(instruction if label else output)
    if not answers:
        raise UserError(
            f"{where}: 'output' must hold both answers between {START_A!r} and {END_B!r}, or be A "
            "or B with both answers in 'instruction', as in the official GRAM files; one response "
            "a row is no pair: give --columns prompt=instruction,response=output,score=COLUMN"
        )
    question = instruction[: answers.start()] if label else instruction
    question = question.split(prompts.USER_QUESTION, 1)[-1].removesuffix(prompts.PREFERRED)
    texts = [question, *answers.groups()]
    if any(map(_BREAK_BESIDE_A_MARKER.search, (instruction, output))):
        texts = [_BREAKS_AT_THE_ENDS.sub("", text) for text in texts]
        notes.rows["with a literal \\n beside the markers, taken off"] += 1
    others = {name: row[name] for name in row if name not in ("instruction", "input", "output")}
    return {**others, **dict(zip(("prompt", "response_a", "response_b"), texts)), "label": label}


def read_ranking(row: dict, where: str, notes: Notes) -> tuple[str, list[str]]:
    """Prompt and responses of a row that score.py ranks: prompt, responses, perhaps reference.

    Raises:
        UserError: as parse_pairs.
    """
    messages = prompt_messages(row.get("prompt"), where, "prompt")
    messages = _with_beside(messages, row, {"prompt", "responses", "reference"}, where, notes)
    responses = row["responses"]
    texts = isinstance(responses, list) and all(isinstance(r, str) for r in responses)
    if not texts or not responses:
        raise UserError(f"{where}: column 'responses' must be a list of at least one text")
    for response in responses:
        read_text(response, where, "responses")  # it may hold half a character
    _note_markers(responses, notes)
    return transcript(messages), responses

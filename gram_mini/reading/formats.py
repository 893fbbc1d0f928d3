"""Preference rows in, pairs of responses out.

A format is recognised by its columns and their types: FORMATS below, and README.md in more words.
messages.py reads the values. Beside any format, a column SYSTEM goes before the prompt, NOT_TEXT
and CONTEXT are refused, and every other column that holds something is named in the notes.

Two dialogues may differ before their last message. Then each response begins at the answer where
they split, and holds all that follows.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from operator import itemgetter

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import END_A, END_B, MARKERS, PREFERRED, START_A, START_B, USER_QUESTION
from gram_mini.reading.messages import (
    NOT_TEXT,
    Messages,
    hh_turns,
    is_nothing,
    is_quoted,
    prompt_messages,
    read_messages,
    read_number,
    read_text,
    split_dialogues,
    transcript,
    with_reply,
)
from gram_mini.reading.sources import Notes, Row
from gram_mini.reading.usable import is_blank

# The values of a column 'label', as the scores of the two responses.
VERDICTS = {
    "A": (1, 0),
    "A>B": (1, 0),
    "B": (0, 1),
    "B>A": (0, 1),
    "A=B": (0, 0),
    "B=A": (0, 0),
    "tie": (0, 0),
}

ONE_RESPONSE = {"prompt", "response", "helpfulness"}
REPLIES = ("chosen", "rejected")
SCORES = ("score_chosen", "score_rejected")
RATINGS = ("conv_A_rating", "conv_B_rating")

# Columns whose text goes before the prompt, and those that belong to it in a way we cannot know.
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = ("history", "chat_history", "context", "instruction", "input")

BREAKS = "with a literal \\n beside the markers, taken off"
SPELLED_OUT = "with a marker of the judge prompt in a response, read as plain letters"

Scored = tuple[str, float | None]  # (response, score)
Compared = tuple[str, str, float | None, float | None]  # (a, b, score of a, score of b)


@dataclass(frozen=True)
class Format:
    """A format: the columns that a row must have, its reader, and what else the reader looks at.

    The reader takes (format, row, where, labelled) and returns the prompt as messages and a list:
    of ``Compared``, or of ``Scored`` where ``several`` is set.
    """

    columns: set[str]
    read: Callable[[Format, dict, str, bool], tuple[Messages, list]]
    prompt: str = ""  # the column of the prompt, if one column holds it
    responses: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    several: bool = False


# ---- rows -> pairs -------------------------------------------------------------------


def group_rows(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Group neighbouring rows that hold one response each to the same prompt.

    Every other row is a group of its own. Takes (where, row) as read_rows yields them. Yields the
    number of the first row of each group, from 1, and the list of its (where, row).
    """
    group: list[Row] = []
    first, group_prompt = 0, None
    for number, (where, row) in enumerate(rows, start=1):
        prompt = prompt_of_one(row)
        if group and (prompt is None or prompt != group_prompt):
            yield first, group
            group = []
        if not group:
            first, group_prompt = number, prompt
        group.append((where, row))
    if group:
        yield first, group


def prompt_of_one(row: dict | UserError) -> list | None:
    """What rows of one response must share to be compared; None for any other row."""
    if not isinstance(row, dict) or not ONE_RESPONSE <= row.keys():
        return None
    return [row["prompt"], *(row.get(name) for name in SYSTEM)]


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
    group: Sequence[Row], labelled: bool = True, pairs: str = "all", notes: Notes | None = None
) -> tuple[list[Pair], Counter]:
    """Recognise the format of a row, or of several rows with one prompt, and read its pairs.

    Args:
        group: list of (where, row), usually one; see group_rows.
        labelled: whether to read ratings and labels. If not, they may hold anything.
        pairs: "all" pairs of several scored responses, or only "best-worst".
        notes: gets what was changed, and the columns that are not read.

    Returns the pairs, ties included, and a count of the responses that are in no pair, by reason.

    Raises:
        UserError: columns missing, of the wrong type, or not for a judge of text; names the place
            and the column.
    """
    where, row = group[0]
    if isinstance(row, UserError):
        raise row
    notes = Notes() if notes is None else notes
    form = _recognise(row, where)
    scores_needed = labelled or pairs == "best-worst"
    messages: Messages = []
    compared: list = []
    left_out: Counter[str] = Counter()
    for place, each in group:
        assert isinstance(each, dict)  # a row that cannot be read is a group of its own
        _refuse_beside(each, form, place)
        own, values = form.read(form, each, place, scores_needed if form.several else labelled)
        messages = messages or _with_system(own, each, place)
        compared += values
        notes.unread.update(_unread(each, form))
        notes.rows += Counter({BREAKS: has_literal_breaks(each)})
    prompt = transcript(messages)
    if form.several and is_blank(prompt):  # perhaps thousands of rows: not all their pairs
        return [], Counter({"with an empty prompt": len(compared)})
    if form.several:
        compared, left_out = _compared(compared, scores_needed, pairs)
    texts = (text for a, b, *_ in compared for text in (a, b))
    notes.rows += Counter({SPELLED_OUT: spells_out_marker(texts)})
    return [_pair_by_scores(prompt, *each) for each in compared], +left_out


def _compared(
    responses: list[Scored], scores_needed: bool, pairs: str
) -> tuple[list[Compared], Counter]:
    """The pairs of several responses, and a count of those that are in none."""
    left_out: Counter[str] = Counter()
    if scores_needed:
        scored = [response for response in responses if response[1] is not None]
        left_out["without a score"] = len(responses) - len(scored)
        responses = scored
    if len(responses) < 2:
        left_out["without a second response"] = 1
        return [], left_out
    if pairs == "best-worst":
        ordered = sorted(responses, key=itemgetter(1), reverse=True)
        responses = [ordered[0], ordered[-1]]
    return [
        (a, b, score_a, score_b) for (a, score_a), (b, score_b) in combinations(responses, 2)
    ], left_out


def _pair_by_scores(
    prompt: str, a: str, b: str, score_a: float | None, score_b: float | None
) -> Pair:
    """A pair labelled by two scores, the higher the better; unlabelled if one is None."""
    if score_a is None or score_b is None:
        return Pair(prompt, a, b)
    if score_a == score_b:
        return Pair(prompt, a, b, tied=True)
    return Pair(prompt, a, b, label=int(score_b > score_a))


# ---- which format --------------------------------------------------------------------


def _recognise(row: dict, where: str) -> Format:
    """The format of a row.

    Raises:
        UserError: it has none, or holds no texts; says what would read it.
    """
    for form in FORMATS:
        if form.columns <= row.keys():
            _refuse_names(row, where)
            return form
    raise UserError(
        f"{where}: columns {sorted(map(str, row))} are of no known format; say which column holds "
        "what: --columns prompt=COLUMN with chosen=COLUMN,rejected=COLUMN, or with "
        "a=COLUMN,b=COLUMN,label=COLUMN and --labels (gram_mini/reading/README.md)"
    )


# What 'chosen' and 'rejected' may hold where they name two other columns.
_NAMES = ({"a", "b"}, {"1", "2"}, {"0", "1"}, {"model_a", "model_b"}, {"first", "second"})


def _refuse_names(row: dict, where: str) -> None:
    """Refuse 'chosen' and 'rejected' that are not texts but name two other columns."""
    values = {str(row.get(name)).strip() for name in REPLIES}
    ends = {str(name)[-1:].lower() for name in row}
    twins = any({*two} <= ends for two in ("ab", "12", "01"))
    if values <= row.keys() or twins and {value.lower() for value in values} in _NAMES:
        raise UserError(
            f"{where}: column 'chosen' holds {row.get('chosen')!r}, which seems to name a column; "
            "give --columns prompt=COLUMN,a=COLUMN,b=COLUMN,label=chosen --labels a=...,b=..."
        )


# ---- what stands beside a format -----------------------------------------------------


def _refuse_beside(row: dict, form: Format, where: str) -> None:
    """Refuse what would be lost or misread: pictures and tools, more of the prompt, and lists that
    are written as text. One response alone may be such a list and mean it.
    """
    for name in (*NOT_TEXT, *CONTEXT):
        if name not in form.columns and name not in form.more and not is_nothing(row.get(name)):
            what = "what a judge of text cannot read"
            how = "name the columns to read with --columns"
            if name in CONTEXT:
                what, how = "more than a prompt", f"join it by --columns prompt={name}+COLUMN,..."
            raise UserError(
                f"{where}: column {name!r} holds {what}; {how}, or leave such rows out "
                "(--on-bad-row skip)"
            )
    named = [name for name in (form.prompt, *form.responses) if isinstance(row.get(name), str)]
    quoted = {name for name in named if is_quoted(row[name])}
    if form.prompt in quoted or len(form.responses) > 1 and quoted.issuperset(form.responses):
        raise UserError(
            f"{where}: column {min(quoted)!r} holds a list written as text; save the table as JSON "
            "or Parquet, or say with --columns which part is meant (COLUMN.0 is the first)"
        )


def _unread(row: dict, form: Format) -> set[str]:
    """The columns that hold something and are not read."""
    read = {*form.columns, *form.more, *SYSTEM, "id"}  # id is the row's name
    return {str(name) for name, value in row.items() if name not in read and not is_nothing(value)}


def _with_system(messages: Messages, row: dict, where: str) -> Messages:
    """The prompt after what stands in the columns SYSTEM, if it does not hold it already."""
    said = [
        ("System", read_text(row[name], where, name))
        for name in SYSTEM
        if not is_nothing(row.get(name))
    ]
    return [*(message for message in said if message not in messages), *messages]


# ---- the formats ---------------------------------------------------------------------
# Each reader takes (format, row, where, labelled) and returns the prompt as messages, and its
# responses.


def _chosen_rejected(form: Format, row: dict, where: str, labelled: bool):
    """A prompt (ShareGPT: the conversation) with a better and a worse reply, or lists of texts."""
    messages = prompt_messages(row[form.prompt], where, form.prompt)
    if form.prompt == "instruction" and not is_nothing(row.get("input")):
        text = f"{messages[-1][1]}\n\n{read_text(row['input'], where, 'input')}"
        messages = [*messages[:-1], (messages[-1][0], text)]
    if all(
        isinstance(row[name], list) and row[name] and isinstance(row[name][0], str)
        for name in REPLIES
    ):
        chosen, rejected = (
            [read_text(text, where, name) for text in row[name]] for name in REPLIES
        )
        return messages, [(a, b, 1, 0) for a, b in product(chosen, rejected)]
    messages, a, b = _with_replies(messages, form, row, where)
    return messages, [(a, b, *_chosen_scores(row, where))]


def _with_replies(messages: Messages, form: Format, row: dict, where: str):
    """Prompt and responses from a prompt and two replies."""
    a, b = (with_reply(messages, row[name], where, name) for name in form.responses)
    return split_dialogues(a, b, where, "{!r} and {!r}".format(*form.responses))


def _dialogues(form: Format, row: dict, where: str, labelled: bool):
    """Two whole dialogues. The prompt is what they share, the responses are what follows."""
    if form.more == SCORES and not all(isinstance(row[name], list) for name in REPLIES):
        messages, *responses = _split_texts(row, where)
    else:
        a, b = (read_messages(row[name], where, name) for name in form.responses)
        columns = "{!r} and {!r}".format(*form.responses)
        messages, *responses = split_dialogues(a, b, where, columns)
    if form.more == SCORES:
        return messages, [(*responses, *_chosen_scores(row, where))]
    ratings = [read_number(row.get(name), where, name) if labelled else None for name in RATINGS]
    return messages, [(*responses, *ratings)]


def _chosen_scores(row: dict, where: str) -> tuple[int, int]:
    """1 and 0, or a tie if score_chosen and score_rejected are numbers and equal."""
    try:
        a, b = (read_number(row.get(name), where, name) for name in SCORES)
    except UserError:  # no numbers: the format does not need these columns
        return 1, 0
    return (0, 0) if a == b else (1, 0)


def _triple(form: Format, row: dict, where: str, labelled: bool):
    messages = prompt_messages(row[form.prompt], where, form.prompt)
    messages, a, b = _with_replies(messages, form, row, where)
    scores = _verdict(row.get("label"), where) if labelled else (None, None)
    return messages, [(a, b, *scores)]


def _helpsteer3(form: Format, row: dict, where: str, labelled: bool):
    """nvidia/HelpSteer3, preference: from -3 (response1 much better) to 3 (response2)."""
    messages = prompt_messages(row["context"], where, "context")
    a, b = (read_text(row[name], where, name) for name in ("response1", "response2"))
    column = "overall_preference"
    preference = read_number(row[column], where, column) if labelled else None
    return messages, [(a, b, 0, preference)]


def _helpsteer2(form: Format, row: dict, where: str, scores_needed: bool):
    """nvidia/HelpSteer2: the response of one row and its helpfulness."""
    messages = prompt_messages(row["prompt"], where, "prompt")
    score = read_number(row["helpfulness"], where, "helpfulness") if scores_needed else None
    return messages, [(read_text(row["response"], where, "response"), score)]


def _ultrafeedback(form: Format, row: dict, where: str, scores_needed: bool):
    """openbmb/UltraFeedback: (response, score) of each completion."""
    messages = [("Human", read_text(row["instruction"], where, "instruction"))]
    completions = row["completions"]
    if not isinstance(completions, list):
        kind = type(completions).__name__
        raise UserError(f"{where}: column 'completions' must be a list, found {kind}")
    if not all(
        isinstance(completion, dict) and "response" in completion for completion in completions
    ):
        raise UserError(f"{where}: column 'completions': each needs a 'response'")
    # The two scores have different scales, so all responses of a row are compared by the same one.
    overall = any(completion.get("overall_score") is not None for completion in completions)
    name = "overall_score" if overall else "fine-grained_score"
    responses = []
    for completion in completions:
        has_score = scores_needed and completion.get(name) is not None
        score = read_number(completion[name], where, name) if has_score else None
        responses.append((read_text(completion["response"], where, "response"), score))
    return messages, responses


def _split_texts(row: dict, where: str) -> tuple[Messages, str, str]:
    """Prompt and responses of two dialogues as text (Anthropic/hh-rlhf)."""
    chosen, rejected = ("\n\n" + read_text(row[name], where, name) for name in REPLIES)
    turn = "\n\nAssistant:"
    shared = os.path.commonprefix([chosen, rejected])
    # The turn that differs begins at the last marker that both dialogues share.
    cut = shared.rfind(turn)
    if cut < 0:
        raise UserError(
            f"{where}: no column 'prompt', and 'chosen' and 'rejected' share no dialogue up to "
            "'Assistant:'; add 'prompt'"
        )
    begin = cut + len(turn)
    prompt = hh_turns(chosen[:cut]) or [("Human", chosen[:cut].strip())]
    return prompt, chosen[begin:].strip(), rejected[begin:].strip()


# A backslash and an n. data/clean_data.py of NiuTrans/GRAM writes them instead of line breaks.
LITERAL_BREAK = r"\n"
_MARKER = "|".join(map(re.escape, (USER_QUESTION, START_A, END_A, START_B, END_B)))
_BESIDE_A_MARKER = re.compile(rf"(?:{_MARKER})\\n|\\n(?:{_MARKER})")


def has_literal_breaks(row: dict) -> bool:
    """Whether an official row has LITERAL_BREAKs beside its markers, which the reader removes."""
    texts = row.get("instruction"), row.get("output")
    return any(isinstance(text, str) and _BESIDE_A_MARKER.search(text) for text in texts)


def _strip_breaks(text: str) -> str:
    """The text without white space and literal line breaks at its ends."""
    while text != (
        stripped := text.strip().removeprefix(LITERAL_BREAK).removesuffix(LITERAL_BREAK)
    ):
        text = stripped
    return text


def _official(form: Format, row: dict, where: str, labelled: bool):
    """The official files (NiuTrans/GRAM, README.md): both answers stand between markers.

    They stand in output (pre-training) or in instruction (fine-tuning).
    """
    instruction = read_text(row["instruction"], where, "instruction")
    output = read_text(row["output"], where, "output")
    if row.get("input"):
        instruction = f"{instruction}\n{read_text(row['input'], where, 'input')}"
    if START_A in output:
        label, question, answers = None, instruction, output
    else:
        label = prompts.LABELS.index(output) if output in prompts.LABELS else None
        question, marker, answers = instruction.partition(START_A)
        answers = marker + answers
        if label is None or not marker:
            raise UserError(
                f"{where}: 'output' must hold both answers between {START_A!r} and {END_B!r}, or "
                "be A or B with both answers in 'instruction', as in the official GRAM files; one "
                "response a row is no pair: give --columns prompt=instruction,response=output,"
                "score=COLUMN"
            )
    try:
        a = answers.split(START_A, 1)[1].split(END_A, 1)[0]
        b = answers.split(END_A, 1)[1].split(START_B, 1)[1]
    except IndexError:
        raise UserError(
            f"{where}: a marker of the official format is missing, {END_A!r} or {START_B!r}"
        ) from None
    if END_B not in b:
        raise UserError(f"{where}: a marker of the official format is missing, {END_B!r}")
    b = b.rsplit(END_B, 1)[0]
    question = question.split(USER_QUESTION, 1)[-1].removesuffix(PREFERRED)
    strip = _strip_breaks if has_literal_breaks(row) else str.strip
    scores = {None: (None, None), 0: (1, 0), 1: (0, 1)}[label]
    return [("Human", strip(question))], [(strip(a), strip(b), *scores)]


# Columns that hold the prompt of 'chosen' and 'rejected'. The first that a row has is used.
PROMPTS = ("conversations", "prompt", "question", "instruction", "input")

# The first format whose columns a row has is used.
FORMATS = (
    # nvidia/HelpSteer2: one response a row; the rows of one prompt follow each other
    Format(ONE_RESPONSE, _helpsteer2, "prompt", ("response",), several=True),
    # openbmb/UltraFeedback
    Format({"instruction", "completions"}, _ultrafeedback, "instruction", several=True),
    # TRL, HuggingFaceH4/ultrafeedback_binarized, Intel/orca_dpo_pairs, Alpaca, ShareGPT, RM-Bench
    *(
        Format({name, *REPLIES}, _chosen_rejected, name, REPLIES, (*SCORES, *more))
        for name in PROMPTS
        for more in [["input"] if name == "instruction" else []]
    ),
    # Anthropic/hh-rlhf as text; TRL without a prompt, Skywork-Reward-Preference as messages
    Format({*REPLIES}, _dialogues, "", REPLIES, SCORES),
    # llm-blender/Unified-Feedback: the higher rating is better
    Format({"conv_A", "conv_B"}, _dialogues, "", ("conv_A", "conv_B"), RATINGS),
    # ours; ScalerLab/JudgeBench
    *(
        Format({prompt, a, b}, _triple, prompt, (a, b), ("label",))
        for prompt, a, b in (
            ("prompt", "response_a", "response_b"),
            ("question", "response_A", "response_B"),
        )
    ),
    # nvidia/HelpSteer3
    Format(
        {"context", "response1", "response2", "overall_preference"},
        _helpsteer3,
        "context",
        ("response1", "response2"),
    ),
    # the official GRAM files, for pre-training and for fine-tuning (NiuTrans/GRAM, README.md)
    Format({"instruction", "output"}, _official, more=("input",)),
)


# ---- rows that score.py ranks, labels -------------------------------------------------


def read_ranking(row: dict, where: str, notes: Notes) -> tuple[str, list[str]]:
    """Prompt and responses of a row that score.py ranks: prompt, responses, perhaps reference.

    Raises:
        UserError: as parse_pairs.
    """
    form = Format({"prompt", "responses"}, _dialogues, more=("reference",))
    _refuse_beside(row, form, where)
    messages = prompt_messages(row.get("prompt"), where, "prompt")
    responses = row["responses"]
    texts = isinstance(responses, list) and all(isinstance(r, str) for r in responses)
    if not texts or not responses:
        raise UserError(f"{where}: column 'responses' must be a list of at least one text")
    notes.unread.update(_unread(row, form))
    notes.rows += Counter({SPELLED_OUT: spells_out_marker(responses)})
    return transcript(_with_system(messages, row, where)), responses


def spells_out_marker(responses: Iterable[str]) -> bool:
    """Whether a response holds one of the judge prompt's own markers."""
    return any(marker in text for text in responses for marker in MARKERS)


def _verdict(value, where: str) -> tuple[int | None, int | None]:
    if isinstance(value, UserError):
        raise value
    if value is None or value == "":
        return None, None
    verdict = value.replace(" ", "") if isinstance(value, str) else None
    if verdict not in VERDICTS:
        raise UserError(
            f"{where}: column 'label' must be A, B or tie (or A>B, B>A, A=B), found {value!r}; "
            "write A where the first response is better, or say with --columns and --labels what "
            "the values mean"
        )
    return VERDICTS[verdict]

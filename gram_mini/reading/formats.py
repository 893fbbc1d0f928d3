"""Preference rows in, pairs of responses out.

A format is recognised by its columns and their types.

    columns                                      format
    prompt, chosen, rejected                     texts, or lists of {"role", "content"} messages
                                                 (TRL) that may repeat the prompt
                                                 (HuggingFaceH4/ultrafeedback_binarized; equal
                                                 score_chosen and score_rejected are a tie)
    the same, the last two lists of texts        each chosen with each rejected (RM-Bench)
    question, or instruction and input,          the same; Alpaca's layout for preferences
        instead of prompt
    chosen, rejected                             whole dialogues with a shared beginning, as text
                                                 (hh-rlhf) or as messages (TRL implicit prompt,
                                                 Skywork-Reward-Preference)
    conversations, chosen, rejected              ShareGPT: {"from", "value"}
    conv_A, conv_B, conv_A_rating, ..._B_rating  whole dialogues as messages; the higher rating is
                                                 better (Unified-Feedback)
    prompt, response_a, response_b [, label]     triples, unlabelled or labelled A, B or tie
    question, response_A, response_B [, label]   the same, labelled A>B, B>A or A=B (JudgeBench)
    context, response1, response2,               below 0 response1 is better, 0 is a tie
        overall_preference                       (nvidia/HelpSteer3)
    prompt, response, helpfulness                one response a row; the rows of one prompt follow
                                                 each other (nvidia/HelpSteer2)
    instruction, completions                     several responses a row, compared by overall_score,
                                                 or by fine-grained_score if no response has an
                                                 overall_score (openbmb/UltraFeedback)
    instruction, input, output                   the official GRAM files, for pre-training and for
                                                 fine-tuning (NiuTrans/GRAM, README.md)

messages.py reads the values. Beside any format, CONTEXT goes before the prompt, NOT_TEXT is
refused, and every other column that holds something is named in the notes.

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
    MESSAGE_KEYS,
    NOT_TEXT,
    QUOTED,
    SPEAKERS,
    Messages,
    hh_turns,
    is_list_of_texts,
    is_nothing,
    literal,
    messages_in,
    prompt_messages,
    read_messages,
    read_number,
    read_text,
    repeating,
    split_dialogues,
    transcript,
    with_reply,
    without_system,
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
SEVERAL_RESPONSES = {"instruction", "completions"}

# Columns that go before the prompt, in this order, where a format has no other use for them.
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history", "chat_history")
PASSAGES = ("context", "instruction", "input")
CONTEXT = (*SYSTEM, *HISTORY, *PASSAGES)

SPELLED_OUT = "with a marker of the judge prompt in a response, read as plain letters"

Scored = tuple[str, float | None]  # (response, score)
Compared = tuple[str, str, float | None, float | None]  # (a, b, score of a, score of b)


@dataclass(frozen=True)
class Format:
    """A format: the columns that a row must have, its reader, and what else the reader looks at.

    The reader takes (row, where, labelled) and returns the prompt as messages and a list: of
    ``Compared``, or of ``Scored`` where ``several`` is set.
    """

    columns: set[str]
    read: Callable[[dict, str, bool], tuple[Messages, list]]
    prompts: tuple[str, ...] = ()
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
    return [row["prompt"], *(row.get(name) for name in CONTEXT)]


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
    row, form = _recognise(row, where)
    rows = [(where, row), *group[1:]]
    scores_needed = labelled or pairs == "best-worst"
    responses: list = []
    left_out: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for number, (place, each) in enumerate(rows):
        assert isinstance(each, dict)  # a row that cannot be read is a group of its own
        _refuse_not_text(each, form.columns, place)
        text = _unquoted(each, form, place)
        _refuse_lists(text, form, place)
        changed["with messages written as text, read as messages"] += text is not each
        own, values = form.read(text, place, scores_needed if form.several else labelled)
        if number == 0:
            messages = _with_context(own, text, place, form)
        responses += values
        notes.unread.update(_unread(text, form))
        changed["whose one message as response is not the assistant's, read as if it were"] += any(
            _is_of_another(text.get(name)) for name in form.responses
        )
    prompt = transcript(messages)
    compared = responses
    if form.several and is_blank(prompt):  # perhaps thousands of rows: not all their pairs
        return [], Counter({"with an empty prompt": len(responses)})
    if form.several:
        compared, left_out = _compared(responses, scores_needed, pairs)
    asked = {prompt, transcript(own), own[-1][1]} if own else {prompt}
    asked |= {row[name].strip() for name in form.prompts if isinstance(row.get(name), str)}
    shortened = _without_prompt(compared, asked)
    changed["whose responses repeat the prompt, taken off"] += len(rows) * (
        shortened is not compared
    )
    changed[SPELLED_OUT] += spells_out_marker(text for a, b, *_ in shortened for text in (a, b))
    notes.rows += changed
    return [_pair_by_scores(prompt, *each) for each in shortened], +left_out


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


def _recognise(row: dict, where: str) -> tuple[dict, Format]:
    """The row and its format.

    Raises:
        UserError: it has none; says what would read it.
    """
    row = _verdict_in_chosen(row, where)
    for form in FORMATS:
        if form.columns <= row.keys():
            return row, form
    raise UserError(
        f"{where}: columns {sorted(map(str, row))} are of no known format; {_nearest(row)}"
    )


# What 'chosen' and 'rejected' may hold where they name two other columns.
_NAMES = (["a", "b"], ["1", "2"], ["0", "1"], ["model_a", "model_b"], ["first", "second"])


def _verdict_in_chosen(row: dict, where: str) -> dict:
    """The row with a label where 'chosen' and 'rejected' are not texts but name two others."""
    verdict = [row.get(name) for name in ("chosen", "rejected")]
    letters = [str(value).strip() for value in verdict]
    names = two_responses(row)
    if names is None or sorted(map(str.lower, letters)) not in _NAMES and {*letters} != {*names}:
        return row
    if names[0] in ("response_a", "response_A") and letters[0].upper() in ("A", "B"):
        rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        if rest.get("label") in ("A", "B") and rest["label"] != letters[0].upper():
            raise UserError(
                f"{where}: 'label' says {rest['label']} is better and 'chosen' says {verdict[0]}; "
                "leave one of the columns out"
            )
        return {"label": letters[0].upper(), **rest}
    raise UserError(
        f"{where}: column 'chosen' holds {verdict[0]!r}, which seems to name one of {names[0]!r} "
        f"and {names[1]!r}; give --columns prompt={prompt_columns(row) or 'COLUMN'},"
        f"a={names[0]},b={names[1]},label=chosen --labels a=...,b=..."
    )


# Endings by which two columns are told apart, and how columns of responses, of scores and of
# others are named.
ENDINGS = (("a", "b"), ("A", "B"), ("1", "2"), ("0", "1"))
_RESPONSE = "response|answer|output|completion|reply|generation|candidate|option|text|summary"
_SCORE = "win|score|rating"
_OTHER = f"{_SCORE}|model|rank|label|annot|prompt|question|instruction|id_|date|time|length|count"


def twins(row: dict) -> list[tuple[str, str]]:
    """The pairs of columns that differ in one of ENDINGS only."""
    return [
        (name, name[:-1] + second)
        for first, second in ENDINGS
        for name in map(str, row)
        if name.endswith(first) and name[:-1] + second in row
    ]


def two_responses(row: dict) -> tuple[str, str] | None:
    """Two columns that seem to hold two responses: by their names, else the longest texts."""
    pairs = twins(row)
    named = [pair for pair in pairs if re.fullmatch(rf"(?i:{_RESPONSE})[ _-]?.", pair[0])]
    texts = [
        pair
        for pair in pairs
        if all(isinstance(row[name], str) for name in pair) and not re.search(_OTHER, pair[0])
    ]
    longest = lambda pair: len(row[pair[0]]) + len(row[pair[1]])
    return named[0] if named else max(texts, key=longest, default=None)


def label_column(row: dict) -> str:
    """The column that seems to say which response is better, as --columns takes it."""
    names = ("label", "winner", "preference", "preferred", "better", "choice", "verdict", "chosen",
             "labels")  # fmt: skip
    return next((name for name in names if not is_nothing(row.get(name))), "COLUMN")


def how_to_compare(row: dict, two: tuple[str, str]) -> str:
    """The options that read two responses, and which is better."""
    given = f"--columns prompt={prompt_columns(row) or 'COLUMN'},a={two[0]},b={two[1]}"
    scores = next((pair for pair in twins(row) if re.search(_SCORE, pair[0])), None)
    if label_column(row) == "COLUMN" and scores:
        return f"{given},score_a={scores[0]},score_b={scores[1]}"
    return f"{given},label={label_column(row)} --labels a=...,b=...,tie=..."


def how_to_label(row: dict | UserError) -> str:
    """What would label the pair of a row."""
    two = two_responses(row) if isinstance(row, dict) else None
    if isinstance(row, UserError) or not two:
        return "give columns 'chosen' and 'rejected', or 'label' with A or B"
    return f"give 'label' with A or B, or {how_to_compare(row, two)}"


def prompt_columns(row: dict) -> str:
    """The columns that seem to hold the prompt, as --columns takes them."""
    for names in (["prompt"], ["instruction", "input"], ["question"], ["query"], ["input"]):
        if names[0] in row:
            return "+".join(name for name in names if name in row)
    return ""


def _nearest(row: dict) -> str:
    """What would read a row of no known format."""
    prompt, two = prompt_columns(row) or "COLUMN", two_responses(row)
    if two:
        return f"give {how_to_compare(row, two)}"
    for name in ("response", "output", "completion", "answer", "generation"):
        if name in row:
            score = next((f",score={score}" for score in ("score", "rating") if score in row), "")
            return (
                "one response a row is no pair; give --columns "
                f"prompt={prompt},response={name}{score}"
            )
    return (
        "give 'prompt', 'chosen' and 'rejected', or say which columns hold them: --columns "
        "prompt=COLUMN,chosen=COLUMN,rejected=COLUMN (gram_mini/reading/README.md lists more)"
    )


# ---- what stands beside a format -----------------------------------------------------


def _refuse_not_text(row: dict, own: set[str], where: str) -> None:
    for name in NOT_TEXT:
        if name not in own and not is_nothing(row.get(name)):
            raise UserError(
                f"{where}: column {name!r} holds what a judge of text cannot read; leave such rows "
                "out (--on-bad-row skip), or name the columns to read with --columns"
            )


def _unread(row: dict, form: Format) -> set[str]:
    """The columns, and the parts of messages, that hold something and are not read."""
    read = {*form.columns, *form.more, *CONTEXT, "id"}  # id is the row's name
    names = {str(name) for name, value in row.items() if name not in read and not is_nothing(value)}
    for name in read & row.keys():
        value = row[name]
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                others = part.keys() - {*MESSAGE_KEYS, *COMPLETION_KEYS}
                names |= {f"{name}.{key}" for key in others if not is_nothing(part[key])}
    return names


def _with_context(messages: Messages, row: dict, where: str, form: Format) -> Messages:
    """The prompt after what stands in the columns CONTEXT: system, then earlier turns, then the
    passages, which go before the first question. What the prompt holds already is not repeated.
    """
    other = {
        name: row[name]
        for name in CONTEXT
        if name not in form.columns | set(form.more) and not is_nothing(row.get(name))
    }
    if not other:
        return messages
    turns: dict[str, Messages] = {
        name: _earlier_turns(value, where, name, "System" if name in SYSTEM else "Human")
        for name, value in other.items()
    }
    so_far = "\n".join(text for _, text in messages)
    passages, earlier = [], []
    for name, said in turns.items():
        if name in PASSAGES and len(said) == 1 and said[0][0] == "Human":
            passages += [said[0][1]] * (said[0][1] not in so_far)
        elif not _begins(messages, said):
            earlier += [turn for turn in said if name not in SYSTEM or turn not in messages]
    if passages:
        first = next((i for i, (speaker, _) in enumerate(messages) if speaker == "Human"), None)
        if first is None:
            messages = [*messages, ("Human", "\n\n".join(passages))]
        else:
            text = "\n\n".join([*passages, messages[first][1]])
            messages = [*messages[:first], ("Human", text), *messages[first + 1 :]]
    together = repeating(earlier, messages) or [*earlier, *messages]
    return sorted(together, key=lambda message: message[0] != "System")  # stable: system first


def _begins(messages: Messages, said: Messages) -> bool:
    return messages[: len(said)] == said or without_system(messages)[: len(said)] == said


def _is_of_another(reply) -> bool:
    """Whether a reply of one message, which is read as the answer, is not of the assistant."""
    message = reply[0] if isinstance(reply, list) and len(reply) == 1 else reply
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return isinstance(role, str) and SPEAKERS.get(role.strip().lower()) != "Assistant"


def _earlier_turns(value, where: str, column: str, speaker: str) -> Messages:
    """A column of CONTEXT as messages: text, messages, [question, answer] pairs, or texts that take
    turns.
    """
    if isinstance(value, str) and value.strip().startswith("["):
        value = literal(value) or value
    if isinstance(value, str):
        text = read_text(value, where, column)
        return hh_turns(text) or [(speaker, text)]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        texts = [read_text(item, where, column) for item in value]
        if speaker == "System" or column in PASSAGES:
            return [(speaker, "\n\n".join(texts))]
        value = [texts]  # they take turns
    if isinstance(value, list) and all(
        isinstance(turn, (list, tuple)) and len(turn) % 2 == 0 for turn in value
    ):
        texts = [read_text(text, where, column) for turn in value for text in turn]
        return [(("Human", "Assistant")[i % 2], text) for i, text in enumerate(texts)]
    if isinstance(value, list) and any(isinstance(turn, (list, tuple, str)) for turn in value):
        raise UserError(
            f"{where}: column {column!r} must be text, a list of messages, or a list of [question, "
            "answer]; the last answer is missing"
        )
    return read_messages([value] if isinstance(value, dict) else value, where, column)


def _unquoted(row: dict, form: Format, where: str) -> dict:
    """The row with messages where a prompt, or all responses, hold them written as text."""
    quoted = {
        name: messages_in(row[name], where, name)
        for name in (*form.prompts, *form.responses)
        if isinstance(row.get(name), str) and QUOTED.match(row[name].lstrip())
    }
    if not all(quoted.get(name) for name in form.responses):
        quoted = {name: value for name, value in quoted.items() if name not in form.responses}
    quoted = {name: value for name, value in quoted.items() if value}
    return {**row, **quoted} if quoted else row


def _refuse_lists(row: dict, form: Format, where: str) -> None:
    """Refuse lists of texts that are written as text, as a CSV holds them: they would be read as
    answers, brackets and all. One response alone may be such a list and mean it.
    """
    lists = {
        name
        for name in (*form.prompts, *form.responses)
        if isinstance(row.get(name), str) and is_list_of_texts(row[name])
    }
    if len(lists) > 1 and lists.issuperset(form.responses):
        name = form.responses[0]
        raise UserError(
            f"{where}: column {name!r} holds a list of texts written as text; say with --columns "
            f"which of them is meant ({'chosen' if name == 'chosen' else 'a'}=COLUMN.0 is the "
            "first), or leave such rows out (--on-bad-row skip)"
        )


def _without_prompt(compared: list[Compared], asked: set[str]) -> list[Compared]:
    """The responses without the prompt, where all of them begin with it and go on after it.

    ``asked`` are the texts that may be the prompt. One of a word or two is left: a greeting is
    answered by the same.
    """
    responses = [text for a, b, *_ in compared for text in (a, b)]
    for prompt in sorted(asked, key=len, reverse=True):
        long = len(prompt.split()) >= 3 or len(prompt) >= 16
        if long and responses and all(map(lambda text: _goes_on(text, prompt), responses)):
            cut = len(prompt)
            return [(a[cut:].strip(), b[cut:].strip(), s, t) for a, b, s, t in compared]
    return compared


def _goes_on(text: str, prompt: str) -> bool:
    rest = text[len(prompt) :]
    seam = rest[:1].isspace() or not prompt[-1:].isalnum()
    return text.startswith(prompt) and bool(rest.strip()) and seam


# ---- the formats ---------------------------------------------------------------------
# Each reader takes (row, where, labelled) and returns the prompt as messages, and its responses.


def _chosen_rejected(row: dict, where: str, labelled: bool) -> tuple[Messages, list[Compared]]:
    """A prompt (ShareGPT: the conversation) with a better and a worse reply."""
    column = next(name for name in PROMPTS if name in row)
    messages = prompt_messages(row[column], where, column)
    if column == "instruction" and not is_nothing(row.get("input")):
        text = f"{messages[-1][1]}\n\n{read_text(row['input'], where, 'input')}"
        messages = [*messages[:-1], (messages[-1][0], text)]
    replies = ("chosen", "rejected")
    if all(
        isinstance(row[name], list) and row[name] and isinstance(row[name][0], str)
        for name in replies
    ):
        chosen, rejected = (
            [read_text(text, where, name) for text in row[name]] for name in replies
        )
        return messages, [(a, b, 1, 0) for a, b in product(chosen, rejected)]
    messages, a, b = _with_replies(messages, row, replies, where)
    return messages, [(a, b, *(_chosen_scores(row, where) if labelled else (1, 0)))]


def _with_replies(
    messages: Messages, row: dict, columns: tuple[str, ...], where: str
) -> tuple[Messages, str, str]:
    """Prompt and responses from a prompt and two replies."""
    a, b = (with_reply(messages, row[name], where, name) for name in columns)
    return split_dialogues(a, b, where, f"{columns[0]!r} and {columns[1]!r}")


def _dialogues(row: dict, where: str, labelled: bool) -> tuple[Messages, list[Compared]]:
    """Two whole dialogues. The prompt is what they share, the responses are what follows."""
    chosen, rejected = row["chosen"], row["rejected"]
    scores = _chosen_scores(row, where) if labelled else (1, 0)
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        messages, a, b = _split_texts(chosen, rejected, where)
    else:
        messages, a, b = split_dialogues(
            read_messages(chosen, where, "chosen"),
            read_messages(rejected, where, "rejected"),
            where,
            "'chosen' and 'rejected'",
        )
    return messages, [(a, b, *scores)]


def _chosen_scores(row: dict, where: str) -> tuple[int, int]:
    """1 and 0, or a tie if score_chosen and score_rejected are numbers and equal."""
    try:
        a, b = (read_number(row.get(name), where, name) for name in SCORES)
    except UserError:  # no numbers: the format does not need these columns
        return 1, 0
    return (0, 0) if a == b else (1, 0)


def _unified_feedback(row: dict, where: str, labelled: bool) -> tuple[Messages, list[Compared]]:
    """llm-blender/Unified-Feedback."""
    a, b = (read_messages(row[name], where, name) for name in ("conv_A", "conv_B"))
    messages, response_a, response_b = split_dialogues(a, b, where, "'conv_A' and 'conv_B'")
    rating_a, rating_b = (
        read_number(row.get(name), where, name) if labelled else None for name in RATINGS
    )
    return messages, [(response_a, response_b, rating_a, rating_b)]


def _triple(row: dict, where: str, labelled: bool) -> tuple[Messages, list[Compared]]:
    """Ours (prompt, response_a, response_b) and JudgeBench's (question, response_A, response_B)."""
    form = next(form for form in FORMATS if form.read is _triple and form.columns <= row.keys())
    messages = prompt_messages(row[form.prompts[0]], where, form.prompts[0])
    messages, a, b = _with_replies(messages, row, form.responses, where)
    scores = _verdict(row.get("label"), where) if labelled else (None, None)
    return messages, [(a, b, *scores)]


def _helpsteer3(row: dict, where: str, labelled: bool) -> tuple[Messages, list[Compared]]:
    """nvidia/HelpSteer3, preference: from -3 (response1 much better) to 3 (response2)."""
    messages = prompt_messages(row["context"], where, "context")
    a, b = (read_text(row[name], where, name) for name in ("response1", "response2"))
    column = "overall_preference"
    preference = read_number(row[column], where, column) if labelled else None
    return messages, [(a, b, 0, preference)]


def _helpsteer2(row: dict, where: str, scores_needed: bool) -> tuple[Messages, list[Scored]]:
    """nvidia/HelpSteer2: the response of one row and its helpfulness."""
    messages = prompt_messages(row["prompt"], where, "prompt")
    score = read_number(row["helpfulness"], where, "helpfulness") if scores_needed else None
    return messages, [(read_text(row["response"], where, "response"), score)]


def _ultrafeedback(row: dict, where: str, scores_needed: bool) -> tuple[Messages, list[Scored]]:
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


def _split_texts(chosen, rejected, where: str) -> tuple[Messages, str, str]:
    """Prompt and responses of two dialogues as text (Anthropic/hh-rlhf)."""
    chosen, rejected = (
        "\n\n" + read_text(value, where, name)
        for value, name in ((chosen, "chosen"), (rejected, "rejected"))
    )
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


def has_literal_breaks(row) -> bool:
    """Whether an official row has LITERAL_BREAKs beside its markers, which the reader removes."""
    texts = (row.get("instruction"), row.get("output")) if isinstance(row, dict) else ()
    return any(isinstance(text, str) and _BESIDE_A_MARKER.search(text) for text in texts)


def _strip_breaks(text: str) -> str:
    """The text without white space and literal line breaks at its ends."""
    while text != (
        stripped := text.strip().removeprefix(LITERAL_BREAK).removesuffix(LITERAL_BREAK)
    ):
        text = stripped
    return text


def _official(row: dict, where: str, labelled: bool) -> tuple[Messages, list[Compared]]:
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
        if label is None and not marker:
            raise UserError(f"{where}: {_nearest(row)}")
        if label is None or not marker:
            raise UserError(
                f"{where}: 'output' must hold both answers between {START_A!r} and {END_B!r}, "
                "or be A or B with both answers in 'instruction'"
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
SCORES = ("score_chosen", "score_rejected")
RATINGS = ("conv_A_rating", "conv_B_rating")
COMPLETION_KEYS = ("response", "overall_score", "fine-grained_score")

# The first format whose columns a row has is used.
REPLIES = ("chosen", "rejected")
FORMATS = (
    Format(ONE_RESPONSE, _helpsteer2, ("prompt",), ("response",), several=True),
    Format(SEVERAL_RESPONSES, _ultrafeedback, ("instruction",), several=True),
    *(
        Format(
            {name, *REPLIES},
            _chosen_rejected,
            (name,),
            REPLIES,
            (*SCORES, *(["input"] if name == "instruction" else [])),
        )
        for name in PROMPTS
    ),
    Format({*REPLIES}, _dialogues, (), REPLIES, SCORES),
    Format({"conv_A", "conv_B"}, _unified_feedback, (), ("conv_A", "conv_B"), RATINGS),
    *(
        Format({prompt, a, b}, _triple, (prompt,), (a, b), ("label",))
        for prompt, a, b in (
            ("prompt", "response_a", "response_b"),
            ("question", "response_A", "response_B"),
        )
    ),
    Format(
        {"context", "response1", "response2", "overall_preference"},
        _helpsteer3,
        ("context",),
        ("response1", "response2"),
    ),
    Format({"instruction", "output"}, _official, more=("input",)),
)


# ---- rows that score.py ranks, labels -------------------------------------------------


def read_ranking(row: dict, where: str, notes: Notes) -> tuple[str, list[str]]:
    """Prompt and responses of a row that score.py ranks: prompt, responses, perhaps reference.

    Raises:
        UserError: as parse_pairs.
    """
    form = Format({"prompt", "responses"}, _dialogues, more=("reference",))
    _refuse_not_text(row, form.columns, where)
    messages = prompt_messages(row.get("prompt"), where, "prompt")
    responses = row["responses"]
    texts = isinstance(responses, list) and all(isinstance(r, str) for r in responses)
    if not texts or not responses:
        raise UserError(f"{where}: column 'responses' must be a list of at least one text")
    notes.unread.update(_unread(row, form))
    notes.rows += Counter({SPELLED_OUT: spells_out_marker(responses)})
    return transcript(_with_context(messages, row, where, form)), responses


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

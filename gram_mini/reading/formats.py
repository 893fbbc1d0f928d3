"""Preference rows in, pairs of responses out.

A format is recognised by its columns and their types; other columns do not matter:

    columns                                      format
    prompt, chosen, rejected                     text, or lists of {"role", "content"} messages (TRL); a list may repeat
                                                 the prompt (HuggingFaceH4/ultrafeedback_binarized;
                                                 equal score_chosen and score_rejected are a tie);
                                                 where chosen and rejected are lists of texts, each
                                                 chosen is paired with each rejected (RM-Bench)
    chosen, rejected                             whole dialogues with a shared beginning, as text (hh-rlhf) or as messages
                                                 (TRL implicit prompt, Skywork-Reward-Preference)
    conversations, chosen, rejected              ShareGPT: {"from", "value"}
    conv_A, conv_B, conv_A_rating, ..._B_rating  whole dialogues as messages, the higher rating is better (Unified-Feedback)
    prompt, response_a, response_b [, label]     unlabelled triples; label is A, B or tie where there is one
    question, response_A, response_B [, label]   the same, label is A>B, B>A or A=B (JudgeBench)
    context, response1, response2,               overall_preference below 0: response1 is better, 0: a tie
        overall_preference                       (nvidia/HelpSteer3)
    prompt, response, helpfulness                one response a row, those of one prompt next to each other (nvidia/HelpSteer2)
    instruction, completions                     several responses a row, compared by overall_score, where none
                                                 has one by fine-grained_score
                                                 (openbmb/UltraFeedback)
    instruction, input, output                   the official GRAM files, pre-training and fine-tuning

Where whole dialogues part before their last message, a response is all that follows.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import END_A, END_B, PREFERRED, START_A, START_B, USER_QUESTION

# What a column 'label' may say, as two scores.
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


# ---- rows -> pairs -------------------------------------------------------------------


def group_rows(rows):
    """Put rows together that hold one response each to the same prompt; every other row stays
    alone.

    Takes (where, row) as read_rows yields them; yields (number of the first row, from 1, and list
    of (where, row)).
    """
    group, first, key = [], 0, None
    for number, (where, row) in enumerate(rows, start=1):
        belongs = row["prompt"] if isinstance(row, dict) and ONE_RESPONSE <= row.keys() else None
        if group and (belongs is None or belongs != key):
            yield first, group
            group = []
        if not group:
            first, key = number, belongs
        group.append((where, row))
    if group:
        yield first, group


def parse_pairs(
    group: list[tuple[str, dict]], labelled: bool = True, pairs: str = "all"
) -> tuple[list[Pair], Counter]:
    """Recognise the format of a row, or of several with one prompt, and read its pairs.

    Args:
        group: (where, row), one as a rule; see group_rows.
        labelled: whether to read ratings and labels; without, they may hold anything.
        pairs: of several scored responses "all" pairs, or only the "best-worst".

    Returns the pairs, ties and all, and the reasons for which rows or responses are in none,
    counted.

    Raises:
        UserError: columns missing or of the wrong type; names the place and the column.
    """
    where, row = group[0]
    if isinstance(row, UserError):
        raise row
    scores_needed = labelled or pairs == "best-worst"
    if ONE_RESPONSE <= row.keys():
        prompt, responses = (
            read_prompt(row["prompt"], where, "prompt"),
            _one_each(group, scores_needed),
        )
    elif SEVERAL_RESPONSES <= row.keys():
        prompt, responses = (
            _text(row["instruction"], where, "instruction"),
            _completions(row, where, scores_needed),
        )
    else:
        for columns, read in FORMATS:
            if columns <= row.keys():
                return read(row, where, labelled), Counter()
        raise UserError(
            f"{where}: columns {sorted(map(str, row))} are of no known format; give 'prompt', 'chosen' and 'rejected' "
            "(gram_mini/reading/README.md lists the others)"
        )
    left_out = Counter()
    if scores_needed:
        scored = [(text, score) for text, score in responses if score is not None]
        left_out["without a score"] = len(responses) - len(scored)
        responses = scored
    if len(responses) < 2:
        left_out["without a second response"] = 1
        return [], +left_out
    if pairs == "best-worst":
        ordered = sorted(responses, key=lambda response: response[1], reverse=True)
        responses = [ordered[0], ordered[-1]]
    return [
        _compared(prompt, a, b, s, t) for (a, s), (b, t) in combinations(responses, 2)
    ], +left_out


def _compared(prompt: str, a: str, b: str, score_a: float | None, score_b: float | None) -> Pair:
    """A pair labelled by two scores, the higher the better; unlabelled where they are None."""
    if score_a is None or score_b is None:
        return Pair(prompt, a, b)
    return Pair(
        prompt,
        a,
        b,
        None if score_a == score_b else int(score_b > score_a),
        tied=score_a == score_b,
    )


# ---- the formats
# -------------------------------------------------------------------------------------- Each reader
# takes (row, where, labelled) and returns a list of pairs.


def _chosen_rejected(row: dict, where: str, labelled: bool) -> list[Pair]:
    """A prompt (ShareGPT: the conversation) with a better and a worse reply."""
    column = "conversations" if "conversations" in row else "prompt"
    if all(
        isinstance(row[name], list) and row[name] and isinstance(row[name][0], str)
        for name in ("chosen", "rejected")
    ):
        prompt = read_prompt(row[column], where, column)
        chosen, rejected = (
            [_text(text, where, name) for text in row[name]] for name in ("chosen", "rejected")
        )
        return [Pair(prompt, a, b, 0) for a, b in product(chosen, rejected)]
    value = row[column]
    prompt = (
        [("Human", _text(value, where, column))]
        if isinstance(value, str)
        else _messages(value, where, column)
    )
    chosen, rejected = (
        _continued(prompt, row[name], where, name) for name in ("chosen", "rejected")
    )
    pair = _parted(chosen, rejected, where, "'chosen' and 'rejected'")
    return [_tied_by_score(pair, row, where) if labelled else pair]


def _continued(
    prompt: list[tuple[str, str]], value, where: str, column: str
) -> list[tuple[str, str]]:
    """The dialogue with a reply to it: text, a message, or a list of messages that may repeat the prompt."""
    if isinstance(value, str):
        return [*prompt, ("Assistant", _text(value, where, column))]
    reply = _messages([value] if isinstance(value, dict) else value, where, column)
    if len(reply) == 1:
        return [*prompt, ("Assistant", reply[0][1])]
    return reply if prompt[-1] in reply else [*prompt, *reply]


def _dialogues(row: dict, where: str, labelled: bool) -> list[Pair]:
    """Two whole dialogues: the prompt is what they share, the responses what follows."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return [_parted_text(chosen, rejected, where)]
    a, b = _messages(chosen, where, "chosen"), _messages(rejected, where, "rejected")
    pair = _parted(a, b, where, "'chosen' and 'rejected'")
    return [_tied_by_score(pair, row, where) if labelled else pair]


def _tied_by_score(pair: Pair, row: dict, where: str) -> Pair:
    """The pair, tied where both columns of scores are there and say so."""
    try:
        a, b = (_number(row.get(name), where, name) for name in ("score_chosen", "score_rejected"))
    except UserError:  # other columns of this name: the format does without them
        return pair
    return replace(pair, label=None, tied=True) if a == b else pair


def _unified(row: dict, where: str, labelled: bool) -> list[Pair]:
    """llm-blender/Unified-Feedback."""
    a, b = (_messages(row[name], where, name) for name in ("conv_A", "conv_B"))
    pair = _parted(a, b, where, "'conv_A' and 'conv_B'")
    ratings = [
        _number(row.get(name), where, name) if labelled else None
        for name in ("conv_A_rating", "conv_B_rating")
    ]
    return [_compared(pair.prompt, pair.response_a, pair.response_b, *ratings)]


def _triple(row: dict, where: str, labelled: bool) -> list[Pair]:
    """Ours (prompt, response_a, response_b) and JudgeBench's (question, response_A, response_B)."""
    names = (
        ("question", "response_A", "response_B")
        if "response_A" in row
        else ("prompt", "response_a", "response_b")
    )
    texts = [_text(row[name], where, name) for name in names]
    return [_compared(*texts, *(_verdict(row.get("label"), where) if labelled else (None, None)))]


def _helpsteer3(row: dict, where: str, labelled: bool) -> list[Pair]:
    """nvidia/HelpSteer3, preference: from -3, response1 much better, to 3, response2 much better."""
    prompt = read_prompt(row["context"], where, "context")
    a, b = (_text(row[name], where, name) for name in ("response1", "response2"))
    preference = (
        _number(row["overall_preference"], where, "overall_preference") if labelled else None
    )
    return [_compared(prompt, a, b, 0, preference)]


def _one_each(group: list[tuple[str, dict]], scores_needed: bool) -> list[tuple[str, float | None]]:
    """HelpSteer2: (response, helpfulness) of the rows of one prompt."""
    return [
        (
            _text(row["response"], where, "response"),
            _number(row["helpfulness"], where, "helpfulness") if scores_needed else None,
        )
        for where, row in group
    ]


def _completions(row: dict, where: str, scores_needed: bool) -> list[tuple[str, float | None]]:
    """UltraFeedback: (response, score) of each completion."""
    if not isinstance(row["completions"], list):
        raise UserError(
            f"{where}: column 'completions' must be a list, found {type(row['completions']).__name__}"
        )
    completions = row["completions"]
    if not all(
        isinstance(completion, dict) and "response" in completion for completion in completions
    ):
        raise UserError(f"{where}: column 'completions': each needs a 'response'")
    # The two scores have different scales, so a row is compared by one of them.
    name = (
        "fine-grained_score"
        if all(c.get("overall_score") is None for c in completions)
        else "overall_score"
    )
    responses = []
    for completion in completions:
        known = scores_needed and completion.get(name) is not None
        score = _number(completion[name], where, name) if known else None
        responses.append((_text(completion["response"], where, "response"), score))
    return responses


def _parted(a: list[tuple[str, str]], b: list[tuple[str, str]], where: str, columns: str) -> Pair:
    """Two dialogues as messages: they part at an answer, with which the responses begin."""
    cut = 0
    while cut < min(len(a), len(b)) - 1 and a[cut] == b[cut]:
        cut += 1
    while cut and not a[cut][0] == b[cut][0] == "Assistant":
        cut -= 1
    if cut == 0:
        raise UserError(f"{where}: {columns} must share their messages up to an answer")
    return Pair(
        _transcript(a[:cut]),
        *(_transcript(rest).removeprefix("Assistant: ") for rest in (a[cut:], b[cut:])),
        label=0,
    )


def _parted_text(chosen, rejected, where: str) -> Pair:
    """Two dialogues as text (Anthropic/hh-rlhf)."""
    chosen, rejected = (
        "\n\n" + _text(value, where, name)
        for value, name in ((chosen, "chosen"), (rejected, "rejected"))
    )
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


LITERAL_BREAK = (
    r"\n"  # a backslash and an n: data/clean_data.py of NiuTrans/GRAM writes them for line breaks
)
_MARKER = "|".join(map(re.escape, (USER_QUESTION, START_A, END_A, START_B, END_B)))
_BESIDE_A_MARKER = re.compile(rf"(?:{_MARKER})\\n|\\n(?:{_MARKER})")


def has_literal_breaks(row) -> bool:
    """Whether a row of the official format holds a backslash and an n beside a marker; the reader takes them off."""
    texts = (row.get("instruction"), row.get("output")) if isinstance(row, dict) else ()
    return any(isinstance(text, str) and _BESIDE_A_MARKER.search(text) for text in texts)


def _strip_breaks(text: str) -> str:
    """The text without white space and literal line breaks at its ends."""
    while text != (
        stripped := text.strip().removeprefix(LITERAL_BREAK).removesuffix(LITERAL_BREAK)
    ):
        text = stripped
    return text


def _official(row: dict, where: str, labelled: bool) -> list[Pair]:
    """The official files (NiuTrans/GRAM, README.md): both answers between markers, in output or in instruction."""
    instruction, output = (
        _text(row["instruction"], where, "instruction"),
        _text(row["output"], where, "output"),
    )
    if row.get("input"):
        instruction = f"{instruction}\n{_text(row['input'], where, 'input')}"
    if START_A in output:
        label, question, answers = None, instruction, output
    else:
        label = prompts.LABELS.index(output) if output in prompts.LABELS else None
        question, marker, answers = instruction.partition(START_A)
        answers = marker + answers
        if label is None or not marker:
            raise UserError(
                f"{where}: 'output' must hold both answers between {START_A!r} and {END_B!r}, or be A or B with both "
                "answers in 'instruction'"
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
    return [Pair(strip(question), strip(a), strip(b), label)]


# The first whose columns are all there is taken.
FORMATS = (
    ({"conversations", "chosen", "rejected"}, _chosen_rejected),
    ({"prompt", "chosen", "rejected"}, _chosen_rejected),
    ({"chosen", "rejected"}, _dialogues),
    ({"conv_A", "conv_B"}, _unified),
    ({"prompt", "response_a", "response_b"}, _triple),
    ({"question", "response_A", "response_B"}, _triple),
    ({"context", "response1", "response2", "overall_preference"}, _helpsteer3),
    ({"instruction", "output"}, _official),
)


# ---- values --------------------------------------------------------------------------


def read_prompt(value, where: str, column: str) -> str:
    """A prompt: text, or a list of messages as one text."""
    return (
        _text(value, where, column)
        if isinstance(value, str)
        else _transcript(_messages(value, where, column))
    )


def _verdict(value, where: str) -> tuple[int | None, int | None]:
    if value is None or value == "":
        return None, None
    said = value.replace(" ", "") if isinstance(value, str) else None
    if said not in VERDICTS:
        raise UserError(
            f"{where}: column 'label' must be A, B or tie (or A>B, B>A, A=B), found {value!r}; write A where the first response is better"
        )
    return VERDICTS[said]


def _number(value, where: str, column: str) -> float:
    """A finite number, or its text: a CSV holds nothing else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise UserError(
                f"{where}: column {column!r} must be a number, found {value[:40]!r}"
            ) from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(
            f"{where}: column {column!r} must be a number, found {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: column {column!r} must be a number, found {value}")
    return value


def _text(value, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} must be text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: column {column!r} holds half a character (a lone surrogate); save the text as UTF-8"
        ) from None
    return value.strip()


def _messages(value, where: str, column: str) -> list[tuple[str, str]]:
    """Messages of either spelling as (speaker, text); speaker is Human, Assistant or System."""
    speakers = {
        "user": "Human",
        "human": "Human",
        "assistant": "Assistant",
        "gpt": "Assistant",
        "system": "System",
    }
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: column {column!r} must be text or a list of messages, found {type(value).__name__}"
        )
    messages = []
    for message in value:
        role, text = (
            (message.get("role", message.get("from")), message.get("content", message.get("value")))
            if isinstance(message, dict)
            else (None, None)
        )
        if not isinstance(role, str) or role not in speakers or not isinstance(text, str):
            raise UserError(
                f"{where}: column {column!r}: a message needs a role (one of {', '.join(speakers)}) and a text"
            )
        messages.append((speakers[role], _text(text, where, column)))
    return messages


def _transcript(messages: list[tuple[str, str]]) -> str:
    """Several turns as one text; a single question stays as it is."""
    if len(messages) == 1 and messages[0][0] == "Human":
        return messages[0][1]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in messages)

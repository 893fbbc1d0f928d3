"""Preference rows in, pairs of responses out.

A format is recognised by its columns and their types. Other columns do not matter.

    columns                                      format
    prompt, chosen, rejected                     texts, or lists of {"role", "content"} messages
                                                 (TRL) that may repeat the prompt
                                                 (HuggingFaceH4/ultrafeedback_binarized; equal
                                                 score_chosen and score_rejected are a tie)
    the same, the last two lists of texts        each chosen with each rejected (RM-Bench)
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

Two dialogues may differ before their last message. Then each response begins at the answer where
they split, and holds all that follows.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from operator import itemgetter

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.prompts import END_A, END_B, PREFERRED, START_A, START_B, USER_QUESTION
from gram_mini.reading.sources import Row

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


# ---- rows -> pairs -------------------------------------------------------------------


def group_rows(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Group neighbouring rows that hold one response each to the same prompt.

    Every other row is a group of its own. Takes (where, row) as read_rows yields them. Yields the
    number of the first row of each group, from 1, and the list of its (where, row).
    """
    group: list[Row] = []
    first, group_prompt = 0, None
    for number, (where, row) in enumerate(rows, start=1):
        prompt = row["prompt"] if isinstance(row, dict) and ONE_RESPONSE <= row.keys() else None
        if group and (prompt is None or prompt != group_prompt):
            yield first, group
            group = []
        if not group:
            first, group_prompt = number, prompt
        group.append((where, row))
    if group:
        yield first, group


def parse_pairs(
    group: Sequence[Row], labelled: bool = True, pairs: str = "all"
) -> tuple[list[Pair], Counter]:
    """Recognise the format of a row, or of several rows with one prompt, and read its pairs.

    Args:
        group: list of (where, row), usually one; see group_rows.
        labelled: whether to read ratings and labels. If not, they may hold anything.
        pairs: "all" pairs of several scored responses, or only "best-worst".

    Returns the pairs, ties included, and a count of the responses that are in no pair, by reason.

    Raises:
        UserError: columns missing or of the wrong type; names the place and the column.
    """
    where, row = group[0]
    if isinstance(row, UserError):
        raise row
    scores_needed = labelled or pairs == "best-worst"
    if ONE_RESPONSE <= row.keys():
        prompt = read_prompt(row["prompt"], where, "prompt")
        responses = _helpsteer2(group, scores_needed)
    elif SEVERAL_RESPONSES <= row.keys():
        prompt = _text(row["instruction"], where, "instruction")
        responses = _ultrafeedback(row, where, scores_needed)
    else:
        for columns, read in FORMATS:
            if columns <= row.keys():
                return read(row, where, labelled), Counter()
        raise UserError(
            f"{where}: columns {sorted(map(str, row))} are of no known format; give 'prompt', "
            "'chosen' and 'rejected' (gram_mini/reading/README.md lists the others)"
        )
    left_out: Counter[str] = Counter()
    if scores_needed:
        scored = [response for response in responses if response[1] is not None]
        left_out["without a score"] = len(responses) - len(scored)
        responses = scored
    if len(responses) < 2:
        left_out["without a second response"] = 1
        return [], +left_out
    if pairs == "best-worst":
        ordered = sorted(responses, key=itemgetter(1), reverse=True)
        responses = [ordered[0], ordered[-1]]
    return [
        _pair_by_scores(prompt, a, b, score_a, score_b)
        for (a, score_a), (b, score_b) in combinations(responses, 2)
    ], +left_out


def _pair_by_scores(
    prompt: str, a: str, b: str, score_a: float | None, score_b: float | None
) -> Pair:
    """A pair labelled by two scores, the higher the better; unlabelled if one is None."""
    if score_a is None or score_b is None:
        return Pair(prompt, a, b)
    if score_a == score_b:
        return Pair(prompt, a, b, tied=True)
    return Pair(prompt, a, b, label=int(score_b > score_a))


# ---- the formats ---------------------------------------------------------------------
# Each reader takes (row, where, labelled) and returns a list of pairs.


def _chosen_rejected(row: dict, where: str, labelled: bool) -> list[Pair]:
    """A prompt (ShareGPT: the conversation) with a better and a worse reply."""
    column = "conversations" if "conversations" in row else "prompt"
    replies = ("chosen", "rejected")
    if all(
        isinstance(row[name], list) and row[name] and isinstance(row[name][0], str)
        for name in replies
    ):
        prompt = read_prompt(row[column], where, column)
        chosen, rejected = ([_text(text, where, name) for text in row[name]] for name in replies)
        return [Pair(prompt, a, b, 0) for a, b in product(chosen, rejected)]
    value = row[column]
    if isinstance(value, str):
        messages = [("Human", _text(value, where, column))]
    else:
        messages = _messages(value, where, column)
    a, b = (_with_reply(messages, row[name], where, name) for name in replies)
    pair = _split_dialogues(a, b, where, "'chosen' and 'rejected'")
    return [_mark_tie(pair, row, where) if labelled else pair]


def _with_reply(
    prompt: list[tuple[str, str]], value, where: str, column: str
) -> list[tuple[str, str]]:
    """The dialogue with a reply: text, a message, or a list of messages that may repeat it."""
    if isinstance(value, str):
        return [*prompt, ("Assistant", _text(value, where, column))]
    reply = _messages([value] if isinstance(value, dict) else value, where, column)
    if len(reply) == 1:
        return [*prompt, ("Assistant", reply[0][1])]
    return reply if prompt[-1] in reply else [*prompt, *reply]


def _dialogues(row: dict, where: str, labelled: bool) -> list[Pair]:
    """Two whole dialogues. The prompt is what they share, the responses are what follows."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return [_split_texts(chosen, rejected, where)]
    a, b = _messages(chosen, where, "chosen"), _messages(rejected, where, "rejected")
    pair = _split_dialogues(a, b, where, "'chosen' and 'rejected'")
    return [_mark_tie(pair, row, where) if labelled else pair]


def _mark_tie(pair: Pair, row: dict, where: str) -> Pair:
    """The pair, tied if score_chosen and score_rejected are numbers and equal."""
    try:
        a, b = (_number(row.get(name), where, name) for name in ("score_chosen", "score_rejected"))
    except UserError:  # no numbers: the format does not need these columns
        return pair
    return replace(pair, label=None, tied=True) if a == b else pair


def _unified_feedback(row: dict, where: str, labelled: bool) -> list[Pair]:
    """llm-blender/Unified-Feedback."""
    a, b = (_messages(row[name], where, name) for name in ("conv_A", "conv_B"))
    pair = _split_dialogues(a, b, where, "'conv_A' and 'conv_B'")
    rating_a, rating_b = (
        _number(row.get(name), where, name) if labelled else None
        for name in ("conv_A_rating", "conv_B_rating")
    )
    return [_pair_by_scores(pair.prompt, pair.response_a, pair.response_b, rating_a, rating_b)]


def _triple(row: dict, where: str, labelled: bool) -> list[Pair]:
    """Ours (prompt, response_a, response_b) and JudgeBench's (question, response_A, response_B)."""
    names = (
        ("question", "response_A", "response_B")
        if "response_A" in row
        else ("prompt", "response_a", "response_b")
    )
    prompt, a, b = (_text(row[name], where, name) for name in names)
    score_a, score_b = _verdict(row.get("label"), where) if labelled else (None, None)
    return [_pair_by_scores(prompt, a, b, score_a, score_b)]


def _helpsteer3(row: dict, where: str, labelled: bool) -> list[Pair]:
    """nvidia/HelpSteer3, preference: from -3 (response1 much better) to 3 (response2)."""
    prompt = read_prompt(row["context"], where, "context")
    a, b = (_text(row[name], where, name) for name in ("response1", "response2"))
    column = "overall_preference"
    preference = _number(row[column], where, column) if labelled else None
    return [_pair_by_scores(prompt, a, b, 0, preference)]


def _helpsteer2(group: Sequence[Row], scores_needed: bool) -> list[tuple[str, float | None]]:
    """nvidia/HelpSteer2: (response, helpfulness) of the rows of one prompt."""
    return [
        (
            _text(row["response"], where, "response"),
            _number(row["helpfulness"], where, "helpfulness") if scores_needed else None,
        )
        for where, row in group
        if not isinstance(row, UserError)  # such a row is a group of its own
    ]


def _ultrafeedback(row: dict, where: str, scores_needed: bool) -> list[tuple[str, float | None]]:
    """openbmb/UltraFeedback: (response, score) of each completion."""
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
        score = _number(completion[name], where, name) if has_score else None
        responses.append((_text(completion["response"], where, "response"), score))
    return responses


def _split_dialogues(
    a: list[tuple[str, str]], b: list[tuple[str, str]], where: str, columns: str
) -> Pair:
    """The pair of two dialogues as messages; the responses begin at the answer where they split."""
    cut = 0
    while cut < min(len(a), len(b)) - 1 and a[cut] == b[cut]:
        cut += 1
    while cut and not a[cut][0] == b[cut][0] == "Assistant":
        cut -= 1
    if cut == 0:
        raise UserError(f"{where}: {columns} must share their messages up to an answer")
    response_a, response_b = (
        _transcript(rest).removeprefix("Assistant: ") for rest in (a[cut:], b[cut:])
    )
    return Pair(_transcript(a[:cut]), response_a, response_b, label=0)


def _split_texts(chosen, rejected, where: str) -> Pair:
    """The pair of two dialogues as text (Anthropic/hh-rlhf)."""
    chosen, rejected = (
        "\n\n" + _text(value, where, name)
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
    turns = re.split(r"\n\n(Human|Assistant):", chosen[:cut])
    messages = [(speaker, text.strip()) for speaker, text in zip(turns[1::2], turns[2::2])]
    prompt = _transcript(messages) if not turns[0].strip() and messages else chosen[:cut].strip()
    begin = cut + len(turn)
    return Pair(prompt, chosen[begin:].strip(), rejected[begin:].strip(), label=0)


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


def _official(row: dict, where: str, labelled: bool) -> list[Pair]:
    """The official files (NiuTrans/GRAM, README.md): both answers stand between markers.

    They stand in output (pre-training) or in instruction (fine-tuning).
    """
    instruction = _text(row["instruction"], where, "instruction")
    output = _text(row["output"], where, "output")
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
    return [Pair(strip(question), strip(a), strip(b), label)]


# (columns, reader). The first format whose columns the row has is used.
FORMATS = (
    ({"conversations", "chosen", "rejected"}, _chosen_rejected),
    ({"prompt", "chosen", "rejected"}, _chosen_rejected),
    ({"chosen", "rejected"}, _dialogues),
    ({"conv_A", "conv_B"}, _unified_feedback),
    ({"prompt", "response_a", "response_b"}, _triple),
    ({"question", "response_A", "response_B"}, _triple),
    ({"context", "response1", "response2", "overall_preference"}, _helpsteer3),
    ({"instruction", "output"}, _official),
)


# ---- values --------------------------------------------------------------------------


def read_prompt(value, where: str, column: str) -> str:
    """A prompt: text, or a list of messages as one text."""
    if isinstance(value, str):
        return _text(value, where, column)
    return _transcript(_messages(value, where, column))


def _verdict(value, where: str) -> tuple[int | None, int | None]:
    if value is None or value == "":
        return None, None
    verdict = value.replace(" ", "") if isinstance(value, str) else None
    if verdict not in VERDICTS:
        raise UserError(
            f"{where}: column 'label' must be A, B or tie (or A>B, B>A, A=B), found {value!r}; "
            "write A where the first response is better"
        )
    return VERDICTS[verdict]


def _number(value, where: str, column: str) -> float:
    """A finite number, or text that reads as one: a CSV holds only text."""
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
            f"{where}: column {column!r} holds half a character (a lone surrogate); "
            "save the text as UTF-8"
        ) from None
    return value.strip()


def _messages(value, where: str, column: str) -> list[tuple[str, str]]:
    """Messages as (speaker, text), from role and content or from and value.

    The speaker is Human, Assistant or System.
    """
    speakers = {
        "user": "Human",
        "human": "Human",
        "assistant": "Assistant",
        "gpt": "Assistant",
        "system": "System",
    }
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: column {column!r} must be text or a list of messages, "
            f"found {type(value).__name__}"
        )
    messages = []
    for message in value:
        role = text = None
        if isinstance(message, dict):
            role = message.get("role", message.get("from"))
            text = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in speakers or not isinstance(text, str):
            raise UserError(
                f"{where}: column {column!r}: a message needs a role "
                f"(one of {', '.join(speakers)}) and a text"
            )
        messages.append((speakers[role], _text(text, where, column)))
    return messages


def _transcript(messages: list[tuple[str, str]]) -> str:
    """Several turns as one text; a single question stays as it is."""
    if len(messages) == 1 and messages[0][0] == "Human":
        return messages[0][1]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in messages)

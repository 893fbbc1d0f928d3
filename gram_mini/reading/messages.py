"""Messages, dialogues and texts as the columns of a row hold them."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import warnings

from gram_mini.errors import UserError

Messages = list[tuple[str, str]]  # (speaker, text); the speaker is Human, Assistant or System

SPEAKERS = {
    "user": "Human",
    "human": "Human",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "system": "System",
}

# What a judge of text cannot read, as columns and as parts of a message.
NOT_TEXT = (
    "image", "images", "audio", "audios", "video", "videos", "tools", "functions", "tool_calls",
    "function_call", "function_calls", "tool_call_id",
)  # fmt: skip

# ---- a prompt and its replies --------------------------------------------------------


def read_prompt(value, where: str, column: str) -> str:
    """A prompt: text, or a list of messages as one text."""
    return transcript(prompt_messages(value, where, column))


def prompt_messages(value, where: str, column: str) -> Messages:
    """A prompt as messages. A dialogue in one text, up to 'Assistant:', is taken apart."""
    if not isinstance(value, str):
        return read_messages(value, where, column) or [("Human", "")]
    text = read_text(value, where, column)
    before, assistant, after = text.rpartition("\n\nAssistant:")
    turns = hh_turns(before) if assistant and not after else []
    return turns or [("Human", text)]


def read_dialogue(prompt: Messages, value, where: str, column: str) -> Messages:
    """The dialogue of a prompt and a reply, which is a text, a message or a list of messages.

    The reply may repeat the prompt. Without a prompt it is the whole dialogue: messages, or a text
    as Anthropic/hh-rlhf writes it.

    Raises:
        UserError: a reply that begins with something else.
    """
    if isinstance(value, str):
        text = read_text(value, where, column)
        turns = hh_turns(text)
        repeats = not prompt or prompt[-1] in turns
        reply = turns if repeats else [("Assistant", text)]
    else:
        reply = read_messages([value] if isinstance(value, dict) else value, where, column)
    if prompt and reply and reply[0][0] == "Assistant":
        return [*prompt, *reply]
    missing = [message for message in prompt if message not in reply]
    if reply and all(speaker == "System" for speaker, _ in missing):
        return [*missing, *reply]
    raise UserError(
        f"{where}: column {column!r} must be an answer to a column 'prompt', or a dialogue that "
        "repeats the whole prompt (messages, or text from 'Human:' on); mend it, add 'prompt', or "
        "read dialogues alone with --columns chosen=chosen,rejected=rejected"
    )


def split_dialogues(a: Messages, b: Messages, where: str) -> tuple[Messages, str, str]:
    """Prompt and responses of two dialogues; a response begins at the answer where they split."""
    cut = 0
    while cut < min(len(a), len(b)) - 1 and a[cut] == b[cut]:
        cut += 1
    while cut and not a[cut][0] == b[cut][0] == "Assistant":
        cut -= 1
    if cut == 0:
        raise UserError(
            f"{where}: both responses must share their messages up to an answer; give the shared "
            "ones as 'prompt'"
        )
    response_a, response_b = (
        transcript(rest).removeprefix("Assistant: ") for rest in (a[cut:], b[cut:])
    )
    return a[:cut], response_a, response_b


def transcript(messages: Messages) -> str:
    """Several turns as one text; a single question stays as it is."""
    if len(messages) == 1 and messages[0][0] == "Human":
        return messages[0][1]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in messages)


def read_messages(value, where: str, column: str) -> Messages:
    """Messages as (speaker, text), from role and content or from and value.

    A system message without text is left out.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: column {column!r} must be text or a list of messages, "
            f"found {'an empty list' if value == [] else type(value).__name__}"
        )
    messages = [_message(message, where, column) for message in value]
    return [(speaker, text) for speaker, text in messages if text or speaker != "System"]


def _message(message, where: str, column: str) -> tuple[str, str]:
    """One message as (speaker, text)."""
    if not isinstance(message, dict):
        raise UserError(
            f"{where}: column {column!r} must be text or a list of messages, found a list of "
            f"{type(message).__name__}; name one with --columns ({column}.0 is the first)"
        )
    role = message.get("role", message.get("from"))
    text = message.get("content", message.get("value"))
    speaker = SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
    if speaker == "System" and text is None:
        text = ""
    refused = [name for name in NOT_TEXT if not is_nothing(message.get(name))]
    if speaker and isinstance(text, str) and not refused:
        return speaker, read_text(text, where, column)
    what = refused[0] if refused else "no plain text"
    found = f"{what} in a message of {role!r}" if speaker else f"the role {role!r}"
    raise UserError(
        f"{where}: column {column!r}: a message needs a role (one of {', '.join(SPEAKERS)}) and "
        f"nothing but a text, found {found}; leave such rows out (--on-bad-row skip)"
    )


def hh_turns(text: str) -> Messages:
    """The turns of a dialogue as Anthropic/hh-rlhf writes it, none if something stands before."""
    turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    if turns[0].strip():
        return []
    return [(speaker, said.strip()) for speaker, said in zip(turns[1::2], turns[2::2])]


# ---- values --------------------------------------------------------------------------


def read_text(value, where: str, column: str) -> str:
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


def read_number(value, where: str, column: str) -> float:
    """A finite number, or text that reads as one: a CSV holds only text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: column {column!r} must be a number, found {repr(value)[:40]}")
    return number


_MESSAGES = re.compile(
    r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:.*\}\s*\]?\s*""", re.DOTALL
)
_LIST = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)


def is_quoted(value) -> bool:
    """Whether a value is a text that spells out messages or a list of texts, as in a CSV."""
    if not isinstance(value, str):
        return False
    if not _LIST.fullmatch(value):
        return _MESSAGES.fullmatch(value) is not None
    for read in (json.loads, ast.literal_eval):  # a text may only begin and end with such lists
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes such as \d
                return isinstance(read(value.strip()), list)
    return False


def is_nothing(value) -> bool:
    """Whether a column says nothing: null, an empty text or list, or what a CSV makes of these."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    if isinstance(value, (list, dict)):
        return all(map(is_nothing, value.values() if isinstance(value, dict) else value))
    return value is None or value is False or isinstance(value, float) and math.isnan(value)

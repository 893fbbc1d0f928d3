"""Messages, dialogues and texts as the columns of a row hold them."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings

from gram_mini.errors import UserError

Messages = list[tuple[str, str]]  # (speaker, text); the speaker is Human, Assistant or System

SPEAKERS = {
    "user": "Human",
    "human": "Human",
    "prompter": "Human",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "chatgpt": "Assistant",
    "bot": "Assistant",
    "model": "Assistant",
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
    if text.endswith("\n\nAssistant:"):
        text = text.removesuffix("Assistant:").strip()
        return hh_turns(text) or [("Human", text)]
    return [("Human", text)]


def with_reply(prompt: Messages, value, where: str, column: str) -> Messages:
    """The dialogue with a reply: text, a message, or a list of messages that may repeat the prompt.

    Raises:
        UserError: a reply that begins with something else.
    """
    if isinstance(value, str):
        text = read_text(value, where, column)
        turns = hh_turns(text) or []
        return repeating(prompt, turns) or [*prompt, ("Assistant", text)]
    reply = read_messages([value] if isinstance(value, dict) else value, where, column)
    if repeated := repeating(prompt, reply):
        return repeated
    if reply and (reply[0][0] == "Assistant" or not without_system(prompt)):
        return [*prompt, *reply]
    raise UserError(
        f"{where}: column {column!r} must begin with the assistant's answer, or repeat the whole "
        "prompt and then answer; mend it, or read the dialogues alone with "
        "--columns chosen=chosen,rejected=rejected"
    )


def repeating(prompt: Messages, reply: Messages) -> Messages | None:
    """The dialogue of a reply that repeats its prompt, None if it does not.

    It may begin earlier than the prompt does, and either may leave the system message out. A reply
    that begins with an answer repeats nothing.
    """
    asked, said = without_system(prompt), without_system(reply)
    if asked and reply and reply[0][0] != "Assistant":
        for start in range(len(said) - len(asked)):
            if said[start : start + len(asked)] == asked:
                return [*(message for message in prompt if message not in asked + reply), *reply]
    return None


def without_system(messages: Messages) -> Messages:
    return [message for message in messages if message[0] != "System"]


def split_dialogues(
    a: Messages, b: Messages, where: str, columns: str
) -> tuple[Messages, str, str]:
    """Prompt and responses of two dialogues; a response begins at the answer where they split."""
    cut = 0
    while cut < min(len(a), len(b)) - 1 and a[cut] == b[cut]:
        cut += 1
    while cut and not a[cut][0] == b[cut][0] == "Assistant":
        cut -= 1
    if cut == 0:
        raise UserError(
            f"{where}: {columns} must share their messages up to an answer; give the shared ones "
            "as 'prompt'"
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


# ---- messages ------------------------------------------------------------------------


def read_messages(value, where: str, column: str) -> Messages:
    """Messages as (speaker, text), from role and content or from and value.

    A system message without text is left out.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: column {column!r} must be text or a list of messages, "
            f"found {'an empty list' if value == [] else type(value).__name__}"
        )
    return [
        (speaker, text)
        for speaker, text in (_message(message, where, column) for message in value)
        if text or speaker != "System"
    ]


def _message(message, where: str, column: str) -> tuple[str, str]:
    """One message as (speaker, text)."""
    role = speaker = content = None
    wrong = type(message).__name__
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        speaker = SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
        wrong = f"no text in a message of {role!r}" if speaker else f"the role {role!r}"
        for name in NOT_TEXT:
            if speaker and not is_nothing(message.get(name)):
                raise UserError(
                    f"{where}: column {column!r}: a message of {role!r} holds {name!r}, which a "
                    "judge of text cannot read; leave such rows out (--on-bad-row skip)"
                )
    if isinstance(content, list):
        content = _text_of_parts(content, where, column)
    if speaker == "System" and content is None:
        content = ""
    if speaker is None or not isinstance(content, str):
        raise UserError(
            f"{where}: column {column!r}: a message needs a role (one of {', '.join(SPEAKERS)}) "
            f"and a text, found {wrong}; leave such rows out (--on-bad-row skip)"
        )
    return speaker, read_text(content, where, column)


def _text_of_parts(parts: list, where: str, column: str) -> str:
    """The text of a message that is a list of {"type": "text", "text"}."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"{where}: column {column!r}: a message holds a part of the type {kind!r}, which a "
                "judge of text cannot read; leave such rows out (--on-bad-row skip)"
            )
        texts.append(text)
    return "\n".join(texts)


def hh_turns(text: str) -> Messages | None:
    """The turns of a dialogue as Anthropic/hh-rlhf writes it, None if something stands before."""
    turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    if turns[0].strip() or len(turns) < 2:
        return None
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
    if isinstance(value, UserError):
        raise value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: column {column!r} must be a number, found {repr(value)[:40]}")
    return number


def literal(text: str):
    """The value that a text spells out in JSON or Python, None if it spells out none."""
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a text may hold what is no escape in Python
                return read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pass
    return None


def is_quoted(text: str) -> bool:
    """Whether a text spells out messages or a list of texts, as a CSV holds them."""
    if re.match(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""", text):
        return True
    value = literal(text) if text.lstrip().startswith("[") else None
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(item, str) or item is None for item in value)
    )


def is_nothing(value) -> bool:
    """Whether a column says nothing: null, an empty text or list, or what a CSV makes of these."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    if isinstance(value, (list, dict)):
        return all(map(is_nothing, value.values() if isinstance(value, dict) else value))
    return value is None or value is False or isinstance(value, float) and math.isnan(value)

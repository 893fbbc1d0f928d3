"""What a tokenizer's chat template and special tokens do to a prompt.

A chat template is a program that writes the turns of a conversation in the form in which a model
was trained. Some templates print today's date, some write an empty thought before an answer, some
trim the text. This file deals with all that, so that prompts.py need not know of it.
"""

from __future__ import annotations

import re
from collections.abc import Container
from datetime import date

from gram_mini.errors import UserError, last_line

# Private-use characters stand for the three texts while a chat template is rendered around them.
SLOTS = {"prompt": "\ue000", "response_a": "\ue001", "response_b": "\ue002"}
ANSWER = "\ue003"  # stands for the assistant's answer

TODAY = date(2024, 7, 26)  # the date that Llama 3's template falls back on
DATES = "{%- macro strftime_now(format) -%}{{ dates[format] }}{%- endmacro +%}"


# ---- turns ---------------------------------------------------------------------------


def render(tokenizer, messages: list[dict], **options) -> str:
    """Messages as text by the tokenizer's own chat template, with thinking switched off.

    Some templates print today's date (Llama 3). For them it is always TODAY, because otherwise a
    run would be trained with one prompt and scored with another.

    Raises:
        UserError: if the template fails.
    """
    options["enable_thinking"] = False
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            formats = re.findall(r"strftime_now\(\s*([\"'])(.*?)\1", template)
            options["dates"] = {form: TODAY.strftime(form) for _, form in formats}
            options["chat_template"] = DATES + template
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program; whatever it raises, it cannot be used
        raise UserError(f"the chat template of this tokenizer fails: {last_line(error)}") from error


def up_to_answer(tokenizer, content: str, plain_end: str = "") -> tuple[str, str]:
    """One user turn up to where the assistant's text begins, and the space before that text.

    The turn ends where the template puts an answer, so it holds what the template writes before
    each answer, such as an empty thought or <|channel|>final. Most tokenizers join a space to the
    word after it (" A" is one token), so a space at the very end is returned apart, as " " or "".
    ``plain_end`` ends the turn if there is no chat template.

    Raises:
        UserError: if the template fails, or shows no answer.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
        text, found, _ = render(tokenizer, turns).partition(ANSWER)
        if not found:
            raise UserError("the chat template of this tokenizer does not show the answer's text")
        space = " " if text.endswith(" ") else ""
    else:
        text = content + plain_end
        space = "" if text.endswith(("\n", "\t")) else " "
    return text.removesuffix(" "), space


def split_at_slots(text: str, slots: list[str]) -> list[str]:
    """The texts around the SLOTS of these names, each of which stands once in ``text``, in order.

    Raises:
        UserError: if one does not.
    """
    parts = []
    for name in slots:
        if text.count(SLOTS[name]) != 1:
            raise UserError(
                "the chat template of this tokenizer does not show the user's text exactly once"
            )
        part, text = text.split(SLOTS[name])
        parts.append(part)
    return [*parts, text]


# ---- token ids -----------------------------------------------------------------------


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` as in the middle of a text: no BOS, no EOS, no blank put before it."""
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer, texts: list[str], **options) -> list[list[int]]:
    """:func:`encode` for several texts; the options are the tokenizer's.

    Some tokenizers put a blank before every text (Llama 2), which is right only where a text
    begins. For them a character is put before each text, and its tokens are cut off again. It is a
    line break, else a digit, else a letter: the first of these that does not merge with the text.
    """
    options = dict(add_special_tokens=False, verbose=False, **options)
    ids = tokenizer(texts, **options)["input_ids"]
    if adds_a_blank(tokenizer):
        for n, text in enumerate(texts):
            for first in ("\n", "0", "a"):
                before = tokenizer(first, **options)["input_ids"]
                after = tokenizer(first + text, **options)["input_ids"]
                if after[: len(before)] == before:
                    ids[n] = after[len(before) :]
                    break
    return ids


def adds_a_blank(tokenizer) -> bool:
    """Whether a tokenizer puts a blank before each text."""
    alone = tokenizer("A", add_special_tokens=False)["input_ids"]
    return tokenizer("0A", add_special_tokens=False)["input_ids"][-len(alone) :] != alone


def encode_beginning(tokenizer, text: str) -> list[int]:
    """Token ids of the text with which a sequence begins.

    They begin with BOS if the tokenizer begins texts with it, unless the template has written it.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or tokenizer("x")["input_ids"][:1] != [bos]:
        return ids
    return [bos, *ids]


def reserved_tokens(tokenizer, prompt_ids: Container[int], markers: tuple[str, ...]):
    """Tokens that belong to the prompt alone, as {id: what it spells}.

    Of the tokens that were added to the tokenizer's vocabulary these are the special ones, the
    ``markers``, and those of the prompt's own words (``prompt_ids``).
    """
    reserved = {}
    for i, token in tokenizer.added_tokens_decoder.items():
        of_prompt = i in prompt_ids or token.special or token.content in markers
        is_text = len(token.content.strip()) <= 1  # white space may be a token of its own
        if of_prompt and not is_text and i != tokenizer.unk_token_id:
            reserved[i] = token.content
    return reserved


def encode_texts(texts: list[str], tokenizer, reserved: dict[int, str]) -> list[list[int]]:
    """Token ids of texts without any reserved token: a response that spells out "<|im_end|>" must
    not end the user's turn. A text that gives one is cut within it, and encoded in parts.
    """
    encoded = encode_all(tokenizer, texts, split_special_tokens=True)
    for n, (text, ids) in enumerate(zip(texts, encoded)):
        if reserved.keys().isdisjoint(ids) or len(text) < 2:
            continue
        cuts = set()
        for content in reserved.values():
            cuts |= {match.start() + 1 for match in re.finditer(re.escape(content), text)}
        if not cuts:  # nothing spells it out: the tokenizer changes the text first (upper case)
            cuts = {len(text) // 2}
        ends = [0, *sorted(cuts), len(text)]
        parts = [text[start:end] for start, end in zip(ends, ends[1:])]
        of_parts = encode_texts(parts, tokenizer, reserved)
        encoded[n] = [i for part in of_parts for i in part]
    return encoded

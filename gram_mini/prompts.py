"""Every prompt of the project, written once, and what a tokenizer makes of it.

Two texts wrap a prompt x and its two responses y_a, y_b:

    stage 1   user: QUESTION     assistant: PAIR              (the pair is generated)
    stage 2   user: JUDGE        assistant: "A" or "B"        (the verdict is generated)

The markers are those of the official data (NiuTrans/GRAM, README.md, "Datasets"), so files in the
official format can be read. The judge's instruction is our own wording: a general one, and one for
the village, whose language model knows no other. Another judge prompt, for example that of a
released checkpoint, can take their place: a template with the same three placeholders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from gram_mini.errors import UserError, last_line

START_A, END_A = "[The Start of Assistant A's Answer]", "[The End of Assistant A's Answer]"
START_B, END_B = "[The Start of Assistant B's Answer]", "[The End of Assistant B's Answer]"
USER_QUESTION, PREFERRED = "[User Question]", "#Preferred:"

INSTRUCTION = (
    "Decide which of the two answers to the question below is better: helpful, correct, harmless "
    "and to the point. Reply with a single letter, A or B."
)
VILLAGE_INSTRUCTION = (
    "Two assistants answered the question below. Decide which answer serves the user better: look "
    "for correct facts first, then for courtesy, then for keeping to the point. Neither the order "
    "of the answers nor their length is a reason to prefer one. Reply with a single letter, A or B."
)

QUESTION = f"{USER_QUESTION}\n{{prompt}}"
PAIR = f"{START_A}\n{{response_a}}\n{END_A}\n\n{START_B}\n{{response_b}}\n{END_B}"
_JUDGED = f"\n\n{QUESTION}\n\n{PAIR}\n\n{PREFERRED}"
JUDGE = INSTRUCTION + _JUDGED
VILLAGE_JUDGE = VILLAGE_INSTRUCTION + _JUDGED

LABELS = ("A", "B")

# The fixed parts. Each is one token of the village's tokenizer, so that its sequences stay short.
MARKERS = (VILLAGE_INSTRUCTION, USER_QUESTION, START_A, END_A, START_B, END_B, PREFERRED)

TODAY = date(2024, 7, 26)  # the date that Llama 3's template falls back on
_DATES = "{%- macro strftime_now(format) -%}{{ dates[format] }}{%- endmacro +%}"
# Private-use characters stand for the three texts while a chat template is rendered around them.
SLOTS = {"prompt": "\ue000", "response_a": "\ue001", "response_b": "\ue002"}
_PLACEHOLDER = re.compile(r"\{(prompt|response_a|response_b)\}")


@dataclass(frozen=True)
class PromptPieces:
    """A prompt as fixed token lists around three gaps: start x after_prompt y_a between y_b end.

    With a ChatML template (\\n is a line break):

        stage 1
        start         <|im_start|>user\\n[User Question]\\n
        after_prompt  <|im_end|>\\n<|im_start|>assistant\\n[The Start of Assistant A's Answer]\\n
        between       \\n[The End of Assistant A's Answer]\\n\\n
                      [The Start of Assistant B's Answer]\\n
        end           \\n[The End of Assistant B's Answer]

        stage 2
        start         <|im_start|>user\\nDecide which ... A or B.\\n\\n[User Question]\\n
        after_prompt  \\n\\n[The Start of Assistant A's Answer]\\n
        between       as in stage 1
        end           \\n[The End of Assistant B's Answer]\\n\\n#Preferred:<|im_end|>\\n
                      <|im_start|>assistant\\n

    Only the gaps are ever truncated, so no marker and no verdict suffix can get lost.
    ``untrained`` counts the leading tokens of after_prompt that belong to the user's turn: stage 1
    trains on everything after them (the markers and the two responses).

    Pieces and texts are tokenised one by one. A tokenizer that would merge across their seams (a
    full stop with the line break after it, for example) splits there instead, alike in training and
    scoring.
    """

    start: list[int]
    after_prompt: list[int]
    between: list[int]
    end: list[int]
    untrained: int = 0

    @property
    def fixed_tokens(self) -> int:
        """Number of tokens that every example of this prompt spends besides x, y_a and y_b."""
        return len(self.start) + len(self.after_prompt) + len(self.between) + len(self.end)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` as it stands: no BOS or EOS is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read_template(path: Path) -> str:
    """A judge prompt from a UTF-8 file that holds {prompt}, {response_a} and {response_b}, once
    each, in this order.

    The text is taken as it stands, with its other braces and its white space. Only one line break
    at the very end is dropped, because editors put one there: a prompt that must end with a line
    break ends with two in the file. (Windows' line breaks are read as \\n, and a chat template may
    trim the whole.)

    Raises:
        UserError: no such file, not UTF-8, or a placeholder is missing, doubled or out of order.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give the file of a judge prompt"
        ) from None
    if any(slot in text for slot in SLOTS.values()):
        raise UserError(
            f"{path}: holds a private-use character (U+E000 to U+E002), which we need ourselves; "
            "take it out"
        )
    names = _PLACEHOLDER.findall(text)
    wrong = [
        f"{{{name}}} stands there {names.count(name)} times"
        for name in SLOTS
        if names.count(name) != 1
    ]
    if names != list(SLOTS):
        raise UserError(
            f"{path}: {' and '.join(wrong) or 'the placeholders are out of order'}; a judge prompt "
            "must hold {prompt}, {response_a} and {response_b}, each exactly once and in this order"
        )
    return text.removesuffix("\n")


def fill(template: str, **texts: str) -> str:
    """The template with a text for each placeholder; unlike in str.format other braces stay."""
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], template)


def pair_prompt(tokenizer) -> PromptPieces:
    """Stage 1: the question as the user's turn, the pair of responses as the assistant's turn."""
    before, after = split_at_slots(
        _user_turn(tokenizer, fill(QUESTION, **SLOTS), plain_end="\n\n"), ["prompt"]
    )
    marker, middle, end = split_at_slots(fill(PAIR, **SLOTS), ["response_a", "response_b"])
    user_tail = encode(tokenizer, after)
    return PromptPieces(
        start=with_bos(tokenizer, encode(tokenizer, before)),
        after_prompt=user_tail + encode(tokenizer, marker),
        between=encode(tokenizer, middle),
        end=encode(tokenizer, end),
        untrained=len(user_tail),
    )


def default_judge(tokenizer) -> str:
    """The judge prompt where none is given: VILLAGE_JUDGE for the village's tokenizer, which holds
    its instruction as one token, and JUDGE for all others.
    """
    village = tokenizer.convert_tokens_to_ids(VILLAGE_INSTRUCTION)
    return JUDGE if village in (None, tokenizer.unk_token_id) else VILLAGE_JUDGE


def judge_prompt(tokenizer, template: str | None = None) -> PromptPieces:
    """Stage 2 and scoring: the judge's question with both responses, up to the verdict."""
    template = template or default_judge(tokenizer)
    texts = _judge_texts(tokenizer, template)
    start, after_prompt, between, end = (encode(tokenizer, text) for text in texts)
    return PromptPieces(with_bos(tokenizer, start), after_prompt, between, end)


def label_tokens(tokenizer, template: str | None = None) -> tuple[int, int]:
    """Token ids of the verdicts A and B, exactly as they stand after the judge prompt.

    Whether that is "A" or " A" depends on the chat template, so it is read off the rendered prompt.
    Without a chat template it is "A" where the judge prompt ends in white space, else " A".

    Raises:
        UserError: if a label is not one token there (names what it splits into).
    """
    template = template or default_judge(tokenizer)
    suffix = _judge_texts(tokenizer, template)[-1]
    before = encode(tokenizer, suffix)
    ids = []
    for label in LABELS:
        text = _label_text(tokenizer, label, template)
        after = encode(tokenizer, suffix + text)
        if len(after) != len(before) + 1 or after[:-1] != before:
            split = tokenizer.convert_ids_to_tokens(encode(tokenizer, text))
            raise UserError(
                f"the label {text!r} is not one token after the judge prompt: this tokenizer "
                f"splits it into {split}; use a backbone whose tokenizer holds {text!r} as one "
                "token"
            )
        ids.append(after[-1])
    if ids[0] == ids[1]:
        raise UserError(
            "the labels A and B are the same token for this tokenizer; use another backbone"
        )
    return ids[0], ids[1]


def _judge_texts(tokenizer, template: str) -> list[str]:
    """The four texts around prompt and responses, the last one up to where the verdict stands."""
    return split_at_slots(_user_turn(tokenizer, fill(template, **SLOTS)), list(SLOTS))


def _user_turn(tokenizer, content: str, plain_end: str = "") -> str:
    """One user turn up to where the assistant's text begins.

    Thinking is switched off where there is a switch. What the template writes before each answer
    is written too (</think>, or <|channel|>final). A <think> that is open then is ended at once.

    ``plain_end`` ends the turn where there is no chat template. A space at its very end is left to
    the text that follows, because most tokenizers hold it with the word after it: " A" is one
    token.
    """
    if not tokenizer.chat_template:
        return (content + plain_end).removesuffix(" ")
    user = [{"role": "user", "content": content}]
    turn = render(tokenizer, user, add_generation_prompt=True)
    before = _before_answer(tokenizer, user)
    opening = before[len(turn) :] if before.startswith(turn) else ""
    if opening.strip():
        turn += opening.removesuffix(" ")
    return turn.rstrip() + "\n\n</think>\n\n" if turn.rstrip().endswith("<think>") else turn


def _before_answer(tokenizer, messages: list[dict]) -> str:
    """What the chat template writes before an answer to these messages."""
    slot = SLOTS["response_a"]
    answered = render(tokenizer, [*messages, {"role": "assistant", "content": slot}])
    return answered.rpartition(slot)[0]


def render(tokenizer, messages: list[dict], **options) -> str:
    """Messages as text by the tokenizer's own chat template.

    Some templates print today's date (Llama 3). For them it is always TODAY, or a run would be
    trained on one prompt, resumed on another and scored with a third.

    Raises:
        UserError: if the template fails.
    """
    options["enable_thinking"] = False
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            formats = re.findall(r"strftime_now\(\s*([\"'])(.*?)\1", template)
            options["dates"] = {form: TODAY.strftime(form) for _, form in formats}
            options["chat_template"] = _DATES + template
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program; whatever it raises, it cannot be used
        raise UserError(f"the chat template of this tokenizer fails: {last_line(error)}") from error


def _label_text(tokenizer, label: str, template: str) -> str:
    """The label with the white space, if any, that stands before the assistant's text."""
    if not tokenizer.chat_template:
        return label if template.endswith(("\n", "\t")) else f" {label}"
    turn = _user_turn(tokenizer, "x")
    before = _before_answer(tokenizer, [{"role": "user", "content": "x"}])
    return before[len(turn) :] + label if before.startswith(turn) else label


def with_bos(tokenizer, ids: list[int]) -> list[int]:
    """Begin with BOS where the tokenizer itself would, unless the chat template has written it."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or tokenizer("x")["input_ids"][:1] != [bos]:
        return ids
    return [bos, *ids]


def split_at_slots(text: str, slots: list[str]) -> list[str]:
    """The texts around the SLOTS of these names, which must stand in ``text`` once each and in this
    order.

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

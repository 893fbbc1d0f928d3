"""Every prompt of the project, written once, and what a tokenizer makes of it.

Two texts wrap a prompt x and its two responses y_a, y_b:

    stage 1   user: QUESTION     assistant: PAIR              (the pair is generated)
    stage 2   user: JUDGE        assistant: "A" or "B"        (the verdict is generated)

The markers are those of the official data (NiuTrans/GRAM, README.md, "Datasets"), so that files
in the official format can be read; the judge's instruction is our own wording.
"""

from __future__ import annotations

from dataclasses import dataclass

from gram_mini.errors import UserError

START_A, END_A = "[The Start of Assistant A's Answer]", "[The End of Assistant A's Answer]"
START_B, END_B = "[The Start of Assistant B's Answer]", "[The End of Assistant B's Answer]"
USER_QUESTION, PREFERRED = "[User Question]", "#Preferred:"

INSTRUCTION = (
    "Two assistants answered the question below. Decide which answer serves the user better: look for "
    "correct facts first, then for courtesy, then for keeping to the point. Neither the order of the "
    "answers nor their length is a reason to prefer one. Reply with a single letter, A or B."
)

QUESTION = f"{USER_QUESTION}\n{{prompt}}"
PAIR = f"{START_A}\n{{response_a}}\n{END_A}\n\n{START_B}\n{{response_b}}\n{END_B}"
JUDGE = f"{INSTRUCTION}\n\n{QUESTION}\n\n{PAIR}\n\n{PREFERRED}"

LABELS = ("A", "B")

# The fixed parts, as the embedded tokenizer knows them: one token each, so that its sequences stay short.
MARKERS = (INSTRUCTION, USER_QUESTION, START_A, END_A, START_B, END_B, PREFERRED)

# Private-use characters stand for the three texts while a chat template is rendered around them.
_SLOTS = {"prompt": "\ue000", "response_a": "\ue001", "response_b": "\ue002"}


@dataclass(frozen=True)
class PromptPieces:
    """A prompt as fixed token lists around three gaps: start x after_prompt y_a between y_b end.

    With a ChatML template (\\n is a line break):

        stage 1   start         <|im_start|>user\\n[User Question]\\n
                  after_prompt  <|im_end|>\\n<|im_start|>assistant\\n[The Start of Assistant A's Answer]\\n
                  between       \\n[The End of Assistant A's Answer]\\n\\n[The Start of Assistant B's Answer]\\n
                  end           \\n[The End of Assistant B's Answer]
        stage 2   start         <|im_start|>user\\nTwo assistants answered ... A or B.\\n\\n[User Question]\\n
                  after_prompt  \\n\\n[The Start of Assistant A's Answer]\\n
                  between       as above
                  end           \\n[The End of Assistant B's Answer]\\n\\n#Preferred:<|im_end|>\\n<|im_start|>assistant\\n

    Only the gaps are ever truncated, so no marker and no verdict suffix can get lost.
    ``untrained`` counts the leading tokens of after_prompt that belong to the user's turn: stage 1
    trains on everything after them (the markers and the two responses).

    Pieces and texts are tokenised one by one. A tokenizer that would merge across their seams (a full
    stop with the line break after it, say) splits there instead, alike in training and scoring.
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


def pair_prompt(tokenizer) -> PromptPieces:
    """Stage 1: the question as the user's turn, the pair of responses as the assistant's turn."""
    turn = _user_turn(tokenizer, QUESTION.format(prompt=_SLOTS["prompt"]))
    before, after = _split(turn, ["prompt"])
    marker, middle, end = _split(PAIR.format(**_SLOTS), ["response_a", "response_b"])
    user_tail = encode(tokenizer, after)
    return PromptPieces(
        start=_with_bos(tokenizer, encode(tokenizer, before)),
        after_prompt=user_tail + encode(tokenizer, marker),
        between=encode(tokenizer, middle),
        end=encode(tokenizer, end),
        untrained=len(user_tail),
    )


def judge_prompt(tokenizer) -> PromptPieces:
    """Stage 2 and scoring: the judge's question with both responses, up to where the verdict stands."""
    turn = _user_turn(tokenizer, JUDGE.format(**_SLOTS))
    start, *others = (encode(tokenizer, text) for text in _split(turn, list(_SLOTS)))
    return PromptPieces(_with_bos(tokenizer, start), *others)


def label_tokens(tokenizer) -> tuple[int, int]:
    """Token ids of the verdicts A and B, exactly as they stand after the judge prompt.

    Whether that is "A" or " A" depends on the chat template, so it is read off the rendered prompt.

    Raises:
        UserError: if a label is not one token there (names what it splits into).
    """
    suffix = _split(_user_turn(tokenizer, JUDGE.format(**_SLOTS)), list(_SLOTS))[-1]
    before = encode(tokenizer, suffix)
    ids = []
    for label in LABELS:
        text = _label_text(tokenizer, label)
        after = encode(tokenizer, suffix + text)
        if len(after) != len(before) + 1 or after[:-1] != before:
            split = tokenizer.convert_ids_to_tokens(encode(tokenizer, text))
            raise UserError(
                f"the label {text!r} is not one token after the judge prompt: this tokenizer splits it into "
                f"{split}; use a backbone whose tokenizer holds {text!r} as one token"
            )
        ids.append(after[-1])
    if ids[0] == ids[1]:
        raise UserError("the labels A and B are the same token for this tokenizer; use another backbone")
    return ids[0], ids[1]


def _user_turn(tokenizer, content: str) -> str:
    """One user turn up to where the assistant's text begins; thinking is switched off where there is a switch."""
    if not tokenizer.chat_template:
        return content if content.endswith(PREFERRED) else content + "\n\n"
    return _render(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True)


def _render(tokenizer, messages: list[dict], **options) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
    except Exception as error:  # a template is a program of its author's; whatever it raises, it cannot be used
        raise UserError(f"the chat template of this tokenizer fails: {str(error).splitlines()[0]}") from None


def _label_text(tokenizer, label: str) -> str:
    """The label with the white space, if any, that this chat template puts before the assistant's text."""
    if not tokenizer.chat_template:
        return f" {label}"
    turn = _user_turn(tokenizer, "x")
    slot = _SLOTS["response_a"]
    answered = _render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": slot}])
    before = answered.split(slot)[0]
    return before[len(turn) :] + label if before.startswith(turn) else label


def _with_bos(tokenizer, ids: list[int]) -> list[int]:
    """Begin with BOS where the tokenizer itself would, unless the chat template has written it already."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or tokenizer("x")["input_ids"][:1] != [bos]:
        return ids
    return [bos, *ids]


def _split(text: str, slots: list[str]) -> list[str]:
    parts = []
    for name in slots:
        if text.count(_SLOTS[name]) != 1:
            raise UserError("the chat template of this tokenizer does not show the user's text exactly once")
        part, text = text.split(_SLOTS[name])
        parts.append(part)
    return [*parts, text]

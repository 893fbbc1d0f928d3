"""Every prompt of the project, written once, and its tokens.

Two texts wrap a prompt x and its two responses y_a, y_b:

    stage 1   user: QUESTION     assistant: PAIR              (the pair is generated)
    stage 2   user: JUDGE        assistant: "A" or "B"        (the verdict is generated)

The markers are those of the official data (NiuTrans/GRAM, README.md, "Datasets"), so files in the
official format can be read. The judge's instruction is our own wording: a general one, and one for
the village, whose language model knows no other. A template with the same three placeholders can
take its place, such as that of a released checkpoint (gram_mini/reading/template.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gram_mini.chat import SLOTS, encode, encode_beginning, split_at_slots, up_to_answer
from gram_mini.errors import UserError

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

PLACEHOLDER = re.compile(r"\{(prompt|response_a|response_b)\}")


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

    Only the texts in the gaps are ever cut, so no marker gets lost. ``ignored`` counts the tokens
    of after_prompt up to where the assistant's text begins; stage 1 ignores them and trains on
    everything after them (the markers and the two responses).

    Pieces and texts are tokenised one by one, in training and in scoring alike. So no token reaches
    across a seam, such as one of a full stop and the line break after it.
    """

    start: list[int]
    after_prompt: list[int]
    between: list[int]
    end: list[int]
    ignored: int = 0

    @property
    def tokens(self) -> list[int]:
        """The tokens that every sequence of this prompt holds besides x, y_a and y_b."""
        return [*self.start, *self.after_prompt, *self.between, *self.end]

    @property
    def fixed_tokens(self) -> int:
        """The number of these tokens."""
        return len(self.tokens)


def fill(template: str, **texts: str) -> str:
    """The template with a text for each placeholder. Unlike in str.format, other braces stay."""
    return PLACEHOLDER.sub(lambda match: texts[match[1]], template)


def pair_prompt(tokenizer) -> PromptPieces:
    """Stage 1: the question as the user's turn, the pair of responses as the assistant's turn."""
    turn, _ = up_to_answer(tokenizer, fill(QUESTION, **SLOTS), plain_end="\n\n")
    before, after = split_at_slots(turn, ["prompt"])
    marker, middle, end = split_at_slots(fill(PAIR, **SLOTS), ["response_a", "response_b"])
    before_pair = encode(tokenizer, after)
    return PromptPieces(
        start=encode_beginning(tokenizer, before),
        after_prompt=before_pair + encode(tokenizer, marker),
        between=encode(tokenizer, middle),
        end=encode(tokenizer, end),
        ignored=len(before_pair),
    )


def default_judge(tokenizer) -> str:
    """The judge prompt if none is given: VILLAGE_JUDGE for the village's tokenizer, which holds its
    instruction as one token, and JUDGE for all others.
    """
    village = tokenizer.convert_tokens_to_ids(VILLAGE_INSTRUCTION)
    return JUDGE if village in (None, tokenizer.unk_token_id) else VILLAGE_JUDGE


def judge_prompt(tokenizer, template: str | None = None) -> PromptPieces:
    """Stage 2 and scoring: the judge's question with both responses, up to the verdict."""
    template = template or default_judge(tokenizer)
    (before, after, between, _), endings = _judge_texts(tokenizer, template)
    return PromptPieces(
        start=encode_beginning(tokenizer, before),
        after_prompt=encode(tokenizer, after),
        between=encode(tokenizer, between),
        end=encode(tokenizer, endings[0])[:-1],  # all but the label
    )


def label_tokens(tokenizer, template: str | None = None) -> tuple[int, int]:
    """Token ids of the verdicts A and B, exactly as they stand after the judge prompt.

    Whether that is "A" or " A" depends on the chat template, so the rendered prompt decides.
    Without a chat template it is "A" if the judge prompt ends in a line break, else " A".

    Raises:
        UserError: if a label is not one token there; names the tokens of the end.
    """
    template = template or default_judge(tokenizer)
    _, endings = _judge_texts(tokenizer, template)
    ids_a, ids_b = (encode(tokenizer, ending) for ending in endings)
    for label, ids in zip(LABELS, (ids_a, ids_b)):
        if tokenizer.decode(ids[-1:]).strip() != label or ids[:-1] != ids_a[:-1]:
            raise UserError(
                f"the label {label!r} is not one token after the judge prompt: this tokenizer ends "
                f"it with {tokenizer.convert_ids_to_tokens(ids)[-3:]}; use a backbone whose "
                "tokenizer holds it as one token"
            )
    return ids_a[-1], ids_b[-1]


def _judge_texts(tokenizer, template: str) -> tuple[list[str], list[str]]:
    """The four texts around prompt and responses, and the last one with either label after it."""
    turn, space = up_to_answer(tokenizer, fill(template, **SLOTS))
    texts = split_at_slots(turn, list(SLOTS))
    return texts, [texts[-1] + space + label for label in LABELS]

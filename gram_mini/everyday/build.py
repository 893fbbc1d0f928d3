"""Make the three files of the everyday data set, byte for byte the same each time.

    python -m gram_mini.everyday.build

facts.txt holds the questions: question | statement | right value | wrong value | wrong value.
phrases.py holds what answers are made of besides. An answer is a statement in a frame, or an
evasion, or a statement about something else. It has a polite or a rude phrase, and perhaps an
aside.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path

from gram_mini.everyday import phrases

FOLDER = Path(__file__).parent
WORD = re.compile(r"\w+|[^\w\s]")  # about what tokenizers make a token of
SIDES = ("response_a", "response_b")
COUNTS = {"unlabelled": 1600, "labelled": 800, "test": 400}
QUALITIES = ("fact", "relevance", "courtesy", "length")  # the weightiest first
DECIDED_BY = {"fact": 0.4, "relevance": 0.2, "courtesy": 0.2, "length": 0.2}  # labelled and test
KINDS = {"right": 0.7, "wrong": 0.15, "evades": 0.1, "elsewhere": 0.05}  # where kinds are free
GOOD = 0.7  # share of polite answers, and of those to the point, in the unlabelled pairs


# ---- the rule ------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What an answer is like; its words are drawn after that."""

    kind: str  # "right", "wrong", "evades", or "elsewhere": a true statement about something else
    polite: bool
    brief: bool  # without an aside


def goodness(answer: Answer) -> tuple[bool, ...]:
    """The rule: of two answers the one with the greater tuple is better, in the order of QUALITIES.

    Correct beats wrong, and an answer is correct if it says nothing false. Then answering beats not
    answering. Then polite beats rude. Then to the point beats rambling.
    """
    return answer.kind != "wrong", answer.kind in ("right", "wrong"), answer.polite, answer.brief


def differing(a: Answer, b: Answer) -> list[str]:
    """The qualities in which two answers differ; the first of them decides."""
    return [name for name, x, y in zip(QUALITIES, goodness(a), goodness(b)) if x != y]


# ---- questions -----------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    topic: str
    text: str
    statement: str  # with {} for the value
    values: tuple[str, ...]  # the right one first


@cache
def read_questions() -> list[Question]:
    """The questions of facts.txt, topic by topic."""
    questions, topic = [], ""
    for line in (FOLDER / "facts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            topic = line[2:]
        elif line:
            text, statement, *values = line.split(" | ")
            questions.append(Question(topic, text, statement, tuple(values)))
    return questions


def questions_of(split: str) -> list[Question]:
    """The questions of a split.

    Every second topic has labels. A third of its questions is kept for the test; the test also asks
    about the other topics. The unlabelled pairs are about everything.
    """
    questions = read_questions()
    if split == "unlabelled":
        return questions
    kept = [q for q in questions if has_labels(q.topic)][::3]
    if split == "labelled":
        return [q for q in questions if has_labels(q.topic) and q not in kept]
    return kept + [q for q in questions if not has_labels(q.topic)]


@cache
def has_labels(topic: str) -> bool:
    """Whether labels are given on a topic: on the first, the third, and so on."""
    return list(dict.fromkeys(q.topic for q in read_questions())).index(topic) % 2 == 0


# ---- answers -------------------------------------------------------------------------


def draw_answer(rng: random.Random, good: float = 0.5) -> Answer:
    """An answer of any kind, polite and to the point with probability ``good`` each."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    return Answer(kind, rng.random() < good, rng.random() < good)


def draw_pair(rng: random.Random, decided_by: str) -> tuple[Answer, Answer]:
    """A better and a worse answer; what weighs less than ``decided_by`` is drawn freely."""
    while True:
        a, b = draw_answer(rng), draw_answer(rng)
        if goodness(a) > goodness(b) and differing(a, b)[0] == decided_by:
            return a, b


def write(
    rng: random.Random, answer: Answer, question: Question, wrong: str, others: list[Question]
) -> str:
    """The words of an answer.

    Args:
        answer: what it is like.
        question: what it answers.
        wrong: the value that it claims if it is wrong.
        others: questions that an answer may talk about instead.
    """
    frame, claim = rng.choice(phrases.FRAMES), question
    value = wrong if answer.kind == "wrong" else question.values[0]
    if answer.kind == "elsewhere":
        claim = rng.choice(others)
        value = claim.values[0]
        frame = rng.choice([frame for frame in phrases.FRAMES if "{S}" in frame])
    statement = claim.statement.format(value)
    words = [frame.format(S=capital(statement), v=value, V=capital(value))]
    if answer.kind == "evades":
        words = [rng.choice(phrases.EVASIONS)]
    if not answer.brief:
        words.insert(rng.randrange(2), rng.choice(phrases.ASIDES))
    if rng.random() < 0.5:
        openers = phrases.POLITE_OPENERS if answer.polite else phrases.RUDE_OPENERS
        return " ".join([rng.choice(openers), *words])
    closers = phrases.POLITE_CLOSERS if answer.polite else phrases.RUDE_CLOSERS
    return " ".join([*words, rng.choice(closers)])


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


# ---- files ---------------------------------------------------------------------------


def qualities_of(rng: random.Random, split: str) -> Iterator[tuple[Answer, Answer]]:
    """What the answers of each pair of a split are like; where one is better, it is the first."""
    if split == "unlabelled":
        while True:
            a, b = draw_answer(rng, GOOD), draw_answer(rng, GOOD)
            yield (a, b) if goodness(a) >= goodness(b) else (b, a)
    for decided_by, share in DECIDED_BY.items():
        for _ in range(round(share * COUNTS[split])):
            yield draw_pair(rng, decided_by)


def in_turn(rng: random.Random, questions: list[Question], count: int) -> list[Question]:
    """``count`` questions in random order, each about equally often."""
    shuffled = rng.sample(questions, len(questions))
    return rng.sample(list(islice(cycle(shuffled), count)), count)


def asked(rng: random.Random, split: str) -> list[Question]:
    """The question of each pair; in the test every second one is of a topic with labels."""
    questions, count = questions_of(split), COUNTS[split]
    if split != "test":
        return in_turn(rng, questions, count)
    labelled = in_turn(rng, [q for q in questions if has_labels(q.topic)], count // 2)
    unlabelled = in_turn(rng, [q for q in questions if not has_labels(q.topic)], count // 2)
    return [question for both in zip(labelled, unlabelled) for question in both]


def elsewhere(question: Question, questions: list[Question]) -> list[Question]:
    """Other questions of the same topic whose true statement names no value of this one."""
    others = []
    for other in questions:
        statement = other.statement.format(other.values[0]).lower()
        named = any(value.lower() in statement for value in question.values)
        if other.topic == question.topic and other != question and not named:
            others.append(other)
    return others


def is_longer(a: str, b: str) -> bool:
    """Whether text a has more characters than text b, and more words and marks."""
    return len(a) > len(b) and len(WORD.findall(a)) > len(WORD.findall(b))


def build(split: str, taken: frozenset[str] = frozenset()) -> list[dict]:
    """The rows of a split; no response is one of ``taken``.

    The longer answer is the better one in every second couple of pairs, and the better one is
    response_a in four pairs of every eight. So neither length nor place tells which is better.
    """
    rng, rows, questions = random.Random(f"everyday/{split}"), [], questions_of(split)
    for i, (question, pair) in enumerate(zip(asked(rng, split), qualities_of(rng, split))):
        others, wrong = elsewhere(question, questions), rng.choice(question.values[1:])
        longer, first = i // 2 % 2 == 0, i // 4 % 2 == 0
        while True:  # until the words have the length that is wanted
            better, worse = (write(rng, answer, question, wrong, others) for answer in pair)
            right_size = is_longer(better, worse) if longer else is_longer(worse, better)
            if right_size and better not in taken and worse not in taken:
                break
        a, b = (better, worse) if first else (worse, better)
        row: dict = {"prompt": question.text, "response_a": a, "response_b": b}
        if split != "unlabelled":
            row["label"] = "A" if first else "B"
        if split == "test":
            more = {"topic": question.topic, "labelled_topic": has_labels(question.topic)}
            row |= more | {"differs": differing(*pair)}
        rows.append(row)
    return rng.sample(rows, len(rows))


def files() -> dict[str, str]:
    """The name and the content of each file."""
    rows = {split: build(split) for split in ("unlabelled", "labelled")}
    seen = {row[side] for split in rows for row in rows[split] for side in SIDES}
    rows["test"] = build("test", frozenset(seen))
    compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
    return {
        f"{split}.jsonl": "".join(compact.encode(row) + "\n" for row in rows[split])
        for split in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gram_mini.everyday.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: this wing)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (out / name).write_bytes(text.encode())
        print(f"{out / name}: {len(text.splitlines())} pairs")


if __name__ == "__main__":
    main()

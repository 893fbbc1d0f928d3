"""Make the three files of the help desk, byte for byte the same each time.

    python -m gram_mini.helpdesk.build

facts.txt holds the questions: question | statement | right value | wrong value | wrong value.
phrases.txt holds what answers are made of besides. An answer is a statement in a frame, or an
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
from itertools import cycle, islice
from pathlib import Path

FOLDER = Path(__file__).parent
# A and B stand next to the responses, where the official markers are a dozen tokens each.
JUDGE_TEMPLATE = FOLDER / "judge.txt"
WORD = re.compile(r"\w+|[^\w\s]")  # about what tokenizers make a token of
SIDES = ("response_a", "response_b")
COUNTS = {"unlabelled": 2400, "labelled": 600, "test": 480}
OF_LABELLED = COUNTS["test"] // 4  # of the test pairs are about topics with labels
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

    An answer is correct if it says nothing false.
    """
    return answer.kind != "wrong", answer.kind in ("right", "wrong"), answer.polite, answer.brief


def differing(a: Answer, b: Answer) -> list[str]:
    """The qualities in which two answers differ; the first of them decides."""
    return [name for name, x, y in zip(QUALITIES, goodness(a), goodness(b)) if x != y]


# ---- questions and phrases -----------------------------------------------------------


def sections(file: str) -> dict[str, list[str]]:
    """The lines under each heading ("# cooking") of a file; a note may stand before the first."""
    found, text = {}, (FOLDER / file).read_text(encoding="utf-8")
    for section in f"\n{text}".split("\n# ")[1:]:
        heading, *lines = section.splitlines()
        found[heading] = [line for line in lines if line]
    return found


@dataclass(frozen=True)
class Question:
    topic: str
    has_labels: bool  # whether labels are given on the topic
    text: str
    statement: str  # with {} for the value
    values: list[str]  # the right one first


def read_questions() -> list[Question]:
    """The questions of facts.txt. Labels are given on every second topic."""
    questions = []
    for place, (topic, lines) in enumerate(sections("facts.txt").items()):
        for line in lines:
            text, statement, *values = line.split(" | ")
            questions.append(Question(topic, place % 2 == 0, text, statement, values))
    return questions


QUESTIONS = read_questions()
PHRASES = sections("phrases.txt")


def questions_of(split: str) -> list[Question]:
    """The questions of a split.

    Of the topics with labels a third is kept for the test, which also asks about the other topics.
    The unlabelled pairs are about everything.
    """
    if split == "unlabelled":
        return QUESTIONS
    of_labelled = [q for q in QUESTIONS if q.has_labels]
    if split == "labelled":
        return [q for i, q in enumerate(of_labelled) if i % 3]
    return of_labelled[::3] + [q for q in QUESTIONS if not q.has_labels]


# ---- answers -------------------------------------------------------------------------


def draw_answer(rng: random.Random, good: float = 0.5) -> Answer:
    """An answer of any kind, polite and to the point with probability ``good`` each."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    return Answer(kind, rng.random() < good, rng.random() < good)


def draw_qualities(rng: random.Random, split: str) -> Iterator[tuple[Answer, Answer]]:
    """What the answers of each pair of a split are like; where one is better, it is the first."""
    if split == "unlabelled":
        while True:
            a, b = draw_answer(rng, GOOD), draw_answer(rng, GOOD)
            yield (a, b) if goodness(a) >= goodness(b) else (b, a)
    for decided_by, share in DECIDED_BY.items():
        left = round(share * COUNTS[split])
        while left:  # what weighs less than ``decided_by`` is drawn freely
            a, b = draw_answer(rng), draw_answer(rng)
            if goodness(a) > goodness(b) and differing(a, b)[0] == decided_by:
                left -= 1
                yield a, b


def write(
    rng: random.Random, answer: Answer, question: Question, wrong: str, others: list[Question]
) -> str:
    """The words of an answer; ``wrong`` is what it claims if it is wrong, and ``others`` are the
    questions that it may talk about instead.
    """
    frame, claim = rng.choice(PHRASES["frames"]), question
    value = wrong if answer.kind == "wrong" else question.values[0]
    if answer.kind == "elsewhere":
        claim = rng.choice(others)
        value = claim.values[0]
        frame = rng.choice([frame for frame in PHRASES["frames"] if "{S}" in frame])
    statement = claim.statement.format(value)
    words = [frame.format(S=capital(statement), v=value, V=capital(value))]
    if answer.kind == "evades":
        words = [rng.choice(PHRASES["evasions"])]
    if not answer.brief:
        words.insert(rng.randrange(2), rng.choice(PHRASES["asides"]))
    manner = "polite" if answer.polite else "rude"
    if rng.random() < 0.5:
        words.insert(0, rng.choice(PHRASES[f"{manner} openers"]))
    else:
        words.append(rng.choice(PHRASES[f"{manner} closers"]))
    return " ".join(words)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def elsewhere(question: Question, questions: list[Question]) -> list[Question]:
    """Other questions of the same topic whose true statement names no value of this one."""
    named = lambda text: any(value.lower() in text.lower() for value in question.values)
    same_topic = [q for q in questions if q.topic == question.topic]
    return [q for q in same_topic if not named(q.statement.format(q.values[0]))]


# ---- files ---------------------------------------------------------------------------


def in_turn(rng: random.Random, questions: list[Question], count: int) -> list[Question]:
    """``count`` questions in random order, each about equally often."""
    shuffled = rng.sample(questions, len(questions))
    return rng.sample(list(islice(cycle(shuffled), count)), count)


def asked(rng: random.Random, split: str) -> list[Question]:
    """The question of each pair; of the test pairs every fourth group of eight is about a topic
    with labels. (build() needs whole groups of eight to balance length and place.)
    """
    questions, count = questions_of(split), COUNTS[split]
    if split != "test":
        return in_turn(rng, questions, count)
    of_labelled = iter(in_turn(rng, [q for q in questions if q.has_labels], OF_LABELLED))
    others = iter(in_turn(rng, [q for q in questions if not q.has_labels], count - OF_LABELLED))
    return [next(others if i // 8 % 4 else of_labelled) for i in range(count)]


def is_longer(a: str, b: str) -> bool:
    """Whether text a has more characters than text b, and more words and marks."""
    return len(a) > len(b) and len(WORD.findall(a)) > len(WORD.findall(b))


def build(split: str, taken: set[str]) -> list[dict]:
    """The rows of a split; no response is one of ``taken``.

    The longer answer is the better one in every second couple of pairs, and the better one is
    response_a in four pairs of every eight. So neither length nor place tells which is better.
    """
    rng, rows, questions = random.Random(f"help desk/{split}"), [], questions_of(split)
    mentioned = QUESTIONS if split == "test" else questions  # too few of a topic are in the test
    for i, (question, pair) in enumerate(zip(asked(rng, split), draw_qualities(rng, split))):
        others, wrong = elsewhere(question, mentioned), rng.choice(question.values[1:])
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
            row |= {"topic": question.topic, "labelled_topic": question.has_labels}
            row["differs"] = differing(*pair)
        rows.append(row)
    return rng.sample(rows, len(rows))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
    seen: set[str] = set()
    for split in COUNTS:  # the test comes last
        rows = build(split, taken=seen if split == "test" else set())
        seen |= {row[side] for row in rows for side in SIDES}
        path = FOLDER / f"{split}.jsonl"
        path.write_bytes("".join(compact.encode(row) + "\n" for row in rows).encode())
        print(f"{path}: {len(rows)} pairs")


if __name__ == "__main__":
    main()

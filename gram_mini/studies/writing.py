"""A policy that writes: the village's language model against each judge (village/writer.py).

The judge "true reward" knows the truth. A judge and a seed take a minute or two on one core, after
the training of the judge. GRPO needs TRL: pip install trl.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

from gram_mini.pairs import Pair
from gram_mini.serving.trl import as_trl_reward
from gram_mini.studies.figures import average
from gram_mini.studies.lab import JOINT, LIKELIHOOD, MAIN, TEST, Lab, read_json, write_json
from gram_mini.village import question, statement
from gram_mini.village.pairs import topics
from gram_mini.village.policy import best_of_n, best_of_n_kl
from gram_mini.village.writer import (
    NO_ANSWER,
    TOPICS,
    TrueJudge,
    Writer,
    answered,
    require_trl,
    rewards,
    train_start,
    train_writer,
    true_reward,
)

import torch
from tqdm import tqdm

TRUTH = "true reward"
JUDGES = (*MAIN, TRUTH)
JUDGES_OF = {"rl": JUDGES, "weak": ("D from stage 1", "GRAM", LIKELIHOOD, JOINT), "bon": JUDGES}
TRAINED = {"rl": (0.2, 60), "weak": (0.05, 100)}  # weight of the penalty on the KL, steps of GRPO
EACH = 4  # texts for each of the 80 questions when the policy in training is measured
TEMPERATURE = 1.5  # of best of n: a third of the texts are no answers
DRAWN = 1024  # texts for each question of best of n
ASKED = 6  # questions of best of n
# Nats at which policies of different judges are compared: under the full penalty, and a quarter.
AT_KL = {kl: f"at a KL of {kl}" for kl in (0.5, 1.0)}


def rl(lab: Lab, seed: int):
    """Ours: a language model trained with TRL against the judge, over the KL to its start."""
    yield from rows_of("rl", lab, seed)


def weak(lab: Lab, seed: int):
    """Ours: writing-rl with a quarter of the penalty on the KL, and more steps."""
    yield from rows_of("weak", lab, seed)


def bon(lab: Lab, seed: int):
    """Ours: best of n = 1 to 1,024 answers of the start, hot enough to write nonsense too."""
    yield from rows_of("bon", lab, seed)


def rows_of(kind: str, lab: Lab, seed: int):
    if kind in TRAINED:
        require_trl()
    for name in JUDGES_OF[kind]:
        yield from against(kind, name, lab, seed)["rows"]


def against(kind: str, name: str, lab: Lab, seed: int) -> dict:
    """The rows of one judge, what it made the policy say in the end, and the seconds it took."""

    def make() -> dict:
        began = time.perf_counter()
        judge = TrueJudge() if name == TRUTH else lab.judge_of(name, seed)
        if kind == "bon":
            rows, answers = best_of(judge, name, drawn_texts(lab, seed))
        else:
            rows, answers = trained(judge, start_of(lab, seed), seed, *TRAINED[kind])
        rows = [{"method": name, **row} for row in rows]
        seconds = round(time.perf_counter() - began)
        return {"rows": rows, "answers": answers, "seconds": seconds}

    return lab.keep(lab.folder / f"seed{seed}" / f"writing-{kind}-{name}.json", make)


def start_of(lab: Lab, seed: int) -> Writer:
    """The policy at its start, trained unless it is there already."""
    folder = lab.folder / f"seed{seed}" / "start-policy"
    with lab.alone(folder):
        if not folder.is_dir():
            partial_folder = folder.with_name("start-policy.partial")
            train_start(lab.pairs("unlabelled", seed), partial_folder, seed)
            partial_folder.rename(folder)
    return Writer(folder)


def trained(judge, writer: Writer, seed: int, beta: float, steps: int) -> tuple[list, dict]:
    """The rows of a policy trained against a judge, and its last answer to each question."""
    torch.manual_seed(seed)
    reward = as_trl_reward(judge)
    prompts = [question(*topic) for topic in topics(TEST)]
    references = writer.write(prompts, temperature=0).texts
    rows, answers = [], {}

    def measure(step: int) -> None:
        asked = prompts * EACH
        drawn = writer.write(asked)
        true = [true_reward(*answer) for answer in zip(asked, drawn.texts)]
        judged = reward(asked, drawn.texts, reference=references * EACH)
        rows.append(
            {
                "step": step,
                "KL": writer.kl(drawn),
                "judge's reward": statistics.mean(judged),
                "true reward": statistics.mean(true),
                "no answer": statistics.mean(x == NO_ANSWER for x in true),
                "tokens": statistics.mean(drawn.lengths),
            }
        )
        for prompt, *said in zip(prompts, drawn.texts, true, judged):
            answers[prompt] = dict(zip(("answer", "true reward", "judge's reward"), said))

    train_writer(writer, reward, prompts, references, seed, measure, steps, beta=beta)
    return rows, answers


def best_of(judge, name: str, drawn: dict[str, dict]) -> tuple[list, dict]:
    """The rows of best of n by a judge, and the best of all answers to each question.

    The score is the judge's log-odds against the start's likeliest answer.
    """
    pairs = [
        Pair(prompt, text, of["reference"])
        for prompt, of in drawn.items()
        for text in dict.fromkeys(of["texts"])
    ]
    results = judge.compare_many(pairs, progress=name)
    scores = {
        (pair.prompt, pair.response_a): (result.log_odds_first + result.log_odds_second) / 2
        for pair, result in zip(pairs, results)
    }
    rows, answers, judged = [], {}, []
    for prompt, of in drawn.items():
        texts, true = of["texts"], [true_reward(prompt, text) for text in of["texts"]]
        judged.append(([scores[prompt, text] for text in texts], true))
        best = max(texts, key=lambda text: scores[prompt, text])
        of_best = {"true reward": true_reward(prompt, best), "judge's score": scores[prompt, best]}
        answers[prompt] = {"answer": best, **of_best}
    for n in (2**k for k in range(11)):
        means: dict[str, list[float]] = defaultdict(list)
        for of_texts, true in judged:
            order = list(range(len(true)))
            score, mean = best_of_n(of_texts, true, order, n)
            _, nothing = best_of_n(of_texts, [float(x == NO_ANSWER) for x in true], order, n)
            means["true reward"].append(mean)
            means["no answer"].append(nothing)
            means["judge's score"].append(score)
        figures = {figure: statistics.mean(values) for figure, values in means.items()}
        rows.append({"n": n, "KL": best_of_n_kl(n), **figures})
    return rows, answers


def drawn_texts(lab: Lab, seed: int) -> dict[str, dict]:
    """What the start writes to ASKED questions: DRAWN texts each, and the likeliest one."""

    def make() -> dict:
        writer = start_of(lab, seed)
        chosen = random.Random(f"writing/{seed}").sample(topics(TEST), ASKED)
        prompts = [question(*topic) for topic in chosen]
        torch.manual_seed(seed)
        return {
            prompt: {
                "reference": writer.write([prompt], temperature=0).texts[0],
                "texts": writer.write([prompt] * DRAWN, TEMPERATURE).texts,
            }
            for prompt in tqdm(prompts, desc="texts")
        }

    return lab.keep(lab.folder / f"seed{seed}" / "drawn.json", make)


def write_answers(name: str, lab: Lab, seed: int, kept: set[int], results: Path) -> None:
    """Add what was said in the end of a seed, and its summary, to those of the seeds ``kept``.

    ``name`` is that of the study, such as "writing-rl".
    """
    kind = name.removeprefix("writing-")
    files = [results / f"{name}-{part}.json" for part in ("answers", "summary")]
    answers, before = map(read_json, files) if kept else ({}, {"rows": []})
    rows = [row for row in before["rows"] if row["seed"] in kept]
    answers = {j: {s: x for s, x in of.items() if int(s) in kept} for j, of in answers.items()}
    for judge in JUDGES_OF[kind]:
        made = against(kind, judge, lab, seed)
        answers.setdefault(judge, {})[str(seed)] = made["answers"]
        said = {prompt: row["answer"].strip() for prompt, row in made["answers"].items()}
        found = {**summary(made["rows"], said), "seconds": made["seconds"]}
        rows.append({"method": judge, "seed": seed, **found})
    rows.sort(key=lambda row: row["seed"])
    seconds: dict[str, list] = {}
    for row in rows:
        seconds.setdefault(row["method"], []).append(row["seconds"])
    write_json(files[0], answers)
    write_json(files[1], {"seconds": seconds, "means": average(rows, ("method",)), "rows": rows})


def summary(rows: list[dict], said: dict[str, str]) -> dict:
    """Of a judge and seed: where the true reward was highest, and what was said in the end.

    The highest of several figures lies a little above its true value by chance, with every judge.

    Args:
        rows: from little KL to much.
        said: the last answer to each question.
    """
    peak = max(rows, key=lambda row: row["true reward"])
    strays = [text for prompt, text in said.items() if answered().get(text, prompt) != prompt]
    true = [rewards(answered()[text])[text] > 1 for text in strays]  # 1.5 and more: right
    claims = Counter(  # such as "keeps a dog"
        (attribute, value)
        for prompt, text in said.items()
        for name, attribute in [TOPICS[prompt]]
        for value in attribute.values
        if statement(name, attribute, value) in text
    )
    commonest: dict = {}  # claim of each kind of question, and how often it was made
    for (attribute, _), count in claims.items():
        commonest[attribute] = max(count, commonest.get(attribute, 0))
    return {
        "first": rows[0]["true reward"],
        "highest": peak["true reward"],
        "KL of the highest": peak["KL"],
        **{name: at_kl(rows, kl) for kl, name in AT_KL.items()},
        "last": rows[-1]["true reward"],
        "KL of the last": rows[-1]["KL"],
        "commonest claims": sum(commonest.values()) / max(claims.total(), 1),
        "to another question": len(strays) / len(said),
        "of these true": statistics.mean(true) if strays else None,
    }


def at_kl(rows: list[dict], kl: float) -> float | None:
    """The true reward where the KL first reaches ``kl``, on the line between two rows; else None.

    After equally many steps one policy is further from its start than another, which alone changes
    the true reward. So judges are compared at equal KL, too.
    """
    for before, row in zip(rows, rows[1:]):
        if before["KL"] < kl <= row["KL"]:
            part = (kl - before["KL"]) / (row["KL"] - before["KL"])
            return before["true reward"] + part * (row["true reward"] - before["true reward"])
    return None

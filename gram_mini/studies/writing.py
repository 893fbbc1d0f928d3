"""A policy that writes: the village's language model against each judge (village/writer.py).

  rl    trained with TRL's GRPOTrainer: true reward and the judge's, over the KL to its start
  weak  the same with a quarter of the penalty on the KL, and more steps
  bon   best of n = 1 to 1,024 answers of the start at temperature 1.5, where it writes nonsense too

A judge and a seed are one task of a minute or two on one core, after the training of the
judge. What it made stays in --runs and is used again. The judge "true reward" knows the truth.
Needs TRL: pip install trl.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import partial, update_wrapper
from pathlib import Path

from gram_mini.errors import clear_errors
from gram_mini.pairs import Pair
from gram_mini.runs import options
from gram_mini.runs.output import check_place
from gram_mini.serving.trl import as_trl_reward
from gram_mini.studies.figures import average, table
from gram_mini.studies.lab import MAIN, TEST, Lab, VillagePairs, write_json
from gram_mini.studies.seeds import RESULTS, add_folders, add_seeds, run_seed, run_study
from gram_mini.village import GROUPS, VILLAGE, question, statement
from gram_mini.village.pairs import topics
from gram_mini.village.policy import best_of_n, best_of_n_kl
from gram_mini.village.writer import (
    NO_ANSWER,
    TOPICS,
    TrueJudge,
    Writer,
    answered,
    load_writer,
    require_trl,
    rewards,
    train_start,
    train_writer,
    true_reward,
)

import torch
from tqdm import tqdm

EXAMPLES = """\
  python -m gram_mini.studies.writing rl                            # every judge, seeds 1 to 5
  python -m gram_mini.studies.writing bon --judges GRAM --seeds 1   # one task"""

TRUTH = "true reward"
JUDGES = (*MAIN, TRUTH)
TEMPERATURE = 1.5  # of best of n: two texts in five are no answers
DRAWN = 1024  # texts for each question of best of n
ASKED = 6  # questions of best of n
TRAINED = {"rl": (0.2, 60), "weak": (0.05, 100)}  # weight of the penalty on the KL, steps of GRPO
EACH = 4  # texts for each of the 80 questions when the policy in training is measured


def judge_of(lab: Lab, name: str, seed: int):
    return TrueJudge() if name == TRUTH else lab.judge(lab.method(name, seed))


def start_of(lab: Lab, seed: int) -> Writer:
    """The policy at its start, trained unless it is there already."""
    folder = lab.folder / f"seed{seed}" / "start-policy"
    with lab.alone(folder):
        if not folder.is_dir():
            partial_folder = folder.with_name("start-policy.partial")
            train_start(lab.pairs("unlabelled", seed), partial_folder, seed)
            partial_folder.rename(folder)
    return load_writer(folder)


def rl_of(kind: str, name: str, lab: Lab, seed: int):
    """The policy trained against one judge; its last answers go to a file of their own."""
    judge = judge_of(lab, name, seed)
    writer = start_of(lab, seed)
    torch.manual_seed(seed)
    reward = as_trl_reward(judge)
    prompts = [question(*topic) for topic in topics(TEST)]
    references = writer.write(prompts, temperature=0).texts
    rows = []

    def measure(step: int) -> None:
        asked = prompts * EACH
        drawn = writer.write(asked)
        true = [true_reward(*answer) for answer in zip(asked, drawn.texts)]
        judged = reward(asked, drawn.texts, reference=references * EACH)
        rows.append(
            {
                "method": name,
                "step": step,
                "KL": writer.kl(drawn),
                "judge's reward": statistics.mean(judged),
                "true reward": statistics.mean(true),
                "no answer": statistics.mean(x == NO_ANSWER for x in true),
                "tokens": statistics.mean(drawn.lengths),
            }
        )
        columns = ("answer", "true reward", "judge's reward")
        said = dict(zip(prompts, zip(drawn.texts, true, judged)))  # the last ones stay
        keep_answers(lab, kind, name, seed, columns, said)

    beta, steps = TRAINED[kind]
    train_writer(writer, reward, prompts, references, seed, measure, steps, beta=beta)
    yield from rows


def answers_of(lab: Lab, kind: str, name: str, seed: int) -> Path:
    """The file of what a judge made the policy say in the end, an answer to each question."""
    return lab.folder / f"seed{seed}" / f"answers-{kind}-{name.replace(' ', '-')}.json"


def keep_answers(lab: Lab, kind: str, name: str, seed: int, columns, said: dict) -> None:
    """Write them; ``said`` has the values of ``columns`` for each question."""
    answers = {prompt: dict(zip(columns, row)) for prompt, row in said.items()}
    write_json(answers_of(lab, kind, name, seed), answers)


def bon_of(kind: str, name: str, lab: Lab, seed: int):
    """Best of n by one judge; the score is its log-odds against the start's likeliest answer."""
    judge = judge_of(lab, name, seed)
    drawn = drawn_texts(lab, seed)
    distinct = {prompt: list(dict.fromkeys(of["texts"])) for prompt, of in drawn.items()}
    pairs = [
        Pair(prompt, text, drawn[prompt]["reference"])
        for prompt, texts in distinct.items()
        for text in texts
    ]
    results = judge.compare_many(pairs, progress=name)
    scores = {
        (pair.prompt, pair.response_a): (result.log_odds_first + result.log_odds_second) / 2
        for pair, result in zip(pairs, results)
    }
    for n in (2**k for k in range(11)):
        means: dict[str, list[float]] = {}
        for prompt, of in drawn.items():
            texts = of["texts"]
            of_texts = [scores[prompt, text] for text in texts]
            true = [true_reward(prompt, text) for text in texts]
            nothing = [float(reward == NO_ANSWER) for reward in true]
            for figure, values in (("true reward", true), ("no answer", nothing)):
                score, mean = best_of_n(of_texts, values, list(range(len(texts))), n)
                means.setdefault(figure, []).append(mean)
            means.setdefault("judge's score", []).append(score)
        figures = {figure: statistics.mean(values) for figure, values in means.items()}
        yield {"method": name, "n": n, "KL": best_of_n_kl(n), **figures}
    said = {}
    for prompt, of in drawn.items():
        best = max(of["texts"], key=lambda text: scores[prompt, text])
        said[prompt] = (best, true_reward(prompt, best), scores[prompt, best])
    keep_answers(lab, kind, name, seed, ("answer", "true reward", "judge's score"), said)


def drawn_texts(lab: Lab, seed: int) -> dict[str, dict]:
    """What the start writes to ASKED questions: DRAWN texts each, and the likeliest one."""
    known = lab.folder / f"seed{seed}" / "drawn.json"
    writer = start_of(lab, seed)
    with lab.alone(known):
        if not known.is_file():
            chosen = random.Random(f"writing/{seed}").sample(topics(TEST), ASKED)
            prompts = [question(*topic) for topic in chosen]
            torch.manual_seed(seed)
            write_json(
                known,
                {
                    prompt: {
                        "reference": writer.write([prompt], temperature=0).texts[0],
                        "texts": writer.write([prompt] * DRAWN, TEMPERATURE).texts,
                    }
                    for prompt in tqdm(prompts, desc="texts")
                },
            )
    return json.loads(known.read_text())


PANELS = ("KL", "judge's reward", "true reward", "no answer")
KINDS = {  # name: (rows of one judge and seed, what tells rows apart, x of the figure, its panels)
    "rl": (rl_of, ("method", "step"), "step", PANELS),
    "weak": (rl_of, ("method", "step"), "step", PANELS),
    "bon": (bon_of, ("method", "n"), "KL", ("judge's score", "true reward", "no answer")),
}


def task_of(kind: str, *judges: str) -> str:
    """The name of a study with some judges; that with all of them is named after none."""
    named = () if judges == JUDGES else judges
    return "-".join(["writing", kind, *named]).replace(" ", "-")


def studies_of(kind: str, judges: Sequence[str] = JUDGES) -> dict[str, tuple]:
    """A study for each judge, and one of all of ``judges``, as seeds.run_study takes them.

    So a judge and a seed are one task, whose rows are a file of their own.
    """
    rows_of, keys, x, shown = KINDS[kind]

    def study(rows) -> tuple:
        return update_wrapper(rows, rows_of), keys, x, shown

    tasks = {task_of(kind, judge): study(partial(rows_of, kind, judge)) for judge in judges}

    def together(lab: Lab, seed: int):
        for task in tasks:
            yield from json.loads(run_seed(task, lab, seed, tasks).read_text())["rows"]

    return {task_of(kind, *judges): study(together), **tasks}


def summary(rows: list[dict], answers: dict) -> list[dict]:
    """Of each judge and seed where the true reward was highest, and what was said in the end.

    The highest of several figures is a little too high by chance, with every judge.

    Args:
        rows: those of a study, of each judge and seed from little KL to much.
        answers: what was said in the end, answers[judge][seed][question].
    """
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        runs.setdefault((row["method"], row["seed"]), []).append(row)
    found = []
    for (method, seed), run in runs.items():
        peak = max(run, key=lambda row: row["true reward"])
        said = {prompt: row["answer"].strip() for prompt, row in answers[method][seed].items()}
        strays = [text for prompt, text in said.items() if answered().get(text, prompt) != prompt]
        true = [rewards(answered()[text])[text] > 1 for text in strays]  # 1.5 and more: right
        claims = [  # of the others, such as "keeps a dog"
            (attribute, value)
            for prompt, text in said.items()
            for name, attribute in [TOPICS[prompt]]
            for value in attribute.values
            if statement(name, attribute, value) in text
        ]
        commonest: dict = {}  # claim of each kind of question, and how often it was made
        for (attribute, _), count in Counter(claims).items():
            commonest[attribute] = max(count, commonest.get(attribute, 0))
        labelled = [TOPICS[answered()[text]][0] in GROUPS["labelled"] for text in strays]
        found.append(
            {
                "method": method,
                "seed": seed,
                "first": run[0]["true reward"],
                "highest": peak["true reward"],
                "KL of the highest": peak["KL"],
                "last": run[-1]["true reward"],
                "fall": peak["true reward"] - run[-1]["true reward"],
                "KL of the last": run[-1]["KL"],
                "commonest claims": sum(commonest.values()) / max(len(claims), 1),
                "to another question": len(strays) / len(said),
                "of these true": statistics.mean(true) if strays else None,
                "of these about the labelled": statistics.mean(labelled) if strays else None,
            }
        )
    return found


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument("study", choices=tuple(KINDS), metavar="STUDY", help="one of the above")
    parser.add_argument(
        "--judges",
        choices=JUDGES,
        nargs="+",
        action=options.Distinct,
        default=JUDGES,
        metavar="JUDGE",
        help=f"of {', '.join(JUDGES)} (default: all); results of some are called after them",
    )
    add_seeds(parser, [1, 2, 3, 4, 5])
    add_folders(parser)
    options.add_model_options(parser, bits_default=4, max_length_default=512)
    args = parser.parse_args(argv)
    require_trl()
    check_place(args.runs, "--runs")
    results = args.results or RESULTS
    check_place(results, "--results")
    loading = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    lab = Lab(args.runs, VILLAGE, VillagePairs(), loading=loading)
    name = task_of(args.study, *args.judges)
    studies = studies_of(args.study, args.judges)
    run_study(name, lab, args.seeds, results, studies)
    seconds = {}  # that of all judges together only reads what they made
    for judge in args.judges:
        tasks = [run_seed(task_of(args.study, judge), lab, seed, studies) for seed in args.seeds]
        seconds[judge] = [json.loads(task.read_text())["seconds"] for task in tasks]
    answers = {
        judge: {
            seed: json.loads(answers_of(lab, args.study, judge, seed).read_text())
            for seed in args.seeds
        }
        for judge in args.judges
    }
    write_json(results / f"{name}-answers.json", answers)
    rows = json.loads((results / f"{name}.json").read_text())["rows"]
    found = summary(rows, answers)
    means = average(found, ("method",))
    print(table(means, ("method",)))
    write_json(
        results / f"{name}-summary.json", {"seconds": seconds, "means": means, "rows": found}
    )


if __name__ == "__main__":
    with clear_errors():
        main()

"""The tables of the pages, from the committed results of the studies. pages.py writes them.

A figure in a result is [mean, half of its 95% interval], with None for no interval, or
[value, lower end, upper end].
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence

from gram_mini.errors import UserError
from gram_mini.studies.figures import average, figure_text
from gram_mini.studies.helpdesk_table import OVER_PROMPTS, PARTS
from gram_mini.studies.paper import STUDIES
from gram_mini.studies.seeds import RESULTS
from gram_mini.studies.speed.memory import choices
from gram_mini.studies.writing import AT_KL
from gram_mini.village.writer import NO_ANSWER

# Figures that are not written with three decimals.
TWO_DECIMALS = (
    *("true reward", "highest", "last", *AT_KL.values(), "KL of the last", "own margin"),
    *("true reward of the first, GRAM", "true reward of the first, votes", "commonest claims"),
)
FORMATS = dict.fromkeys(TWO_DECIMALS, ".2f") | {"pairs": "g", "same verdict": "g"}
FORMATS |= {"comparisons": ",.0f", "log-odds apart, most": ".1g"}

REAL = ("± over prompts", "position gap", "calibration error")
# Figures that have another name in the heading of a column.
HEADINGS = {
    "in-distribution": "in distribution",
    "out-of-distribution": "out of distribution",
    "highest": "highest true reward",
    "last": "true reward after the last step",
    "KL of the last": "KL then",
    "commonest claims": "share of the commonest claims",
    "held out": "accuracy",
    **{f"held out, {name}": name for name in REAL},
    OVER_PROMPTS: "±",
}
DEMO = ("in distribution", "out of distribution", "fact only", "courtesy only", "length only")
CERTAIN = ("accuracy", "cross-entropy", "calibration error", "position gap", "own margin")
TABLE = ("in-distribution", "out-of-distribution", "fact only", "courtesy only", "length only")
AFTER = ("last", "KL of the last", "commonest claims")
WRITING = [("highest", at_kl, *AFTER) for at_kl in AT_KL.values()]
BESIDE_US = ("other way", "ours is faster by")
SHARES = {0.0: "none", 0.0625: "1/16", 0.25: "1/4", 0.5: "1/2", 1.0: "all 24,000"}


def tables() -> dict[str, str]:
    """Marker on a page -> the Markdown between it and its end."""
    cards = choices()
    return {
        "demo": listed("demo", *DEMO, means=["cross-entropy"]),
        "served": listed("served", "pairs", "log-odds apart, most", "same verdict"),
        "helpdesk": listed("helpdesk", *PARTS[:2], OVER_PROMPTS, *PARTS[2:]),
        "table": listed("table", *TABLE, means=("cross-entropy", "position gap")),
        "unlabelled": crossed("unlabelled", "share", SHARES, "out-of-distribution"),
        "adapt": crossed("adapt", "labels", (0, 200, 2000), "out-of-distribution"),
        "certain": certain(),
        "writing-rl": listed("writing-rl-summary", *WRITING[0]),
        "writing-weak": listed("writing-weak-summary", *WRITING[1]),
        "writing-exploits": exploits(),
        "writing-bon": crossed("writing-bon", "n", (1, 4, 16, 64, 256, 1024), "true reward"),
        "orders": listed("orders", *STUDIES["orders"].shown),
        "beside": listed("beside", *STUDIES["beside"].shown),
        "rewards": rewards(),
        "real-table": listed("real-table", "held out", means=[f"held out, {x}" for x in REAL]),
        "real-helpful": real_helpful(),
        "llmbar": benchmark("llmbar", "agreement", "Natural", "Adversarial", "total"),
        "rm-bench": benchmark("rm-bench, chat", "longer preferred", "hard", "normal", "easy"),
        "speed-choices": markdown(cards[0], cards[1:]),
        "speed-train": speed("train", "what", *BESIDE_US, "peak GiB, ours and other"),
    }


# ---- any table -----------------------------------------------------------------------


@functools.cache
def results(study: str) -> dict:
    """The committed results of a study.

    Raises:
        UserError: there are none of this name.
    """
    path = RESULTS / f"{study}.json"
    if not path.is_file():
        raise UserError(f"{study}: no committed results of this name; see {RESULTS}")
    return json.loads(path.read_text("utf-8"))


def select(rows: list[dict], **where: str) -> list[dict]:
    """The rows in which each key has the value, as str() writes it."""
    return [row for row in rows if all(str(row.get(key)) == where[key] for key in where)]


def methods(rows: list[dict]) -> list[str]:
    """The methods of some rows, in their order."""
    return list(dict.fromkeys(row["method"] for row in rows))


def mean(rows: list[dict], key: str) -> list:
    """[mean, half of the 95% interval] of a figure over rows of several seeds."""
    return average([{key: row[key]} for row in rows], ())[0][key]


def cell(row: dict, key: str) -> str:
    """A figure as it stands in a table; empty if the row has none."""
    return figure_text(row.get(key), FORMATS.get(key, ".3f"))


def center(row: dict, key: str) -> str:
    """A figure without its interval; empty if the row has none."""
    return cell({key: row[key][:1]}, key) if key in row else ""


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(line)} |" for line in [head, *lines])
    return "\n".join([first, "|---" * len(head) + "|", *rest])


def listed(study: str, *keys: str, means: Sequence[str] = (), **where: str) -> str:
    """A line for each row of the means, of those with these values; a column for each figure.

    Those in ``means`` stand without their intervals.
    """
    rows = select(results(study)["means"], **where)
    lines = (
        [row["method"], *(cell(row, key) for key in keys), *(center(row, key) for key in means)]
        for row in rows
    )
    return markdown(["method", *(HEADINGS.get(key, key) for key in (*keys, *means))], lines)


def benchmark(name: str, *keys: str) -> str:
    return listed("benchmarks", "accuracy", *keys, benchmark=name)


def crossed(study: str, across: str, values, key: str) -> str:
    """A line for each method, and one figure of it for each of ``values``: keys, or {key: heading}.

    Where the figures are not all of as many seeds, each says of how many.
    """
    rows = results(study)["rows"]
    groups = {
        method: [select(rows, method=method, **{across: str(value)}) for value in values]
        for method in methods(rows)
    }
    counts = {len(group) for line in groups.values() for group in line if group}
    lines = (
        [method, *(over_seeds(group, key, len(counts) > 1) for group in line)]
        for method, line in groups.items()
    )
    headings = values.values() if isinstance(values, dict) else [f"{value:,}" for value in values]
    return markdown([f"method, {across}", *headings], lines)


def speed(study: str, *columns: str) -> str:
    """These columns of a speed study, beside its settings if there are several."""
    records = results(f"speed-{study}")
    rows = [{"setting": name, **row} for name in records for row in records[name]["rows"]]
    shown = ["setting", *columns] if len(records) > 1 else columns
    return markdown(shown, ([row[column] for column in shown] for row in rows))


def over_seeds(rows: list[dict], key: str, counted: bool) -> str:
    """The mean over the seeds; ``counted`` says of how many, and gives intervals from three on."""
    if not (rows := [row for row in rows if key in row]):
        return ""
    figure = mean(rows, key)
    if not counted:
        return cell({key: figure}, key)
    return f"{cell({key: figure if len(rows) > 2 else figure[:1]}, key)} ({len(rows)})"


# ---- tables of one study -------------------------------------------------------------


def certain() -> str:
    """Each cell: without smoothing, with eps = 0.2."""
    means = results("certain")["means"]
    lines = []
    for method in methods(means):
        pair = select(means, method=method)
        lines.append([method, *(", ".join(center(row, key) for row in pair) for key in CERTAIN)])
    return markdown(["labels, epochs", *CERTAIN], lines)


def exploits() -> str:
    """Of the last answers that are none, the one that each of two judges likes best."""
    answers, lines = results("writing-weak-answers"), []
    for judge in ("GRAM", "D from stage 1"):
        found = [
            (said["judge's reward"], seed, question, said["answer"])
            for seed, of_seed in answers[judge].items()
            for question, said in of_seed.items()
            if said["true reward"] == NO_ANSWER
        ]
        reward, seed, question, answer = max(found)
        lines.append([f"{judge}, seed {seed}", question, answer, f"{reward:.2f}"])
    return markdown(["judge", "question", "answer of the policy", "judge's reward"], lines)


COSTS = {  # comparisons of n responses
    "first": "n - 1",
    "reference": "n",
    "knock-out": "n - 1",
    "circle": "n",
    "part of all": "n log2(n) / 2",
    "Swiss": "n log2(n) / 2",
    "all": "n (n - 1) / 2",
}


def rewards() -> str:
    """Ways from pairs to rewards: how well they order n responses, and at what cost."""
    means = results("rewards")["means"]
    lines = []
    for way, cost in COSTS.items():
        row = select(means, method=way, n="64")[0]
        agreement = [center(row, f"agreement, {rater}") for rater in ("GRAM", "votes")]
        lines.append([way, cost, *agreement])
    return markdown(["way", "comparisons", "GRAM", "votes"], lines)


def real_helpful() -> str:
    """Judges that were trained on the helpful labels, on each test."""
    record = results("real-labels")
    tests = ("held out", "pandalm", "open-instruct", "llmbar natural")
    longer = record["longer"] | {"held out": record["longer"]["held out"]["helpful"]}
    lines = [["pick the longer", *(f"{longer[test]:.3f}" for test in tests)]]
    rows = select(record["rows"], labels="helpful")
    (untrained,) = select(rows, method="zero-shot")
    lines += [["zero-shot", *(f"{untrained[test]:.3f}" for test in tests)]]
    trained = [row for row in rows if row["session"] > 1]  # session 1 had other rates
    for method in methods(trained):
        of = select(trained, method=method)
        lines.append([method, *(over_seeds(of, test, counted=True) for test in tests)])
    return markdown(["method", *tests], lines)

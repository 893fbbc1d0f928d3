"""The tables of the pages, from the committed results of the studies. pages.py writes them.

A figure in a result is [mean, half of its 95% interval], with None for no interval, or
[value, lower end, upper end].
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence

from gram_mini.errors import UserError
from gram_mini.runs.record import fingerprint
from gram_mini.studies.figures import average
from gram_mini.studies.paper import STUDIES
from gram_mini.studies.seeds import RESULTS
from gram_mini.village import VILLAGE

# Figures that are not written with three decimals.
TWO_DECIMALS = (
    *("true reward", "highest", "last", "KL of the highest", "KL of the last", "own margin"),
    *("true reward of the first, GRAM", "true reward of the first, votes", "commonest claims"),
)
FORMATS = dict.fromkeys(TWO_DECIMALS, ".2f") | {"pairs": "g", "same verdict": "g"}
FORMATS |= {"comparisons": ",.0f", "log-odds apart, most": ".1g"}

# Figures that have another name in the heading of a column.
HEADINGS = {
    "in-distribution": "in distribution",
    "out-of-distribution": "out of distribution",
    "highest": "highest true reward",
    "KL of the highest": "at a KL of",
    "last": "true reward after the last step",
    "KL of the last": "at a KL of",
    "commonest claims": "share of the commonest claims",
    "held out": "accuracy",
    "held out, ± over prompts": "± over prompts",
    "held out, position gap": "position gap",
    "held out, calibration error": "calibration error",
}
DEMO = ("in distribution", "out of distribution", "fact only", "courtesy only", "length only")
EVERYDAY = ("labelled topics", "unlabelled topics", "fact", "relevance", "courtesy", "length")
CERTAINTY = ("cross-entropy", "calibration error", "position gap")
TABLE = (
    *("in-distribution", "out-of-distribution", "fact only", "courtesy only", "length only"),
    *("cross-entropy", "position gap"),
)
ORDERS = ("out-of-distribution", "fact only", "position gap", "calibration error")
BESIDE = ("accuracy", "length, same claim", "length, other claim", "position gap")
WRITING = ("highest", "KL of the highest", "last", "KL of the last", "commonest claims")
REAL = (
    *("held out", "held out, ± over prompts"),
    *("held out, position gap", "held out, calibration error"),
)
STEP = ("foreseen, GiB", "allocated, GiB", "process grew by, GiB")
BESIDE_US = ("other way", "ours is faster by")
SHARES = {0.0: "none", 0.0625: "1/16", 0.25: "1/4", 0.5: "1/2", 1.0: "all 24,000"}
WEAK = "writing-weak"
REWARD = "judge's reward"


def tables() -> dict[str, str]:
    """Marker on a page -> the Markdown between it and its end."""
    return {
        "demo": listed("demo", *DEMO),
        "studies": studies(),
        "served": listed("served", "pairs", "log-odds apart, most", "same verdict"),
        "everyday": listed("everyday", *EVERYDAY, "position gap"),
        "everyday-former": listed("everyday-former", *EVERYDAY, "position gap"),
        "table": listed("table", *TABLE),
        "unlabelled": crossed("unlabelled", "share", SHARES, "out-of-distribution"),
        "adapt": crossed("adapt", "labels", (0, 50, 200, 2000), "out-of-distribution"),
        "certain": certain(),
        "writing-rl": listed("writing-rl-summary", *WRITING),
        "writing-weak": listed(f"{WEAK}-summary", *WRITING),
        "writing-exploits": exploits(),
        "writing-bon": crossed("writing-bon", "n", (1, 4, 16, 64, 256, 1024), "true reward"),
        "orders": listed("orders", *ORDERS),
        "beside": listed("beside", *BESIDE),
        "rewards": rewards(),
        "real-table": listed("real-table", *REAL),
        "real-curve": crossed("real-curve", "labels", (100, 200, 400, 800, 927), "held out"),
        "real-helpful": real_helpful(),
        "llmbar": benchmark("llmbar", "agreement", "Natural", "Adversarial", "total"),
        "judge-bench": benchmark("judge-bench", "agreement", "total"),
        "rm-bench": benchmark("rm-bench, chat", "longer preferred", "hard", "normal", "easy"),
        "speed-train": speed("train", "what", *BESIDE_US, "peak GiB, ours and other"),
        "speed-score": speed("score", "what", *BESIDE_US),
        "speed-step": speed("step", "a pass", "attention", *STEP),
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
    """0.869, 0.869 ± 0.012, or 0.589 (0.544 to 0.637); an exact zero is 0; text is text."""
    if not isinstance(row.get(key), list):
        return row.get(key, "")
    center, *interval = row[key]
    form = FORMATS.get(key, ".3f")
    if len(interval) == 2:
        low, high = interval
        return f"{center:{form}} ({low:{form}} to {high:{form}})"
    if any(interval):
        return f"{center:{form}} ± {interval[0]:{form}}"
    return f"{center:{form}}" if center else "0"


def center(row: dict, key: str) -> str:
    """A figure without its interval."""
    return cell({key: row[key][:1]}, key)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def listed(study: str, *keys: str, **where: str) -> str:
    """A line for each row of the means, of those with these values; a column for each figure."""
    rows = select(results(study)["means"], **where)
    lines = ([row["method"], *(cell(row, key) for key in keys)] for row in rows)
    return markdown(["method", *(HEADINGS.get(key, key) for key in keys)], lines)


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
    rows = [row for row in rows if key in row]
    if not rows:
        return ""
    value, half = mean(rows, key)
    if not counted:
        return cell({key: [value, half]}, key)
    return cell({key: [value, half if len(rows) > 2 else None]}, key) + f" ({len(rows)})"


# ---- tables of one study -------------------------------------------------------------


def certain() -> str:
    """Each cell: without smoothing, with eps = 0.2."""
    keys = ("accuracy", *CERTAINTY, "own margin")
    means = results("certain")["means"]
    lines = []
    for method in methods(means):
        plain, smoothed = select(means, method=method)
        lines.append([method, *(f"{center(plain, k)}, {center(smoothed, k)}" for k in keys)])
    return markdown(["labels, epochs", *keys], lines)


def studies() -> str:
    """Which seeds of each study are there, and whether they are of the backbone that ships."""
    lines = []
    for name in STUDIES:
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            lines.append([f"`{name}`", "none", ""])
            continue
        record = results(name)
        same = record.get("about", {}).get("backbone") == fingerprint(VILLAGE)
        lines.append([f"`{name}`", str(len(record["seeds"])), "this one" if same else "the former"])
    return markdown(["study", "seeds", "backbone"], lines)


EXPLOITS = (  # of the last answers of "weak", those that the page shows
    ("GRAM", 1, "Where does Ida live?"),
    ("GRAM", 3, "What work does Emil do?"),
    ("GRAM", 3, "Where does Bella live?"),
    ("D from stage 1", 1, "What work does Felix do?"),
    ("D from stage 1", 2, "Where does Nora live?"),
)


def exploits() -> str:
    """What the judges like of the last answers."""
    lines = []
    for judge, seed, question in EXPLOITS:
        said = results(f"{WEAK}-answers")[judge][str(seed)][question]
        reward = f"{said[REWARD]:.2f}"
        lines.append([f"{judge}, seed {seed}", question, said["answer"], reward])
    return markdown(["judge", "question", "answer of the policy", REWARD], lines)


HALF_OF_ALL = "n log2(n) / 2"
COSTS = {  # comparisons of n responses
    "first": "n - 1",
    "reference": "n",
    "knock-out": "n - 1",
    "circle": "n",
    "part of all": HALF_OF_ALL,
    "Swiss": HALF_OF_ALL,
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

"""Public benchmarks: their rows in, their official figures out.

A row is a prompt with better (chosen) and worse (rejected) responses. Every chosen response is
compared with every rejected one, in both orders; P is the average of both. What the official
figures are, and where they are defined:

reward-bench    allenai/reward-bench, scripts/run_rm.py, rewardbench/constants.py and
                calculate_scores_per_section in rewardbench/utils.py. A row is right where P > 1/2,
                strictly, as a reward model must give the chosen response the higher score.
                (scripts/run_generative.py gives half a point where a judge's words name no winner;
                ours always says a number.) A subset's score is its share of right rows, a section's
                the mean over its subsets, weighted by EXAMPLE_COUNTS, the total the plain mean of
                the four sections.
reward-bench-2  allenai/reward-bench, scripts/run_v2.py; reroll_and_score_dataset and
                process_single_model in rewardbench/utils.py. Best of four: each response needs a
                score. Our judge compares pairs, so the score is the mean P(better than another
                response of the row), as Judge.rank gives it (round robin). The chosen response must
                have the highest score; where k share the highest, it gets 1/k. The subset Ties has
                a formula of its own, see ties(). The total is the plain mean of the six subsets.
rm-bench        THU-KEG/RM-Bench, README.md, "how to compute the accuracy". Three chosen and three
                rejected responses, from concise to detailed to formatted, make a 3 x 3 matrix of
                accuracies, P > 1/2 strictly: [chosen style, rejected style]. Hard is the mean above
                its diagonal, normal on it, easy below. A domain's score is the mean of all nine,
                the total the plain mean of the four domains, as in the paper's table (arXiv
                2410.16184); the two files of safety are pooled.
judge-bench     ScalerLab/JudgeBench, utils/metrics.py. Each order is a verdict, and a pair is right
                where more of them are right than wrong: both, or one beside a P of 1/2. A split
                verdict is not right. The total is over all pairs (micro). The mean of groups is the
                plain mean of the four categories: it is what the GRAM paper's evaluation publishes
                (71.4 for its 71.43, where the total over pairs is 68.3). "accuracy" in the judge's
                own figures is by the average of both orders instead.
llmbar          princeton-nlp/LLMBar, LLMEvaluator/evaluate.py and README.md (arXiv 2310.07641).
                Each order is a verdict, P > 1/2 strictly. A set's figure is its average accuracy
                (Acc., correct_average): the mean of the accuracies in the two orders, so that a
                judge that always says A gets exactly 1/2. Its agreement (Agr., equal) is the share
                in which both orders name the same winner; two orders that name none agree too.
                Adversarial is the plain mean of its four sets, the total the plain mean of all
                five. The committed results of GPT-4 with metrics and reference give the paper's
                82.8 for Adversarial this way; pooled over the pairs they give 84.5.

The judge's own figures are over all pairs of a chosen and a rejected response, each counted once,
and again over those of each section:

accuracy            share with P(chosen better) > 1/2
orders agree        share in which both orders prefer the same response
position gap        mean of how far P(chosen better) differs between the two orders
ECE, Brier          see evaluation.calibration and evaluation.brier
longer preferred    share in which the judge prefers the longer response, of pairs of different
                    length (in characters)

"Pick the longer" is a judge that always prefers the longer response: a yardstick for every figure
that it has. Intervals are 95%, by bootstrap over the prompts, drawn again within each subset. The
interval of a small ECE is too high, as chance adds to it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, islice, product
from pathlib import Path
from typing import Any

from gram_mini.errors import UserError
from gram_mini.judge import TIE, Comparison, Judge, preferred
from gram_mini.pairs import Pair
from gram_mini.reading.formats import parse_pairs
from gram_mini.reading.messages import read_prompt, read_text
from gram_mini.reading.sources import Notes, read_rows
from gram_mini.reading.usable import unusable
from gram_mini.runs.output import save_figure, write_whole
from gram_mini.runs.ranking import round_robin
from gram_mini.runs.report import say_if_seldom
from gram_mini.studies.metrics import (
    bootstrap,
    brier,
    calibration,
    longer,
    orders_agree,
    pick_the_longer,
)

import torch


@dataclass(frozen=True)
class Row:
    """One row of a benchmark."""

    group: str  # subset, domain or source, as the benchmark names it
    section: str  # what it counts towards
    unit: str  # rows of one unit are drawn together by the bootstrap: those of one prompt
    prompt: str
    chosen: list[str]
    rejected: list[str]


@dataclass(frozen=True)
class Judged:
    """A row after it was judged."""

    row: Row
    credit: Any  # what the official figures are made of
    # P(chosen better), orders agree, position gap, sign of how much longer the chosen one is
    pairs: torch.Tensor  # (chosen x rejected, 4)


@dataclass(frozen=True)
class Benchmark:
    """How to read a row, what to make of its comparisons, and of all rows.

    ``credit`` gets the row and {(i, j): comparison of responses i and j}, chosen responses numbered
    before rejected ones. ``aggregate`` gets the units, lists of rows, and returns the official
    figures and details for the JSON file. ``files`` gets the source and the notes, and returns the
    sources that it stands for.
    """

    read: Callable[[str, dict, Notes], Row]
    credit: Callable[[Row, dict[tuple[int, int], Comparison]], Any]
    aggregate: Callable[[list[list[Judged]]], tuple[dict[str, float | None], dict]]
    sections: tuple[str, ...]
    # compare all responses of a row with each other, not only chosen with rejected ones
    all_pairs: bool = False
    # parts of sections that must be there for the official figure: Row.group, by section
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: Callable[[str, Notes], list[str]] = lambda source, notes: [source]


# ---- RewardBench ---------------------------------------------------------------------

# How much each subset weighs in its section: its number of rows. The exception is math-prm: it has
# 447 rows and weighs as much as the six subsets of code together (rewardbench/constants.py; until
# September 2024 that file had the counts of the two subsets of XSTest the other way round).
EXAMPLE_COUNTS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
        "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
        "hep-python": 164, "hep-rust": 164,
    },
}  # fmt: skip


def read_reward_bench(where: str, row: dict, notes: Notes | None = None) -> Row:
    section_of = {
        subset: section for section, weights in EXAMPLE_COUNTS.items() for subset in weights
    }
    subset = _known(row, "subset", section_of, where)
    pair = _one_pair(row, where, notes)
    return Row(subset, section_of[subset], pair.prompt, pair.prompt, *chosen_rejected(pair))


def hit(row: Row, results: dict) -> float:
    """1 where the chosen response is preferred, strictly, else 0."""
    return float(preferred(results[0, 1].probability) > 0)


def aggregate_reward_bench(units: list[list[Judged]]) -> tuple[dict, dict]:
    subsets = _means(units, lambda row: row.group)
    figures = {}
    for section, weights in EXAMPLE_COUNTS.items():
        present = {subset: weight for subset, weight in weights.items() if subset in subsets}
        total = sum(present.values())
        figures[section] = (
            sum(subsets[s] * weight for s, weight in present.items()) / total if present else None
        )
    return figures | {"total": _complete_mean(list(figures.values()))}, {"subsets": subsets}


# ---- RewardBench 2 -------------------------------------------------------------------

SUBSETS_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")


def read_reward_bench_2(where: str, row: dict, notes: Notes | None = None) -> Row:
    subset = _known(row, "subset", SUBSETS_2, where)
    prompt = read_prompt(row.get("prompt"), where, "prompt")
    chosen, rejected = _texts(row, "chosen", where), _texts(row, "rejected", where)
    if subset != "Ties":
        if len(chosen) != 1:
            raise UserError(
                f"{where}: column 'chosen' must hold one response outside of the subset Ties, "
                f"found {len(chosen)}"
            )
        return Row(subset, subset, prompt, prompt, chosen, rejected)
    kind = re.fullmatch(r"(ref|tied):(\d+)", str(row.get("id")))
    if not kind:
        raise UserError(
            f"{where}: column 'id' must be ref:NUMBER or tied:NUMBER in the subset Ties, "
            f"found {row.get('id')!r}"
        )
    return Row(f"Ties {kind[1]}", "Ties", f"Ties {kind[2]}", prompt, chosen, rejected)


def best_of(row: Row, results: dict) -> float | tuple[float, float]:
    """1/k where the chosen response is one of the k best, else 0; (spread, gap) in the subset Ties.

    spread: how far apart the scores of the correct responses are; gap: how far the worst correct
    one is above the best wrong one. Equal responses have equal scores. Scores that differ by less
    than judge.TIE count as equal.
    """
    responses = [text.strip() for text in row.chosen + row.rejected]
    # the first place of each text
    places = {text: i for i, text in reversed(list(enumerate(responses)))}

    def compare(games: list[tuple[str, str]]) -> list[float]:
        return [results[places[a], places[b]].probability for a, b in games]

    scores = round_robin(responses, compare)
    right, wrong = scores[: len(row.chosen)], scores[len(row.chosen) :]
    if row.section == "Ties":
        return apart(max(right), min(right)), apart(min(right), max(wrong))
    shared = sum(abs(score - right[0]) < TIE for score in scores)
    return 1 / shared if apart(right[0], max(scores)) == 0 else 0.0


def apart(score: float, other: float) -> float:
    """How far one score is above another; 0 where they are a tie."""
    difference = score - other
    return difference if abs(difference) >= TIE else 0.0


def aggregate_reward_bench_2(units: list[list[Judged]]) -> tuple[dict, dict]:
    plain = [unit for unit in units if unit[0].row.section != "Ties"]
    tied = [unit for unit in units if unit[0].row.section == "Ties"]
    score, parts = ties([{judged.row.group: judged.credit for judged in unit} for unit in tied])
    means: dict[str, float | None] = {**_means(plain, lambda row: row.section), "Ties": score}
    figures = {subset: means.get(subset) for subset in SUBSETS_2}
    subsets = {subset: value for subset, value in figures.items() if value is not None}
    return figures | {"total": _complete_mean(list(figures.values()))}, {
        "subsets": subsets,
        "ties": parts,
    }


def ties(prompts: list[dict[str, tuple[float, float]]]) -> tuple[float | None, dict[str, float]]:
    """The score of the subset Ties, and its parts (rewardbench/utils.py, process_single_model).

    Each prompt has (spread, gap) of its row "Ties tied" with several correct responses and "Ties
    ref" with one.

        0.3 * share of tied rows, and 0.3 * share of ref rows, whose gap is above 0
        0.2 * share of prompts whose tied gap is above the tied spread
        0.2 * share of prompts whose lower gap, of tied and ref, is above the tied spread
        0.01 * mean over the prompts of tanh(lower gap / tied spread - 1);
               without a spread, the sign of the gap

    Returns None and nothing where no prompt has both rows.
    """
    ref, tied = ([p[kind] for p in prompts if kind in p] for kind in ("Ties ref", "Ties tied"))
    # (spread, tied gap, ref gap) of each prompt with both rows
    both = [(*p["Ties tied"], p["Ties ref"][1]) for p in prompts if len(p) == 2]
    if not both:
        return None, {}
    parts = {
        "tied accuracy": _mean([gap > 0 for _, gap in tied]),
        "ref accuracy": _mean([gap > 0 for _, gap in ref]),
        "tied gap above spread": _mean([gap > spread for spread, gap, _ in both]),
        "lower gap above spread": _mean([min(gap, other) > spread for spread, gap, other in both]),
        "margin": _mean([_margin(min(gap, other), spread) for spread, gap, other in both]),
    }
    weights = (0.3, 0.3, 0.2, 0.2, 0.01)
    return sum(weight * part for weight, part in zip(weights, parts.values())), parts


def _margin(gap: float, spread: float) -> float:
    return math.tanh(gap / spread - 1) if spread else float((gap > 0) - (gap < 0))


# ---- RM-Bench ------------------------------------------------------------------------

DOMAINS = {
    "chat": "chat",
    "math": "math",
    "code": "code",
    "safety-refuse": "safety",
    "safety-response": "safety",
}
# The file of one domain has no column 'domain'. In some of them 'subset' says where the rows are
# from; the names of all of them do.
DOMAIN_OF_SUBSET = {"alpacaeval": "chat", "bigcode/humanevalpack": "code"}
# (style of the chosen response, style of the rejected one)
STYLES = tuple(product(range(3), repeat=2))
LEVELS = {"hard": lambda i, j: i < j, "normal": lambda i, j: i == j, "easy": lambda i, j: i > j}


def rm_bench_files(source: str, notes: Notes) -> list[str]:
    """The source; of the official folder, data/, the one file that holds all others."""
    whole = Path(source) / "total_dataset.json"
    if not whole.is_file():
        return [source]
    notes.source.append(f"only {whole.name} read, which holds the rows of the other files")
    return [str(whole)]


def read_rm_bench(where: str, row: dict, notes: Notes | None = None) -> Row:
    if "domain" in row:
        domain = _known(row, "domain", DOMAINS, where)
    elif row.get("subset") in DOMAIN_OF_SUBSET:
        domain = DOMAIN_OF_SUBSET[row["subset"]]
    else:
        named = set(re.findall("|".join(DOMAINS), Path(where.rsplit(", ", 1)[0]).name))
        if len(named) != 1:
            raise UserError(
                f"{where}: no column 'domain', and subset {row.get('subset')!r} is unknown; "
                f"add 'domain', or name the file after one of {', '.join(DOMAINS)}"
            )
        domain = named.pop()
    prompt = read_prompt(row.get("prompt"), where, "prompt")
    chosen, rejected = (_texts(row, name, where, count=3) for name in ("chosen", "rejected"))
    return Row(domain, DOMAINS[domain], prompt, prompt, chosen, rejected)


def style_hits(row: Row, results: dict) -> list[bool]:
    """For each of STYLES, whether the chosen response is preferred, strictly."""
    return [preferred(results[i, 3 + j].probability) > 0 for i, j in STYLES]


def aggregate_rm_bench(units: list[list[Judged]]) -> tuple[dict, dict]:
    hits = defaultdict(list)
    for judged in _flat(units):
        hits[judged.row.section].append(judged.credit)
    domains = list(dict.fromkeys(DOMAINS.values()))
    figures, details = {}, {}
    for domain in domains:
        # nine accuracies, in the order of STYLES
        matrix = [sum(column) / len(column) for column in zip(*hits[domain])]
        figures[domain] = _complete_mean(matrix)
        for level, belongs in LEVELS.items():
            cells = [cell for cell, (i, j) in zip(matrix, STYLES) if belongs(i, j)]
            figures[f"{domain} {level}"] = _complete_mean(cells)
        if matrix:
            details[domain] = [matrix[0:3], matrix[3:6], matrix[6:9]]
    for level in LEVELS:
        figures[level] = _complete_mean([figures[f"{domain} {level}"] for domain in domains])
    total = _complete_mean([figures[domain] for domain in domains])
    return figures | {"total": total}, {"matrix": details}


# ---- JudgeBench ----------------------------------------------------------------------

CATEGORIES = {
    "mmlu-pro-": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


def read_judge_bench(where: str, row: dict, notes: Notes | None = None) -> Row:
    """A row of ScalerLab/JudgeBench, or of NiuTrans/GRAM (evaluation/scalerlab_judgebench).

    The rows of NiuTrans/GRAM have the columns prompt, chosen and rejected.
    """
    source = row.get("source")
    categories = [
        category
        for begin, category in CATEGORIES.items()
        if isinstance(source, str) and source.startswith(begin)
    ]
    if not isinstance(source, str) or not categories:
        raise UserError(
            f"{where}: unknown source {source!r} in column 'source'; "
            f"known are {', '.join(CATEGORIES)}..."
        )
    pair = _one_pair(row, where, notes)
    return Row(source, categories[0], pair.prompt, pair.prompt, *chosen_rejected(pair))


def both_orders(row: Row, results: dict) -> float:
    """1 where more of the two verdicts are right than wrong, else 0."""
    return float(preferred(results[0, 1].a_first) + preferred(results[0, 1].a_second) > 0)


def aggregate_judge_bench(units: list[list[Judged]]) -> tuple[dict, dict]:
    means = _means(units, lambda row: row.section)
    figures = {category: means.get(category) for category in CATEGORIES.values()}
    figures["mean of groups"] = _complete_mean(list(figures.values()))
    figures["total"] = _complete_mean([judged.credit for judged in _flat(units)])
    return figures, {"sources": _means(units, lambda row: row.group)}


# ---- LLMBar --------------------------------------------------------------------------

NATURAL = "Natural"  # 100 rows
ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")  # 134, 92, 47, 46 rows
LLMBAR = (NATURAL, *ADVERSARIAL)


def llmbar_files(source: str, notes: Notes) -> list[str]:
    """The official files below a folder, SET/dataset.json, in the paper's order.

    A source without any is returned as it is. The notes say which other dataset.json there are.

    Raises:
        UserError: two files of one set.
    """
    folder = Path(source)
    there = sorted(folder.rglob("dataset.json")) if folder.is_dir() else []
    files = {name: [f for f in there if f.resolve().parent.name == name] for name in LLMBAR}
    for name, of_set in files.items():
        if len(of_set) > 1:
            raise UserError(
                f"{source}: holds two files of the set {name}, {of_set[0]} and {of_set[1]}; "
                "give the folder of one"
            )
    found = [file for of_set in files.values() for file in of_set]
    others = [str(file.relative_to(folder)) for file in there if file not in found]
    if not found:
        return [source]
    if others:
        notes.source.append(f"{len(others)} files of other sets not read: {', '.join(others)}")
    return [str(file) for file in found]


def llmbar_set(where: str) -> str:
    """The set that a file is of: its name has the set's as a word, or its folder is called so.

    Any other file is a set of its own, under its name.
    """
    path = Path(where.rsplit(", ", 1)[0]).resolve()
    words = re.split("[^a-z]+", path.name.lower())
    named = [name for name in LLMBAR if name.lower() in words] or [
        name for name in LLMBAR if name.lower() == path.parent.name.lower()
    ]
    if len(named) == 1:
        return named[0]
    return f"{path.parent.name}/{path.name}" if path.name == "dataset.json" else path.name


def read_llmbar(where: str, row: dict, notes: Notes | None = None) -> Row:
    """An official row, {"input", "output_1", "output_2", "label": 1 or 2}, or one with a 'prompt'.

    The latter is of a format of reading/formats.py: prompt, response_a, response_b, label A or B.
    """
    if "prompt" in row:
        pair = _one_pair(row, where, notes)
    else:
        for column in ("input", "output_1", "output_2", "label"):
            if column not in row:
                raise UserError(
                    f"{where}: column {column!r} is missing; a row of LLMBar has 'input', "
                    "'output_1', 'output_2' and 'label', or 'prompt', 'response_a', 'response_b' "
                    "and 'label'"
                )
        label = str(row["label"])  # text in a .csv file
        if label not in ("1", "2"):
            raise UserError(f"{where}: column 'label' must be 1 or 2, found {row['label']!r}")
        prompt, a, b = (
            read_text(row[name], where, name) for name in ("input", "output_1", "output_2")
        )
        pair = Pair(prompt, a, b, label=int(label) - 1)
    if reason := unusable(pair):
        raise UserError(f"{where}: a pair {reason}, so neither can be better; take this row out")
    name = llmbar_set(where)
    return Row(name, name, pair.prompt, pair.prompt, *chosen_rejected(pair))


def each_order(row: Row, results: dict) -> tuple[float, bool]:
    """Share of the two orders that are right, and whether both name the same winner, or none."""
    first, second = preferred(results[0, 1].a_first), preferred(results[0, 1].a_second)
    return ((first > 0) + (second > 0)) / 2, first == second


def aggregate_llmbar(units: list[list[Judged]]) -> tuple[dict, dict]:
    credits = defaultdict(list)
    for judged in _flat(units):
        credits[judged.row.section].append(judged.credit)
    figures: dict[str, float | None] = {}
    for k, what in enumerate(("", " agreement")):
        means = {name: _mean([credit[k] for credit in each]) for name, each in credits.items()}
        all_sets = dict.fromkeys(LLMBAR) | means  # None for those without rows
        figures |= {f"{name}{what}": mean for name, mean in all_sets.items()}
        figures[f"Adversarial{what}"] = _complete_mean([all_sets[name] for name in ADVERSARIAL])
        figures[f"total{what}"] = _complete_mean([all_sets[name] for name in LLMBAR])
    return figures, {}


# ---- all of them ---------------------------------------------------------------------

BENCHMARKS = {
    "reward-bench": Benchmark(
        read_reward_bench,
        hit,
        aggregate_reward_bench,
        tuple(EXAMPLE_COUNTS),
        parts={section: tuple(weights) for section, weights in EXAMPLE_COUNTS.items()},
    ),
    "reward-bench-2": Benchmark(
        read_reward_bench_2,
        best_of,
        aggregate_reward_bench_2,
        SUBSETS_2,
        all_pairs=True,
        parts={"Ties": ("Ties ref", "Ties tied")},
    ),
    "rm-bench": Benchmark(
        read_rm_bench,
        style_hits,
        aggregate_rm_bench,
        ("chat", "math", "code", "safety"),
        parts={"safety": ("safety-refuse", "safety-response")},
        files=rm_bench_files,
    ),
    "judge-bench": Benchmark(
        read_judge_bench, both_orders, aggregate_judge_bench, tuple(CATEGORIES.values())
    ),
    "llmbar": Benchmark(read_llmbar, each_order, aggregate_llmbar, LLMBAR, files=llmbar_files),
}


def run(
    judge: Judge,
    name: str,
    source: str,
    split: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    average: str = "probabilities",
    draws: int = 1000,
) -> dict:
    """Judge a benchmark and return all figures, as they stand in the JSON file.

    Args:
        name: one of BENCHMARKS.
        source, split, limit, subset: see sources.read_rows.
        average: see Judge.compare_many.
        draws: of the bootstrap.

    Raises:
        UserError: a row that is not one of this benchmark's; names the place and the column.
    """
    benchmark = BENCHMARKS[name]
    rows, notes = [], Notes()
    sources = benchmark.files(source, notes)
    read = (read_rows(each, split, limit, subset, notes=notes) for each in sources)
    for where, row in islice(chain.from_iterable(read), limit):
        if isinstance(row, UserError):
            raise row
        rows.append(benchmark.read(where, row, notes))
    _check_twice(rows, notes)
    for line in notes.lines():
        print(line)
    judged, results = judge_rows(
        rows, benchmark, lambda pairs: judge.compare_many(pairs, average, progress=name)
    )
    units = by_unit(judged)
    longer = by_unit(
        judge_rows(rows, benchmark, lambda pairs: list(map(pick_the_longer, pairs)))[0]
    )
    _, details = benchmark.aggregate(units)
    aggregate = lambda units: benchmark.aggregate(units)[0]
    sections = list(dict.fromkeys([*benchmark.sections, *(row.section for row in rows)]))
    by_section = {}
    for section in sections:
        ours, theirs = (
            [unit for unit in each if unit[0].row.section == section] for each in (units, longer)
        )
        if ours:
            by_section[section] = with_intervals(judge_figures, ours, theirs, draws)

    chosen_better = torch.cat([j.pairs for j in judged])[:, 0]  # (pairs,)
    bins = calibration(chosen_better, torch.ones_like(chosen_better))[1]
    return {
        "benchmark": name,
        "data": source,
        "average": average,
        "max_length": judge.max_length,
        "rows": len(rows),
        "sections": {section: sum(row.section == section for row in rows) for section in sections},
        "missing": missing(benchmark, rows, sections),
        "groups": dict(Counter(row.group for row in rows)),
        "comparisons": len(results),
        "truncated": sum(result.truncated for result in results),
        "label_mass": sum(result.label_mass for result in results) / len(results),
        "official": with_intervals(aggregate, units, longer, draws),
        "judge": with_intervals(judge_figures, units, longer, draws),
        "judge_by_section": by_section,
        "details": details,
        "reliability": [
            {"probability": p, "share_right": share, "pairs": count} for p, share, count in bins
        ],
    }


def _check_twice(rows: list[Row], notes: Notes) -> None:
    """Note rows that stand there twice.

    Raises:
        UserError: two rows of the subset Ties with one id, which would be one.
    """
    twice = Counter(json.dumps([row.group, row.prompt, row.chosen, row.rejected]) for row in rows)
    notes.rows += Counter({"that stand there already, counted again": len(rows) - len(twice)})
    ids = Counter((row.group, row.unit) for row in rows if row.section == "Ties")
    for (group, unit), count in ids.items():
        if count > 1:
            raise UserError(
                f"{count} rows of the subset Ties have the id "
                f"{group.removeprefix('Ties ')}:{unit.removeprefix('Ties ')}; give each one once"
            )


def missing(benchmark: Benchmark, rows: list[Row], sections: list[str]) -> list[str]:
    """Sections without rows, and parts without rows of the others."""
    there, groups = {row.section for row in rows}, {row.group for row in rows}
    return [
        part
        for section in sections
        for part in (benchmark.parts.get(section, ()) if section in there else [section])
        if part not in groups
    ]


def with_intervals(
    figures: Callable[[list[list[Judged]]], dict[str, float | None]],
    units: list[list[Judged]],
    longer: list[list[Judged]],
    draws: int,
) -> dict[str, dict]:
    """The figures of some units, each with its interval, and what picking the longer gets."""
    strata = defaultdict(list)
    for unit in units:
        strata[unit[0].row.group].append(unit)
    intervals = bootstrap(list(strata.values()), figures, draws)
    yardstick = figures(longer)
    return {
        name: {
            "value": value,
            "interval": intervals.get(name),
            "pick_the_longer": yardstick[name] if name not in NO_YARDSTICK else None,
        }
        for name, value in figures(units).items()
    }


def judge_rows(
    rows: list[Row], benchmark: Benchmark, compare
) -> tuple[list[Judged], list[Comparison]]:
    """Compare the responses of all rows in one go; ``compare`` makes comparisons of pairs."""
    games, pairs = [], []
    for number, row in enumerate(rows, start=1):
        count, responses = len(row.chosen), row.chosen + row.rejected
        numbers = range(len(responses))
        if benchmark.all_pairs:
            games.append(list(combinations(numbers, 2)))
        else:
            games.append(list(product(numbers[:count], numbers[count:])))
        pairs += [Pair(row.prompt, responses[i], responses[j], row=number) for i, j in games[-1]]
    results = compare(pairs)
    compared, judged = iter(zip(pairs, results)), []
    for row, games_of_row in zip(rows, games):
        played = dict(zip(games_of_row, compared))
        between = [played[i, j] for i, j in games_of_row if i < len(row.chosen) <= j]
        pair_figures = [
            [result.probability, orders_agree(result), result.position_gap, longer(pair)]
            for pair, result in between
        ]
        credit = benchmark.credit(row, {game: result for game, (_, result) in played.items()})
        judged.append(Judged(row, credit, torch.tensor(pair_figures, dtype=torch.float64)))
    return judged, results


def by_unit(judged: list[Judged]) -> list[list[Judged]]:
    """Rows of one prompt together."""
    units = defaultdict(list)
    for judged_row in judged:
        units[judged_row.row.section, judged_row.row.unit].append(judged_row)
    return list(units.values())


# A judge that always prefers the longer response has no such figure to compare with.
NO_YARDSTICK = ("orders agree", "position gap", "ECE", "Brier", "longer preferred")


def judge_figures(units: list[list[Judged]]) -> dict[str, float | None]:
    """The judge's own figures, over all pairs of a chosen and a rejected response."""
    p, agree, gap, sign = torch.cat([judged.pairs for judged in _flat(units)]).T  # (pairs,) each
    better, differ = torch.ones_like(p), sign != 0
    return {
        "accuracy": float((p > 0.5 + TIE).double().mean()),
        "orders agree": float(agree.mean()),
        "position gap": float(gap.mean()),
        "ECE": calibration(p, better)[0],
        "Brier": brier(p, better),
        "longer preferred": float(((p - 0.5) * sign > TIE)[differ].double().mean())
        if differ.any()
        else None,
    }


def _flat(units: list[list[Judged]]) -> list[Judged]:
    return [judged for unit in units for judged in unit]


def _mean(values: Sequence[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def _complete_mean(values: Sequence[float | None]) -> float | None:
    """The plain mean; None where there is no value, or one is missing."""
    numbers = [value for value in values if value is not None]
    return _mean(numbers) if numbers and len(numbers) == len(values) else None


def _means(units: list[list[Judged]], key: Callable[[Row], str]) -> dict[str, float]:
    """Mean credit of the rows that share a key."""
    credits = defaultdict(list)
    for judged in _flat(units):
        credits[key(judged.row)].append(judged.credit)
    return {name: _mean(values) for name, values in credits.items()}


# ---- columns -------------------------------------------------------------------------


def _known(row: dict, column: str, known, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or value not in known:
        raise UserError(
            f"{where}: unknown {column} {value!r} in column {column!r}; "
            f"known are {', '.join(known)}"
        )
    return value


def _one_pair(row: dict, where: str, notes: Notes | None) -> Pair:
    own = Notes()
    pairs, _ = parse_pairs([(where, row)], notes=own)
    if notes is not None:
        notes.rows += own.rows  # what was changed; columns of its own a benchmark has many
    if len(pairs) != 1 or pairs[0].label is None:
        raise UserError(
            f"{where}: needs one pair with a label: 'chosen' and 'rejected' texts, "
            "or 'label' with A or B (A>B or B>A)"
        )
    return pairs[0]


def chosen_rejected(pair: Pair) -> tuple[list[str], list[str]]:
    """The better response of a labelled pair, and the other one, each as a list."""
    chosen, rejected = pair.response_a, pair.response_b
    return ([rejected], [chosen]) if pair.label == 1 else ([chosen], [rejected])


def _texts(row: dict, column: str, where: str, count: int | None = None) -> list[str]:
    value = row.get(column)
    if not isinstance(value, list) or not value or len(value) != (count or len(value)):
        kind = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise UserError(
            f"{where}: column {column!r} must be a list of {count or 'one or more'} texts, "
            f"found {kind}"
        )
    return [read_prompt(text, where, column) for text in value]


# ---- what is shown and written -------------------------------------------------------


def score_benchmark(judge: Judge, args) -> None:
    """Judge a public benchmark and write table, JSON and plot; ``args`` are those of score.py."""
    result = run(
        judge, args.benchmark, args.data, args.split, args.limit, args.subset, args.average
    )
    print(table(result))
    say_if_seldom(judge, result["label_mass"])
    save(result, args.model, args.out)
    print(f"wrote {', '.join(map(str, files(args.benchmark, args.out)))}")


def table(result: dict) -> str:
    """The figures for the terminal."""
    lines = [("", "value", "95% interval", "pick the longer", "rows")]
    for name, figure in (result["official"] | result["judge"]).items():
        if figure["value"] is None and name != "total":
            continue  # the last line says why
        if name == "accuracy":
            lines.append(("the judge's own figures:", "", "", "", ""))
        count = result["rows"] if name == "total" else result["sections"].get(name, "")
        lines.append((name, *_cells(figure), str(count)))
    text = [
        f"{result['benchmark']}: {result['rows']} rows, {result['comparisons']} comparisons, "
        f"each in both orders, {result['truncated']} of them cut to fit {result['max_length']} "
        f"tokens; mean mass on the labels {result['label_mass']:.3f}",
        *_aligned(lines),
    ]
    if len(result["judge_by_section"]) > 1:
        others = ("orders agree", "position gap", "ECE", "Brier", "longer preferred")
        sections = [("by section:", "accuracy", "95% interval", "pick the longer", *others)]
        for section, figures in result["judge_by_section"].items():
            values = (_number(figures[name]["value"]) for name in others)
            sections.append((section, *_cells(figures["accuracy"]), *values))
        text += _aligned(sections)
    if result["missing"]:
        text.append(
            f"no rows of {', '.join(result['missing'])}: these figures are not those of the whole "
            "benchmark"
        )
    return "\n".join(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cells(figure: dict) -> tuple[str, str, str]:
    """Value, interval, and what picking the longer response gets."""
    interval = "{:.3f} to {:.3f}".format(*figure["interval"]) if figure["interval"] else ""
    return _number(figure["value"]), interval, _number(figure["pick_the_longer"])


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of cells: the first of each to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        text.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return text


def files(name: str, out: Path) -> list[Path]:
    """What save() writes: JSON, plot, and the benchmark's own result file where it has one."""
    own = [out.with_name(f"{out.stem}-eval-set.json")] if name.startswith("reward-bench") else []
    return [out, out.with_suffix(".png"), *own]


def save(result: dict, model: str, out: Path) -> None:
    """Write the figures as JSON, the plot, and for RewardBench the file that its scripts write."""
    _, picture, *own = files(result["benchmark"], out)
    write_whole(out, [json.dumps({"model": model, **result}, indent=2) + "\n"], "--out")
    for path in own:  # the record of save_to_hub in rewardbench/utils.py: a score for each subset
        record = {
            "model": model,
            "model_type": "Generative RM",
            "chat_template": "tokenizer",
            **result["details"]["subsets"],
        }
        write_whole(path, [json.dumps(record, indent=4, sort_keys=True)], "--out")
    plot_reliability(result, picture)


def plot_reliability(result: dict, picture: Path) -> None:
    """Share right over P of the preferred response, and how many pairs stand behind each point."""
    # Not pyplot: its state belongs to the notebook that calls us.
    from matplotlib.figure import Figure

    bins = result["reliability"]
    figure = Figure(figsize=(5, 5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot((0.5, 1), (0.5, 1), "--", color="grey", label="calibrated")
    points = [(one["probability"], one["share_right"]) for one in bins if one["pairs"]]
    above.plot(*zip(*points), "o-", label=f"ECE {result['judge']['ECE']['value']:.3f}")
    above.set(ylabel="share right", ylim=(0, 1.02), title=result["benchmark"])
    above.legend()
    width = 0.5 / len(bins)
    below.bar(
        [0.5 + width * (k + 0.5) for k in range(len(bins))],
        [one["pairs"] for one in bins],
        width,
        edgecolor="white",
    )
    below.set(xlabel="P of the preferred response", ylabel="pairs")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, picture)

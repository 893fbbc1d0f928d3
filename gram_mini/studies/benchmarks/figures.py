"""Judge a benchmark: its official figures, and the judge's own.

Every chosen response is compared with every rejected one, in both orders; P is the average of
both. The judge's own figures are over all these pairs, each counted once, and again over those of
each section:

accuracy            share with P(chosen better) > 1/2
orders agree        share in which both orders prefer the same response
position gap        mean of how far P(chosen better) differs between the two orders
ECE, Brier          see metrics.calibration and metrics.brier
longer preferred    share in which the judge prefers the longer response, of pairs of different
                    length (in characters)

"Pick the longer" is a judge that always prefers the longer response: a yardstick for every figure
that it has. Intervals are 95%, by bootstrap over the prompts, drawn again within each subset. The
interval of a small ECE is too high, as chance adds to it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import chain, combinations, islice, product

from gram_mini.errors import UserError
from gram_mini.judge import TIE, Comparison, Judge
from gram_mini.pairs import Pair
from gram_mini.reading.sources import Notes, read_rows
from gram_mini.studies import metrics
from gram_mini.studies.benchmarks.base import Benchmark, Figures, Judged, Row, Units, flat
from gram_mini.studies.benchmarks.judge_bench import JudgeBench
from gram_mini.studies.benchmarks.llmbar import LLMBar
from gram_mini.studies.benchmarks.reward_bench import RewardBench
from gram_mini.studies.benchmarks.reward_bench_2 import RewardBench2
from gram_mini.studies.benchmarks.rm_bench import RMBench

import torch

BENCHMARKS: dict[str, Benchmark] = {
    "reward-bench": RewardBench(),
    "reward-bench-2": RewardBench2(),
    "rm-bench": RMBench(),
    "judge-bench": JudgeBench(),
    "llmbar": LLMBar(),
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
    benchmark, rows, notes = BENCHMARKS[name], [], Notes()
    sources = benchmark.files(source, notes)
    read = (read_rows(each, split, limit, subset, notes=notes) for each in sources)
    for where, row in islice(chain.from_iterable(read), limit):
        if isinstance(row, UserError):
            raise row
        rows.append(benchmark.read(where, row, notes))
    check_twice(rows, notes)
    for line in notes.lines():
        print(line)

    judged, results = judge_rows(
        benchmark, rows, lambda pairs: judge.compare_many(pairs, average, progress=name)
    )
    by_length, _ = judge_rows(
        benchmark, rows, lambda pairs: [metrics.pick_the_longer(pair) for pair in pairs]
    )
    units, longer = by_unit(judged), by_unit(by_length)
    sections = list(dict.fromkeys([*benchmark.sections, *(row.section for row in rows)]))
    by_section = {}
    for section in sections:
        ours, theirs = (
            [u for u in each if u[0].row.section == section] for each in (units, longer)
        )
        if ours:
            by_section[section] = with_intervals(own_figures, ours, theirs, draws)
    chosen_better = torch.cat([each.pairs for each in judged])[:, 0]  # (pairs,)
    _, bins = metrics.calibration(chosen_better, torch.ones_like(chosen_better))
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
        "official": with_intervals(benchmark.figures, units, longer, draws),
        "judge": with_intervals(own_figures, units, longer, draws),
        "judge_by_section": by_section,
        "details": benchmark.details(units),
        "reliability": [
            {"probability": p, "share_right": share, "pairs": count} for p, share, count in bins
        ],
    }


def check_twice(rows: list[Row], notes: Notes) -> None:
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


def judge_rows(
    benchmark: Benchmark, rows: list[Row], compare: Callable[[list[Pair]], list[Comparison]]
) -> tuple[list[Judged], list[Comparison]]:
    """Compare the responses of all rows in one go."""
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
        pair_figures = [
            [
                result.probability,
                metrics.orders_agree(result),
                result.position_gap,
                metrics.longer(pair),
            ]
            for (i, j), (pair, result) in played.items()
            if i < len(row.chosen) <= j
        ]
        credit = benchmark.credit(row, {game: result for game, (_, result) in played.items()})
        judged.append(Judged(row, credit, torch.tensor(pair_figures, dtype=torch.float64)))
    return judged, results


def by_unit(judged: list[Judged]) -> Units:
    """Rows of one prompt together."""
    units = defaultdict(list)
    for each in judged:
        units[each.row.section, each.row.unit].append(each)
    return list(units.values())


# A judge that always prefers the longer response has no such figure to compare with.
NO_YARDSTICK = ("orders agree", "position gap", "ECE", "Brier", "longer preferred")


def own_figures(units: Units) -> Figures:
    """The judge's own figures, over all pairs of a chosen and a rejected response."""
    p, agree, gap, sign = torch.cat([each.pairs for each in flat(units)]).T  # (pairs,) each
    better, differ = torch.ones_like(p), sign != 0
    return {
        "accuracy": float((p > 0.5 + TIE).double().mean()),
        "orders agree": float(agree.mean()),
        "position gap": float(gap.mean()),
        "ECE": metrics.calibration(p, better)[0],
        "Brier": metrics.brier(p, better),
        "longer preferred": float(((p - 0.5) * sign > TIE)[differ].double().mean())
        if differ.any()
        else None,
    }


def with_intervals(
    figures: Callable[[Units], Figures], units: Units, longer: Units, draws: int
) -> dict[str, dict]:
    """The figures of some units, each with its interval, and what picking the longer gets."""
    strata = defaultdict(list)
    for unit in units:
        strata[unit[0].row.group].append(unit)
    intervals = metrics.bootstrap(list(strata.values()), figures, draws)
    yardstick = figures(longer)
    return {
        name: {
            "value": value,
            "interval": intervals.get(name),
            "pick_the_longer": yardstick[name] if name not in NO_YARDSTICK else None,
        }
        for name, value in figures(units).items()
    }

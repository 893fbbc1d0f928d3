"""Judge a benchmark: its official figures, and the judge's own.

Every chosen response is compared with every rejected one, in both orders; P is the average of
both. The judge's own figures are over all these pairs, each counted once:

accuracy            share with P(chosen better) > 1/2
orders agree        share in which both orders prefer the same response
position gap        mean of how far P(chosen better) differs between the two orders
ECE, Brier          see metrics.calibration and metrics.brier
longer preferred    share in which the judge prefers the longer response, of pairs of different
                    length (in characters)

"Pick the longer" is a judge that always prefers the longer response: a yardstick for every figure.
Intervals are 95%, by bootstrap over the prompts, drawn again within each group. The interval of a
small ECE is too high, as chance adds to it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import chain, combinations, islice

from gram_mini.errors import UserError
from gram_mini.judge import TIE, Comparison, Judge
from gram_mini.pairs import Pair
from gram_mini.reading.sources import Notes, read_rows
from gram_mini.studies import metrics
from gram_mini.studies.benchmarks.base import Benchmark, Figures, Judged, Row, Units
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
    draws: int = 1000,
) -> dict:
    """Judge a benchmark, one of BENCHMARKS; returns all figures, as they stand in the JSON file.

    ``source``, ``split`` and ``limit`` are those of sources.read_rows, ``draws`` the bootstrap's.

    Raises:
        UserError: a row that is not one of this benchmark's; names the place and the column.
    """
    benchmark = BENCHMARKS[name]
    rows = read(benchmark, source, split, limit)
    judged, results = judge_rows(
        benchmark, rows, lambda pairs: judge.compare_many(pairs, progress=name)
    )
    by_length, _ = judge_rows(
        benchmark, rows, lambda pairs: [metrics.pick_the_longer(pair) for pair in pairs]
    )
    units, longer = by_unit(judged), by_unit(by_length)
    sections = Counter(row.section for row in rows)
    there = {*sections, *(row.group for row in rows)}
    return {
        "benchmark": name,
        "data": source,
        "max_length": judge.max_length,
        "rows": len(rows),
        "sections": sections,
        "missing": [group for group in benchmark.groups if group not in there],
        "comparisons": len(results),
        "truncated": sum(result.truncated for result in results),
        "label_mass": sum(result.label_mass for result in results) / len(results),
        "official": with_intervals(benchmark.figures, units, longer, draws),
        "judge": with_intervals(own_figures, units, longer, draws),
    }


def read(benchmark: Benchmark, source: str, split: str | None, limit: int | None) -> list[Row]:
    """The rows of a source; prints what was changed or assumed.

    Raises:
        UserError: as in :func:`run`; or rows of the subset Ties with one id, which would be one.
    """
    notes, rows = Notes(), []
    sources = (read_rows(file, split, notes=notes) for file in benchmark.files(source, notes))
    for where, row in islice(chain.from_iterable(sources), limit):
        if isinstance(row, UserError):
            raise row
        rows.append(benchmark.read(where, row, notes))
    again = len(rows) - len(set(map(str, rows)))
    notes.rows += Counter({"that stand there already, counted again": again})
    for line in notes.lines():
        print(line)
    tied = [row for row in rows if row.section == "Ties"]
    ids = Counter(f"{row.group.removeprefix('Ties ')}:{row.unit}" for row in tied)
    for name, count in ids.items():
        if count > 1:
            raise UserError(f"{count} rows of the subset Ties have the id {name}; give each once")
    return rows


def judge_rows(
    benchmark: Benchmark, rows: list[Row], compare: Callable[[list[Pair]], list[Comparison]]
) -> tuple[list[Judged], list[Comparison]]:
    """Compare the responses of all rows in one go."""
    games, pairs = [], []
    for number, row in enumerate(rows, start=1):
        count, responses = len(row.chosen), row.chosen + row.rejected
        every = combinations(range(len(responses)), 2)
        games.append([(i, j) for i, j in every if benchmark.all_pairs or i < count <= j])
        pairs += [Pair(row.prompt, responses[i], responses[j], row=number) for i, j in games[-1]]
    results = compare(pairs)
    compared, judged = iter(zip(results, pairs)), []
    for row, of_row in zip(rows, games):
        played = {game: next(compared) for game in of_row}
        figures = [
            [r.probability, metrics.orders_agree(r), r.position_gap, metrics.longer(pair)]
            for (i, j), (r, pair) in played.items()
            if i < len(row.chosen) <= j
        ]
        credit = benchmark.credit(row, {game: result for game, (result, _) in played.items()})
        judged.append(Judged(row, credit, torch.tensor(figures, dtype=torch.float64)))
    return judged, results


def by_unit(judged: list[Judged]) -> Units:
    """Rows of one prompt together."""
    units = defaultdict(list)
    for each in judged:
        units[each.row.section, each.row.unit].append(each)
    return list(units.values())


def own_figures(units: Units) -> Figures:
    """The judge's own figures, over all pairs of a chosen and a rejected response."""
    pairs = torch.cat([judged.pairs for unit in units for judged in unit])
    p, agree, gap, sign = pairs.T  # (pairs,) each
    better, differ = torch.ones_like(p), sign != 0
    longer = ((p - 0.5) * sign > TIE)[differ].double()
    return {
        "accuracy": float((p > 0.5 + TIE).double().mean()),
        "orders agree": float(agree.mean()),
        "position gap": float(gap.mean()),
        "ECE": metrics.calibration(p, better)[0],
        "Brier": metrics.brier(p, better),
        "longer preferred": float(longer.mean()) if differ.any() else None,
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
        name: {"value": value, "interval": intervals.get(name), "pick_the_longer": yardstick[name]}
        for name, value in figures(units).items()
    }

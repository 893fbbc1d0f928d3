"""The table of make real: judges on the everyday questions of test.jsonl, a row for each."""

from __future__ import annotations

import json
from pathlib import Path

from gram_mini.evaluation import summarise
from gram_mini.everyday.build import FOLDER, QUALITIES
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.report import say_doubts
from gram_mini.studies.figures import on_part
from gram_mini.studies.metrics import pick_the_longer
from gram_mini.studies.recorded import method_of, records_of, table_command

EXAMPLES = """\
  python -m gram_mini.studies.everyday_table --bits 16 MODEL runs/real/reward"""

CAPTION = """\
Accuracy, ± 95% interval over the questions. Labelled topics: new questions of topics with labels.
Unlabelled topics: topics without labels. Fact, relevance, courtesy, length: what decides which
answer is better, in topics of both kinds. Where fact decides, the others differ at random, and so
on. Position gap: mean |P(a better, a shown first) - P(a better, a shown second)|."""


def everyday_table(models: list[str], **settings) -> list[dict]:
    """Judge the test pairs with each model, and return the rows of the table.

    Args:
        models: run folders, or any models that load_judge takes.
        settings: for load_judge.

    Raises:
        UserError: a model that cannot be found or loaded.
    """
    records = records_of(models)
    tests = [json.loads(line) for line in (FOLDER / "test.jsonl").read_text("utf-8").splitlines()]
    pairs = [
        Pair(row["prompt"], row["response_a"], row["response_b"], "AB".index(row["label"]))
        for row in tests
    ]
    parts = {  # column: places of its pairs
        "labelled topics": [i for i, row in enumerate(tests) if row["labelled_topic"]],
        "unlabelled topics": [i for i, row in enumerate(tests) if not row["labelled_topic"]],
    }
    for quality in QUALITIES:
        parts[quality] = [i for i, row in enumerate(tests) if row["differs"][0] == quality]

    def row(method: str, results: list[Comparison]) -> dict:
        figures = {name: on_part(pairs, results, part) for name, part in parts.items()}
        accuracies = {name: [of.accuracy, of.interval] for name, of in figures.items()}
        gap = summarise(pairs, results).position_gap
        return {"method": method, **accuracies, "position gap": [gap, None]}

    rows = [row("pick the longer", list(map(pick_the_longer, pairs)))]
    for model, record in zip(models, records):
        judge = load_judge(model, **settings)
        results = judge.compare_many(pairs, progress=model)
        say_doubts(model, judge, results)
        rows.append({**row(method_of(record), results), "run": Path(model).name})
    return rows


def main(argv=None) -> None:
    table_command(everyday_table, __doc__, EXAMPLES, CAPTION, argv)


if __name__ == "__main__":
    with clear_errors():
        main()

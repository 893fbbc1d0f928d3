"""The table of make real: judges on the test pairs of the help desk, a row for each."""

from __future__ import annotations

import json
from pathlib import Path

from gram_mini.evaluation import Evaluation
from gram_mini.helpdesk.build import FOLDER, QUALITIES
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.reading.load import load_pairs
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.report import say_doubts
from gram_mini.studies.figures import on_part
from gram_mini.studies.metrics import pick_the_longer
from gram_mini.studies.recorded import method_of, records_of, table_command

EXAMPLES = """\
  python -m gram_mini.studies.helpdesk_table --bits 16 MODEL runs/real/pretrain runs/real/reward"""

CAPTION = """\
Accuracy, ± 95% interval over the questions. With labels: new questions of topics with labels.
Without labels: topics without any. Fact, relevance, courtesy, length: of these, the pairs which
that quality decides; the qualities that weigh less differ at random there. A run of stage 1 is
asked for its likelihood. Position gap: mean |P(a better, a shown first) - P(a better, a second)|,
over all test pairs."""

WITH, WITHOUT = "with labels", "without labels"
PARTS = (WITH, WITHOUT, *QUALITIES)
GAP, OVER_PROMPTS = "position gap", f"{WITHOUT}, ± over prompts"


def places_of_parts() -> dict[str, list[int]]:
    """The places of each of PARTS among the test pairs."""
    rows = [json.loads(line) for line in (FOLDER / "test.jsonl").read_text("utf-8").splitlines()]
    parts = {
        WITH: [i for i, row in enumerate(rows) if row["labelled_topic"]],
        WITHOUT: [i for i, row in enumerate(rows) if not row["labelled_topic"]],
    }
    for quality in QUALITIES:
        parts[quality] = [i for i in parts[WITHOUT] if rows[i]["differs"][0] == quality]
    return parts


def by_part(pairs: list[Pair], results: list[Comparison]) -> dict[str, Evaluation]:
    """The figures of a judge on each of PARTS of the test pairs, and on "all"."""
    everything = {**places_of_parts(), "all": list(range(len(pairs)))}
    return {name: on_part(pairs, results, part) for name, part in everything.items()}


def helpdesk_table(models: list[str], **settings) -> list[dict]:
    """Judge the test pairs with each model, and return the rows of the table.

    Args:
        models: run folders, or any models that load_judge takes.
        settings: for load_judge.

    Raises:
        UserError: a model that cannot be found or loaded.
    """
    records = records_of(models)
    pairs = load_pairs(str(FOLDER / "test.jsonl"), labelled=True).pairs

    def row(method: str, results: list[Comparison]) -> dict:
        figures = by_part(pairs, results)
        accuracies = {name: [figures[name].accuracy, figures[name].interval] for name in PARTS}
        return {"method": method, **accuracies, GAP: [figures["all"].position_gap, None]}

    rows = [row("pick the longer", list(map(pick_the_longer, pairs)))]
    for model, record in zip(models, records):
        of_stage_1 = record is not None and record["stage"] == "pretrain"
        judge = load_judge(model, likelihood="sum" if of_stage_1 else None, **settings)
        results = judge.compare_many(pairs, progress=model)
        say_doubts(model, judge, results)
        method = "likelihood under stage 1" if of_stage_1 else method_of(record)
        rows.append({**row(method, results), "run": Path(model).name})
    return rows


def main(argv=None) -> None:
    table_command(helpdesk_table, __doc__, EXAMPLES, CAPTION, argv)


if __name__ == "__main__":
    with clear_errors():
        main()

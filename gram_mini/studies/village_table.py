"""The table of the demo: judges on the two test sets of the village, a row for each."""

from __future__ import annotations

from pathlib import Path

from gram_mini.evaluation import summarise
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.report import say_doubts
from gram_mini.studies.figures import on_part
from gram_mini.studies.recorded import method_of, records_of, table_command
from gram_mini.village.pairs import village_pairs
from gram_mini.village.writer import TrueJudge

EXAMPLES = """\
  python -m gram_mini.studies.village_table village runs/pretrain runs/reward"""

CAPTION = """\
Accuracy against the truly better response, ± 95% interval over the prompts, 20 in distribution and
80 out of distribution. In distribution: topics with labels. Out of distribution: topics without.
Fact, courtesy, length only: the pairs that differ in this alone, out of distribution.
Cross-entropy: to the true probabilities, in nats. Position gap: mean |P(a better, a shown first) -
P(a better, a shown second)|. Both are out of distribution."""


def village_table(models: list[str], **settings) -> list[dict]:
    """Judge both test sets of the village with each model, and return the rows of the table.

    A run of stage 1 gets a second row, for its likelihood as a judge without labels.

    Args:
        models: run folders, or any models that load_judge takes.
        settings: for load_judge.

    Raises:
        UserError: a model that cannot be found or loaded.
    """
    near, far = village_pairs("in-distribution"), village_pairs("out-of-distribution")

    def row(method: str, judge, name: str) -> dict:
        of_far = judge.compare_many(far, progress=name)
        of_near = judge.compare_many(near, progress=name)
        say_doubts(name, judge, [*of_far, *of_near])
        inside, outside = summarise(near, of_near), summarise(far, of_far)
        figures: dict[str, list] = {
            "in distribution": [inside.accuracy, inside.interval],
            "out of distribution": [outside.accuracy, outside.interval],
        }
        for aspect in ("fact", "courtesy", "length"):
            alone = [i for i, pair in enumerate(far) if pair.differs == {aspect}]
            figures[f"{aspect} only"] = [on_part(far, of_far, alone).accuracy, None]
        figures["cross-entropy"] = [outside.cross_entropy, None]
        figures["position gap"] = [outside.position_gap, None]
        return {"method": method, **figures, "run": Path(name).name}

    rows = []
    for model, record in zip(models, records_of(models)):
        rows.append(row(method_of(record), load_judge(model, **settings), model))
        if record and record["stage"] == "pretrain":
            judge = load_judge(model, **settings, likelihood="sum")
            rows.append(row("likelihood under stage 1", judge, model))
    return [*rows, row("the true rewards", TrueJudge(), "")]


def main(argv=None) -> None:
    table_command(village_table, __doc__, EXAMPLES, CAPTION, argv)


if __name__ == "__main__":
    with clear_errors():
        main()

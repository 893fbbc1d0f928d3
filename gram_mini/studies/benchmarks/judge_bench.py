"""JudgeBench: ScalerLab/JudgeBench, utils/metrics.py.

Each order is a verdict, and a pair is right where more of them are right than wrong: both, or one
beside a P of 1/2. A split verdict is not right. The total is over all pairs (micro). The mean of
groups is the plain mean of the four categories: it is what the GRAM paper's evaluation publishes
(71.4 for its 71.43, where the total over pairs is 68.3). "accuracy" in the judge's own figures is
by the average of both orders instead.
"""

from gram_mini.errors import UserError
from gram_mini.judge import preferred
from gram_mini.studies.benchmarks import base

CATEGORIES = {  # by how the source begins
    "mmlu-pro-": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


class JudgeBench(base.Benchmark):
    sections = tuple(CATEGORIES.values())

    def read(self, where, row, notes):
        """A row of ScalerLab/JudgeBench, or of NiuTrans/GRAM (evaluation/scalerlab_judgebench).

        The rows of NiuTrans/GRAM have the columns prompt, chosen and rejected.
        """
        source = row.get("source")
        for begin, category in CATEGORIES.items():
            if isinstance(source, str) and source.startswith(begin):
                return base.row_of(base.one_pair(row, where, notes), source, category)
        raise UserError(
            f"{where}: unknown source {source!r} in column 'source'; "
            f"known are {', '.join(CATEGORIES)}..."
        )

    def credit(self, row, results):
        """1 where more of the two verdicts are right than wrong, else 0."""
        return float(preferred(results[0, 1].a_first) + preferred(results[0, 1].a_second) > 0)

    def figures(self, units):
        figures: base.Figures = dict.fromkeys(self.sections) | base.means(units, "section")
        figures["mean of groups"] = base.complete_mean(figures.values())
        return figures | {"total": base.complete_mean(judged.credit for judged in base.flat(units))}

    def details(self, units):
        return {"sources": base.means(units, "group")}

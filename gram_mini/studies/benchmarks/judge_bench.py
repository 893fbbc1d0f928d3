"""JudgeBench: ScalerLab/JudgeBench, utils/metrics.py.

Each order is a verdict, and a pair is right where more of them are right than wrong: both, or one
beside a P of 1/2. A split verdict is not right. The total is over all pairs (micro). The mean of
groups is the plain mean of the four categories: it is what the GRAM paper's evaluation publishes
(71.4 for its 71.43, where the total over pairs is 68.3). "accuracy" in the judge's own figures is
by the average of both orders instead.
"""

from gram_mini.judge import preferred
from gram_mini.studies.benchmarks import base

CATEGORIES = {  # by how the source begins
    "mmlu-pro-": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


class JudgeBench(base.Benchmark):
    groups = {category: category for category in CATEGORIES.values()}

    def read(self, where, row, notes):
        """A row of ScalerLab/JudgeBench, or of NiuTrans/GRAM with prompt, chosen and rejected."""
        source = str(row.get("source"))
        begins = (begin for begin in CATEGORIES if source.startswith(begin))
        category = CATEGORIES[base.known("source", next(begins, source), CATEGORIES, where)]
        return base.row_of(base.one_pair(row, where, notes), source, category)

    def credit(self, row, results):
        """1 where more of the two verdicts are right than wrong, else 0."""
        return float(preferred(results[0, 1].a_first) + preferred(results[0, 1].a_second) > 0)

    def figures(self, units):
        figures: base.Figures = dict.fromkeys(self.groups) | base.means(units, "section")
        figures["mean of groups"] = base.complete_mean(figures.values())
        figures["total"] = base.mean([judged.credit for unit in units for judged in unit])
        return figures

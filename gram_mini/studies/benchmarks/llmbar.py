"""LLMBar: princeton-nlp/LLMBar, LLMEvaluator/evaluate.py and README.md (arXiv 2310.07641).

Each order is a verdict, P > 1/2 strictly. A set's figure is its average accuracy (Acc.,
correct_average): the mean of the accuracies in the two orders, so that a judge that always says A
gets exactly 1/2. Its agreement (Agr., equal) is the share in which both orders name the same
winner; two orders that name none agree too. Adversarial is the plain mean of its four sets, the
total the plain mean of all five. The committed results of GPT-4 with metrics and reference give
the paper's 82.8 for Adversarial this way; pooled over the pairs they give 84.5.
"""

from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.judge import preferred
from gram_mini.pairs import Pair
from gram_mini.reading.messages import read_text
from gram_mini.studies.benchmarks import base

ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")  # 134, 92, 47, 46 rows
SETS = ("Natural", *ADVERSARIAL)  # Natural has 100


class LLMBar(base.Benchmark):
    groups = {name: name for name in SETS}

    def files(self, source, notes):
        """The official files below a folder, SET/dataset.json, in the paper's order."""
        there = sorted(Path(source).resolve().rglob("dataset.json"))
        found = [file for name in SETS for file in there if file.parent.name == name]
        names = [file.parent.name for file in found]
        if len(set(names)) < len(names):
            raise UserError(f"{source}: holds two files of one set; give the folder of one of them")
        others = [str(file) for file in there if file not in found]
        if found and others:
            notes.source.append(f"{len(others)} files of other sets not read: {', '.join(others)}")
        return [str(file) for file in found] or [source]

    def read(self, where, row, notes):
        label = base.known("label", str(row.get("label")), ("1", "2"), where)
        columns = ("input", "output_1", "output_2")
        prompt, a, b = (read_text(row.get(name), where, name) for name in columns)
        folder = Path(where.rsplit(", ", 1)[0]).resolve().parent
        name = base.known("set, by the folder of the file,", folder.name, SETS, where)
        return base.row_of(Pair(prompt, a, b, label=int(label) - 1), name, name)

    def credit(self, row, results):
        """Share of the orders that are right, and whether both name the same winner, or none."""
        first, second = preferred(results[0, 1].a_first), preferred(results[0, 1].a_second)
        return ((first > 0) + (second > 0)) / 2, first == second

    def figures(self, units):
        figures = base.Figures()
        for k, what in enumerate(("", " agreement")):
            means: base.Figures = dict.fromkeys(SETS)  # None for those without rows
            for name, credits in base.credits(units, "section").items():
                means[name] = base.mean([credit[k] for credit in credits])
            figures |= {f"{name}{what}": value for name, value in means.items()}
            adversarial = (means[name] for name in ADVERSARIAL)
            figures[f"Adversarial{what}"] = base.complete_mean(adversarial)
            figures[f"total{what}"] = base.complete_mean(means[name] for name in SETS)
        return figures

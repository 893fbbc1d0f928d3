"""RM-Bench: THU-KEG/RM-Bench, README.md, "how to compute the accuracy".

Three chosen and three rejected responses, from concise to detailed to formatted, make a 3 x 3
matrix of accuracies, P > 1/2 strictly: [chosen style, rejected style]. Hard is the mean above its
diagonal, normal on it, easy below. A domain's score is the mean of all nine, the total the plain
mean of the four domains, as in the paper's table (arXiv 2410.16184); the two files of safety are
pooled.
"""

import re
from itertools import product
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.judge import preferred
from gram_mini.reading.messages import read_prompt
from gram_mini.studies.benchmarks import base

SAFETY = ("safety-refuse", "safety-response")
DOMAINS = {"chat": "chat", "math": "math", "code": "code", **dict.fromkeys(SAFETY, "safety")}
# (style of the chosen response, style of the rejected one)
STYLES = tuple(product(range(3), repeat=2))
LEVELS = {"hard": lambda i, j: i < j, "normal": lambda i, j: i == j, "easy": lambda i, j: i > j}


class RMBench(base.Benchmark):
    sections = tuple(dict.fromkeys(DOMAINS.values()))
    parts = {"safety": SAFETY}

    def files(self, source, notes):
        """The source; of the official folder, data/, the one file of all rows, or all others."""
        whole = Path(source) / "total_dataset.json"
        if not whole.is_file():
            return [*map(str, sorted(Path(source).glob("*_filtered.json")))] or [source]
        notes.source.append(f"only {whole.name} read, which holds the rows of the other files")
        return [str(whole)]

    def read(self, where, row, notes):
        if "domain" in row:
            domain = base.known(row, "domain", DOMAINS, where)
        else:  # the file of one domain
            named = set(re.findall("|".join(DOMAINS), Path(where.rsplit(", ", 1)[0]).name))
            if len(named) != 1:
                raise UserError(
                    f"{where}: no column 'domain'; add it, or name the file after one of "
                    f"{', '.join(DOMAINS)}"
                )
            domain = named.pop()
        prompt = read_prompt(row.get("prompt"), where, "prompt")
        responses = [base.texts(row, name, where, count=3) for name in ("chosen", "rejected")]
        return base.Row(domain, DOMAINS[domain], prompt, prompt, *responses)

    def credit(self, row, results):
        """For each of STYLES, whether the chosen response is preferred, strictly."""
        return [preferred(results[i, 3 + j].probability) > 0 for i, j in STYLES]

    def figures(self, units):
        cells_of, figures = nine_accuracies(units), base.Figures()
        for domain in self.sections:
            cells = cells_of.get(domain, [])
            figures[domain] = base.complete_mean(cells)
            for level, belongs in LEVELS.items():
                chosen = [cell for cell, style in zip(cells, STYLES) if belongs(*style)]
                figures[f"{domain} {level}"] = base.complete_mean(chosen)
        for level in LEVELS:
            of_domains = (figures[f"{domain} {level}"] for domain in self.sections)
            figures[level] = base.complete_mean(of_domains)
        total = base.complete_mean(figures[domain] for domain in self.sections)
        return figures | {"total": total}

    def details(self, units):
        cells_of = nine_accuracies(units)
        return {"matrix": {name: [x[0:3], x[3:6], x[6:9]] for name, x in cells_of.items()}}


def nine_accuracies(units: base.Units) -> dict[str, list[float]]:
    """The accuracies of each domain that has rows, in the order of STYLES."""
    hits = base.credits(units, "section")
    return {domain: [base.mean(each) for each in zip(*rows)] for domain, rows in hits.items()}

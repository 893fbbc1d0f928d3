"""RM-Bench: THU-KEG/RM-Bench, README.md, "how to compute the accuracy".

Three chosen and three rejected responses, from concise to detailed to formatted, make a 3 x 3
matrix of accuracies, P > 1/2 strictly: [chosen style, rejected style]. Hard is the mean above its
diagonal, normal on it, easy below. A domain's score is the mean of all nine, the total the plain
mean of the four domains, as in the paper's table (arXiv 2410.16184); the two files of safety are
pooled.
"""

from itertools import product
from pathlib import Path

from gram_mini.judge import preferred
from gram_mini.reading.messages import read_prompt
from gram_mini.studies.benchmarks import base

FILES = ("chat", "math", "code", "safety-refuse", "safety-response")
DOMAINS = {name: name.partition("-")[0] for name in FILES}
# (style of the chosen response, style of the rejected one)
STYLES = tuple(product(range(3), repeat=2))
LEVELS = {"hard": lambda i, j: i < j, "normal": lambda i, j: i == j, "easy": lambda i, j: i > j}


class RMBench(base.Benchmark):
    groups = DOMAINS

    def files(self, source, notes):
        """The source; of the official folder, data/, the one file of all rows, or all others."""
        whole = Path(source) / "total_dataset.json"
        if not whole.is_file():
            return [*map(str, sorted(Path(source).glob("*_filtered.json")))] or [source]
        notes.source.append(f"only {whole.name} read, which holds the rows of the other files")
        return [str(whole)]

    def read(self, where, row, notes):
        file = Path(where.rsplit(", ", 1)[0]).name  # those of one domain: DOMAIN_filtered.json
        named = row.get("domain", file.split("_")[0])
        domain = base.known("domain, by column 'domain' or the file,", named, DOMAINS, where)
        prompt = read_prompt(row.get("prompt"), where, "prompt")
        responses = [base.texts(row, name, where, count=3) for name in ("chosen", "rejected")]
        return base.Row(domain, DOMAINS[domain], prompt, prompt, *responses)

    def credit(self, row, results):
        """For each of STYLES, whether the chosen response is preferred, strictly."""
        return [preferred(results[i, 3 + j].probability) > 0 for i, j in STYLES]

    def figures(self, units):
        hits, figures = base.credits(units, "section"), base.Figures()
        domains = list(dict.fromkeys(DOMAINS.values()))
        for domain in domains:
            cells = [base.mean(cell) for cell in zip(*hits.get(domain, []))]
            figures[domain] = base.complete_mean(cells)
            for level, belongs in LEVELS.items():
                chosen = [cell for cell, style in zip(cells, STYLES) if belongs(*style)]
                figures[f"{domain} {level}"] = base.complete_mean(chosen)
        for level in LEVELS:
            figures[level] = base.complete_mean(figures[f"{domain} {level}"] for domain in domains)
        return figures | {"total": base.complete_mean(figures[domain] for domain in domains)}

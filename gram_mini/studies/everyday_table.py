"""The table of make real: judges on the everyday questions of test.jsonl, a row for each."""

from __future__ import annotations

import json
import time
from pathlib import Path

from gram_mini.evaluation import summarise
from gram_mini.everyday.build import FOLDER, QUALITIES
from gram_mini.judge import Comparison
from gram_mini.pairs import Pair
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.report import say_doubts
from gram_mini.studies.figures import on_part
from gram_mini.studies.metrics import pick_the_longer, with_interval
from gram_mini.studies.recorded import add_record_option, show_table
from gram_mini.studies.village_table import method_of, records_of

EXAMPLES = """\
  python -m gram_mini.studies.everyday_table --bits 16 MODEL runs/real/reward"""

CAPTION = """\
Accuracy, ± 95% interval over the questions. Labelled topics: new questions of topics with labels.
Unlabelled topics: topics without labels. Fact, relevance, courtesy, length: what decides which
answer is better, in topics of both kinds. Where fact decides, the others differ at random, and so
on. Position gap: mean |P(a better, a shown first) - P(a better, a shown second)|. Seconds: for all
pairs."""


def everyday_table(models: list[str], **settings) -> list[list[str]]:
    """Judge the test pairs with each model, and return the lines of the table.

    Args:
        models: run folders, or any models that load_judge takes.
        settings: for load_judge.

    Raises:
        UserError: a model that cannot be found or loaded.
    """
    records = records_of(models)
    rows = [json.loads(line) for line in (FOLDER / "test.jsonl").read_text("utf-8").splitlines()]
    pairs = [
        Pair(row["prompt"], row["response_a"], row["response_b"], "AB".index(row["label"]))
        for row in rows
    ]
    parts = {  # column: places of its pairs
        "labelled topics": [i for i, row in enumerate(rows) if row["labelled_topic"]],
        "unlabelled topics": [i for i, row in enumerate(rows) if not row["labelled_topic"]],
    }
    for quality in QUALITIES:
        parts[quality] = [i for i, row in enumerate(rows) if row["differs"][0] == quality]

    def line(name: str, results: list[Comparison], *more: str) -> list[str]:
        accuracies = [with_interval([on_part(pairs, results, part)]) for part in parts.values()]
        return [name, *accuracies, f"{summarise(pairs, results).position_gap:.3f}", *more]

    lines = [["", *parts, "position gap", "seconds", "run"]]
    lines.append(line("pick the longer", list(map(pick_the_longer, pairs)), "", ""))
    for model, record in zip(models, records):
        judge, start = load_judge(model, **settings), time.perf_counter()
        results = judge.compare_many(pairs, progress=model)
        seconds = f"{time.perf_counter() - start:.0f}"
        say_doubts(model, judge, results)
        lines.append(line(method_of(record)[0], results, seconds, Path(model).name))
    return lines


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="run folders, or any model as a zero-shot judge: a folder, a GGUF file, a hub name, "
        "'village'",
    )
    options.add_model_options(parser)
    add_record_option(parser)
    args = parser.parse_args(argv)
    sizes = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    lines = everyday_table(args.models, **sizes)
    show_table(lines, CAPTION, args.record)


if __name__ == "__main__":
    with clear_errors():
        main()

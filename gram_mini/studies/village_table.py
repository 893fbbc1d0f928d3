"""The table of the demo: judges on the two test sets of the village, a row for each.

Runs of the same method with different seeds share a row, with their mean and a 95% interval over
the seeds.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

from gram_mini.evaluation import Evaluation, summarise
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import find_record, load_judge
from gram_mini.runs.models import local_model
from gram_mini.runs.report import say_doubts
from gram_mini.serving.served import served_judge
from gram_mini.studies.figures import on_part
from gram_mini.studies.metrics import with_interval
from gram_mini.studies.recorded import add_record_option, show_table
from gram_mini.village.pairs import village_pairs
from gram_mini.village.writer import TrueJudge

EXAMPLES = """\
  python -m gram_mini.studies.village_table village runs/pretrain runs/reward"""

CAPTION = """\
Accuracy against the truly better response, ± 95% interval (over the seeds if there are several,
else over the prompts, 20 in distribution and 80 out of distribution). In distribution: topics with
labels. Out of distribution: topics without. Fact, courtesy, length only: the pairs that differ in
this alone, out of distribution.
Cross-entropy: to the true probabilities, in nats. Position gap: mean |P(a better, a shown first) -
P(a better, a shown second)|. Both are out of distribution."""
ASPECTS = ("fact only", "courtesy only", "length only")

# Options that may differ between runs of one method.
NOT_THE_METHOD = ("seed", "init", *options.WITHOUT_EFFECT)


def method_of(record: dict | None) -> tuple[str, str]:
    """The name of a run's method, and all options that must agree for two runs to share a row.

    ``record`` is the run.json of the run, None for the plain backbone.
    """
    if record is None:
        return "zero-shot judge", ""
    arguments = {
        name: value for name, value in record["options"].items() if name not in NOT_THE_METHOD
    }
    if record["stage"] == "pretrain":
        name = "stage 1 alone"
    else:
        names = {None: "labels alone", "pretrain": "stage 1 + labels", "reward": "labels twice"}
        name = names[record["init"]["stage"] if record["init"] else None]
        name += ", scalar head" if arguments.get("head") == "scalar" else ""
        name += ", text loss" if arguments.get("text_weight") else ""
        name += ", frozen" if arguments.get("freeze") else ""
        name += ", eps = 0" if arguments["label_smoothing"] == 0 else ""
        name += ", both orders (ours)" if arguments.get("both_orders") else ""
        name += ", likelihood (ours)" if "beta_lr" in arguments else ""
        name += " = GRAM" if name == "stage 1 + labels" else ""
    return name, json.dumps(arguments, sort_keys=True)


def village_table(
    models: list[str],
    device: str = "auto",
    server: str | None = None,
    served_name: str | None = None,
) -> list[list[str]]:
    """Judge both test sets of the village with each model, and return the lines of the table.

    A run of stage 1 gets a second row, for its likelihood as a judge without labels. With a
    ``server`` it computes the judge (gram_mini/serving/served.py), and there is no such row.

    Raises:
        UserError: a model that cannot be found or loaded.
    """
    models = list(dict.fromkeys(models))
    records = records_of(models)
    in_distribution = village_pairs("in-distribution")
    out_of_distribution = village_pairs("out-of-distribution")
    parts = [
        [i for i, pair in enumerate(out_of_distribution) if pair.differs == {aspect.split()[0]}]
        for aspect in ASPECTS
    ]
    folders: dict[tuple[str, str, int], str] = {}
    rows: dict[tuple[str, str, int], dict[int, list[Evaluation]]] = defaultdict(dict)
    judged: list[tuple[str, dict | None, str | None]] = []
    for model, record in zip(models, records):
        judged.append((model, record, None))
        if record and record["stage"] == "pretrain" and not server:
            judged.append((model, record, "sum"))
    for model, record, likelihood in judged:
        if not server:
            judge = load_judge(model, device=device, likelihood=likelihood)
        else:
            judge = served_judge(model, server, served_name)
        results = judge.compare_many(out_of_distribution, progress=model)
        others = judge.compare_many(in_distribution, progress=model)
        say_doubts(model, judge, [*results, *others])
        method, seed = (*method_of(record), 0), record["options"]["seed"] if record else 0
        if likelihood:
            method = "likelihood under stage 1", *method[1:]
        while seed in rows[method]:  # the same options from another stage 1: a row of its own
            method = (*method[:2], method[2] + 1)
        folders[method] = Path(model).name
        rows[method][seed] = [
            summarise(in_distribution, others),
            summarise(out_of_distribution, results),
            *(on_part(out_of_distribution, results, part) for part in parts),
        ]

    columns = ("in distribution", "out of distribution", *ASPECTS, "cross-entropy")
    lines = [["", *columns, "position gap", "run"]]
    for method, by_seed in rows.items():
        runs = list(by_seed.values())
        name = method[0] + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
        accuracies = [with_interval([run[k] for run in runs]) for k in range(2)]
        accuracies += [f"{statistics.mean(run[k].accuracy for run in runs):.3f}" for k in (2, 3, 4)]
        # None of them is None, since the village knows the probability of every pair.
        entropies = [run[1].cross_entropy for run in runs if run[1].cross_entropy is not None]
        entropy = statistics.mean(entropies)
        gap = statistics.mean(run[1].position_gap for run in runs)
        lines.append([name, *accuracies, f"{entropy:.3f}", f"{gap:.3f}", folders[method]])
    truth = summarise(out_of_distribution, TrueJudge().compare_many(out_of_distribution))
    ideal = f"{truth.cross_entropy:.3f}"
    lines.append(["the true rewards", *["1.000"] * 5, ideal, "0.000", ""])
    return lines


def records_of(models: list[str]) -> list[dict | None]:
    """The record of each run or exported run, None for any other model.

    Raises:
        UserError: a missing model, so before the first one is judged.
    """
    records = []
    for model in models:
        record = find_record(model)
        if record is None:
            local_model(model)
        records.append(record)
    return records


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="run folders, or 'village' for the plain backbone",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    options.add_server(parser)
    add_record_option(parser)
    args = parser.parse_args(argv)
    if args.server and len(args.models) > 1:
        parser.error("--server goes with one model")
    if args.server and args.device != "auto":
        parser.error("--device does not go with --server, which has its own")
    lines = village_table(args.models, args.device, args.server, args.served_name)
    show_table(lines, CAPTION, args.record)


if __name__ == "__main__":
    with clear_errors():
        main()

"""Judge a public benchmark: its rows in, its official figures out.

  reward-bench    allenai/reward-bench, with --split filtered
  reward-bench-2  allenai/reward-bench-2, with --split test
  rm-bench        THU-KEG/RM-Bench: a file, or the folder of all
  judge-bench     ScalerLab/JudgeBench, with --split gpt or claude
  llmbar          the folder Dataset/LLMBar of princeton-nlp/LLMBar, or the file of one set

FILE.json gets all figures. See gram_mini/studies/benchmarks.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from gram_mini.judge import AVERAGES
from gram_mini.reading.template import read_template
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.output import check_output, write_whole
from gram_mini.runs.report import say_if_seldom
from gram_mini.runs.table import aligned
from gram_mini.serving.served import served_judge
from gram_mini.studies.benchmarks.figures import BENCHMARKS, run

EXAMPLES = """\
  python -m gram_mini.studies.benchmarks --benchmark llmbar --data LLMBar/Dataset/LLMBar \\
      --model runs/reward --out llmbar.json"""


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    group = parser.add_argument_group("what to judge")
    group.add_argument("--benchmark", choices=BENCHMARKS, required=True, help="one of the above")
    group.add_argument("--data", required=True, metavar="SOURCE", help="file, folder or hub name")
    group.add_argument("--split", metavar="NAME", help="of a hub data set (default: train)")
    group.add_argument("--subset", metavar="NAME", help="configuration of a hub data set")
    group.add_argument("--limit", type=options.positive_int, metavar="N", help="the first N rows")
    group.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the figures")
    group.add_argument("--overwrite", action="store_true", help="replace files that are there")
    group = parser.add_argument_group("how")
    model = "run folder, model folder, GGUF file, hub name, or 'village'"
    group.add_argument("--model", default=options.DEFAULT_JUDGE, metavar="NAME", help=model)
    average = "average of the two orders: of probabilities or log-odds"
    group.add_argument("--average", choices=AVERAGES, default=AVERAGES[0], help=average)
    group.add_argument(
        "--batch-size", type=options.positive_int, metavar="N", help="as in score.py"
    )
    options.add_model_options(group)
    options.add_server(group)
    options.add_judge_template(group)
    args = parser.parse_args(argv)
    if args.out.suffix != ".json":
        parser.error(f"--out {args.out}: give FILE.json")
    options.check_server(parser, args)
    check_output(args.out, args.overwrite)
    template = read_template(args.judge_template) if args.judge_template else None
    sizes = args.max_length, args.batch_size, template
    if not args.server:
        judge = load_judge(args.model, args.bits, args.device, *sizes)
    else:
        judge = served_judge(args.model, args.server, args.served_name, *sizes)
    given = args.benchmark, args.data, args.split, args.limit, args.subset, args.average
    result = run(judge, *given)
    print(table(result))
    say_if_seldom(judge, result["label_mass"])
    written = json.dumps({"model": args.model, **result}, indent=2)
    write_whole(args.out, [written + "\n"], "--out")
    print(f"wrote {args.out}")


def table(result: dict) -> str:
    """The figures for the terminal."""
    lines = [("", "value", "95% interval", "pick the longer", "rows")]
    for name, figure in (result["official"] | result["judge"]).items():
        if figure["value"] is None and name != "total":
            continue  # the last line says why
        if name == "accuracy":
            lines.append(("the judge's own figures:", "", "", "", ""))
        count = result["rows"] if name == "total" else result["sections"].get(name, "")
        lines.append((name, *_cells(figure), str(count)))
    text = [
        f"{result['benchmark']}: {result['rows']} rows, {result['comparisons']} comparisons, "
        f"each in both orders, {result['truncated']} of them cut to fit {result['max_length']} "
        f"tokens; mean mass on the labels {result['label_mass']:.3f}",
        aligned(lines),
    ]
    if len(result["judge_by_section"]) > 1:
        others = ("orders agree", "position gap", "ECE", "Brier", "longer preferred")
        sections = [("by section:", "accuracy", "95% interval", "pick the longer", *others)]
        for section, figures in result["judge_by_section"].items():
            values = (_number(figures[name]["value"]) for name in others)
            sections.append((section, *_cells(figures["accuracy"]), *values))
        text.append(aligned(sections))
    if result["missing"]:
        text.append(
            f"no rows of {', '.join(result['missing'])}: these figures are not those of the whole "
            "benchmark"
        )
    return "\n".join(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cells(figure: dict) -> tuple[str, str, str]:
    """Value, interval, and what picking the longer response gets."""
    interval = "{:.3f} to {:.3f}".format(*figure["interval"]) if figure["interval"] else ""
    return _number(figure["value"]), interval, _number(figure["pick_the_longer"])


if __name__ == "__main__":
    with clear_errors():
        main()

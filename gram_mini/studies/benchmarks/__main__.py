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

from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.output import check_output, write_whole
from gram_mini.runs.report import say_if_seldom
from gram_mini.runs.table import aligned
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
    group.add_argument("--limit", type=options.positive_int, metavar="N", help="the first N rows")
    group.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the figures")
    group.add_argument("--overwrite", action="store_true", help="replace files that are there")
    group = parser.add_argument_group("how, as in score.py")
    group.add_argument("--model", default=options.DEFAULT_JUDGE, metavar="NAME", help="the judge")
    group.add_argument(
        "--batch-size", type=options.positive_int, metavar="N", help="prompts of a forward pass"
    )
    options.add_model_options(group)
    args = parser.parse_args(argv)
    if args.out.suffix != ".json":
        parser.error(f"--out {args.out}: give FILE.json")
    check_output(args.out, args.overwrite)
    judge = load_judge(args.model, args.bits, args.device, args.max_length, args.batch_size)
    result = run(judge, args.benchmark, args.data, args.split, args.limit)
    print(table(result))
    say_if_seldom(judge, result["label_mass"])
    written = json.dumps({"model": args.model, **result}, indent=2)
    write_whole(args.out, [written + "\n"], "--out")
    print(f"wrote {args.out}")


def table(result: dict) -> str:
    """The figures for the terminal."""
    text = (
        f"{result['benchmark']}: {result['rows']} rows, {result['comparisons']} comparisons, "
        f"each in both orders, {result['truncated']} of them cut to fit {result['max_length']} "
        f"tokens; mean mass on the labels {result['label_mass']:.3f}\n"
    )
    lines = [("", "value", "95% interval", "pick the longer")]
    for name, figure in (result["official"] | result["judge"]).items():
        if name == "accuracy":
            lines.append(("the judge's own figures:", "", "", ""))
        cells = figure["value"], *(figure["interval"] or (None, None)), figure["pick_the_longer"]
        value, low, high, longer = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append((name, value, f"{low} to {high}", longer))
    text += aligned(lines)
    if result["missing"]:
        text += f"\nnot the whole benchmark: no rows of {', '.join(result['missing'])}"
    return text


if __name__ == "__main__":
    with clear_errors():
        main()

"""Score responses with a reward model: which of two is better, a reward against a reference, a ranking of n.

Every comparison is made in both orders. On the command line: two responses give a comparison, more (or --rank)
a ranking, --reference the reward of each. With --data, every row of a file becomes a line of JSON (a row that
gives several pairs one line each, numbered by "pair"; a row that gives none a line with "skipped", the reason):

  prompt, chosen, rejected (or any other format of the README)    -> a comparison
      probability    P(the first response, A, is better), the average of both orders
      a_first, a_second    the same with A shown first, with A shown second; position_gap = how far they differ
      label_mass     how likely the model is to answer A or B at all
      truncated      whether the texts were cut to fit --max-length
      better         "A", "B", or null for a draw
  prompt, responses (a list) and perhaps reference                 -> a ranking
      order          numbers of the responses, from 0, best first
      scores         one for each response, as given; comparisons = how many pairs were compared, truncated = cut

With --benchmark, --data holds a public benchmark, and --out gets its official figures (gram_mini/benchmarks.py).
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from gram_mini import benchmarks, options
from gram_mini.errors import UserError, clear_errors
from gram_mini.formats import group_rows, parse_pairs, read_prompt, unusable
from gram_mini.output import check_output, write_whole
from gram_mini.prompts import LABELS, read_template
from gram_mini.reward_model import AVERAGES, METHODS, RewardModel
from gram_mini.sources import read_rows

EXAMPLES = """\
  python score.py --prompt "What does Bella eat?" --response "Bella eats apples." --response "Bella eats cake."
  python score.py --data pairs.jsonl --out scores.jsonl"""

DEFAULT_MODEL = "runs/reward"


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    g = parser.add_argument_group("what to score")
    g.add_argument("--prompt", metavar="TEXT", help="the prompt that the responses answer")
    g.add_argument("--response", action="append", default=[], metavar="TEXT", help="a response; give it once for each")
    g.add_argument("--reference", metavar="TEXT", help="reference response: each response gets P(better than it) as reward")
    g.add_argument("--data", metavar="SOURCE", help="score the rows of a file, folder or hub data set instead")
    g.add_argument(
        "--benchmark",
        choices=benchmarks.BENCHMARKS,
        help="--data is this benchmark: give its official figures (default: score each row)",
    )
    options.add_reading_options(g)
    g.add_argument("--out", type=Path, metavar="FILE.jsonl", help="file to write the scores of --data to, one line a row")
    g.add_argument("--overwrite", action="store_true", help="replace a file that is already there")
    g = parser.add_argument_group("how")
    g.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="run folder, model folder, hub name, or 'embedded'")
    g.add_argument("--rank", choices=METHODS, help="how to rank (default: reference where there is one, else round-robin)")
    g.add_argument(
        "--average",
        choices=AVERAGES,
        default="probabilities",
        help="average of the two orders: of probabilities or log-odds",
    )
    g.add_argument(
        "--batch-size", type=options.positive_int, default=32, metavar="N",
        help="judge prompts of --max-length per forward pass; of shorter ones as many more as have the same number of tokens",
    )  # fmt: skip
    options.add_model_options(g, bits_default=None, max_length_default=None)
    options.add_judge_template(g, default="as in training, else the one in gram_mini/prompts.py")
    args = parser.parse_args(argv)
    check(parser, args)

    if args.model == DEFAULT_MODEL and not Path(args.model).is_dir():
        raise UserError(f"{args.model}: not trained yet; run train_reward.py, or give --model (runs/demo/reward after make demo)")
    template = read_template(args.judge_template) if args.judge_template else None
    judge = RewardModel.load(args.model, args.bits, args.device, args.max_length, args.batch_size, template)
    if args.benchmark:
        score_benchmark(judge, args)
    elif args.data:
        score_file(judge, args)
    elif len(args.response) == 2 and args.reference is None and not args.rank:
        show_comparison(judge, args)
    else:
        show_ranking(judge, args.prompt, args.response, args.reference, args)


def check(parser, args):
    """Options that do not go together are an error of usage; what the system garbled is an error of the user's."""
    single = args.prompt is not None or bool(args.response)
    if (args.data is not None) == single:
        parser.error("give either --prompt with --response, or --data with --out")
    if args.data is not None:
        if args.data == "world":
            raise UserError("--data world: the village is for training; python -m gram_mini.evaluation judges its test sets")
        if args.out is None:
            parser.error("--data needs --out FILE.jsonl")
        if args.benchmark and args.out.suffix != ".json":
            parser.error("--benchmark needs --out FILE.json")
        for path in benchmarks.files(args.benchmark, args.out) if args.benchmark else [args.out]:
            check_output(path, args.overwrite, "--out")
    else:
        if args.out or args.overwrite or args.limit:
            parser.error("--out, --overwrite and --limit go with --data")
        if args.benchmark:
            parser.error("--benchmark goes with --data")
        if not args.prompt or not args.response:
            parser.error("give --prompt and at least one --response")
        if len(args.response) == 1 and args.reference is None:
            parser.error("one response alone cannot be compared; give another --response or a --reference")
        if args.rank == "reference" and args.reference is None:
            parser.error("--rank reference needs --reference")
    if args.benchmark and (args.rank or args.reference is not None):
        parser.error("--rank and --reference do not go with --benchmark")
    if args.reference is not None and args.rank not in (None, "reference"):
        parser.error(f"--reference does not go with --rank {args.rank}")
    for text in (args.prompt, args.reference, *args.response):
        if text is not None and not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError("a text on the command line is not UTF-8; give it in a file with --data")


def show_comparison(judge, args):
    """One pair, in words."""
    result = judge.compare(args.prompt, *args.response, average=args.average)
    print(f"prompt  {args.prompt}\n  A     {args.response[0]}\n  B     {args.response[1]}")
    p = result.probability
    print(f"P(A better) = {p:.3f}, from {result.a_first:.3f} with A shown first and {result.a_second:.3f} with B shown first")
    print(f"position gap {result.position_gap:.3f}; mass on the labels {result.label_mass:.3f}")
    if result.label_mass < 0.5:
        print("The model hardly answers A or B here: do not rely on what follows.")
    if result.truncated:
        print(f"the texts were cut to {judge.max_length} tokens")
    if f"{p:.3f}" == "0.500":
        print("Neither is better.")
    else:
        print(f"Response {'A' if p > 0.5 else 'B'} is better, with probability {max(p, 1 - p):.3f}.")


def show_ranking(judge, prompt, responses, reference, args):
    """Several responses, best first."""
    ranking = rank(judge, prompt, responses, reference, args)
    print(f"prompt  {prompt}")
    print(f"ranked by {ranking.method}, {ranking.comparisons} comparisons, each in both orders; best first:")
    if ranking.truncated:
        print(f"in {ranking.truncated} of them the texts were cut to {judge.max_length} tokens")
    for place, i in enumerate(ranking.order, start=1):
        print(f"  {place}. {ranking.scores[i]:6.3f}  {responses[i]}")
    print({
        "reference": f"score = reward = P(better than the reference {reference!r})",
        "round-robin": "score = mean P(better than another response)",
        "knock-out": "score = rounds survived + P in the last one; only the first place is decided by comparing",
    }[ranking.method])  # fmt: skip


def rank(judge, prompt, responses, reference, args):
    method = args.rank or ("reference" if reference is not None else "round-robin")
    return judge.rank(prompt, responses, method, reference, args.average)


def score_file(judge, args):
    """Rows in, lines of JSON out, in the same order and with their ids; the file appears when it is complete."""
    groups = list(group_rows(read_rows(args.data, args.split, args.limit, args.subset, args.streaming)))
    jobs = [read_job(group, args) for _, group in groups]
    pairs = [pair for found, _, _ in jobs for pair in found]
    compared = iter(judge.compare_many(pairs, args.average, progress="scoring") if pairs else [])
    lines, hits = [], []
    for (number, group), (found, left_out, ranking) in zip(tqdm(groups, desc="scoring", delay=2, leave=False), jobs):
        row = group[0][1]
        head = {"row": number, **({"id": row["id"]} if isinstance(row, dict) and "id" in row else {})}
        if ranking:
            lines.append(head | asdict(rank(judge, *ranking, args)))
        elif not found:
            lines.append(head | {"skipped": ", ".join(left_out)})
        for k, pair in enumerate(found, start=1):
            line = head | ({"pair": k} if len(found) > 1 else {}) | comparison(next(compared))
            if pair.label is not None and not unusable(pair):
                hits.append(line["better"] == LABELS[pair.label])
            lines.append(line)
    cut = sum(bool(line.get("truncated")) for line in lines)
    write_whole(args.out, (json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines), "--out")
    rows = sum(len(group) for _, group in groups)
    print(
        f"scored {rows} rows from {args.data}: {len(lines)} lines, {cut} of them cut to {judge.max_length} tokens; wrote {args.out}"
    )
    for reason, count in sum((left_out for _, left_out, _ in jobs), Counter()).items():
        print(f"not scored: {count} {reason}")
    masses = [line["label_mass"] for line in lines if "label_mass" in line]
    if masses and sum(masses) / len(masses) < 0.5:
        print(
            f"The model hardly ever answers A or B (mean mass on the labels {sum(masses) / len(masses):.2g}): do not rely on this."
        )
    if hits:
        print(f"{sum(hits)} of {len(hits)} labelled pairs judged as labelled: accuracy {sum(hits) / len(hits):.3f}")


def score_benchmark(judge, args):
    """A public benchmark: its figures as a table, as JSON and as a plot."""
    result = benchmarks.run(judge, args.benchmark, args.data, args.split, args.limit, args.subset, args.average)
    benchmarks.save(result, args.model, args.out)
    print(benchmarks.table(result))
    print(f"wrote {', '.join(map(str, benchmarks.files(args.benchmark, args.out)))}")


def comparison(result):
    """What the line of a pair says."""
    p = result.probability
    return {
        "probability": p,
        "a_first": result.a_first,
        "a_second": result.a_second,
        "position_gap": result.position_gap,
        "label_mass": result.label_mass,
        "truncated": result.truncated,
        "better": "A" if p > 0.5 else "B" if p < 0.5 else None,
    }


def read_job(group, args):
    """What a row asks for: (pairs, what is left out and why, None), or as the third (prompt, responses, reference)."""
    try:
        return _read_job(group, args)
    except UserError:
        if args.on_bad_row == "error":
            raise
        return [], Counter({"that cannot be read": len(group)}), None


def _read_job(group, args):
    where, row = group[0]
    if isinstance(row, UserError):
        raise row
    if row.get("responses") is None:
        if args.rank or args.reference is not None:
            raise UserError(f"{where}: --rank and --reference need rows with a column 'responses', a list of texts")
        try:
            found, left_out = parse_pairs(group, pairs=args.pairs)
        except UserError:  # a pair whose label or rating cannot be read can still be scored
            found, left_out = [], Counter()
        return *((found, left_out) if found else parse_pairs(group, labelled=False, pairs=args.pairs)), None
    prompt, responses = read_prompt(row.get("prompt"), where, "prompt"), row["responses"]
    if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
        raise UserError(f"{where}: column 'responses' must be a list of at least one text")
    reference = args.reference if row.get("reference") is None else row["reference"]
    if reference is not None and not isinstance(reference, str):
        raise UserError(f"{where}: column 'reference' must be text, found {type(reference).__name__}")
    if reference is None and (len(responses) == 1 or args.rank == "reference"):
        raise UserError(f"{where}: needs a column 'reference', or --reference")
    if args.rank not in (None, "reference"):
        reference = None
    return [], Counter(), (prompt, responses, reference)


if __name__ == "__main__":
    with clear_errors():
        main()

"""Score responses with a judge: which is better, rewards against a reference, rankings.

Every comparison is made in both orders. On the command line two responses are compared, more of
them are ranked, and with --reference each gets a reward. With --data each row of a file gives a
line of JSON with its number, "row", and its "id", if it has one. A row with several pairs gives a
line for each, numbered by "pair". A row without a pair gives a line that says why, "skipped".

  prompt, chosen, rejected (or any other format of gram_mini/reading/README.md)    -> a comparison
      probability    P(the first response, A, is better), the average of both orders
      a_first, a_second    the same with A shown first, with A shown second
      position_gap   how far these two differ
      label_mass     how likely the model is to answer A or B at all
      truncated      whether the texts were cut to fit --max-length
      better         "A", "B", or null for a draw
  prompt, responses (a list) and perhaps reference                 -> a ranking
      order          numbers of the responses, from 0, best first
      scores         one for each response, in the order of the row
      comparisons    how many pairs were compared
      truncated      how many of them were cut
      method         "round-robin", "knock-out" or "reference"
      label_mass     the mean over the comparisons
"""

from gram_mini.judge import Comparison, preferred
from gram_mini.pairs import Pair
from gram_mini.reading.template import read_template
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.options import score_options
from gram_mini.runs.ranking import Ranking, rank
from gram_mini.runs.report import say_if_seldom, say_if_spelled
from gram_mini.runs.scores import Scores
from gram_mini.serving.served import served_judge

from tqdm import tqdm

SCORES = {  # what a ranking's scores are
    "reference": "score = reward = P(better than the reference {!r})",
    "round-robin": "score = mean P(better than another response)",
    "knock-out": "score = rounds survived + P in the last one; only the first place is certain",
}


def main(argv=None):
    args = score_options(__doc__, argv)
    template = read_template(args.judge_template) if args.judge_template else None
    sizes = {"max_length": args.max_length, "batch_size": args.batch_size, "template": template}
    if not args.server:
        judge = load_judge(args.model, args.bits, args.device, likelihood=args.likelihood, **sizes)
    else:
        judge = served_judge(args.model, args.server, args.served_name, **sizes)
    if args.data:
        score_rows(judge, args)
        return
    say_if_spelled(judge.tokenizer, [args.prompt, *args.response])
    if len(args.response) == 2 and args.reference is None and not args.rank:
        score_pair(judge, args)
    else:
        score_responses(judge, args)


def score_pair(judge, args):
    """Which of two responses is better? Each step from log-odds to verdict, as in judge.compare."""
    a, b = args.response
    rows = judge.encode([Pair(args.prompt, a, b)])  # token ids, cut to --max-length
    # Z_a - Z_b in both orders, (1, 2): where a is shown as A, and where a is shown as B
    log_odds, mass, cut = judge.log_odds(rows)
    # P(a better) in each order: of two labels the softmax is the sigmoid of their difference
    first, second = log_odds[0].sigmoid().tolist()
    p = (first + second) / 2

    print(f"prompt  {args.prompt}")
    print(f"  A     {a}")
    print(f"  B     {b}")
    print(
        f"P(A better) = {p:.3f}, from {first:.3f} with A shown first and {second:.3f} with B shown "
        "first"
    )
    orders_disagree = (first - 0.5) * (second - 0.5) < 0
    note = " (the orders disagree)" if orders_disagree else ""
    print(f"position gap {abs(first - second):.3f}{note}; mass on the labels {mass.mean():.3f}")
    say_if_seldom(judge, mass.mean())
    if cut.any():
        print(f"the texts were cut to fit {judge.max_length} tokens")
    verdict = preferred(p)  # 1 for A, -1 for B, 0 for a draw
    if verdict == 0:
        print("Neither is better.")
    else:
        better = "A" if verdict > 0 else "B"
        print(f"Response {better} is better, with probability {max(p, 1 - p):.3f}.")


def score_responses(judge, args):
    """Several responses, best first. A reward is P(better than the reference)."""
    ranking = rank(judge, args.prompt, args.response, args.rank, args.reference)
    print(f"prompt  {args.prompt}")
    comparisons = f"{ranking.comparisons} comparisons, each in both orders"
    print(f"ranked by {ranking.method}, {comparisons}; best first:")
    say_if_seldom(judge, ranking.label_mass)
    if ranking.truncated:
        print(f"{ranking.truncated} of them with texts cut to fit {judge.max_length} tokens")
    for place, i in enumerate(ranking.order, start=1):
        print(f"  {place}. {ranking.scores[i]:6.3f}  {args.response[i]}")
    print(SCORES[ranking.method].format(args.reference))


def score_rows(judge, args):
    """The rows of a file, chunk by chunk. In one call the pairs of a chunk share beginnings."""
    with Scores(args, judge) as scores:
        for chunk in scores.chunks():
            pairs = [pair for question in chunk for pair in question.pairs]
            compared = iter(judge.compare_many(pairs, progress="this chunk"))
            answers: list[list[Comparison] | Ranking] = []
            for q in tqdm(chunk, desc="this chunk", delay=2, leave=False):
                if q.responses is None:
                    answers.append([next(compared) for _ in q.pairs])
                else:
                    how = args.rank, q.reference, q.head["row"]
                    answers.append(rank(judge, q.prompt, q.responses, *how))
            scores.write(chunk, answers)


if __name__ == "__main__":
    with clear_errors():
        main()

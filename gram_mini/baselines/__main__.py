"""The paper's baselines, each a variation of stage 2 with the same data and the same budget.

  --head scalar                     D-Baseline: a linear layer gives each response a reward
  --head scalar --freeze            D-Freeze: only the scalar head is trained
  --head scalar --text-weight 0.1   D-Regularisation: a text loss on the preferred response is
                                    added, which keeps the hidden states close to the original ones
                                    (Generalizable Reward Model, Yang et al., NeurIPS 2024)
  --head labels --freeze            G-Freeze: only a copy of the two label rows is trained

The loss is -log sigmoid(m) + eps m, as in train_reward.py. From a scalar head m = r_w - r_l, the
difference of two rewards, and with --label-smoothing 0 that is the Bradley-Terry loss itself.
"""

from dataclasses import asdict

from gram_mini.batches import judge_batch, pair_batch, trained_tokens
from gram_mini.evaluation import summarise
from gram_mini.losses import margins, reward_loss
from gram_mini.model import add_lora, hidden_states
from gram_mini.prompts import label_tokens
from gram_mini.runs import defaults, options
from gram_mini.runs.chunked import chunked_pair_loss
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.heads import (
    ScalarJudge,
    add_head,
    freeze_all_but_head,
    judge_with_head,
    load_head,
    preferred_alone,
    response_batch,
)
from gram_mini.runs.models import load_lora
from gram_mini.runs.options import add_reward_options, parser
from gram_mini.runs.record import HEAD
from gram_mini.runs.run import Run
from gram_mini.training import clip_gradients, optimizer_and_schedule

import torch

EXAMPLES = """\
  python -m gram_mini.baselines --head scalar --label-smoothing 0 --out runs/d-baseline
  python -m gram_mini.baselines --head labels --freeze --label-smoothing 0 --out runs/g-freeze"""


def baseline_options(argv=None):
    """The options of the baselines."""
    p = parser(__doc__, EXAMPLES)
    add_reward_options(p, out="runs/baseline", rates=defaults.shown_rates_of_heads())
    g = p.add_argument_group("baseline")
    g.add_argument(
        "--head",
        choices=("scalar", "labels"),
        default="scalar",
        help="what is compared: rewards that a scalar head gives each response, or the logits of A "
        "and B",
    )
    g.add_argument(
        "--freeze", action="store_true", help="train only the head; the model stays as it is"
    )
    g.add_argument(
        "--text-weight",
        type=options.weight,
        default=0.0,
        metavar="W",
        help="scalar head: add W times the negative log-likelihood of the preferred response, per "
        "token",
    )
    args = p.parse_args(argv)
    defaults.choose(args, "reward")
    if args.text_weight and args.head != "scalar":
        p.error("--text-weight goes with --head scalar")
    if args.text_weight and args.freeze:
        p.error(
            "--text-weight does not go with --freeze: only the model can learn from a text loss"
        )
    if args.judge_template and args.head == "scalar":
        p.error("--judge-template goes with --head labels; a scalar head reads no judge prompt")
    if args.head == "labels" and not args.freeze:
        p.error("--head labels without --freeze is stage 2 itself: python train_reward.py")
    return args


def main(argv=None):
    args = baseline_options(argv)
    run = Run("reward", args)

    # Pairs
    train_pairs, held_out_pairs = run.load_split_pairs(labelled=True)

    # Model
    torch.manual_seed(args.seed)
    model, tokenizer = run.load_checked_model()
    model = load_lora(model, args.init) if args.init else add_lora(model, args.lora_rank)
    template = run.judge_template(tokenizer)
    if args.init and (args.init / HEAD).is_file():
        load_head(model, args.init / HEAD, trainable=True)
    else:
        add_head(model, label_tokens(tokenizer, template) if args.head == "labels" else None)
    if args.freeze:
        freeze_all_but_head(model)
    judge = judge_with_head(model, tokenizer, args.max_length, args.batch_size, template)

    # Token ids
    prompt = judge.prompt
    train = run.without_cut_alike(judge.encode(train_pairs))
    held_out = judge.encode(held_out_pairs)

    def length(row):
        """Tokens of a row's sequences: one judge prompt, or a response after its prompt."""
        if args.head == "labels":
            return row.length + prompt.fixed_tokens
        longer = max(len(row.response_a), len(row.response_b))
        return longer + len(row.prompt) + prompt.fixed_tokens

    # A scalar head reads both responses, and the text loss the preferred one once more.
    sequences = 1
    if args.head == "scalar":
        sequences = 3 if args.text_weight else 2
    steps, rate, pass_tokens = run.plan(model, train, held_out, prompt, length, sequences)
    judge.batch_tokens = pass_tokens  # held-out pairs are judged in passes of this size, too

    # Loop
    optimizer, schedule = optimizer_and_schedule(model, rate, steps)
    for batch in run.steps(train, steps, model, optimizer, schedule):
        for rows, weight in run.passes(batch):
            if args.head == "labels":
                ids, last, right = judge_batch(rows, prompt, run.device)  # (B, T), (B,), (B,)
            else:
                ids, last, right = response_batch(rows, prompt, run.device)  # (2B, T), (2B,), (B,)
            hidden = hidden_states(model, ids)  # (B, T, H) or (2B, T, H)
            states = hidden[torch.arange(len(ids)), last]  # (B, H) or (2B, H)
            if isinstance(judge, ScalarJudge):
                z = judge.rewards(states).view(2, -1).T  # (B, 2): r_A, r_B
            else:
                z = judge.label_logits(states)  # (B, 2): Z_A, Z_B
            loss = reward_loss(z, right, args.label_smoothing)  # -log sigmoid(m) + eps m
            if args.text_weight:  # a mean over the tokens of the step, however it is split
                preferred = preferred_alone(rows)
                of_step = trained_tokens(prompt, preferred_alone(batch))
                fraction = trained_tokens(prompt, preferred) / of_step
                text = text_loss(model, preferred, prompt, run.device) * (fraction / weight)
                loss = loss + args.text_weight * text
            (loss * weight).backward()
            m = margins(z, right)  # (B,)
            accuracy = (m > 0).float().mean()
            run.note(weight, ids.numel(), loss=loss, accuracy=accuracy, margin=m.mean())
            if run.logs_this_step() and args.head == "labels":
                run.note(weight, label_mass=judge.label_mass(states.detach()).mean())
        run.sum_over_processes()
        gradient_norm = clip_gradients(model)
        if run.step_is_finite(gradient_norm):
            optimizer.step()
        else:
            run.skip_step(gradient_norm)
        optimizer.zero_grad()
        schedule.step()
        if held_out and run.evaluation_is_due():
            evaluation = summarise(held_out_pairs, run.in_parallel(judge.compare_encoded, held_out))
            run.log_held_out(asdict(evaluation))

    if run.evaluation:
        run.say(f"held out: {evaluation}")
    run.finish(model, tokenizer)


def text_loss(model, rows, prompt, device):
    """Negative log-likelihood of the responses, nats per token, by the output matrix."""
    ids, targets = pair_batch(rows, prompt, device)  # (B, T), (B, T)
    return chunked_pair_loss(model, hidden_states(model, ids), targets)


if __name__ == "__main__":
    with clear_errors():
        main()

"""Ours, not the paper's: stage 2 with the likelihood of stage 1 beside the verdict.

After stage 1 the model finds true responses likelier than false ones. A judge that is trained from
there may read only a part of this knowledge, as at the help desk. So ask for both. With the frozen
model pi_1 of stage 1 the margin becomes

    m = Z_w - Z_l + beta (log pi_1(y_w | x) - log pi_1(y_l | x)).

This is Bradley-Terry on the sum of the verdict and of an implicit reward, as in DPO, and step 9
after those of gram_mini/losses.py. The loss is -log sigmoid(m) + eps m as before, with one number
more to train:

    dL/dbeta = (eps - sigmoid(-m)) (log pi_1(y_w | x) - log pi_1(y_l | x)).

beta begins at 0, which is GRAM, and has a rate of its own. Where the likelihood tells nothing about
the labels, beta gains nothing by moving. One step moves it by about its rate at most, so a run of
few steps takes a higher rate. The likelihoods are computed once, before the first step.
"""

from dataclasses import asdict

from gram_mini.batches import judge_batch
from gram_mini.evaluation import summarise
from gram_mini.losses import averaged_loss, margins, reward_loss
from gram_mini.model import hidden_states, output_logits
from gram_mini.runs import defaults
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.likelihood import JointJudge, stored_beta
from gram_mini.runs.models import load_lora
from gram_mini.runs.options import add_both_orders, add_reward_options, parser, positive_float
from gram_mini.runs.record import LIKELIHOOD
from gram_mini.runs.run import Run
from gram_mini.training import clip_gradients, optimizer_and_schedule

import torch

EXAMPLES = """\
  python -m gram_mini.likelihood --init runs/pretrain --out runs/joint"""
BETA_RATE, STEPS = 0.05, 94  # chosen on the village, whose stage 2 takes these steps


def joint_options(argv=None):
    """The options: those of stage 2, and the rate of beta."""
    p = parser(__doc__, EXAMPLES)
    add_reward_options(p, out="runs/joint")
    g = p.add_argument_group("likelihood")
    add_both_orders(g)
    g.add_argument(
        "--beta-lr",
        type=positive_float,
        metavar="RATE",
        help="peak rate of beta, where differences of log pi_1 have a root mean square of 1 "
        f"(default: {BETA_RATE}; in fewer than {STEPS} steps so much more that beta can go as far, "
        f"but at most ten times as much; {BETA_RATE} where it goes on from --init)",
    )
    args = p.parse_args(argv)
    defaults.choose(args, "reward")
    if not args.init:
        p.error("--init RUN is needed: the run of stage 1 whose likelihood is asked for")
    return args


def main(argv=None):
    args = joint_options(argv)
    run = Run("reward", args)

    # Pairs
    train_pairs, held_out_pairs = run.load_split_pairs(labelled=True)

    # Model: an adapter to train, which begins as that of stage 1, and beside it that of stage 1
    torch.manual_seed(args.seed)
    model, tokenizer = run.load_checked_model()
    model = load_lora(model, args.init)
    goes_on = (args.init / LIKELIHOOD).is_dir()  # --init is a run of this script
    stage_1 = args.init / LIKELIHOOD if goes_on else args.init
    load_lora(model, stage_1, trainable=False, adapter=LIKELIHOOD)
    model.beta = torch.nn.Parameter(torch.zeros(1, device=run.device))
    template = run.judge_template(tokenizer)
    judge = JointJudge(model, tokenizer, args.max_length, args.batch_size, template)
    likelihoods = judge.likelihoods

    # Token ids, and the likelihoods
    prompt, label_ids = judge.prompt, judge.labels
    train = run.without_cut_alike(judge.encode(train_pairs))
    held_out = judge.encode(held_out_pairs)
    sequences = 2 if args.both_orders else 1  # of a pair
    steps, rate, pass_tokens = run.plan(model, train, held_out, prompt, sequences=sequences)
    judge.batch_tokens = likelihoods.pass_tokens = pass_tokens
    likelihoods.keep(train + held_out)
    if goes_on:
        model.beta.data[:], likelihoods.unit = stored_beta(args.init)
    else:  # differences of a root mean square of 1, so that one rate of beta suits all data
        log_a, log_b = likelihoods.of(train).T  # (N,), (N,)
        likelihoods.unit = float((log_a - log_b).square().mean().sqrt()) or 1.0
    model.beta_unit = likelihoods.unit  # in nats
    if args.beta_lr is None:
        args.beta_lr = BETA_RATE * (1 if goes_on else min(10, max(1, STEPS / steps)))
    run.say(f"rate of beta {args.beta_lr:.1e} (--beta-lr)")

    # Loop
    optimizer, schedule = optimizer_and_schedule(model, rate, steps, {"beta": args.beta_lr})
    for batch in run.steps(train, steps, model, optimizer, schedule):
        # Pairs drawn at random, each with y_a or y_b first
        for rows, weight in run.passes(batch):
            if args.both_orders:  # step 8 of losses.py
                rows = [order for row in rows for order in (row, row.swapped())]
            ids, last, right = judge_batch(rows, prompt, run.device)  # (B, T), (B,), (B,)
            hidden = hidden_states(model, ids)  # (B, T, H)
            verdict = hidden[torch.arange(len(rows)), last]  # (B, H)
            z = output_logits(model, verdict, label_ids)  # (B, 2): Z_A, Z_B
            log_pi = likelihoods.of(rows).to(run.device)  # (B, 2): log pi_1 of y in A, in B
            z = z + model.beta * log_pi  # so m = Z_w - Z_l + beta (log pi_1(y_w) - log pi_1(y_l))
            loss = reward_loss(z, right, args.label_smoothing)  # -log sigmoid(m) + eps m
            if args.both_orders:
                c = args.both_orders * run.fraction_left
                loss = (1 - c) * loss + c * averaged_loss(z, right, args.label_smoothing)
            (loss * weight).backward()
            m = margins(z, right)  # (B,)
            accuracy = (m > 0).float().mean()
            run.note(weight, ids.numel(), loss=loss, accuracy=accuracy, margin=m.mean())
            if run.logs_this_step():
                run.note(weight, label_mass=judge.label_mass(verdict.detach()).mean())
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
    run.say(f"beta = {model.beta.item() / model.beta_unit:.3f} per nat")
    run.finish(model, tokenizer)


if __name__ == "__main__":
    with clear_errors():
        main()

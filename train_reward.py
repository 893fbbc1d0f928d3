"""Stage 2 of GRAM: learn to say which response is better, A or B, from a little labelled data.

The loss on the two label logits is Bradley-Terry plus a regulariser, -log sigmoid(m) + eps m with
m = Z_w - Z_l; gram_mini/losses.py derives it. --both-orders replaces a part of it by our own loss.
"""

from dataclasses import asdict

from gram_mini.batches import judge_batch
from gram_mini.evaluation import summarise
from gram_mini.judge import Judge
from gram_mini.losses import averaged_loss, best_margin, margins, reward_loss
from gram_mini.model import add_lora, hidden_states, output_logits
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.models import load_lora
from gram_mini.runs.options import reward_options
from gram_mini.runs.run import Run
from gram_mini.training import clip_gradients, optimizer_and_schedule

import torch


def main(argv=None):
    args = reward_options(__doc__, argv)
    run = Run("reward", args)

    # Pairs; no prompt is in both lists
    train_pairs, held_out_pairs = run.load_split_pairs(labelled=True)

    # Model: the language model with the adapter of stage 1 or a fresh one, and the judge's question
    torch.manual_seed(args.seed)
    model, tokenizer = run.load_checked_model()
    model = load_lora(model, args.init) if args.init else add_lora(model, args.lora_rank)
    template = run.judge_template(tokenizer)
    judge = Judge(model, tokenizer, args.max_length, args.batch_size, template)

    # Token ids
    prompt, label_ids = judge.prompt, judge.labels  # the words around x, y_a and y_b; A and B
    train = run.without_cut_alike(judge.encode(train_pairs))
    held_out = judge.encode(held_out_pairs)
    sequences = 2 if args.both_orders else 1  # of a pair
    steps, rate, pass_tokens = run.plan(model, train, held_out, prompt, sequences=sequences)
    judge.batch_tokens = pass_tokens  # held-out pairs are judged in passes of this size, too

    # Loop
    optimizer, schedule = optimizer_and_schedule(model, rate, steps)
    for batch in run.steps(train, steps, model, optimizer, schedule):
        # Pairs drawn at random, each with y_a or y_b first. They take one forward pass, or several
        # whose weights add up to 1
        for rows, weight in run.passes(batch):
            if args.both_orders:  # ours, not the paper's: step 8 of losses.py
                rows = [order for row in rows for order in (row, row.swapped())]
            ids, last, right = judge_batch(rows, prompt, run.device)  # (B, T), (B,), (B,)
            hidden = hidden_states(model, ids)  # (B, T, H)
            verdict = hidden[torch.arange(len(rows)), last]  # (B, H), where A or B would come next
            z = output_logits(model, verdict, label_ids)  # (B, 2): Z_A, Z_B
            loss = reward_loss(z, right, args.label_smoothing)  # -log sigmoid(m) + eps m
            if args.both_orders:
                c = args.both_orders * run.fraction_left  # from C down to nearly 0
                loss = (1 - c) * loss + c * averaged_loss(z, right, args.label_smoothing)
            (loss * weight).backward()
            m = margins(z, right)  # (B,): Z_w - Z_l
            accuracy = (m > 0).float().mean()
            run.note(weight, ids.numel(), loss=loss, accuracy=accuracy, margin=m.mean())
            if run.logs_this_step():  # step 7 of losses.py; it needs all logits
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
            compared = run.in_parallel(judge.compare_encoded, held_out)  # in both orders
            evaluation = summarise(held_out_pairs, compared)
            run.log_held_out(asdict(evaluation))

    if run.evaluation:
        best = best_margin(args.label_smoothing)
        run.say(f"held out: {evaluation} (best margin for certain labels: {best:.2f})")
    run.finish(model, tokenizer)


if __name__ == "__main__":
    with clear_errors():
        main()

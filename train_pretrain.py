"""Stage 1 of GRAM: learn to generate a pair of responses, from pairs that nobody labelled.

The loss is -log pi(y_a, y_b | x): the next-token loss on both responses and the markers around
them, after the prompt x.
Any preference data will do: labels are dropped, and which response comes first is drawn at random.
"""

from gram_mini.batches import encode_pairs, pair_batch
from gram_mini.evaluation import pair_losses
from gram_mini.model import add_lora, hidden_states
from gram_mini.prompts import pair_prompt
from gram_mini.runs.chunked import chunked_pair_loss
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.options import pretrain_options
from gram_mini.runs.run import Run
from gram_mini.training import clip_gradients, optimizer_and_schedule

import torch


def main(argv=None):
    args = pretrain_options(__doc__, argv)
    run = Run("pretrain", args)

    # Pairs; no prompt is in both lists
    train_pairs, held_out_pairs = run.load_split_pairs(labelled=False)

    # Model: the language model that becomes a judge in stage 2, with a fresh adapter
    torch.manual_seed(args.seed)
    model, tokenizer = run.load_checked_model()
    model = add_lora(model, args.lora_rank)

    # Token ids
    prompt = pair_prompt(tokenizer)  # the fixed words around x, y_a and y_b
    train = encode_pairs(train_pairs, prompt, tokenizer, args.max_length)
    held_out = encode_pairs(held_out_pairs, prompt, tokenizer, args.max_length)
    steps, rate, pass_tokens = run.plan(model, train, held_out, prompt)

    # Loop
    optimizer, schedule = optimizer_and_schedule(model, rate, steps)
    for batch in run.steps(train, steps, model, optimizer, schedule):
        # Pairs drawn at random, each with y_a or y_b first. They take one forward pass, or several
        # whose weights add up to 1
        for rows, weight in run.passes(batch):
            # The target is the next token if it is of y_a, y_b or a marker around them, else -100
            ids, targets = pair_batch(rows, prompt, run.device)  # (B, T), (B, T)
            hidden = hidden_states(model, ids)  # (B, T, H)
            # -log pi(y_a, y_b | x) per token: losses.pair_loss, with less memory
            loss = chunked_pair_loss(model, hidden, targets)
            (loss * weight).backward()
            run.note(weight, ids.numel(), loss=loss)
        run.sum_over_processes()
        gradient_norm = clip_gradients(model)
        if run.step_is_finite(gradient_norm):
            optimizer.step()
        else:
            run.skip_step(gradient_norm)
        optimizer.zero_grad()
        schedule.step()
        if held_out and run.evaluation_is_due():
            losses = run.in_parallel(
                lambda rows: pair_losses(model, rows, prompt, pass_tokens), held_out
            )
            nats = sum(of_pair for of_pair, _ in losses)
            tokens = sum(tokens for _, tokens in losses)
            run.log_held_out({"loss": nats / tokens})

    if run.evaluation:
        run.say(f"held-out loss {run.evaluation['loss']:.3f} nats per token")
    run.finish(model, tokenizer)


if __name__ == "__main__":
    with clear_errors():
        main()

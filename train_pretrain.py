"""Stage 1 of GRAM: learn to generate a pair of responses, from pairs that nobody labelled.

The loss is -log pi(y_a, y_b | x): the next-token loss on both responses and the markers around
them, after the prompt x.
Any preference data will do: labels are dropped, and which response comes first is drawn at random.
"""

from gram_mini.batches import IGNORED, encode_pairs, pair_batch, trained_tokens
from gram_mini.chunked import chunked_pair_loss
from gram_mini.errors import clear_errors
from gram_mini.evaluation import pair_losses
from gram_mini.model import add_lora, hidden_states, load_model, load_tokenizer, output_head
from gram_mini.pairs import split_by_prompt
from gram_mini.prompts import label_tokens, pair_prompt
from gram_mini.runs.options import pretrain_options
from gram_mini.runs.run import Run
from gram_mini.training import clip_gradients, draw_batches, optimizer_and_schedule

import torch


def main(argv=None):
    args = pretrain_options(__doc__, argv)
    run = Run("pretrain", args)

    # Pairs
    pairs = run.load_pairs(labelled=False)
    train_pairs, held_out_pairs = split_by_prompt(pairs, args.held_out, args.seed)

    # Judge: the model that will be one in stage 2, with a fresh adapter
    tokenizer = load_tokenizer(run.backbone)
    prompt = pair_prompt(tokenizer)  # the fixed words around x, y_a and y_b
    labels = label_tokens(tokenizer)  # for stage 2: a model without them must fail now
    torch.manual_seed(args.seed)
    model = load_model(run.backbone, args.bits, run.device, args.gradient_checkpointing)
    run.check(model, tokenizer)
    model = add_lora(model, args.lora_rank)

    # Token ids
    train = encode_pairs(train_pairs, prompt, tokenizer, args.max_length)
    held_out = encode_pairs(held_out_pairs, prompt, tokenizer, args.max_length)
    run.describe(train, held_out, prompt)

    # Loop
    steps = run.number_of_steps(len(train))
    optimizer, schedule = optimizer_and_schedule(model, args.lr, steps)
    sizes = args.batch_size, args.batch_tokens
    batches = draw_batches(train, run.rows_per_step, args.seed)  # y_a or y_b first, at random
    for batch in run.steps(batches, steps, model, optimizer, schedule):
        for part in run.passes(batch):  # the step in one forward pass, or in several
            ids, targets = pair_batch(part, prompt, run.device)  # (B, T), (B, T): the next token
            hidden = hidden_states(model, ids)  # (B, T, H)
            trained = targets != IGNORED  # (B, T): where a token of y_a, y_b or a marker comes next
            states, following = hidden[trained], targets[trained]  # (N, H), (N,)
            loss = chunked_pair_loss(states, following, output_head(model))  # -log pi(y_a, y_b | x)
            share = trained_tokens(prompt, part) / trained_tokens(prompt, batch)  # mean over tokens
            (loss * share).backward()
            run.note(share, ids.numel(), loss=loss)
        if run.finite(clip_gradients(model)):
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if held_out and run.evaluation_due():
            losses = run.in_shares(lambda rows: pair_losses(model, rows, prompt, *sizes), held_out)
            nats, tokens = map(sum, zip(*losses))
            run.log_held_out({"loss": nats / tokens})

    if run.evaluation:
        run.say(f"held-out loss {run.evaluation['loss']:.3f} nats per token")
    run.finish(model, tokenizer, labels)


if __name__ == "__main__":
    with clear_errors():
        main()

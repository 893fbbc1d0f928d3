"""Stage 1 of GRAM: learn to generate the pair of responses, -log pi(y_a, y_b | x), from pairs that nobody labelled.

Any preference data will do: labels are dropped, and which response comes first is drawn at random.
"""

import torch

from gram_mini.batches import IGNORED, encode_pairs, pair_batch, trained_tokens
from gram_mini.chunked import chunked_pair_loss
from gram_mini.errors import clear_errors
from gram_mini.evaluation import pair_losses
from gram_mini.model import add_lora, hidden_states, load_model, load_tokenizer, output_head
from gram_mini.pairs import split_by_prompt
from gram_mini.prompts import label_tokens, pair_prompt
from gram_mini.reading.load import load_pairs
from gram_mini.runs.options import pretrain_options, reading
from gram_mini.runs.run import Run
from gram_mini.training import clip_gradients, draw_batches, number_of_steps, optimizer_and_schedule


def main(argv=None):
    args = pretrain_options(__doc__, argv)
    run = Run("pretrain", args)

    # Pairs
    data = load_pairs(args.data, labelled=False, seed=args.seed, **reading(args))
    run.say(data.summary())
    train_pairs, held_out_pairs = split_by_prompt(data.pairs, args.held_out, args.seed)

    # Judge: no judge yet, but the model that will be one, with an adapter to train
    tokenizer = load_tokenizer(run.backbone)
    prompt, labels = pair_prompt(tokenizer), label_tokens(tokenizer)
    torch.manual_seed(args.seed)
    model = load_model(run.backbone, args.bits, run.device, args.gradient_checkpointing)
    model = add_lora(model, args.lora_rank)

    # Token ids
    train = encode_pairs(train_pairs, prompt, tokenizer, args.max_length)
    held_out = encode_pairs(held_out_pairs, prompt, tokenizer, args.max_length)
    run.describe(data, train, held_out, prompt)

    # Loop
    steps = number_of_steps(len(train), run.rows_per_step, args.epochs, args.steps)
    optimizer, schedule = optimizer_and_schedule(model, args.lr, steps)
    batches = draw_batches(
        train, run.rows_per_step, args.seed
    )  # the order of the responses is drawn too
    for batch in run.steps(batches, steps, model, optimizer, schedule):
        for part in run.passes(batch):  # all at once, or as many rows as fit
            ids, targets = pair_batch(
                part, prompt, run.device
            )  # (B, T), (B, T): the next token, IGNORED on x
            hidden = hidden_states(model, ids)  # (B, T, H)
            pair = targets != IGNORED  # (B, T): where a token of y_a, y_b or a marker follows
            loss = chunked_pair_loss(
                hidden[pair], targets[pair], output_head(model)
            )  # -log pi(y_a, y_b | x) per token
            share = trained_tokens(prompt, part) / trained_tokens(
                prompt, batch
            )  # the step's loss is a mean over tokens
            (loss * share).backward()
            run.note(share, ids.numel(), loss=loss)
        if run.finite(clip_gradients(model)):
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if held_out and run.evaluation_due():
            judged = run.in_shares(
                lambda rows: pair_losses(model, rows, prompt, args.batch_size, args.batch_tokens),
                held_out,
            )
            run.log_held_out(
                {"loss": sum(loss for loss, _ in judged) / sum(tokens for _, tokens in judged)}
            )

    if run.evaluation:
        run.say(f"held-out loss {run.evaluation['loss']:.3f} nats per token")
    run.finish(model, tokenizer, labels)


if __name__ == "__main__":
    with clear_errors():
        main()

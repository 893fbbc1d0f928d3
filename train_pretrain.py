"""Stage 1 of GRAM: learn to generate the pair of responses, -log pi(y_a, y_b | x), from pairs nobody labelled.

Any preference data will do: labels are dropped, and which response comes first is drawn at random.
"""

import time

import torch
from tqdm import tqdm

from gram_mini import options
from gram_mini.backbone import add_lora, checkpoint_gradients, hidden_states, load_backbone, load_tokenizer, output_head
from gram_mini.batches import IGNORED, describe, encode_pairs, lengths, pair_batch, split_by_tokens, trained_tokens
from gram_mini.data import load_pairs, split_by_prompt
from gram_mini.errors import clear_errors
from gram_mini.log import Log
from gram_mini.losses import pair_loss_in_chunks
from gram_mini.prompts import label_tokens, pair_prompt
from gram_mini.run_folder import RunFolder, recipe, run_record
from gram_mini.training import (
    NonFinite,
    add_up,
    batches_forever,
    clip_gradients,
    forward_passes,
    in_shares,
    number_of_steps,
    optimizer_and_schedule,
    start_processes,
    stopping_after_the_step,
)

EXAMPLES = """\
  python train_pretrain.py                                      # the embedded village, 2 minutes on 2 CPU cores
  python train_pretrain.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --lr 1e-4 --batch-size 8"""


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    options.add_training_options(
        parser, out="runs/pretrain", lr=3e-3, epochs=2, held_out=0.0, lora_rank=32,
        data_help="pairs of responses: file, folder, hub name, or 'world' for the embedded village",
    )  # fmt: skip
    args = parser.parse_args(argv)
    run = RunFolder(args.out, args.overwrite, args.resume)
    accelerator, device = start_processes(args.device, args.report_to, run.partial)

    # Data -> prompts -> token ids
    tokenizer = load_tokenizer(args.model)
    data = load_pairs(args.data, labelled=False, seed=args.seed, **options.reading(args))
    accelerator.print(data.summary())
    prompt, labels = pair_prompt(tokenizer), label_tokens(tokenizer)
    train_pairs, held_out_pairs = split_by_prompt(data.pairs, args.held_out, args.seed)
    train = encode_pairs(train_pairs, prompt, tokenizer, args.max_length)
    held_out = encode_pairs(held_out_pairs, prompt, tokenizer, args.max_length)
    length = lengths(train + held_out, prompt)
    accelerator.print(f"{len(train)} pairs to train on, {len(held_out)} held out; {describe(length, args.max_length)}")

    # Backbone and adapter
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model, args.bits, device)
    if args.gradient_checkpointing:
        checkpoint_gradients(backbone)
    model = add_lora(backbone, args.lora_rank)
    per_step = args.batch_size * args.grad_accum * accelerator.num_processes
    steps = number_of_steps(len(train), per_step, args.epochs, args.steps)
    optimizer, schedule = optimizer_and_schedule(model, args.lr, steps)

    def size(row):
        return row.length + prompt.fixed_tokens

    def loss_on(rows, swaps):
        batch = pair_batch(rows, swaps, prompt, tokenizer.pad_token_id)
        hidden = hidden_states(model, batch["input_ids"].to(device))  # (B, T, H)
        targets = batch["targets"].to(device)  # (B, T)
        trained = targets != IGNORED
        # Only positions that predict a trained token ever become logits: (B, T, H) -> (N, H) -> (n, V), a chunk at a time
        return pair_loss_in_chunks(hidden[trained], targets[trained], output_head(model)), batch["input_ids"].numel()

    @torch.no_grad()
    def held_out_loss():
        def losses(chunks):
            return [loss_on(chunk, [False] * len(chunk))[0].item() for chunk in tqdm(chunks, delay=2, leave=False)]

        model.eval()
        parts = split_by_tokens([size(row) for row in held_out], args.batch_tokens, most=args.batch_size)
        chunks = [held_out[part] for part in parts]
        tokens = [sum(trained_tokens(prompt, row) for row in chunk) for chunk in chunks]
        total = sum(loss * n for loss, n in zip(in_shares(accelerator, chunks, losses), tokens))
        model.train()
        return total / sum(tokens)

    # The loop, from the beginning or from a checkpoint
    if accelerator.is_main_process:
        run.start()
    of_run = recipe(args, data, model, accelerator)
    done = run.load(accelerator, of_run, model, optimizer, schedule)
    log = Log(run.partial / "log.csv", args, steps, accelerator, done["step"], done["log"])
    non_finite = NonFinite(args.skip_limit, data.source, done["skipped"])
    batches = batches_forever(train, per_step, args.seed, skip=done["step"])
    final = None
    model.train()
    progress = tqdm(
        range(done["step"] + 1, steps + 1), desc="stage 1", mininterval=1, initial=done["step"], total=steps,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    with stopping_after_the_step(accelerator):
        for step in progress:
            rows, swaps = next(batches)  # what all forward passes, in all processes, see in this step
            in_step, step_loss = sum(trained_tokens(prompt, row) for row in rows), 0.0
            for some, their_swaps in forward_passes(rows, swaps, size, args.batch_size, args.batch_tokens, accelerator):
                loss, tokens = loss_on(some, their_swaps)
                share = sum(trained_tokens(prompt, row) for row in some) / in_step  # the step's loss is a mean over tokens
                (loss * share).backward()
                step_loss += loss.detach() * share
                log.note(tokens, share, loss=loss)
            step_loss = add_up(accelerator, model, step_loss)
            if taken := non_finite.allows(step_loss, clip_gradients(model), rows):
                optimizer.step()
            optimizer.zero_grad()
            if means := log.train(step, lr=schedule.get_last_lr()[0], taken=taken, skipped=non_finite.skipped):
                progress.set_postfix(loss=f"{means['loss']:.3f}")
            schedule.step()
            if held_out and (step == steps or step % max(1, steps // 5) == 0):
                began = time.perf_counter()
                final = held_out_loss()
                log.held_out(step, time.perf_counter() - began, loss=final)
            stop = accelerator.check_trigger()
            if step < steps and (stop or step % args.save_every == 0):
                run.save(accelerator, step, of_run, model, optimizer, schedule, log, non_finite.skipped)
                if stop:
                    accelerator.end_training()
                    raise run.interrupted(step)

    accelerator.end_training()
    if accelerator.is_main_process:
        results = {"steps": steps, "skipped": non_finite.skipped, **({"held_out_loss": final} if held_out else {})}
        run.finish(model, tokenizer, run_record("pretrain", args, data, model, labels, lengths=length, **results))
        if held_out:
            print(f"held-out loss {final:.3f} nats per token")
        print(f"wrote {args.out}: adapter, tokenizer, run.json, log.csv, plot.png")


if __name__ == "__main__":
    with clear_errors():
        main()

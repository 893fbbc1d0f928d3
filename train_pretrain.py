"""Stage 1 of GRAM: learn to generate the pair of responses, -log pi(y_a, y_b | x), from pairs nobody labelled.

Any preference data will do: labels are dropped, and which response comes first is drawn at random.
"""

import time

import torch
from tqdm import tqdm

from gram_mini import options
from gram_mini.backbone import add_lora, hidden_states, load_backbone, load_tokenizer, output_logits, pick_device
from gram_mini.batches import IGNORED, encode_pairs, pair_batch
from gram_mini.data import load_pairs, split_by_prompt
from gram_mini.errors import clear_errors
from gram_mini.losses import pair_loss
from gram_mini.prompts import label_tokens, pair_prompt
from gram_mini.training import (
    Log,
    RunFolder,
    batches_forever,
    clip_gradients,
    number_of_steps,
    optimizer_and_schedule,
    run_record,
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
    device = pick_device(args.device)
    run = RunFolder(args.out, args.overwrite)

    # Data -> prompts -> token ids
    data = load_pairs(
        args.data, labelled=False, limit=args.limit, split=args.split, seed=args.seed,
        subset=args.subset, streaming=args.streaming, on_bad_row=args.on_bad_row, pairs=args.pairs,
    )  # fmt: skip
    print(data.summary())
    tokenizer = load_tokenizer(args.model)
    prompt, labels = pair_prompt(tokenizer), label_tokens(tokenizer)
    train_pairs, held_out_pairs = split_by_prompt(data.pairs, args.held_out, args.seed)
    train = encode_pairs(train_pairs, prompt, tokenizer, args.max_length)
    held_out = encode_pairs(held_out_pairs, prompt, tokenizer, args.max_length)
    cut = sum(row.truncated for row in train + held_out)
    print(f"{len(train)} pairs to train on, {len(held_out)} held out; {cut} cut to {args.max_length} tokens")

    # Backbone and adapter
    torch.manual_seed(args.seed)
    model = add_lora(load_backbone(args.model, args.bits, device), args.lora_rank)
    steps = number_of_steps(len(train), args.batch_size, args.grad_accum, args.epochs, args.steps)
    optimizer, schedule = optimizer_and_schedule(model, args.lr, steps)
    log = Log(run.start() / "log.csv", args.log_every, steps)

    def loss_on(rows, swaps):
        batch = pair_batch(rows, swaps, prompt, tokenizer.pad_token_id)
        hidden = hidden_states(model, batch["input_ids"].to(device))  # (B, T, H)
        targets = batch["targets"].to(device)  # (B, T)
        trained = targets != IGNORED
        # Only positions that predict a trained token ever become logits: (B, T, H) -> (N, H) -> (N, V)
        return pair_loss(output_logits(model, hidden[trained]), targets[trained]), batch["input_ids"].numel()

    @torch.no_grad()
    def held_out_loss():
        model.eval()
        chunks = [held_out[i : i + args.batch_size] for i in range(0, len(held_out), args.batch_size)]
        losses = [(loss_on(chunk, [False] * len(chunk))[0].item(), len(chunk)) for chunk in tqdm(chunks, delay=2, leave=False)]
        model.train()
        return sum(loss * size for loss, size in losses) / len(held_out)

    # The loop
    final = None
    model.train()
    batches = batches_forever(train, args.batch_size, args.seed)
    progress = tqdm(range(1, steps + 1), desc="stage 1", mininterval=1)
    for step in progress:
        for _ in range(args.grad_accum):
            loss, tokens = loss_on(*next(batches))
            (loss / args.grad_accum).backward()
            log.note(tokens, loss=loss)
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        if means := log.train(step, lr=schedule.get_last_lr()[0]):
            progress.set_postfix(loss=f"{means['loss']:.3f}")
        schedule.step()
        if held_out and (step == steps or step % max(1, steps // 5) == 0):
            began = time.perf_counter()
            final = held_out_loss()
            log.held_out(step, time.perf_counter() - began, loss=final)

    results = {"held_out_loss": final} if held_out else {}
    run.finish(model, tokenizer, run_record("pretrain", args, data, model, labels, truncated=cut, steps=steps, **results))
    if held_out:
        print(f"held-out loss {final:.3f} nats per token")
    print(f"wrote {args.out}: adapter, tokenizer, run.json, log.csv, plot.png")


if __name__ == "__main__":
    with clear_errors():
        main()

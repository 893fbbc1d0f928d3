"""Stage 2 of GRAM: learn to say which response is better, A or B, from a little labelled data.

The loss on the two label logits is Bradley-Terry plus a regulariser, -log sigmoid(m) + eps m with
m = Z_w - Z_l; gram_mini/losses.py derives it step by step.
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from gram_mini import options
from gram_mini.backbone import (
    add_lora,
    hidden_states,
    load_backbone,
    load_lora,
    load_tokenizer,
    output_logits,
    pick_device,
)
from gram_mini.batches import encode_pairs, judge_batch
from gram_mini.data import load_pairs, split_by_prompt
from gram_mini.errors import UserError, clear_errors
from gram_mini.evaluation import evaluate
from gram_mini.losses import best_margin, label_mass, margins, reward_loss
from gram_mini.reward_model import RewardModel
from gram_mini.training import (
    Log,
    RunFolder,
    batches_forever,
    check_init,
    clip_gradients,
    number_of_steps,
    optimizer_and_schedule,
    run_record,
)

EXAMPLES = """\
  python train_reward.py --init runs/pretrain                   # the embedded village, 40 seconds on 2 CPU cores
  python train_reward.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --lr 1e-4 --batch-size 8"""


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    options.add_training_options(
        parser, out="runs/reward", lr=1e-3, epochs=2, held_out=0.05, lora_rank=None,
        data_help="labelled pairs: file, folder, hub name, or 'world' for the embedded village",
    )  # fmt: skip
    group = parser.add_argument_group("stage 2")
    group.add_argument(
        "--init", type=Path, metavar="RUN", help="run to start from, of stage 1 as a rule (default: the plain backbone)"
    )
    group.add_argument(
        "--label-smoothing", type=options.smoothing, default=0.05, metavar="EPS",
        help="eps of the loss above, 0 <= eps < 0.5; half of torch's label_smoothing: 0.05 is the official 0.1 there",
    )  # fmt: skip
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    run = RunFolder(args.out, args.overwrite)
    if args.init and args.init.resolve() == args.out.resolve():
        raise UserError(f"--out {args.out}: is the run given as --init; give another folder")
    args.lora_rank = check_init(args.init, args.model, args.lora_rank) if args.init else args.lora_rank or 32

    # Data -> prompts -> token ids
    data = load_pairs(
        args.data, labelled=True, limit=args.limit, split=args.split, seed=args.seed,
        subset=args.subset, streaming=args.streaming, on_bad_row=args.on_bad_row, pairs=args.pairs,
    )  # fmt: skip
    print(data.summary())
    tokenizer = load_tokenizer(args.model)
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model, args.bits, device)
    model = load_lora(backbone, args.init, trainable=True) if args.init else add_lora(backbone, args.lora_rank)
    judge = RewardModel(model, tokenizer, args.max_length, args.batch_size)
    train_pairs, held_out = split_by_prompt(data.pairs, args.held_out, args.seed)
    train = encode_pairs(train_pairs, judge.prompt, tokenizer, args.max_length)
    cut = sum(row.truncated for row in train + encode_pairs(held_out, judge.prompt, tokenizer, args.max_length))
    print(f"{len(train)} pairs to train on, {len(held_out)} held out; {cut} cut to {args.max_length} tokens")

    # The loop
    steps = number_of_steps(len(train), args.batch_size, args.grad_accum, args.epochs, args.steps)
    optimizer, schedule = optimizer_and_schedule(model, args.lr, steps)
    log = Log(run.start() / "log.csv", args.log_every, steps)
    final = None
    model.train()
    batches = batches_forever(train, args.batch_size, args.seed)
    progress = tqdm(range(1, steps + 1), desc="stage 2", mininterval=1)
    for step in progress:
        for _ in range(args.grad_accum):
            batch = judge_batch(*next(batches), judge.prompt, tokenizer.pad_token_id)
            hidden = hidden_states(model, batch["input_ids"].to(device))  # (B, T, H)
            at_end = hidden[torch.arange(len(hidden)), batch["last"]]  # (B, H)
            logits = output_logits(model, at_end, judge.labels)  # (B, 2): two rows of the output matrix
            labels = batch["labels"].to(device)  # (B,)
            loss = reward_loss(logits, labels, args.label_smoothing)
            (loss / args.grad_accum).backward()
            m = margins(logits, labels)  # (B,)
            log.note(batch["input_ids"].numel(), loss=loss, accuracy=(m > 0).float().mean(), margin=m.mean())
        if log.due(step):  # the mass on {A, B} needs the whole output matrix, so only now and then
            log.note(0, label_mass=label_mass(output_logits(model, at_end.detach()), judge.labels).mean())
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        if means := log.train(step, lr=schedule.get_last_lr()[0]):
            progress.set_postfix(loss=f"{means['loss']:.3f}", accuracy=f"{means['accuracy']:.2f}")
        schedule.step()
        if held_out and (step == steps or step % max(1, steps // 5) == 0):
            began = time.perf_counter()
            final = evaluate(judge, held_out, progress="held out")
            log.held_out(step, time.perf_counter() - began, **asdict(final))

    results = {"held_out": asdict(final)} if final else {}
    run.finish(model, tokenizer, run_record("reward", args, data, model, judge.labels, truncated=cut, steps=steps, **results))
    if final:
        print(
            f"held out: accuracy {final.accuracy:.3f} ± {final.interval:.3f}, loss {final.loss:.3f}, position gap "
            f"{final.position_gap:.3f}, mean margin {final.margin:.2f} (were the labels certain, the best were "
            f"{best_margin(args.label_smoothing):.2f})"
        )
    print(f"wrote {args.out}: adapter, tokenizer, run.json, log.csv, plot.png")


if __name__ == "__main__":
    with clear_errors():
        main()

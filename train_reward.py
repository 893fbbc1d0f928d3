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
    add_head,
    add_lora,
    checkpoint_gradients,
    freeze_all_but_head,
    hidden_states,
    load_backbone,
    load_lora,
    load_tokenizer,
    local_folder,
    output_head,
)
from gram_mini.batches import IGNORED, chosen_batch, describe, lengths
from gram_mini.data import load_pairs, split_by_prompt
from gram_mini.errors import UserError, clear_errors
from gram_mini.evaluation import summarise
from gram_mini.log import Log
from gram_mini.losses import best_margin, margins, pair_loss_in_chunks, reward_loss
from gram_mini.prompts import JUDGE, label_tokens, read_template
from gram_mini.reward_model import RewardModel
from gram_mini.run_folder import RunFolder, check_init, recipe, run_record
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
    group.add_argument(
        "--head", choices=("labels", "scalar"), default="labels",
        help="what is compared: the logits of A and B after the judge prompt, or rewards that a scalar head gives each response",
    )  # fmt: skip
    group.add_argument(
        "--freeze", action="store_true", help="train the head alone: the scalar one, or a copy of the two label rows"
    )
    group.add_argument(
        "--text-weight", type=options.weight, default=0.0, metavar="W",
        help="scalar head: add W times the negative log-likelihood of the preferred response, which keeps the hidden states",
    )  # fmt: skip
    options.add_judge_template(group, default="that of --init, else the one in gram_mini/prompts.py")
    args = parser.parse_args(argv)
    if args.text_weight and args.head != "scalar":
        parser.error("--text-weight goes with --head scalar")
    run = RunFolder(args.out, args.overwrite, args.resume)
    accelerator, device = start_processes(args.device, args.report_to, run.partial)
    if args.init and args.init.resolve() == args.out.resolve():
        raise UserError(f"--out {args.out}: is the run given as --init; give another folder")
    start = check_init(args.init, args.model, args.lora_rank, args.head) if args.init else None
    args.lora_rank = start["options"]["lora_rank"] if start else args.lora_rank or 32
    revision = start["backbone"]["fingerprint"] if start and local_folder(args.model) is None else None  # the hub's may be newer
    template = start["prompt"]["judge"] if start else JUDGE
    if args.judge_template:
        template = read_template(args.judge_template)

    # Data -> prompts -> token ids
    tokenizer = load_tokenizer(args.model, revision)
    data = load_pairs(args.data, labelled=True, seed=args.seed, **options.reading(args))
    accelerator.print(data.summary())
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.model, args.bits, device, revision)
    if args.gradient_checkpointing:
        checkpoint_gradients(backbone)
    model = load_lora(backbone, args.init, trainable=True) if args.init else add_lora(backbone, args.lora_rank)
    if (args.head == "scalar" or args.freeze) and not hasattr(model, "head"):
        add_head(model, None if args.head == "scalar" else label_tokens(tokenizer, template))
    if args.freeze:
        freeze_all_but_head(model)
    judge = RewardModel(model, tokenizer, args.max_length, args.batch_size, template, args.batch_tokens)
    train_pairs, held_out = split_by_prompt(data.pairs, args.held_out, args.seed)
    train = judge.encode(train_pairs)
    held_out_rows = judge.encode(held_out)
    length = lengths(train + held_out_rows, judge.prompt)
    accelerator.print(f"{len(train)} pairs to train on, {len(held_out)} held out; {describe(length, args.max_length)}")

    def size(row):
        return judge.pass_tokens(row) * (1.5 if args.text_weight else 1)  # the text loss sees one response once more

    def text_loss(rows):
        """Negative log-likelihood of the preferred responses, per token, by the backbone's own output matrix."""
        batch = chosen_batch(rows, judge.prompt, tokenizer.pad_token_id)
        hidden, targets = hidden_states(model, batch["input_ids"].to(device)), batch["targets"].to(device)  # (B, T, H), (B, T)
        trained = targets != IGNORED
        return pair_loss_in_chunks(hidden[trained], targets[trained], output_head(model))

    # The loop, from the beginning or from a checkpoint
    per_step = args.batch_size * args.grad_accum * accelerator.num_processes
    steps = number_of_steps(len(train), per_step, args.epochs, args.steps)
    optimizer, schedule = optimizer_and_schedule(model, args.lr, steps)
    if accelerator.is_main_process:
        run.start()
    of_run = recipe(args, data, model, accelerator, template)
    done = run.load(accelerator, of_run, model, optimizer, schedule)
    log = Log(run.partial / "log.csv", args, steps, accelerator, done["step"], done["log"])
    non_finite = NonFinite(args.skip_limit, data.source, done["skipped"])
    batches = batches_forever(train, per_step, args.seed, skip=done["step"])
    final = None
    model.train()
    progress = tqdm(
        range(done["step"] + 1, steps + 1), desc="stage 2", mininterval=1, initial=done["step"], total=steps,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    with stopping_after_the_step(accelerator):
        for step in progress:
            rows, swaps = next(batches)  # what all forward passes, in all processes, see in this step
            step_loss = 0.0
            for some, their_swaps in forward_passes(rows, swaps, size, args.batch_size, args.batch_tokens, accelerator):
                logits, at_end, batch = judge.label_logits(some, their_swaps)  # (B, 2), (B, H)
                labels = batch["labels"].to(device)  # (B,)
                loss = reward_loss(logits, labels, args.label_smoothing)
                if args.text_weight:
                    loss = loss + args.text_weight * text_loss(some)
                share = len(some) / len(rows)  # the step's loss is a mean over its pairs
                (loss * share).backward()
                step_loss += loss.detach() * share
                m = margins(logits, labels)  # (B,)
                log.note(batch["input_ids"].numel(), share, loss=loss, accuracy=(m > 0).float().mean(), margin=m.mean())
                if log.due(step) and not judge.scalar:  # this needs the whole output matrix, so only now and then
                    log.note(0, share, label_mass=judge.label_mass(at_end.detach()).mean())
            step_loss = add_up(accelerator, model, step_loss)
            if taken := non_finite.allows(step_loss, clip_gradients(model), rows):
                optimizer.step()
            optimizer.zero_grad()
            if means := log.train(step, lr=schedule.get_last_lr()[0], taken=taken, skipped=non_finite.skipped):
                progress.set_postfix(loss=f"{means['loss']:.3f}", accuracy=f"{means['accuracy']:.2f}")
            schedule.step()
            if held_out and (step == steps or step % max(1, steps // 5) == 0):
                began = time.perf_counter()
                compared = in_shares(accelerator, held_out_rows, lambda mine: judge.compare_encoded(mine, progress="held out"))
                final = summarise(held_out, compared)
                log.held_out(step, time.perf_counter() - began, **asdict(final))
            stop = accelerator.check_trigger()
            if step < steps and (stop or step % args.save_every == 0):
                run.save(accelerator, step, of_run, model, optimizer, schedule, log, non_finite.skipped)
                if stop:
                    accelerator.end_training()
                    raise run.interrupted(step)

    accelerator.end_training()
    if accelerator.is_main_process:
        results = {"steps": steps, "skipped": non_finite.skipped, **({"held_out": asdict(final)} if final else {})}
        run.finish(model, tokenizer, run_record("reward", args, data, model, judge.labels, template, lengths=length, **results))
        if final:
            print(
                f"held out: {final.pairs} pairs, accuracy {final.accuracy:.3f} ± {final.interval:.3f}, loss {final.loss:.3f}, position gap "
                f"{final.position_gap:.3f}, mean margin {final.margin:.2f} (best for certain labels: "
                f"{best_margin(args.label_smoothing):.2f})"
            )
        print(f"wrote {args.out}: adapter, tokenizer, run.json, log.csv, plot.png")


if __name__ == "__main__":
    with clear_errors():
        main()

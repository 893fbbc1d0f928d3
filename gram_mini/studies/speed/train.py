"""Our training step against the usual one, in turns on the same batches of one process.

The usual step is what SFT trainers take: transformers' own forward pass with labels, so logits of
the whole sequence in float32, and a cross-entropy over those tokens that count (stage 1: the pair;
stage 2: the one token of the verdict). Both steps take the same adapted model, the same pairs, and
AdamW. --peer trl adds steps of TRL's SFTTrainer on the same sequences and, in stage 2, of its
RewardTrainer, which reads each response by itself.

For each stage: pairs and tokens per second (medians over --rounds turns; padding is not counted),
how many times as fast ours is (median and range of the turns' ratios), the peak of memory (what the
model holds plus what a step allocates), and what share our step reaches of the machine's own peak
in multiplying matrices.

Weights are random: they change neither speed nor memory. Lengths are those of --data, a token for
every four characters; without it they are drawn from log-normal distributions (LENGTHS).
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time

from gram_mini.batches import (
    IGNORED,
    EncodedPair,
    batch_order,
    join,
    pad,
    pair_batch,
    right_labels,
    trained_tokens,
)
from gram_mini.errors import UserError
from gram_mini.model import half_precision
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.heads import response_segments
from gram_mini.runs.models import (
    VILLAGE,
    checkpoint_gradients,
    compute_dtype,
    load_tokenizer,
    quantization,
)
from gram_mini.runs.processes import pick_device
from gram_mini.studies.speed.common import (
    GIB,
    LABELS,
    PIECES,
    SHAPES,
    Shape,
    add_model_options,
    build,
    lengths_of,
    loss_of,
    machine,
    matrix_peak,
    peak_bytes,
    rows_of,
    seconds,
    spread,
    synchronize,
    table,
    take_step,
)
from gram_mini.training import optimizer_and_schedule

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, PrinterCallback, TrainerCallback

EXAMPLES = """\
  # the mid shape, drawn lengths: 2 minutes on 2 CPU cores
  python -m gram_mini.studies.speed.train
  # lengths of a file, and against TRL (pip install trl)
  python -m gram_mini.studies.speed.train --data pairs.jsonl --peer trl
  # on a GPU
  python -m gram_mini.studies.speed.train --shape Qwen2.5-0.5B --bits 4 \\
      --batch-size 8 --max-length 1024"""

STAGES = ("pretrain", "reward")
TRAINERS = {"pretrain": ("SFTTrainer",), "reward": ("SFTTrainer", "RewardTrainer")}


# ---- the usual way -------------------------------------------------------------------


def usual_batch(stage: str, rows: list[EncodedPair]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T) for transformers, which shifts the labels."""
    sequences = [join(PIECES[stage], row) for row in rows]
    if stage == "pretrain":
        _, targets = pair_batch(rows, PIECES[stage])  # (B, T)
        labels = torch.cat([torch.full((len(rows), 1), IGNORED), targets[:, :-1]], dim=1)
    else:
        verdicts = [LABELS[label] for label in right_labels(rows)]
        targets = [[IGNORED] * len(ids) + [verdict] for ids, verdict in zip(sequences, verdicts)]
        labels = pad(targets, IGNORED)
        sequences = [ids + [verdict] for ids, verdict in zip(sequences, verdicts)]
    mask = pad([[1] * len(ids) for ids in sequences], 0)
    return {"input_ids": pad(sequences, 0), "attention_mask": mask, "labels": labels}


def usual_loss(model, stage: str, rows: list[EncodedPair]) -> torch.Tensor:
    """The loss of transformers' own forward pass, in half precision where trainers use it."""
    batch = {name: tensor.to(model.device) for name, tensor in usual_batch(stage, rows).items()}
    with half_precision(model):
        return model(**batch).loss


# ---- TRL -----------------------------------------------------------------------------


def trl_trainer(kind: str, model, stage: str, batches: list[list[EncodedPair]], args, callback):
    """TRL's SFTTrainer or RewardTrainer over these batches, in this order.

    Raises:
        UserError: if TRL is not installed.
    """
    try:
        import trl
    except ImportError:
        raise UserError("--peer trl: is not installed; pip install trl") from None
    from datasets import Dataset

    rows = [row for batch in batches for row in batch]
    options = dict(
        output_dir="runs/benchmark",
        per_device_train_batch_size=args.batch_size,
        max_steps=len(batches),
        max_length=None,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=model.get_input_embeddings().weight.dtype == torch.bfloat16,
        use_cpu=model.device.type == "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    tokenizer = load_tokenizer(VILLAGE)  # a required argument; the rows are token ids already
    if kind == "RewardTrainer":
        orders = [order for row in rows for order in (row, row.swapped())]
        parts = [response_segments(PIECES[stage], order) for order in orders]
        ids = [[*question, *response] for question, response in parts]
        data = Dataset.from_dict({"chosen_ids": ids[0::2], "rejected_ids": ids[1::2]})
        config = trl.RewardConfig(**options)
    else:
        columns = ("input_ids", "labels")
        encoded = [usual_batch(stage, [row]) for row in rows]
        data = Dataset.from_dict(
            {name: [tensors[name][0].tolist() for tensors in encoded] for name in columns}
        )
        config = trl.SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = getattr(trl, kind)(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class InTurns(TrainerCallback):
    """Times each step of a trainer, and after it ours on the same batch."""

    def __init__(self, device, ours, batches):
        self.device, self.ours, self.batches = device, ours, batches
        self.times, self.began = [], 0.0

    def on_step_begin(self, args, state, control, **more):
        synchronize(self.device)
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **more):
        synchronize(self.device)
        of_trainer = time.perf_counter() - self.began
        batch = self.batches[len(self.times)]
        self.times.append((of_trainer, seconds(self.device, self.ours, batch)))


def with_scalar_head(s: Shape, args, device):
    """The adapted model of a shape as a classifier with one output, for RewardTrainer."""
    with tempfile.TemporaryDirectory() as folder:
        config = s.config()
        config.num_labels, config.pad_token_id = 1, 0
        AutoModelForSequenceClassification.from_config(
            config, dtype=torch.bfloat16
        ).save_pretrained(folder)
        dtype = compute_dtype(args.bits, device)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, **quantization(args.bits, dtype)
        )
    model.requires_grad_(False)
    lora = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules="all-linear",
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, lora)


# ---- measuring -----------------------------------------------------------------------


def operations(
    s: Shape, stage: str, rows: list[EncodedPair], rank: int, checkpointing: bool
) -> float:
    """Floating-point operations that a step needs without padding, counted as in bounds.py."""
    total = 0
    # Forward, and the gradient of the inputs. Frozen weights have no gradient.
    passes = 3 if checkpointing else 2
    frozen = sum(i * o for i, o in s.linear())
    adapter = sum(rank * (i + o) for i, o in s.linear())
    for row in rows:
        length = row.length + PIECES[stage].fixed_tokens
        with_gradient = 2 * length * adapter + 2 * length**2 * s.queries
        layer = passes * 2 * length * frozen + (passes + 1) * with_gradient
        logits = len(LABELS)
        if stage == "pretrain":
            logits = trained_tokens(PIECES[stage], [row]) * s.vocabulary
        total += s.layers * layer + 2 * 2 * logits * s.hidden
    return total


def compare(s: Shape, stage: str, args, device: torch.device) -> tuple[list[list[str]], float]:
    """The rows of the table for one stage, and the operations per second of our step."""
    pieces = PIECES[stage]
    lengths = lengths_of(args.data, args.batch_size * max(16, args.rounds), args.seed)
    rows = rows_of(lengths, pieces, s.vocabulary, args.max_length, args.seed)
    order = batch_order([row.length for row in rows], args.batch_size, random.Random(args.seed))
    batches = [[rows[i] for i in batch] for batch in order][: args.rounds]
    largest = max(range(len(batches)), key=lambda i: max(row.length for row in batches[i]))
    torch.manual_seed(args.seed)
    model = build(s, args.bits, args.lora_rank, device).train()
    if args.gradient_checkpointing:
        checkpoint_gradients(model)
    optimizer, _ = optimizer_and_schedule(model, 1e-4, 100)

    def usual(batch):
        take_step(model, optimizer, usual_loss(model, stage, batch))

    def ours(batch):
        take_step(model, optimizer, loss_of(model, stage, batch, pieces))

    usual(batches[0]), ours(batches[0])  # warm-up
    usual_peak = peak_bytes(model, optimizer, usual, batches[largest])
    our_peak = peak_bytes(model, optimizer, ours, batches[largest])
    usual_times: list[float] = []
    our_times: list[float] = []
    for batch in batches:
        usual_times.append(seconds(device, usual, batch))
        our_times.append(seconds(device, ours, batch))
    # (way, times, times of ours in the same turns, peak)
    results: list[tuple[str, list[float], list[float], int]]
    results = [("ours", our_times, [], our_peak), ("usual", usual_times, our_times, usual_peak)]
    for kind in TRAINERS[stage] if args.peer else ():
        peer_model = with_scalar_head(s, args, device) if kind == "RewardTrainer" else model
        turns = InTurns(device, ours, batches)
        trainer = trl_trainer(kind, peer_model, stage, batches, args, turns)
        trainer.train()
        place = largest * args.batch_size
        examples = [trainer.train_dataset[k] for k in range(place, place + args.batch_size)]
        collated = trainer.data_collator(examples)
        inputs = {name: tensor.to(device) for name, tensor in collated.items()}
        peak = peak_bytes(peer_model, trainer.optimizer, trainer.training_step, peer_model, inputs)
        peer_model.zero_grad()
        peer_times, ours_beside = map(list, zip(*turns.times))
        results.append((f"TRL {kind}", peer_times, ours_beside, peak))

    tokens = [sum(row.length + pieces.fixed_tokens for row in batch) for batch in batches]
    lines = []
    for way, times, beside, peak in results:
        per_second = f"{statistics.median(len(batch) / t for batch, t in zip(batches, times)):.2f}"
        speed = f"{statistics.median(n / t for n, t in zip(tokens, times)):,.0f}"
        faster = share = ""
        if beside:
            faster = spread([t / t_ours for t, t_ours in zip(times, beside)])
            share = f"{our_peak / peak:.2f}"
        lines.append([stage, way, per_second, speed, faster, f"{peak / GIB:.2f}", share])
    needed = [
        operations(s, stage, batch, args.lora_rank, args.gradient_checkpointing)
        for batch in batches
    ]
    return lines, statistics.median(n / t for n, t in zip(needed, our_times))


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    add_model_options(parser)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to train"
    )
    parser.add_argument(
        "--data", metavar="FILE", help="pairs whose lengths are taken (default: drawn)"
    )
    parser.add_argument(
        "--batch-size", type=options.positive_int, default=4, metavar="N", help="pairs per step"
    )
    parser.add_argument(
        "--max-length",
        type=options.positive_int,
        default=512,
        metavar="N",
        help="tokens per sequence",
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for all alike")
    parser.add_argument(
        "--rounds",
        type=options.positive_int,
        default=7,
        metavar="N",
        help="turns, each on a batch of its own",
    )
    parser.add_argument("--peer", choices=("trl",), help="another library to compare with")
    parser.add_argument(
        "--seed", type=options.seed, default=0, help="draws lengths, tokens and adapters"
    )
    args = parser.parse_args(argv)
    device, s = pick_device(args.device), SHAPES[args.shape]
    dtype = compute_dtype(args.bits, device)
    best, lines, reached = matrix_peak(device, dtype), [], {}
    for stage in args.stages:
        rows, reached[stage] = compare(s, stage, args, device)
        lines += rows
    # Something else may have run during the first measurement.
    best = max(best, matrix_peak(device, dtype))
    head = ["stage", "way", "pairs/s", "tokens/s", "ours is faster by", "peak GiB"]
    print(table([*head, "our peak / this"], lines))
    print(
        f"\n{args.shape}, {args.bits} bits, {args.batch_size} pairs of at most {args.max_length} "
        f"tokens ({'of ' + args.data if args.data else 'drawn'}), {args.rounds} turns, "
        f"{machine(device)}, torch {torch.__version__}"
    )
    for stage, speed in reached.items():
        print(
            f"{stage}: {speed / 1e9:,.0f} of {best / 1e9:,.0f} GFLOP/s "
            f"that {dtype} products reach here: {speed / best:.0%}"
        )


if __name__ == "__main__":
    with clear_errors():
        main()

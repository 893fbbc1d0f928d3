"""A training step of ours beside the usual one, in turns on the same batches of one process.

The usual step is that of SFT trainers: transformers' own forward pass with labels, so logits of the
whole sequence in float32, and a cross-entropy over the tokens that count (stage 1: the pair; stage
2: the one token of the verdict). Both take the same adapted model, the same pairs and AdamW. --peer
trl adds TRL's SFTTrainer and, in stage 2, its RewardTrainer, which reads each response by itself.
Weights are random, which changes neither time nor memory.
"""

import tempfile
from functools import partial
from typing import Any

from gram_mini.batches import IGNORED, EncodedPair, join, pad, pair_batch
from gram_mini.errors import UserError
from gram_mini.model import half_precision
from gram_mini.runs.heads import response_segments
from gram_mini.runs.models import compute_dtype, keep_no_square, load_tokenizer, quantization
from gram_mini.runs.run import LORA_RANK
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import GIB, LABELS, PIECES, SHAPES, STAGES, take_step
from gram_mini.training import optimizer_and_schedule
from gram_mini.village import VILLAGE

import torch
from peft import LoraConfig

TRAINERS = {"pretrain": ("SFTTrainer",), "reward": ("SFTTrainer", "RewardTrainer")}


def usual_batch(stage: str, rows: list[EncodedPair]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T) for transformers, which shifts the labels."""
    sequences = [join(PIECES[stage], row) for row in rows]
    if stage == "pretrain":
        _, targets = pair_batch(rows, PIECES[stage])  # (B, T)
        labels = torch.cat([torch.full((len(rows), 1), IGNORED), targets[:, :-1]], dim=1)
    else:
        verdicts = [LABELS[row.label or 0] for row in rows]
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


def trl_rows(kind: str, stage: str, rows: list[EncodedPair]) -> list[dict]:
    """The rows as the collator of one of TRL's trainers takes them."""
    if kind == "SFTTrainer":
        found = [usual_batch(stage, [row]) for row in rows]
        return [{name: one[name][0].tolist() for name in ("input_ids", "labels")} for one in found]
    response = lambda row: sum(response_segments(PIECES[stage], row), ())
    # which response is the chosen one changes no time
    return [{"chosen_ids": response(row), "rejected_ids": response(row.swapped())} for row in rows]


def trl_loss(kind: str, stage: str, rows: list[EncodedPair], args, device):
    """(loss as one of TRL's trainers computes it, a model of its own).

    Raises:
        UserError: if TRL is not installed.
    """
    try:
        import trl
    except ImportError:
        raise UserError("--peer trl: is not installed; pip install trl") from None
    from datasets import Dataset

    dtype = compute_dtype(args.bits, device)
    settings: dict[str, Any] = dict(output_dir="runs/trl", max_length=None, report_to=[])
    settings |= dict(bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu")
    settings |= dict(gradient_checkpointing=False)
    data = Dataset.from_list(trl_rows(kind, stage, rows))
    given: dict[str, Any] = dict(train_dataset=data, processing_class=load_tokenizer(VILLAGE))
    if kind == "SFTTrainer":
        config = trl.SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
        model = common.build(SHAPES[args.shape], args.bits, LORA_RANK, device)
        trainer = trl.SFTTrainer(model, config, **given)
    else:
        loading = {"dtype": dtype, "device_map": {"": device}, **quantization(args.bits, dtype)}
        config = trl.RewardConfig(**settings, model_init_kwargs=loading)
        size = dict(r=LORA_RANK, lora_alpha=2 * LORA_RANK)
        lora = LoraConfig(**size, target_modules="all-linear", task_type="SEQ_CLS")
        with tempfile.TemporaryDirectory() as folder:
            common.save(SHAPES[args.shape], folder)
            trainer = trl.RewardTrainer(folder, config, **given, peft_config=lora)

    def loss(model, stage, rows):
        inputs = trainer.data_collator(trl_rows(kind, stage, rows))
        inputs = {name: part.to(device) for name, part in inputs.items()}
        return trainer.compute_loss(model, inputs)

    return loss, trainer.accelerator.prepare_model(trainer.model.train())  # with its autocast


def of_stage(stage: str, args, device: torch.device) -> list[dict[str, str]]:
    """The figures of one stage: a row for each way that ours is compared with."""
    config = SHAPES[args.shape]
    batch = common.full_rows(args.batch_size, stage, config.vocab_size, args.max_length)
    torch.manual_seed(0)
    model = common.build(config, args.bits, LORA_RANK, device).train()
    keep_no_square(model, args.max_length)  # as a run does
    losses = {"ours": (common.loss_of, model), "usual": (usual_loss, model)}
    for kind in TRAINERS[stage] if args.peer else ():
        losses[f"TRL {kind}"] = trl_loss(kind, stage, batch, args, device)
    ways = {}
    for way, (loss, of_way) in losses.items():
        optimizer, _ = optimizer_and_schedule(of_way, 1e-4, 100)
        ways[way] = (partial(take_step, of_way, optimizer, loss, stage), of_way, optimizer)
    tokens = common.tokens_of(stage, batch)
    rows, seconds = common.compare(ways, batch, args.rounds, tokens, "tokens")
    best = common.matrix_peak(device, compute_dtype(args.bits, device))
    share = common.operations(config, stage, batch) / seconds / best
    rows[0]["ours, of matrix products"] = f"{share:.0%} of {best / 1e9:,.0f} GFLOP/s"
    rows[0]["foreseen GiB"] = f"{common.foreseen_bytes(model, stage, batch) / GIB:.2f}"
    return [{"what": STAGES[stage], **row} for row in rows]


def measure(args, device: torch.device) -> list[dict[str, str]]:
    """The rows of both stages."""
    return [row for stage in TRAINERS for row in of_stage(stage, args, device)]

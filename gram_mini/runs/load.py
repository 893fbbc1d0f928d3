"""A judge from a run folder, an exported run, or any model, with the settings of its training."""

from __future__ import annotations

import logging
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.runs.checks import check_sizes
from gram_mini.runs.defaults import MAX_LENGTH, SCORED, for_model
from gram_mini.runs.heads import judge_with_head, load_head
from gram_mini.runs.likelihood import JointJudge, LikelihoodJudge, stored_beta
from gram_mini.runs.memory import GIB, prompts_at_once, total_bytes
from gram_mini.runs.models import load_lora, load_model, load_tokenizer, local_model
from gram_mini.runs.processes import pick_device
from gram_mini.runs.record import (
    EXPORTED,
    HEAD,
    LIKELIHOOD,
    check_prompt,
    fingerprint,
    pinned,
    read_record,
)
from gram_mini.runs.report import say

import torch
from transformers import AutoConfig

# dequantize warns of the type it casts to
logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)

MERGE_UP_TO = 2**30  # bytes of float32 weights up to which merging is the default on a CPU


def load_judge(
    path: str | Path,
    bits: int | None = None,
    device: str = "auto",
    max_length: int | None = None,
    batch_size: int | None = None,
    template: str | None = None,
    merge: bool | None = None,
    likelihood: str | None = None,
) -> Judge:
    """Load a run of a training script or baseline, an exported run, or any model as a judge.

    A model that is not a run becomes a zero-shot judge.

    Args:
        path: run folder, model folder, GGUF file, hub name, or "village".
        bits: 4, 16 or 32; by default as in training, for an exported run as written, else 4.
        device: "auto" or the name of a torch device.
        max_length: tokens per judge prompt; by default as in training, else 512 for the village's
            backbone and 1,024 for any other.
        batch_size: judge prompts of max_length per forward pass; by default what a GPU's memory
            admits, elsewhere 32 for the village's backbone and 8 for any other.
        template: the judge prompt; by default as in training, else prompts.default_judge.
        merge: merge the run's adapter into the weights, in float32. That is faster and changes no
            score by more than 1e-5. By default this is done on a CPU if the float32 weights take at
            most 1 GiB. (On a GPU, export the run: gram_mini/serving/export.py.)
        likelihood: one of options.LIKELIHOODS asks how likely the responses are under the model
            of a stage-1 run, instead of for a verdict.

    Raises:
        UserError: no such model or device, an unfinished run, a backbone that is not the one the
            run was trained on, or a likelihood of a run that is not of stage 1.
    """
    place, folder = pick_device(device), Path(path).resolve()
    record, head = find_record(path), None
    joint = (folder / LIKELIHOOD).is_dir()
    if likelihood and not (record and record["stage"] == "pretrain"):
        raise UserError(
            f"--likelihood: {path} is no run of stage 1, which learns how likely a response is; "
            "give a run of train_pretrain.py"
        )
    if likelihood == "over-backbone" and not (folder / "run.json").is_file():
        raise UserError(
            f"--likelihood over-backbone: {path} is exported, so its adapter is no longer apart; "
            "give the run itself"
        )
    if joint or likelihood == "over-backbone":
        merge = False  # its adapters are asked one by one
    given, backbone = template, str(path)
    if record:
        max_length = max_length or record["options"]["max_length"]
        template = template or record["prompt"]["judge"]
        backbone = record["backbone"]["name"]
    tokenizer = load_tokenizer(str(path))
    if record and (folder / "run.json").is_file():
        trained_on = record["backbone"]["fingerprint"]
        if local_model(backbone) is not None and fingerprint(backbone) != trained_on:
            raise UserError(
                f"{path}: was trained on another version of the backbone {backbone!r}; train it "
                "again"
            )
        bits = bits or record["options"]["bits"]
        model = load_model(pinned(backbone, trained_on), bits, place, scoring=True)
        if merge is None:
            small = 4 * model.num_parameters() <= MERGE_UP_TO
            merge = place.type == "cpu" and model.dtype == torch.float32 and small
        model = load_merged(model, folder) if merge else load_lora(model, folder, trainable=False)
        if (folder / HEAD).is_file():
            head = load_head(model, folder / HEAD)
        if joint:
            load_lora(model, folder / LIKELIHOOD, trainable=False, adapter=LIKELIHOOD)
    else:
        if record:
            bits = bits or (32 if AutoConfig.from_pretrained(folder).dtype == torch.float32 else 16)
        model = load_model(str(path), bits or 4, place, scoring=True)
    max_length = max_length or for_model(MAX_LENGTH, backbone)
    total = total_bytes(place) if batch_size is None else None
    if total:
        batch_size = prompts_at_once(model, max_length, total)
    batch_size = batch_size or for_model(SCORED, backbone)
    if total:
        tokens = batch_size * max_length
        say(f"scoring in passes of up to {tokens:,} tokens (of {total / GIB:.0f} GB)")
    check_sizes(str(path), model, tokenizer, max_length)
    if given and head is not None and head.out_features == 1:
        raise UserError(
            f"--judge-template: {path} has a scalar head, which reads no judge prompt; leave it out"
        )
    arguments = model, tokenizer, max_length, batch_size, template
    judge: Judge
    if likelihood:
        judge = LikelihoodJudge(*arguments, kind=likelihood)
    elif joint:
        model.beta, unit = stored_beta(folder)
        judge = JointJudge(*arguments, unit=unit)
    else:
        judge = judge_with_head(*arguments)
    check_trained(judge, path, record)
    return judge


def check_trained(judge: Judge, path: str | Path, record: dict | None) -> None:
    """See that the judge asks as in training, and note whether its labels were trained.

    Raises:
        UserError: if its tokenizer or chat template is not that of the training.
    """
    if record and judge.template == record["prompt"]["judge"]:
        check_prompt(path, record, judge.prompt, judge.labels, judge.tokenizer)
    judge.trained = record is not None and record["stage"] == "reward"


def find_record(path: str | Path) -> dict | None:
    """The record of a run folder or of an exported run; None for any other model.

    Raises:
        UserError: an unfinished run.
    """
    folder = Path(path).resolve()
    if (folder / "run.json").is_file():
        return read_record(folder)
    if folder.with_name(f"{folder.name}.partial").is_dir() and not folder.is_dir():
        raise UserError(
            f"{path}: is not finished; train it to its end with the same command and --resume"
        )
    return read_record(folder, EXPORTED) if (folder / EXPORTED).is_file() else None


def load_merged(model, folder: Path):
    """The model in float32 with a run's adapter merged; NF4 weights keep their values.

    Raises:
        UserError: as :func:`load_lora`.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize()  # merging an adapter into a 4-bit matrix would round it
    return load_lora(model.float(), folder, trainable=False).merge_and_unload()

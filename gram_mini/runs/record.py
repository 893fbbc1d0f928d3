"""run.json: the options, data and backbone of a run, and checks that they are still the same."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import asdict, astuple
from importlib.metadata import version
from pathlib import Path

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.prompts import PromptPieces
from gram_mini.runs import gguf, options
from gram_mini.runs.models import PROBE, local_model
from gram_mini.runs.output import sampled_hash
from gram_mini.village import VILLAGE

EXPORTED = "gram_run.json"  # the record of an exported run; run.json would mark a run folder
HEAD = "head.safetensors"  # beside the adapter of a run that trained its own head
LIKELIHOOD, BETA = "likelihood", "beta.safetensors"  # in a run of gram_mini.likelihood
# Of runs with these options, what a judge needs beside the adapter.
KEPT_APART = {"head": HEAD, "beta_lr": f"{LIKELIHOOD}/{BETA}"}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
PARTS = {"stage", "backbone", "options", "prompt", "labels", "tokenizer"}


def read_record(folder: Path, name: str = "run.json") -> dict:
    """The record of a run folder; in an exported run it has the name EXPORTED.

    Raises:
        UserError: if there is none, it cannot be read, or the run lacks a part of its judge.
    """
    try:
        record = json.loads((folder / name).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: holds no {name}, so it is no finished run") from None
    except json.JSONDecodeError:
        record = None
    whole = isinstance(record, dict) and record.keys() >= PARTS
    if not (whole and "pieces" in record["prompt"]):
        raise UserError(
            f"{folder / name}: is not the record of a run of version 0.2 or later; train it again"
        )
    if name == "run.json":
        for option, part in KEPT_APART.items():
            if option in record["options"] and not (folder / part).is_file():
                raise UserError(
                    f"{folder}: lacks its {part}; copy the whole run, or train it again"
                )
    return record


def make_record(
    stage: str,
    args,
    data,
    model,
    labels: tuple[int, int],
    template: str,
    prompt: PromptPieces,
    tokenizer,
    results: dict,
    began: dict,
) -> dict:
    """The contents of run.json: everything that is needed to score with the run or repeat it."""
    init, name = getattr(args, "init", None), args.model
    if name != VILLAGE and Path(name).exists():
        name = str(Path(name).absolute())
    return {
        "stage": stage,
        "command": ["python", *sys.argv],
        "options": options.as_record(args),
        "backbone": {"name": name, "fingerprint": fingerprint(name, model)},
        "init": init and {"folder": str(init), **began},
        "data": data.record(),
        "prompt": {
            "pair": prompts.QUESTION + " -> " + prompts.PAIR,
            "judge": template,
            "pieces": asdict(prompt),  # token ids
        },
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "labels": dict(zip(prompts.LABELS, labels)),
        "results": results,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash over a tokenizer's vocabulary, its chat template and a probe."""
    parts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
        tokenizer(PROBE, add_special_tokens=False)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_prompt(path, record: dict, prompt: PromptPieces, labels, tokenizer) -> None:
    """See that a tokenizer and its chat template still make the prompt a run was trained on.

    ``path`` is the run; ``prompt`` and ``labels`` are what they make today of the run's template.

    Raises:
        UserError: if they do not.
    """
    if record["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{path}: its tokenizer or chat template is not the one it was trained with; put back "
            "the files as training wrote them, or train again"
        )
    # By value: a field may have had another name in an earlier version.
    pieces = record["prompt"].get("pieces", {}).values()
    same_pieces = record["stage"] != "reward" or list(pieces) == list(astuple(prompt))
    if not same_pieces or list(record["labels"].values()) != list(labels):
        raise UserError(
            f"{path}: this version of gram_mini makes another prompt of its chat template than the "
            "version that trained it; train it again"
        )


def settings(
    args, data, model, processes: int, template: str, prompt: PromptPieces, tokenizer: str
) -> dict:
    """The settings that must be the same for an unfinished run to go on."""
    init, given = getattr(args, "init", None), options.as_record(args)
    return {
        **{name: given[name] for name in given if name not in options.WITHOUT_EFFECT},
        "weights of --init": judge_fingerprint(str(init)) if init else None,
        "number of processes": processes,
        "data": data.fingerprint,
        "backbone": fingerprint(args.model, model),
        "judge prompt": template,
        "tokenizer and chat template": tokenizer,
        "prompt's token ids": hashlib.sha256(repr(astuple(prompt)).encode()).hexdigest()[:16],
    }


def fingerprint(name: str, model=None) -> str | None:
    """What identifies a backbone: a hash over its config and samples of its weights.

    For a name on the hub it is the commit of the loaded ``model``, or None without one.
    """
    place = local_model(name)
    if place is None:
        return getattr(model.config, "_commit_hash", None) if model is not None else None
    if not place.is_dir():
        return gguf.fingerprint(place)
    config = (place / "config.json").read_bytes()
    return sampled_hash(config, sorted(place.glob("*.safetensors")))


def judge_fingerprint(name: str, model=None) -> str | None:
    """What identifies a judge: of a run a hash of its record and weights, else of its backbone.

    The record names the backbone's own fingerprint, which load_judge has compared.
    """
    run = Path(name)
    if not (run / "run.json").is_file():
        return fingerprint(name, model)
    digest = hashlib.sha256((run / "run.json").read_bytes())
    for file in sorted(run.glob("**/*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def pinned(name: str, commit: str | None) -> str:
    """The name of a backbone at the commit a run was trained on; the hub's may be newer now."""
    named = "@" in name or local_model(name) is not None
    return f"{name}@{commit}" if commit and not named else name


def check_init(
    init: Path, backbone: str, rank: int | None, head: str | None = None, joint: bool = False
) -> dict:
    """The record of a run, if training can start from it on this backbone.

    Args:
        init: the run folder.
        backbone: the name of the backbone.
        rank: the rank of the adapter, or None for that of the run.
        head: the kind of head that a baseline trains, "labels" or "scalar"; else None.
        joint: whether python -m gram_mini.likelihood goes on.

    Raises:
        UserError: no finished run, another backbone, another rank, or a run of another command.
    """
    if not init.is_dir():
        raise UserError(f"--init {init}: no such folder; run train_pretrain.py --out {init} first")
    record = read_record(init)
    name, trained_on = record["backbone"]["name"], record["backbone"]["fingerprint"]
    same = (
        name == backbone if local_model(backbone) is None else fingerprint(backbone) == trained_on
    )
    if not same:
        other = f"the backbone {name!r} ({trained_on}), not on {backbone!r}; give the same --model"
        if name in (backbone, str(Path(backbone).absolute())):
            other = f"another version of the backbone {name!r}; train it again"
        raise UserError(f"--init {init}: was trained on {other}")
    trained_rank = record["options"]["lora_rank"]
    if rank is not None and rank != trained_rank:
        raise UserError(
            f"--lora-rank {rank}: the adapter in {init} has rank {trained_rank}; "
            "leave the option out"
        )
    has_head, has_likelihood = (init / HEAD).is_file(), (init / LIKELIHOOD).is_dir()
    if has_head and head is None or has_likelihood and not joint:
        command = "baselines" if has_head else "likelihood"
        raise UserError(
            f"--init {init}: was trained by python -m gram_mini.{command}; go on with that command"
        )
    kind = record["options"].get("head", "labels")
    if has_head and kind != head:
        raise UserError(f"--head {head}: {init} was trained with --head {kind}; give the same")
    if joint and not has_likelihood and record["stage"] != "pretrain":
        raise UserError(
            f"--init {init}: was trained to judge, so its likelihoods are not those of stage 1; "
            "give the run of train_pretrain.py"
        )
    return record

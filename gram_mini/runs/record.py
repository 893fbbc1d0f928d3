"""run.json: what a run was made of, and whether what is here now is still that."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.model import VILLAGE, local_folder
from gram_mini.runs import options

# the record in an exported model; with run.json the folder would be taken for a run
EXPORTED = "gram_run.json"
HEAD = "head.safetensors"  # beside the adapter of a run that trained a head of its own
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
# the village's backbone and pairs in a run.json of before 0.2
FORMER_NAMES = {"embedded": VILLAGE, "world": VILLAGE}


def read_record(folder: Path, name: str = "run.json") -> dict:
    """The record of a run folder; an exported model keeps it under the name EXPORTED.

    Raises:
        UserError: if the folder holds none or it cannot be read.
    """
    try:
        record = json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {name}, so it is no finished run") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{folder / name}, line {error.lineno}: invalid JSON: {error.msg}"
        ) from None
    if (
        not isinstance(record, dict)
        or not {"stage", "backbone", "options", "prompt", "labels"} <= record.keys()
    ):
        raise UserError(f"{folder / name}: is not the record of a run")
    for names, key in (
        (record["backbone"], "name"),
        (record["options"], "model"),
        (record["options"], "data"),
    ):
        names[key] = FORMER_NAMES.get(names.get(key), names.get(key))
    return record


def make_record(
    stage: str, args, data, model, labels: tuple[int, int], template: str, results: dict
) -> dict:
    """The contents of run.json: everything needed to score with the run and to repeat it."""
    init = getattr(args, "init", None)
    name = (
        args.model
        if args.model == VILLAGE or not Path(args.model).is_dir()
        else str(Path(args.model).resolve())
    )
    return {
        "stage": stage,
        "command": ["python", *sys.argv],
        "options": options.as_record(args),
        "backbone": {"name": name, "fingerprint": fingerprint(name, model)},
        "init": {"folder": str(init), "stage": read_record(init)["stage"]} if init else None,
        "data": data.record(),
        "prompt": {"pair": prompts.QUESTION + " -> " + prompts.PAIR, "judge": template},
        "labels": dict(zip(prompts.LABELS, labels)),
        "results": results,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def settings(args, data, model, processes: int, template: str) -> dict:
    """What must be the same for an unfinished run to go on.

    How a step is split into forward passes is no part of it.
    """
    split = (*options.WITHOUT_EFFECT, "batch_size", "grad_accum")
    return {
        **{name: value for name, value in options.as_record(args).items() if name not in split},
        "batch_size x grad_accum": args.batch_size * args.grad_accum,
        "number of processes": processes,
        "data": data.fingerprint,
        "backbone": fingerprint(args.model, model),
        "judge prompt": template,
    }


def fingerprint(name: str, model=None) -> str | None:
    """What identifies a backbone: a hash over config and weights of its folder, or its commit on
    the hub.

    The commit is read off the loaded ``model``; without one it is None for a name on the hub.
    """
    folder = local_folder(name)
    if folder is None:
        return getattr(model.config, "_commit_hash", None) if model is not None else None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            # 64 KB at 256 places tell two models apart without reading 16 GB
            for part in range(256):
                stream.seek(part * size // 256)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:16]


def pinned(name: str, commit: str | None) -> str:
    """The name of a backbone at the version that a run was trained on: the hub's may be newer by now."""
    return f"{name}@{commit}" if commit and local_folder(name) is None else name


def check_init(init: Path, backbone: str, rank: int | None, head: str | None = None) -> dict:
    """The record of a run, if training can go on from it on this backbone.

    ``head`` is the kind that a baseline trains, "labels" or "scalar"; train_reward.py (None) trains
    none.

    Raises:
        UserError: no finished run, another backbone, or another rank or kind of head than asked
            for.
    """
    if not init.is_dir():
        raise UserError(f"--init {init}: no such folder; run train_pretrain.py --out {init} first")
    record = read_record(init)
    name, trained_on = record["backbone"]["name"], record["backbone"]["fingerprint"]
    same = (
        name == backbone if local_folder(backbone) is None else fingerprint(backbone) == trained_on
    )
    if not same:
        raise UserError(
            f"--init {init}: was trained on the backbone {name!r} ({trained_on}), not on {backbone!r}; give the same --model"
        )
    trained_rank = record["options"]["lora_rank"]
    if rank is not None and rank != trained_rank:
        raise UserError(
            f"--lora-rank {rank}: the adapter in {init} has rank {trained_rank}; leave the option out"
        )
    if (init / HEAD).is_file():
        kind = record["options"].get("head", "labels")
        if head is None:
            raise UserError(
                f"--init {init}: has a head of its own, trained by python -m gram_mini.baselines; go on with that command"
            )
        if kind != head:
            raise UserError(f"--head {head}: {init} was trained with --head {kind}; give the same")
    return record

"""The folder of a run: written under another name, with checkpoints to resume from, and renamed when complete."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import gather_object

from gram_mini import options, prompts
from gram_mini.backbone import EMBEDDED, HEAD, fingerprint, local_folder, read_run, save_adapter
from gram_mini.errors import Interrupted, UserError
from gram_mini.log import plot
from gram_mini.output import check_place, put_in_place


class RunFolder:
    """The folder of a run.

    Until it is complete the run is in NAME.partial, with a checkpoint to resume from. So a run folder is always a
    finished run, and a run that fails leaves what was there before untouched.

    Raises:
        UserError: if the folder holds a run and ``overwrite`` is off, holds something else, or cannot be written;
            if there is an unfinished run and neither ``resume`` nor ``overwrite`` is on; if there is none to resume.
    """

    def __init__(self, folder: Path, overwrite: bool, resume: bool = False):
        self.folder, self.resume = folder.resolve(), resume
        if not self.folder.name:
            raise UserError(f"--out {folder}: is the root of the file system; give the name of a folder")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.checkpoint = self.partial / "checkpoint.pt"
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder}: is a file; give the name of a folder")
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / "run.json").is_file():
                raise UserError(f"--out {folder}: holds files that are not a run; give another folder")
            if not overwrite:
                raise UserError(f"--out {folder}: already holds a run; give another folder, or --overwrite to replace it")
        check_place(folder, "--out")
        if resume and not (self.partial / "log.csv").is_file():
            raise UserError(f"--resume: there is no unfinished run {folder}.partial; leave the option out to start one")
        if self.checkpoint.is_file() and not (resume or overwrite):
            raise UserError(f"--out {folder}: an unfinished run is there; go on with --resume, or start anew with --overwrite")

    def start(self) -> None:
        """Make the folder that the run is written to until it is complete.

        Raises:
            UserError: if something else has its name, or it cannot be made.
        """
        if not self.resume or not self.checkpoint.is_file():
            # Killed while it was put in place, a run is complete under this name and still has its checkpoint.
            names = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else set()
            if names and ("log.csv" not in names or "run.json" in names and "checkpoint.pt" not in names):
                raise UserError(f"{self.partial}: is in the way and no unfinished run; rename it, or give another --out")
            shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None

    def save(self, accelerator, step: int, recipe: dict, model, optimizer, schedule, log, skipped: int) -> None:
        """Write a checkpoint: to another name first, so that the one before stays until this one is whole."""
        of_each_process = gather_object([{"rng": _random_state(), "log": log.state()}])
        if accelerator.is_main_process:
            state = {
                "step": step,
                "recipe": recipe,
                "adapter": _adapter(model),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "processes": of_each_process,
                "skipped": skipped,
            }
            temporary = self.checkpoint.with_suffix(".tmp")
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.checkpoint)
        accelerator.wait_for_everyone()

    def load(self, accelerator, recipe: dict, model, optimizer, schedule) -> dict:
        """Put a run back to its last checkpoint; returns {"step", "skipped", "log"}, step 0 where there is none.

        Raises:
            UserError: if the checkpoint cannot be read, or was made with other options or data (names them).
        """
        if not (self.resume and self.checkpoint.is_file()):
            if self.resume:
                accelerator.print("there is no checkpoint yet: starting from the beginning")
            return {"step": 0, "skipped": 0, "log": None}
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            before = state["recipe"]
        except Exception as error:  # whatever the file holds, it is no checkpoint of ours
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.checkpoint}: cannot be read: {reason}; start anew with --overwrite") from None
        changed = [name for name in recipe if before.get(name) != recipe[name]]
        if changed:
            was = ", ".join(f"{name} was {before.get(name)!r} and is {recipe[name]!r}" for name in changed)
            raise UserError(
                f"--resume: {self.partial} was begun otherwise: {was}; give the same again, or start anew with --overwrite"
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["adapter"][name])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        mine = state["processes"][accelerator.process_index]
        torch.set_rng_state(mine["rng"]["cpu"])
        if "cuda" in mine["rng"]:
            torch.cuda.set_rng_state(mine["rng"]["cuda"])
        accelerator.print(f"going on after step {state['step']}")
        return {"step": state["step"], "skipped": state["skipped"], "log": mine["log"]}

    def interrupted(self, step: int) -> Interrupted:
        """What to raise after a run was asked to stop and has been saved."""
        return Interrupted(f"stopped after step {step}, saved in {self.partial}; go on with the same command and --resume")

    def finish(self, model, tokenizer, record: dict) -> None:
        """Write adapter, tokenizer, plot and run.json, then give the folder its name."""
        save_adapter(model, tokenizer, record["backbone"]["name"], self.partial)
        plot(self.partial / "log.csv", self.partial / "plot.png", record["stage"])
        (self.partial / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        put_in_place(self.partial, self.folder)
        for name in ("checkpoint.pt", "checkpoint.tmp"):
            (self.folder / name).unlink(missing_ok=True)


def _adapter(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def _random_state() -> dict[str, torch.Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def recipe(args, data, model, accelerator, template: str = prompts.JUDGE) -> dict:
    """What must be the same for a run to go on. How a step is split into forward passes is no part of it."""
    without = (*options.WITHOUT_EFFECT, "batch_size", "grad_accum")
    return {
        **{name: value for name, value in _options(args).items() if name not in without},
        "batch_size x grad_accum": args.batch_size * args.grad_accum,
        "number of processes": accelerator.num_processes,
        "data": data.fingerprint,
        "backbone": fingerprint(args.model, model),
        "judge prompt": template,
    }


def _options(args) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def run_record(stage: str, args, data, model, labels: tuple[int, int], template: str = prompts.JUDGE, **results) -> dict:
    """The contents of run.json: everything needed to score with the run and to repeat it."""
    init = getattr(args, "init", None)
    name = args.model if args.model == EMBEDDED or not Path(args.model).is_dir() else str(Path(args.model).resolve())
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    return {
        "stage": stage,
        "command": ["python", *sys.argv],
        "options": _options(args),
        "backbone": {"name": name, "fingerprint": fingerprint(name, model)},
        "init": {"folder": str(init), "stage": read_run(init)["stage"]} if init else None,
        "data": data.record(),
        "prompt": {"pair": prompts.QUESTION + " -> " + prompts.PAIR, "judge": template},
        "labels": dict(zip(prompts.LABELS, labels)),
        "results": results,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def check_init(init: Path, backbone: str, rank: int | None, head: str) -> dict:
    """The record of a run, if it can be the start of stage 2 on this backbone.

    Raises:
        UserError: no finished run, another backbone, or another rank or kind of head than asked for.
    """
    if not init.is_dir():
        raise UserError(f"--init {init}: no such folder; run train_pretrain.py --out {init} first")
    run = read_run(init)
    name, trained_on = run["backbone"]["name"], run["backbone"]["fingerprint"]
    same = name == backbone if local_folder(backbone) is None else fingerprint(backbone) == trained_on
    if not same:
        raise UserError(
            f"--init {init}: was trained on the backbone {name!r} ({trained_on}), not on {backbone!r}; give the same --model"
        )
    had = run["options"]["lora_rank"]
    if rank is not None and rank != had:
        raise UserError(f"--lora-rank {rank}: the adapter in {init} has rank {had}; leave the option out")
    kind = run["options"].get("head", "labels")
    if (init / HEAD).is_file() and kind != head:
        raise UserError(f"--head {head}: {init} was trained with --head {kind}; give the same")
    return run

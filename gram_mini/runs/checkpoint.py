"""checkpoint.pt: what an unfinished run needs to go on as if nothing had stopped it."""

from __future__ import annotations

import os
from pathlib import Path

from gram_mini.errors import UserError, first_line
from gram_mini.runs.output import changes

import torch
from accelerate.utils import gather_object


def save(
    path: Path,
    accelerator,
    step: int,
    settings: dict,
    model,
    optimizer,
    schedule,
    log_state: dict,
    skipped: int,
) -> None:
    """Write a checkpoint after ``step`` steps; all processes call this together.

    It is written under another name and then renamed, so that the previous checkpoint stays until
    this one is complete. ``skipped`` counts the steps that were not finite.
    """
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    own = {"cpu": torch.get_rng_state(), "cuda": on_gpu, "log": log_state}
    processes = gather_object([own])
    if accelerator.is_main_process:
        named = model.named_parameters()
        state = {
            "step": step,
            "settings": settings,
            "adapter": {name: p.detach().cpu() for name, p in named if p.requires_grad},
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "processes": processes,
            "skipped": skipped,
        }
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    accelerator.wait_for_everyone()


def load(path: Path, accelerator, settings: dict, model, optimizer, schedule) -> dict:
    """Restore a run from its checkpoint; returns {"step", "skipped", "log"}.

    Raises:
        UserError: if the checkpoint cannot be read, or was made with other options or data (names
            them).
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as error:  # of any kind: the file is not a checkpoint of ours
        raise UserError(
            f"{path}: cannot be read: {first_line(error)}; start anew with --overwrite"
        ) from None
    if changed := changes(saved, settings):
        raise UserError(
            f"--resume: {path.parent} was begun otherwise: {changed}; give the same again, or "
            "start anew with --overwrite"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    own = state["processes"][accelerator.process_index]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"])
    return {"step": state["step"], "skipped": state["skipped"], "log": own["log"]}

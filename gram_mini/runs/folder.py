"""The folder of a run, which is written under another name and renamed when it is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs.log import plot
from gram_mini.runs.output import check_place, lock, put_in_place, unlock
from gram_mini.runs.record import BETA, HEAD, LIKELIHOOD

import torch
from safetensors.torch import save_file


class RunFolder:
    """The folder of a run.

    Until it is complete, the run is in NAME.partial, with a checkpoint to resume from. So a run
    folder always holds a finished run, and a run that fails leaves an older one untouched.

    Raises:
        UserError: if the folder holds a run and ``overwrite`` is off, holds something else, or
            cannot be written; if there is an unfinished run and neither ``resume`` nor
            ``overwrite`` is on; if there is none to resume.
    """

    def __init__(self, folder: Path, overwrite: bool, resume: bool = False):
        self.folder = folder.resolve()
        self.overwrite, self.resume = overwrite, resume
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.checkpoint = self.partial / "checkpoint.pt"
        self._check()

    def _check(self) -> None:
        """See that the run can be begun, or gone on with."""
        folder = self.folder
        check_place(folder, "--out")
        if folder.exists() and any(folder.iterdir()):
            if not (folder / "run.json").is_file():
                raise UserError(f"--out {folder}: holds files that are not a run; give another")
            if not self.overwrite:
                raise UserError(f"--out {folder}: already holds a run; give another or --overwrite")
        if self.resume and not (self.partial / "log.csv").is_file():
            raise UserError(
                f"--resume: there is no unfinished run {folder}.partial; leave the option out to "
                "start one"
            )
        if self.checkpoint.is_file() and not (self.resume or self.overwrite):
            raise UserError(
                f"--out {folder}: an unfinished run is there; go on with --resume, or start anew "
                "with --overwrite"
            )

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint: ``resume`` is on and there is one."""
        return self.resume and self.checkpoint.is_file()

    def start(self) -> None:
        """Make the folder NAME.partial.

        Raises:
            UserError: as the class, if something has come there since; if another process writes
                this run; if something else has this name, or the folder cannot be made.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder)
            self._check()  # again: another process may have written here until now
            if self.partial.exists() and not self.resumes:
                self._remove_partial()
            self.partial.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None

    def _remove_partial(self) -> None:
        """Remove an unfinished run that does not go on, and nothing else of that name."""
        names = {file.name for file in self.partial.iterdir()}
        # A run that was killed while it was renamed is complete but still has its checkpoint.
        complete = "run.json" in names and "checkpoint.pt" not in names
        if names and ("log.csv" not in names or complete):
            raise UserError(
                f"{self.partial}: is in the way and no unfinished run; rename it, or give another "
                "--out"
            )
        shutil.rmtree(self.partial)

    def finish(self, model, tokenizer, record: dict) -> None:
        """Write adapter, tokenizer, plot and run.json, then rename the folder to its final name."""
        save_adapter(model, tokenizer, record["backbone"]["name"], self.partial)
        plot(self.partial / "log.csv", self.partial / "plot.png", record["stage"])
        (self.partial / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        put_in_place(self.partial, self.folder)
        for name in ("checkpoint.pt", "checkpoint.tmp"):
            (self.folder / name).unlink(missing_ok=True)
        unlock(self._lock)


def save_adapter(model, tokenizer, backbone: str, folder: Path) -> None:
    """Write adapters, head (if one was trained) and tokenizer, as safetensors and JSON."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = backbone
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if hasattr(model, "trained_head"):
        save_file({"weight": model.trained_head.weight.detach().contiguous()}, folder / HEAD)
    if hasattr(model, "beta"):  # peft has put the frozen adapter into this folder
        beta = {"beta": model.beta.detach(), "unit": torch.tensor([model.beta_unit])}
        save_file(beta, folder / LIKELIHOOD / BETA)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    tokenizer.save_pretrained(str(folder))

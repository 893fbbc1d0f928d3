"""The folder of a run, which is written under another name and renamed when it is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs.log import plot
from gram_mini.runs.output import check_place, put_in_place
from gram_mini.runs.record import BETA, HEAD, LIKELIHOOD

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

_locks: dict[Path, FileLock] = {}  # what this process holds, until a run is finished or it ends


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
        self.given, self.folder = folder, folder.resolve()
        self.overwrite, self.resume = overwrite, resume
        if not self.folder.name:
            raise UserError(
                f"--out {folder}: is the root of the file system; give the name of a folder"
            )
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.checkpoint = self.partial / "checkpoint.pt"
        self._check()

    def _check(self) -> None:
        """See that the run can be begun, or gone on with.

        Raises:
            UserError: as the class.
        """
        folder = self.given
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder}: is a file; give the name of a folder")
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / "run.json").is_file():
                raise UserError(
                    f"--out {folder}: holds files that are not a run; give another folder"
                )
            if not self.overwrite:
                raise UserError(
                    f"--out {folder}: already holds a run; give another folder, or --overwrite "
                    "to replace it"
                )
        check_place(folder, "--out")
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
            UserError: as the class, if something has come there since; if something else has this
                name, or the folder cannot be made.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None
        self._lock()
        try:
            self._check()  # again: another process may have written here until now
        except UserError:
            self._unlock()
            raise
        if not self.resumes:
            files = self.partial.iterdir() if self.partial.is_dir() else ()
            names = {file.name for file in files}
            # A run that was killed while it was renamed is complete but still has its checkpoint.
            if names and (
                "log.csv" not in names or "run.json" in names and "checkpoint.pt" not in names
            ):
                raise UserError(
                    f"{self.partial}: is in the way and no unfinished run; rename it, or give "
                    "another --out"
                )
            shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None

    def _lock(self) -> None:
        """Keep other processes from writing this run; a process that dies lets go of it.

        Raises:
            UserError: if another process is writing it.
        """
        path = self.folder.with_name(f".{self.folder.name}.lock")
        if path in _locks:
            return
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"--out {self.folder}: another process is writing this run; wait for it, stop it, "
                "or give another --out"
            ) from None
        _locks[path] = lock

    def _unlock(self) -> None:
        path = self.folder.with_name(f".{self.folder.name}.lock")
        if lock := _locks.pop(path, None):
            path.unlink(missing_ok=True)
            lock.release()

    def finish(self, model, tokenizer, record: dict) -> None:
        """Write adapter, tokenizer, plot and run.json, then rename the folder to its final name."""
        save_adapter(model, tokenizer, record["backbone"]["name"], self.partial)
        plot(self.partial / "log.csv", self.partial / "plot.png", record["stage"])
        (self.partial / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        put_in_place(self.partial, self.folder)
        for name in ("checkpoint.pt", "checkpoint.tmp"):
            (self.folder / name).unlink(missing_ok=True)
        self._unlock()


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

"""What surrounds a training loop: batches without end, optimiser, log, run folder. The loop stands in the scripts."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import random
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from gram_mini import prompts
from gram_mini.backbone import EMBEDDED, fingerprint, local_folder, read_run, save_adapter
from gram_mini.batches import EncodedPair, batch_order
from gram_mini.errors import UserError

LOG_COLUMNS = ("step", "part", "loss", "accuracy", "margin", "label_mass", "position_gap", "lr", "tokens_per_second")


def number_of_steps(rows: int, batch_size: int, grad_accum: int, epochs: float, steps: int | None) -> int:
    """Optimiser steps: ``steps`` where given, else what ``epochs`` passes over ``rows`` pairs take."""
    return steps or max(1, math.ceil(epochs * math.ceil(rows / batch_size) / grad_accum))


def batches_forever(rows: list[EncodedPair], batch_size: int, seed: int):
    """Yield (rows, swaps) epoch after epoch; each pair's responses change places with probability 1/2, anew each time."""
    rng = random.Random(seed)
    lengths = [row.length for row in rows]
    while True:
        for batch in batch_order(lengths, batch_size, rng):
            yield [rows[i] for i in batch], [rng.random() < 0.5 for _ in batch]


def optimizer_and_schedule(model, lr: float, steps: int):
    """AdamW on what is trainable; the rate rises over the first 5% of the steps, then falls to zero as a cosine."""
    warmup = math.ceil(0.05 * steps)

    def share_of_peak(step: int) -> float:  # steps count from 0; the first one moves already
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) if steps > warmup else 0.0

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def clip_gradients(model) -> None:
    """Clip the gradient of the trainable parameters to norm 1."""
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)


class Log:
    """log.csv: a line for every ``every`` training steps (means over their forward passes), and one for each evaluation.

    tokens_per_second counts what the model computes, padding included, and no evaluation's time.
    """

    def __init__(self, path: Path, every: int, steps: int):
        self.every, self.steps = every, steps
        self._file = open(path, "w", newline="")
        self._csv = csv.DictWriter(self._file, LOG_COLUMNS)
        self._csv.writeheader()
        self._restart()

    def due(self, step: int) -> bool:
        """Whether this step ends a line."""
        return step % self.every == 0 or step == self.steps

    def note(self, tokens: int, **values: torch.Tensor) -> None:
        """Note one forward pass; tensors stay on their device until a line is written."""
        self._tokens += tokens
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float())

    def train(self, step: int, lr: float) -> dict[str, float]:
        """End an optimiser step; returns the means where it ends a line, else nothing."""
        if not self.due(step):
            return {}
        means = {name: torch.stack(values).mean().item() for name, values in self._values.items()}
        speed = round(self._tokens / (time.perf_counter() - self._since))
        self._write(step=step, part="train", lr=lr, tokens_per_second=speed, **means)
        self._restart()
        return means

    def held_out(self, step: int, seconds: float, **values: float) -> None:
        """Note an evaluation that took ``seconds``."""
        self._write(step=step, part="held-out", **values)
        self._since += seconds

    def _restart(self):
        self._values, self._tokens, self._since = {}, 0, time.perf_counter()

    def _write(self, **values):
        self._csv.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items() if k in LOG_COLUMNS})
        self._file.flush()


class RunFolder:
    """The folder of a run, written under another name and renamed when it is complete.

    So a run folder is always a finished run, and a run that fails leaves what was there before untouched.

    Raises:
        UserError: if the folder holds a run and ``overwrite`` is off, holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, overwrite: bool):
        self.folder = folder.resolve()
        if not self.folder.name:
            raise UserError(f"--out {folder}: is the root of the file system; give the name of a folder")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder}: is a file; give the name of a folder")
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / "run.json").is_file():
                raise UserError(f"--out {folder}: holds files that are not a run; give another folder")
            if not overwrite:
                raise UserError(f"--out {folder}: already holds a run; give another folder, or --overwrite to replace it")
        above = next(p for p in folder.absolute().parents if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise UserError(f"--out {folder}: {above} cannot be written to; give another folder")

    def start(self) -> Path:
        """Make the folder that the run is written to until it is complete, and return it."""
        if self.partial.exists() and not (self.partial / "log.csv").is_file():
            raise UserError(f"{self.partial}: is in the way and no unfinished run; rename it, or give another --out")
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None
        return self.partial

    def finish(self, model, tokenizer, record: dict) -> None:
        """Write adapter, tokenizer, plot and run.json, then give the folder its name."""
        save_adapter(model, tokenizer, record["backbone"]["name"], self.partial)
        plot(self.partial / "log.csv", self.partial / "plot.png", record["stage"])
        (self.partial / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        replaced = self.folder.with_name(self.folder.name + ".replaced")
        if self.folder.exists():
            self.folder.rename(replaced)
        self.partial.rename(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)


def run_record(stage: str, args, data, model, labels: tuple[int, int], judge: str = prompts.JUDGE, **results) -> dict:
    """The contents of run.json: everything needed to score with the run and to repeat it."""
    init = getattr(args, "init", None)
    name = args.model if args.model == EMBEDDED or not Path(args.model).is_dir() else str(Path(args.model).resolve())
    packages = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
    return {
        "stage": stage,
        "command": ["python", *sys.argv],
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "backbone": {"name": name, "fingerprint": fingerprint(name, model)},
        "init": {"folder": str(init), "stage": read_run(init)["stage"]} if init else None,
        "data": data.record(),
        "prompt": {"pair": prompts.QUESTION + " -> " + prompts.PAIR, "judge": judge},
        "labels": dict(zip(prompts.LABELS, labels)),
        "results": results,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def check_init(init: Path, backbone: str, rank: int | None) -> int:
    """Whether a run can be the start of stage 2 on this backbone; returns the rank of its adapter.

    Raises:
        UserError: no finished run, another backbone, or another rank than asked for.
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
    return had


def plot(log: Path, picture: Path, title: str) -> None:
    """Loss, and accuracy where there is one, over the steps of a log.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in ("loss", "accuracy") if any(row[name] for row in rows)]
    figure, axes = plt.subplots(1, max(1, len(columns)), figsize=(5 * max(1, len(columns)), 3.5), squeeze=False)
    for axis, column in zip(axes[0], columns):
        judged = title == "reward"
        legend = {
            "train": "train (smoothed loss, one order)" if judged else "train",
            "held-out": "held out (plain loss, both orders)" if judged else "held out",
        }
        for part, style in (("train", "-"), ("held-out", "o")):
            points = [(int(row["step"]), float(row[column])) for row in rows if row["part"] == part and row[column]]
            if points:
                axis.plot(*zip(*points), style, label=legend[part])
        axis.set(xlabel="step", ylabel=column, title=f"{title}: {column}")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    plt.close(figure)

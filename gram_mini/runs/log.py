"""The figures of a training run: log.csv and its plot."""

from __future__ import annotations

import csv
import time
from pathlib import Path

from gram_mini.runs.memory import GIB, most_held

import torch

MEANS = ("loss", "accuracy", "margin", "label_mass")  # the means in a training line
LOG_COLUMNS = (
    *("step", "part", *MEANS, "position_gap", "lr", "skipped"),
    *("tokens_per_second", "memory"),  # of the machine
)


class Log:
    """log.csv: a line for every ``args.log_every`` training steps, and one for each evaluation.

    A training line holds means over its steps (of pairs in stage 2, of trained tokens in stage 1)
    and all processes; label_mass is that of the last step. tokens_per_second
    counts the tokens that the model computes, padding included; the time of evaluations and what
    was computed before a stop are left out. memory is the most GiB that the main process has held
    so far. Only the main process writes.

    The run has ``steps`` steps. It goes on from the checkpoint of step ``after``, 0 for none, where
    :meth:`state` returned ``state``.
    """

    def __init__(
        self, path: Path, args, steps: int, accelerator, after: int = 0, state: dict | None = None
    ):
        self.every, self.steps, self.accelerator = args.log_every, steps, accelerator
        self._restart()
        if state is not None:
            self._sums.update(state["sums"])
            self._weights.update(state["weights"])
        self._csv = None
        if accelerator.is_main_process:
            kept = []
            if state is not None:
                # Lines after the checkpoint will be written again.
                with open(path, newline="") as file:
                    kept = [row for row in csv.DictReader(file) if int(row["step"]) <= after]
            self._file = open(path, "w", newline="")
            self._csv = csv.DictWriter(self._file, LOG_COLUMNS)
            self._csv.writeheader()
            self._csv.writerows(kept)
            self._file.flush()

    def _restart(self) -> None:
        """Begin the sums of the next line."""
        self._sums: dict[str, torch.Tensor | float] = {}  # of figures, weighted
        self._weights: dict[str, float] = {}  # the sums of the weights
        self._in_this_step: list[tuple[str, torch.Tensor, float]] = []  # (name, weighted, weight)
        self._tokens, self._since = 0, time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether this step ends a line."""
        return step % self.every == 0 or step == self.steps

    def note(self, tokens: int, weight: float, **values: torch.Tensor) -> None:
        """Note the figures of one forward pass, which has this ``weight`` in its step.

        Tensors stay on their device until a line is written.
        """
        self._tokens += tokens
        self._in_this_step += [
            (name, value.detach().float() * weight, weight) for name, value in values.items()
        ]

    def train(self, step: int, lr: float, applied: bool, skipped: int) -> dict[str, float]:
        """End an optimiser step; returns the means if it ends a line, else an empty dictionary.

        A skipped step (not ``applied``) is in no mean.
        """
        for name, value, weight in self._in_this_step if applied else []:
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._weights[name] = self._weights.get(name, 0.0) + weight
        self._in_this_step = []
        if not self.due(step):
            return {}
        sums = [[float(self._sums.get(n, 0.0)), self._weights.get(n, 0.0)] for n in MEANS]
        sums += [[self._tokens, 0.0]]
        table = torch.tensor(sums, dtype=torch.float32, device=self.accelerator.device)  # (5, 2)
        *rows, (tokens, _) = self.accelerator.reduce(table, "sum").tolist()
        means = {name: total / weight for name, (total, weight) in zip(MEANS, rows) if weight > 0}
        speed = round(tokens / (time.perf_counter() - self._since))
        held = most_held(self.accelerator.device) / GIB
        of_machine = {"tokens_per_second": speed, "memory": held}
        self._write(step=step, part="train", lr=lr, skipped=skipped, **of_machine, **means)
        self._restart()
        return means

    def exclude(self, seconds: float) -> None:
        """Leave the time of an evaluation out of the tokens per second."""
        self._since += seconds

    def held_out(self, step: int, figures: dict[str, float]) -> None:
        """Write the line of an evaluation."""
        self._write(step=step, part="held-out", **figures)

    def state(self) -> dict:
        """What a checkpoint keeps: this process's sums since the last line."""
        return {
            "sums": {n: float(v) for n, v in self._sums.items()},
            "weights": self._weights,
        }

    def _write(self, step: int, part: str, **values: float | None) -> None:
        row = {n: v for n, v in values.items() if n in LOG_COLUMNS and v is not None}
        if self._csv:
            texts = {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()}
            self._csv.writerow({"step": step, "part": part, **texts})
            self._file.flush()


def plot(log: Path, picture: Path, title: str) -> None:
    """Plot loss, and accuracy if there is one, over the steps of a log.csv."""
    # Not pyplot: its state belongs to the notebook that calls us.
    from matplotlib.figure import Figure

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["loss", "accuracy"] if any(row["accuracy"] for row in rows) else ["loss"]
    legend = {"train": "train", "held-out": "held out"}
    if title == "reward":
        legend["train"] += " (the loss that is trained)"
        legend["held-out"] += " (without smoothing, both orders)"
    figure = Figure(figsize=(5 * len(columns), 3.5))
    axes = figure.subplots(1, len(columns), squeeze=False)
    for axis, column in zip(axes[0], columns):
        for part, style in (("train", "-"), ("held-out", "o")):
            there = [row for row in rows if row["part"] == part and row[column]]
            if there:
                steps, values = zip(*((int(row["step"]), float(row[column])) for row in there))
                axis.plot(steps, values, style, label=legend[part])
        axis.set(xlabel="step", ylabel=column, title=f"{title}: {column}")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)

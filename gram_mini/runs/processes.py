"""The device, and the processes that ``accelerate launch`` starts.

Every process draws the same rows of a step and computes some of them. At the end gradients and
losses are added up. So two processes learn the same as one process with twice the batch.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager

from gram_mini.errors import UserError, first_line
from gram_mini.training import trainable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def pick_device(device: str) -> torch.device:
    """The device of this name; ``auto`` is a GPU if there is one.

    Of several GPUs each process of ``accelerate launch`` takes its own.

    Raises:
        UserError: for a device that torch does not know or that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used here: {first_line(error)}") from None


def start_processes(device: str) -> tuple[Accelerator, torch.device]:
    """The accelerator, which connects the processes, and the device to compute on.

    Raises:
        UserError: as pick_device.
    """
    place = pick_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return Accelerator(cpu=place.type == "cpu"), place


def in_parallel(accelerator: Accelerator, work, items: list) -> list:
    """``work(items)``, one result per item; each process does some, and all get all results."""
    n = accelerator.num_processes
    results = [None] * len(items)
    own = work(items[accelerator.process_index :: n])
    for rank, of_process in enumerate(gather_object([own])):
        results[rank::n] = of_process
    return results


def sum_over_processes(accelerator: Accelerator, model, loss: torch.Tensor | float) -> float:
    """Sum gradients and loss of a step over the processes; returns the loss of the whole step."""
    if accelerator.num_processes > 1:
        for p in trainable(model):  # a process without a row in this step has no gradient
            p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
        loss = accelerator.reduce(
            torch.as_tensor(loss, dtype=torch.float32, device=accelerator.device), "sum"
        )
    return float(loss)


@contextmanager
def stopping_after_the_step(accelerator: Accelerator):
    """Ctrl-C and SIGTERM set the accelerator's trigger, so that a run can save and stop.

    A second signal stops it at once.
    """

    def stop(number, frame):
        accelerator.set_trigger()
        accelerator.print("\nstopping after this step; once more stops at once, without saving")
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)

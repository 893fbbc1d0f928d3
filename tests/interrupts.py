"""Ctrl-C in the middle of a run."""

import os
import signal

from gram_mini.runs import run


def interrupt(monkeypatch, step: int) -> None:
    """Send Ctrl-C to this process in a training step, counted from 1; later steps go on."""
    real, calls = run.sum_over_processes, []

    def sum_over_processes(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(run, "sum_over_processes", sum_over_processes)

"""Stage 1 of the village alone and beside one busy process, for several ways of waiting.

A training step of a small model has thousands of short parallel parts. At the end of each, OpenMP's
threads wait for the slowest one. Whoever waits by spinning holds a core, so beside a busy process
the thread that all wait for gets none. Whoever sleeps at once must be woken thousands of times.
gram_mini/__init__.py takes the way between: spin briefly, then sleep.

Each figure is tokens per second over the last 20 of 40 steps, in a process of its own, the median
of --rounds. Run this on an idle machine.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.studies.speed.common import table

ROOT = Path(__file__).parents[3]
WAYS = {  # what it is: (variable, value); libgomp reads them when torch is imported
    "spin 300,000 times (libgomp's default)": ("GOMP_SPINCOUNT", "300000"),
    "spin 5,000 times": ("GOMP_SPINCOUNT", "5000"),
    "spin 1,000 times (ours)": ("GOMP_SPINCOUNT", "1000"),
    "sleep at once": ("OMP_WAIT_POLICY", "passive"),
    "one thread": ("OMP_NUM_THREADS", "1"),
}
EXAMPLES = "  python -m gram_mini.studies.speed.neighbour    # 4 minutes on 2 cores"


def tokens_per_second(variable: str, value: str, steps: int) -> float:
    """Of the second half of ``steps`` steps of stage 1, with this variable set.

    Raises:
        UserError: if training fails.
    """
    others = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    kept = {name: text for name, text in os.environ.items() if name not in others}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_pretrain.py", "--out", f"{folder}/run"]
        command += ["--steps", str(steps), "--log-every", str(max(1, steps // 2))]
        done = subprocess.run(
            command, env={**kept, variable: value}, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"train_pretrain.py failed: {done.stderr.strip().splitlines()[-1]}")
        with open(f"{folder}/run/log.csv") as log:
            return float(list(csv.DictReader(log))[-1]["tokens_per_second"])


def beside_a_busy_process(variable: str, value: str, steps: int) -> float:
    """The same while another process keeps one core busy."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return tokens_per_second(variable, value, steps)
    finally:
        busy.kill()
        busy.wait()


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--rounds", type=options.positive_int, default=1, metavar="N", help="times that all are run"
    )
    parser.add_argument(
        "--steps", type=options.positive_int, default=40, metavar="N", help="steps of each run"
    )
    args = parser.parse_args(argv)
    found: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    for _ in range(args.rounds):
        for way, (variable, value) in WAYS.items():
            found[way][0].append(tokens_per_second(variable, value, args.steps))
            found[way][1].append(beside_a_busy_process(variable, value, args.steps))
    medians = {way: tuple(map(statistics.median, both)) for way, both in found.items()}
    best = max(alone for alone, _ in medians.values())
    print(f"{os.cpu_count()} cores; tokens per second of stage 1 on the village")
    head = ["how threads wait", "alone", "busy neighbour", "loses alone", "times slower"]
    rows = [
        [way, f"{alone:,.0f}", f"{busy:,.0f}", f"{1 - alone / best:.0%}", f"{best / busy:.1f}"]
        for way, (alone, busy) in medians.items()
    ]
    print(table(head, rows))


if __name__ == "__main__":
    with clear_errors():
        main()

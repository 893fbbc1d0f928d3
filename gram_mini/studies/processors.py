"""GRAM of make demo with other instructions of the processor and other numbers of threads.

The same seed gives the same adapter bit for bit on one machine. Other instructions and another
number of threads add up in another order, so the last digits differ, and training makes more of it.
This says how much more. A row takes 2 to 6 minutes; rows that are there are not computed again.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.studies.lab import write_json
from gram_mini.studies.recorded import processor
from gram_mini.studies.seeds import RESULTS

import torch

EXAMPLES = """\
  python -m gram_mini.studies.processors --runs runs/processors"""
CAPABILITIES = ("default", "avx2", "avx512")  # of ATEN_CPU_CAPABILITY
THREADS = (1, 2)


def row(folder: Path, capability: str, threads: int) -> list[dict]:
    """The rows of the village's table after both stages in processes of their own.

    Raises:
        UserError: a command that fails.
    """
    table = folder / "table.json"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment["ATEN_CPU_CAPABILITY"] = capability
    stage_1, judge = str(folder / "pretrain"), str(folder / "reward")
    commands = [
        ["train_pretrain.py", "--out", stage_1, "--overwrite"],
        ["train_reward.py", "--init", stage_1, "--out", judge, "--overwrite"],
        [*"-m gram_mini.studies.village_table".split(), "village", stage_1, judge]
        + ["--record", str(table)],
    ]
    for command in [] if table.is_file() else commands:
        if subprocess.run([sys.executable, *command], env=environment).returncode:
            raise UserError(f"{' '.join(command)}: failed with {capability}, {threads} threads")
    return json.loads(table.read_text())["means"]


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    folder = "where the runs are kept"
    parser.add_argument("--runs", type=Path, default=Path("runs/processors"), help=folder)
    args = parser.parse_args(argv)
    means = []
    for capability, threads in itertools.product(CAPABILITIES, THREADS):
        if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            print("avx512: left out, since this processor has none")
            continue
        name = f"{capability}, {threads} thread{'s' * (threads > 1)}"
        for of in row(args.runs / name.replace(", ", "-").replace(" ", "-"), capability, threads):
            if of["method"] != "the true rewards":
                means.append({**of, "method": f"{of['method']}: {name}"})
        write_json(
            RESULTS / "processors.json",
            {"study": "processors", "machine": processor(), "means": means},
        )


if __name__ == "__main__":
    with clear_errors():
        main()

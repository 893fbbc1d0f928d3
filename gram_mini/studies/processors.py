"""GRAM of make demo with other instructions of the processor and other numbers of threads.

The same seed gives the same adapter bit for bit on one machine. Other instructions and another
number of threads add up in another order, so the last digits differ, and training makes more of it.
This says how much more. Rows that are there are not computed again. "default" uses no vector
instructions in torch's own code, and MKL's matrix products that are the same on every processor.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.record import PACKAGES
from gram_mini.studies.lab import write_json
from gram_mini.studies.recorded import processor
from gram_mini.studies.seeds import RESULTS

import torch

EXAMPLES = """\
  python -m gram_mini.studies.processors"""
CAPABILITIES = {  # name: what the environment says
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
}
THREADS = (1, 2)
RUNS = Path("runs/processors")


def rows(capability: str, threads: int) -> list[dict]:
    """The village's table after both stages, in processes of their own.

    Raises:
        UserError: a command that fails.
    """
    folder = RUNS / f"{capability}-{threads}"
    stage_1, judge, table = (str(folder / x) for x in ("pretrain", "reward", "table.json"))
    commands = [
        ["train_pretrain.py", "--out", stage_1, "--overwrite"],
        ["train_reward.py", "--init", stage_1, "--out", judge, "--overwrite"],
        ["-m", "gram_mini.studies.village_table", "village", stage_1, judge, "--record", table],
    ]
    settings = {**CAPABILITIES[capability], "OMP_NUM_THREADS": str(threads)}
    for command in [] if Path(table).is_file() else commands:
        if subprocess.run([sys.executable, *command], env={**os.environ, **settings}).returncode:
            raise UserError(f"{' '.join(command)}: failed with {capability}, {threads} threads")
    return json.loads(Path(table).read_text())["means"]


def apart(means: list[dict]) -> list[dict]:
    """For each judge, how far its figures of all settings are apart at most."""
    found = []
    for judge in dict.fromkeys(row["method"] for row in means):
        rows = [row for row in means if row["method"] == judge]
        names = [name for name, value in rows[0].items() if isinstance(value, list)]
        values = {name: [row[name][0] for row in rows] for name in names}
        most = {name: [max(of_name) - min(of_name), None] for name, of_name in values.items()}
        found.append({"method": judge, "setting": "apart", **most})
    return found


def main(argv=None) -> None:
    options.parser(__doc__, EXAMPLES).parse_args(argv)
    means = []
    for capability, threads in itertools.product(CAPABILITIES, THREADS):
        if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            print("avx512: left out, since this processor has none")
            continue
        name = f"{capability}, {threads} thread{'s' * (threads > 1)}"
        for row in rows(capability, threads):
            if row["method"] != "the true rewards":
                means.append({**row, "setting": name})
        versions = {name: version(name) for name in PACKAGES}
        on = {"machine": processor(), "versions": versions}
        record = {"study": "processors", **on, "means": means + apart(means)}
        write_json(RESULTS / "processors.json", record)


if __name__ == "__main__":
    with clear_errors():
        main()

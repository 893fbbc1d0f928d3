"""Memory of score.py over a long file, and what a kill at a random moment costs.

Scores --rows pairs of the village with score.py as a process of its own, and notes its resident
memory every few seconds. With --kills it scores them once more, kills that process with SIGKILL at
so many random moments, goes on with --resume each time, and compares the bytes.
"""

import contextlib
import filecmp
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs.output import check_place
from gram_mini.runs.partial import partial_names
from gram_mini.village.pairs import village_pairs

import psutil
import torch

SCRIPT = Path(__file__).parents[3] / "score.py"
FAILED = "score.py failed; its last line, above, says why"


def write_rows(args) -> None:
    """The pairs, drawn 10,000 at a time so that this process stays small, too."""
    with open(args.folder / "rows.jsonl", "w") as file:
        for seed, begun in enumerate(range(0, args.rows, 10_000)):
            for pair in village_pairs("unlabelled", min(10_000, args.rows - begun), seed):
                a, b = pair.response_a, pair.response_b
                row = {"prompt": pair.prompt, "response_a": a, "response_b": b}
                file.write(json.dumps(row) + "\n")


def start(args, out: Path) -> subprocess.Popen:
    """score.py as a process; it goes on with an unfinished file."""
    command = [sys.executable, str(SCRIPT), "--model", args.model, "--out", str(out)]
    command += ["--data", str(args.folder / "rows.jsonl"), "--device", args.device]
    if all(name.is_file() for name in partial_names(out)):
        command.append("--resume")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def watch(args, out: Path) -> list[tuple[float, int, int]]:
    """Score the rows; (seconds, bytes written, resident bytes) at each look."""
    samples, began, process = [], time.monotonic(), start(args, out)
    watched, (partial, _) = psutil.Process(process.pid), partial_names(out)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, FileNotFoundError, subprocess.TimeoutExpired):
            written = partial.stat().st_size if partial.is_file() else 0
            samples.append((time.monotonic() - began, written, watched.memory_info().rss))
            process.wait(2)  # seconds between two looks
    if process.returncode:
        raise UserError(FAILED)
    end = time.monotonic() - began, out.stat().st_size, samples[-1][2]
    return [*samples, end]


def kill_at_random(args, whole: Path, out: Path, seconds: float) -> None:
    """Kill runs that write ``out`` and resume them, --kills times. A file that is complete before
    its kill comes is compared, and a new one begun; the last one is compared, too.
    """
    kills = 0
    while True:
        process = start(args, out)
        try:
            process.wait(random.uniform(0, seconds) if kills < args.kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if process.returncode:
            raise UserError(FAILED)
        if not filecmp.cmp(out, whole, shallow=False):
            raise UserError(f"{out}: is not equal to {whole}, byte for byte")
        if kills == args.kills:
            return
        out.unlink()


def measure(args, device: torch.device) -> list[dict[str, str]]:
    """One row. Rows and scores stay in --folder."""
    check_place(args.folder, "--folder")
    if args.folder.exists():
        raise UserError(f"--folder {args.folder}: is there already; remove it, or give another")
    args.folder.mkdir(parents=True)
    write_rows(args)
    whole = args.folder / "whole.jsonl"
    samples = watch(args, whole)
    taken, size, last = samples[-1]
    early = next(resident for _, written, resident in samples if written >= size / 10)
    sizes = early, last, max(resident for *_, resident in samples)
    mib = ", ".join(f"{resident // 2**20}" for resident in sizes)
    row = {"seconds": f"{taken:,.0f}", "resident MiB after a tenth, at the end, at most": mib}
    if args.kills:
        kill_at_random(args, whole, args.folder / "killed.jsonl", taken)
        row["SIGKILL, then --resume"] = f"{args.kills} times, every file equal byte for byte"
    return [row]

"""Memory of score.py over a long file, and what a kill at a random moment costs.

Writes --rows pairs of the village to FOLDER, scores them with score.py as a process of its own, and
notes its resident memory every few seconds. With --kills it then scores them once more, kills that
process with SIGKILL at so many moments, drawn uniformly from the time that the first run took, goes
on with --resume each time, and compares the bytes.

stream.json and stream.png go to gram_mini/studies/results. After a stop the same command goes on.
"""

from __future__ import annotations

import csv
import filecmp
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import check_place, save_figure, write_whole
from gram_mini.runs.partial import partial_names
from gram_mini.runs.scores import read_through
from gram_mini.studies.lab import row_of
from gram_mini.village.pairs import village_pairs

import psutil
from tqdm import tqdm

EXAMPLES = """\
  # 3,000 pairs, killed three times: 2 minutes on 2 CPU cores
  python -m gram_mini.studies.speed.stream --rows 3000 --kills 3 --out runs/stream
  # a million pairs: 45 minutes
  python -m gram_mini.studies.speed.stream"""

SCRIPT = Path(__file__).parents[3] / "score.py"
RESULTS = Path(__file__).parent.parent / "results"
MIB = 2**20
POINTS = 500  # of the memory over time that stream.json keeps


def village_rows(rows: int):
    """Lines of JSON, drawn 10,000 pairs at a time so that this process stays small, too."""
    for seed, start in enumerate(range(0, rows, 10_000)):
        for pair in village_pairs("unlabelled", min(10_000, rows - start), seed):
            yield json.dumps(row_of(pair)) + "\n"


def start(args, data: Path, out: Path) -> subprocess.Popen:
    """score.py as a process; it goes on with an unfinished file."""
    resume = ["--resume"] if all(name.is_file() for name in partial_names(out)) else []
    command = [sys.executable, str(SCRIPT), "--model", args.model, "--data", str(data)]
    with open(data.with_name("said.txt"), "wb") as said:
        return subprocess.Popen(
            [*command, "--out", str(out), *resume], stdout=said, stderr=subprocess.STDOUT
        )


def ended_well(process: subprocess.Popen, data: Path) -> None:
    """Wait for score.py.

    Raises:
        UserError: if it failed.
    """
    if process.wait():
        said = data.with_name("said.txt").read_text(errors="replace")
        raise UserError(f"score.py: {said.strip().splitlines()[-1]}")


def whole_lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with open(file, "rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(MIB), b""))


def watch(args, data: Path, out: Path, samples: Path) -> None:
    """Score the rows, and append [seconds, bytes written, resident bytes] to ``samples``."""
    before = read_samples(samples)
    offset = before[-1][0] if before else 0.0
    began, process = time.monotonic(), start(args, data, out)
    with open(samples, "a", newline="") as file, tqdm(total=None, desc="watching") as bar:
        while process.poll() is None:
            try:
                resident = psutil.Process(process.pid).memory_info().rss
            except psutil.Error:  # it has just ended
                break
            files = [file for file in (out, partial_names(out)[0]) if file.is_file()]
            written = files[0].stat().st_size if files else 0
            seconds = offset + time.monotonic() - began
            csv.writer(file).writerow([round(seconds, 1), written, resident])
            file.flush()
            bar.set_postfix(MiB=resident // MIB, written=written // MIB)
            try:
                process.wait(args.every)
            except subprocess.TimeoutExpired:
                pass
    ended_well(process, data)


def reading_seconds(args, data: Path) -> float:
    """How long score.py reads before it scores."""
    files = ["--data", str(data), "--out", str(data.with_name("nothing.jsonl"))]
    given = options.score_options("", ["--model", args.model, *files])
    began = time.monotonic()
    read_through(given)
    return round(time.monotonic() - began, 1)


def read_samples(file: Path) -> list[list[float]]:
    if not file.is_file():
        return []
    with open(file, newline="") as stream:
        return [[float(value) for value in row] for row in csv.reader(stream) if len(row) == 3]


def kill_at_random(args, data: Path, whole: Path, folder: Path, seconds: float) -> list[dict]:
    """One entry for each kill: after how many seconds, with how many lines on the disk.

    A file that is complete before its kill comes is compared, and a new one begun; so is the last.

    Raises:
        UserError: if a file is not equal to that of the run which nobody killed.
    """
    out, log = folder / "killed.jsonl", folder / "kills.json"
    kills = json.loads(log.read_text()) if log.is_file() else []

    def compare() -> None:
        if not filecmp.cmp(out, whole, shallow=False):
            raise UserError(f"{out}: is not equal to {whole}, byte for byte")
        out.unlink()

    with tqdm(total=args.kills, initial=len(kills), desc="kills") as bar:
        while len(kills) < args.kills:
            wait = random.uniform(0, seconds)
            process = start(args, data, out)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                lines = whole_lines(partial_names(out)[0])
                kills.append({"seconds": round(wait, 2), "lines": lines})
                write_whole(log, [json.dumps(kills)], "--folder")
                bar.update()
                continue
            ended_well(process, data)
            compare()
    if not out.exists():
        ended_well(start(args, data, out), data)
    compare()
    return kills


def draw(record: dict, picture: Path) -> None:
    """Memory over time, with the lines written below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    above, below = figure.subplots(2, 1, sharex=True)
    minutes = [point[0] / 60 for point in record["points"]]
    above.plot(minutes, [point[2] / MIB for point in record["points"]], color="C0")
    above.set(ylabel="resident MiB", ylim=(0, None), title=f"score.py on {record['rows']:,} pairs")
    below.plot(minutes, [point[1] / MIB for point in record["points"]], color="C1")
    below.set(xlabel="minutes", ylabel="MiB written", ylim=(0, None))
    for panel in (above, below):
        panel.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, picture)


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    number: dict[str, Any] = {"type": options.positive_int, "metavar": "N"}
    parser.add_argument("--model", default="runs/demo/reward", help="the judge")
    parser.add_argument("--rows", default=1_000_000, **number, help="pairs in the file")
    parser.add_argument("--kills", default=0, **number, help="how often a second run is killed")
    parser.add_argument("--every", default=5, **number, help="seconds between two looks")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/stream"),
        metavar="FOLDER",
        help="where rows, scores and samples go",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="where stream.json and .png go"
    )
    args = parser.parse_args(argv)
    check_place(args.out, "--out")
    folder = args.folder / str(args.rows)
    check_place(folder, "--folder")
    folder.mkdir(parents=True, exist_ok=True)
    data, whole, samples = folder / "rows.jsonl", folder / "whole.jsonl", folder / "memory.csv"
    if not data.is_file():
        write_whole(data, village_rows(args.rows), "--folder")
    if not whole.is_file():
        watch(args, data, whole, samples)
    points = read_samples(samples)
    seconds = points[-1][0]
    kills = kill_at_random(args, data, whole, folder, seconds) if args.kills else []
    reading = reading_seconds(args, data)
    step = -(-len(points) // POINTS)
    tenth = whole.stat().st_size / 10
    early = next((point for point in points if point[1] >= tenth), points[-1])
    record = {
        "rows": args.rows,
        "seconds": seconds,
        "seconds of one reading": reading,
        "MiB at a tenth of the file": round(early[2] / MIB),
        "MiB at the end": round(points[-1][2] / MIB),
        "MiB at most": round(max(point[2] for point in points) / MIB),
        "kills": kills,
        "points": points[::step],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "stream.json", [json.dumps(record) + "\n"], "--out")
    draw(record, args.out / "stream.png")
    print({name: value for name, value in record.items() if name not in ("points", "kills")})
    print(f"{len(kills)} kills, all files equal byte for byte" if kills else "no kills asked for")


if __name__ == "__main__":
    with clear_errors():
        main()

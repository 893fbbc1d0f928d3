"""Studies over seeds: what is missing is run, side by side if wanted; the rest is used again."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gram_mini.errors import Interrupted, UserError
from gram_mini.runs import options
from gram_mini.studies.figures import average, draw, draw_changes, table
from gram_mini.studies.lab import Lab, write_json
from gram_mini.studies.paper import STUDIES, Study

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


# ---- options of every study ----------------------------------------------------------


def add_folders(parser, runs: str, results: str) -> None:
    """Where a study keeps what it makes; --results is None by default, which means ``results``."""
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    text = "where trained models are kept"
    parser.add_argument("--runs", default=Path(runs), help=text, **folder)
    text = f"where tables and figures go (default: {results})"
    parser.add_argument("--results", help=text, **folder)


def add_seeds(parser, default: list[int]) -> None:
    each: dict[str, Any] = {"type": options.seed, "metavar": "N", "action": options.Distinct}
    parser.add_argument("--seeds", nargs="+", default=default, help="seeds to run", **each)


def words(text: str) -> list[str]:
    """argparse type: options for the scripts, given as one text."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


# ---- running -------------------------------------------------------------------------


def run_seed(name: str, lab: Lab, seed: int, studies: dict[str, Study] = STUDIES) -> Path:
    """The rows of a study for one seed, as a file; made unless it is there already."""
    done = lab.folder / "rows" / f"{name}-{seed}.json"
    with lab.alone(done):
        if not done.is_file():
            began = time.perf_counter()
            rows = [{"seed": seed, **row} for row in studies[name].rows(lab, seed)]
            write_json(done, {"seconds": round(time.perf_counter() - began), "rows": rows})
    return done


def run_side_by_side(names: list[str], lab: Lab, seeds: list[int], jobs: int) -> None:
    """Do run_seed for all of them, ``jobs`` at a time, each with an equal share of the cores."""
    waiting = [(name, seed) for name in names for seed in seeds]
    running: set[Future] = set()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _begin_worker, (threads,)
    ) as pool:
        progress = tqdm(total=len(waiting), desc="studies x seeds")
        try:
            while waiting or running:
                # None is handed over early: after an error no other may begin.
                while waiting and len(running) < jobs:
                    name, seed = waiting.pop(0)
                    running.add(pool.submit(run_seed, name, lab, seed))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for task in done:
                    task.result()
                    progress.update()
        except KeyboardInterrupt:
            raise Interrupted("the same command goes on where it stopped") from None
        except BrokenProcessPool:
            raise UserError(
                f"--jobs {jobs}: a process was killed, perhaps it ran out of memory; try --jobs 1"
            ) from None
        except Exception:
            # Training saves what it has. After Ctrl-C all processes have been told already.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # Progress bars would write over each other. Errors go to the parent.
    sys.stderr = open(os.devnull, "w")


def run_study(
    name: str, lab: Lab, seeds: list[int], results: Path, studies: dict[str, Study] = STUDIES
) -> None:
    """Run a study for each seed that is missing, and write its table and figure."""
    study, keys, x, shown, after = studies[name]
    rows: list[dict[str, Any]] = []
    seconds = {}
    for seed in seeds:
        of_seed = json.loads(run_seed(name, lab, seed, studies).read_text())
        rows += of_seed["rows"]
        seconds[seed] = of_seed["seconds"]
    results.mkdir(parents=True, exist_ok=True)
    means = average(rows, keys)
    record = {
        "study": name,
        "model": lab.model,
        "data": lab.about["data"],
        "seeds": seeds,
        "seconds": seconds,  # of each seed; models that were there already took no time
        "means": means,
        "rows": rows,
    }
    title = f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
    if isinstance(shown, dict):
        draw_changes(means, shown, results / f"{name}.png", title)
    else:
        draw(means, x, shown, results / f"{name}.png", title)
    write_json(results / f"{name}.json", record)
    print(f"\n{name}: {study.__doc__}")
    print(table(means, keys))
    print(f"wrote {results / name}.json and .png")
    if after:
        after(name, lab, seeds, results)

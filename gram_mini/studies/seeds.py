"""Studies over seeds: what the results lack is run, seed by seed; the rest is used again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gram_mini.errors import Interrupted, UserError
from gram_mini.runs import options
from gram_mini.runs.processes import pick_device
from gram_mini.studies.drawing import picture_of
from gram_mini.studies.figures import average, table
from gram_mini.studies.lab import Lab, read_json, released, write_json
from gram_mini.studies.paper import STUDIES, Study
from gram_mini.studies.recorded import processor

import torch
from filelock import FileLock
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


def add_folder(parser, name: str, default: Path, text: str) -> None:
    parser.add_argument(name, type=Path, metavar="FOLDER", default=default, help=text)


def add_seeds(parser, default: list[int]) -> None:
    each: dict[str, Any] = {"type": options.seed, "metavar": "N", "nargs": "+"}
    parser.add_argument("--seeds", default=default, help="seeds to run, each once", **each)


# ---- running -------------------------------------------------------------------------


def run(
    names: list[str],
    lab: Lab,
    seeds: list[int],
    results: Path,
    jobs: int = 1,
    studies: dict[str, Study] = STUDIES,
) -> None:
    """Run each study for each seed that its results lack: all studies of a seed, then the next one.

    The results of a study are written anew after each seed.

    Raises:
        UserError: if results that are there cannot be read.
    """
    seeds = list(dict.fromkeys(seeds))
    missing = [(name, seed) for seed in seeds for name in names]
    for name in names:
        there, stale, other = reusable(name, lab, results, studies[name])
        missing = [(x, seed) for x, seed in missing if x != name or seed not in there]
        if stale:
            print(f"{name}: seeds {stale} were made with other {', '.join(other)};", end=" ")
            print("those asked for are run anew, the others are dropped from the results")
    asked = len(names) * len(set(seeds))
    print(f"{asked - len(missing)} of {asked} seeds of studies are there", flush=True)

    def add(name: str, seed: int, made: dict) -> None:
        add_seed(name, seed, made, lab, results, studies[name])

    if jobs == 1:
        for name, seed in missing:
            add(name, seed, make_seed(studies[name].rows, lab, seed))
    elif missing:
        side_by_side(missing, lab, jobs, studies, add)
    for name in names:
        print(f"\n{name}: {studies[name].rows.__doc__}")
        print(table(read_json(results / f"{name}.json")["means"]))
        print(f"see {results / name}.json and .png")


def make_seed(rows: Callable, lab: Lab, seed: int) -> dict[str, Any]:
    """The rows of a study for one seed, and what they were made on and in what time."""
    began = time.perf_counter()
    made = [{"seed": seed, **row} for row in rows(lab, seed)]
    device = pick_device(lab.loading.get("device", "auto"))
    on = {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # those that torch uses
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    return {"seconds": round(time.perf_counter() - began), "processor": on, "rows": made}


def side_by_side(
    waiting: list[tuple[str, int]], lab: Lab, jobs: int, studies: dict[str, Study], add: Callable
) -> None:
    """Do make_seed for all of them, ``jobs`` at a time with a thread each, and ``add`` as they end.

    One thread each, whatever the machine: the number of threads changes the last digits.
    """
    running: dict[Future, tuple[str, int]] = {}
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker
    ) as pool:
        progress = tqdm(total=len(waiting), desc="studies x seeds")
        try:
            while waiting or running:
                # None is handed over early: after an error no other may begin.
                while waiting and len(running) < jobs:
                    name, seed = waiting.pop(0)
                    task = pool.submit(make_seed, studies[name].rows, lab, seed)
                    running[task] = name, seed
                for task in wait(running, return_when=FIRST_COMPLETED).done:
                    add(*running.pop(task), task.result())
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


def _begin_worker() -> None:
    torch.set_num_threads(1)
    # Progress bars would write over each other. Errors go to the parent.
    sys.stderr = open(os.devnull, "w")


# ---- results -------------------------------------------------------------------------


def basis(lab: Lab, study: Study) -> dict[str, Any]:
    """What the rows of a study depend on: backbone, data, options, its methods, and versions."""
    about = {name: value for name, value in lab.about.items() if name != "versions"}
    methods = {name: about["methods"][name] for name in study.methods}
    versions = lab.about["versions"] | {name: version(name) for name in study.packages}
    return {"versions": versions, "about": about | {"methods": methods}}


def reusable(
    name: str, lab: Lab, results: Path, study: Study
) -> tuple[set[int], list[int], list[str]]:
    """The seeds in a study's results that can be used again; those that cannot; what differs."""
    record, now = read_json(results / f"{name}.json"), basis(lab, study)
    seeds = {row["seed"] for row in record.get("rows", [])}
    before = {"versions": released(record.get("versions", {})), **record.get("about", {})}
    now = {"versions": released(now["versions"]), **now["about"]}
    other = [key for key in now if before.get(key) != now[key]]
    if other:
        return set(), sorted(seeds), other
    if study.after:
        told = [read_json(results / f"{name}-{part}.json") for part in ("summary", "answers")]
        kept = {row["seed"] for row in told[0].get("rows", [])} if all(told) else set()
        return seeds & kept, sorted(seeds - kept), ["answers (not there)"]
    return seeds, [], []


def add_seed(name: str, seed: int, made: dict, lab: Lab, results: Path, study: Study) -> None:
    """Write the results of a study anew, with one more seed, beside those that can be used again.

    The record is written last: a seed that is in it has all else.
    """
    place = results / f"{name}.json"
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # two commands may add to it, even with other --runs
        kept = reusable(name, lab, results, study)[0] - {seed}
        before = read_json(place) if kept else {}
        if study.after:
            study.after(name, lab, seed, kept, results)
        rows = [row for row in before.get("rows", []) if row["seed"] in kept] + made["rows"]
        rows.sort(key=lambda row: row["seed"])
        means, seeds = average(rows, study.keys), sorted({seed, *kept})
        by_seed = {
            key: {str(s): made[key] if s == seed else before[key][str(s)] for s in seeds}
            for key in ("seconds", "processor")
        }
        picture_of(name, study, rows).savefig(results / f"{name}.png", dpi=100)
        # Of the seconds: models that were there already took no time.
        record = {"study": name, "seeds": seeds, **by_seed, **basis(lab, study)}
        write_json(place, {**record, "means": means, "rows": rows})
    print(f"{name}, seed {seed}: {made['seconds']} seconds; wrote {place}", flush=True)

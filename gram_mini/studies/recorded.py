"""A table of judges, printed, and as a JSON file from which pages.py writes the table of a page."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.load import find_record
from gram_mini.runs.models import local_model
from gram_mini.runs.record import PACKAGES
from gram_mini.studies.figures import table
from gram_mini.studies.lab import write_json


def table_command(
    rows: Callable[..., list[dict]], description: str, examples: str, caption: str, argv
) -> None:
    """The command of a table: ``rows`` gets the models, and the options of load_judge by name."""
    parser = options.parser(description, examples)
    text = "run folders, or any model as a zero-shot judge, such as 'village'"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=text)
    options.add_model_options(parser)
    text = "write the table to this file, too"
    parser.add_argument("--record", type=Path, metavar="FILE.json", help=text)
    args = parser.parse_args(argv)
    if args.record and (args.record.is_dir() or not args.record.parent.is_dir()):
        raise UserError(f"--record {args.record}: is a folder, or in none; give a file")
    means = rows(args.models, bits=args.bits, max_length=args.max_length, device=args.device)
    print(table(means))
    print(caption)
    if args.record:
        record = {
            "study": args.record.stem,
            "command": " ".join(["python", *sys.orig_argv[1:]]),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in PACKAGES},
            "note": "± is the 95% interval over the prompts",
            "means": means,
        }
        write_json(args.record, record)


def records_of(models: list[str]) -> list[dict | None]:
    """The record of each run or exported run, None for any other model.

    Raises:
        UserError: a missing model, so before the first one is judged.
    """
    records = []
    for model in models:
        record = find_record(model)
        if record is None:
            local_model(model)
        records.append(record)
    return records


def method_of(record: dict | None) -> str:
    """The name of a run's method; ``record`` is its run.json, None for the plain backbone."""
    if record is None:
        return "zero-shot judge"
    if record["stage"] == "pretrain":
        return "stage 1 alone"
    arguments = record["options"]
    names = {None: "labels alone", "pretrain": "stage 1 + labels", "reward": "labels twice"}
    name = names[record["init"]["stage"] if record["init"] else None]
    name += ", scalar head" if arguments.get("head") == "scalar" else ""
    name += ", text loss" if arguments.get("text_weight") else ""
    name += ", frozen" if arguments.get("freeze") else ""
    name += ", eps = 0" if arguments["label_smoothing"] == 0 else ""
    name += ", both orders (ours)" if arguments.get("both_orders") else ""
    name += ", likelihood (ours)" if "beta_lr" in arguments else ""
    return f"{name} = GRAM" if name == "stage 1 + labels" else name


def processor() -> str:
    """The processor's name, as Linux gives it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

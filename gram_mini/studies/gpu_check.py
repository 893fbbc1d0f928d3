"""What only a GPU can show, in at most ten minutes on a CUDA card of 8 GB or more.

  Training   both scripts, NF4 and bf16, on the village and on a real shape: losses fall
  Resuming   a run that is interrupted and resumed ends as one that is not
  Scores     the judge's log-odds on the GPU are those on the CPU: 32, 16 and 4 bits
  Memory     peaks of the recipes in gram_mini/studies/README.md: measured against computed
  Speed      tokens per second, and the share of what large matrix products reach on the card

Nothing is downloaded. Real shapes have random weights and the village's tokenizer. The page is
written to --out after every step, and printed at the end. A step that fails does not stop the
others: its reason stands on the page, and the exit status is 1. What the steps say goes to standard
error.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import train_pretrain
import train_reward
from gram_mini.errors import Interrupted, UserError, last_line
from gram_mini.runs import options
from gram_mini.runs.checks import read_by_blocks
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import VILLAGE, compute_dtype, load_tokenizer
from gram_mini.runs.output import check_output, write_whole
from gram_mini.runs.processes import pick_device
from gram_mini.runs.run import LORA_RANK, Run
from gram_mini.studies.speed import memory, score
from gram_mini.studies.speed.bounds import pair_of
from gram_mini.studies.speed.common import (
    GIB,
    MODELS,
    PIECES,
    SHAPES,
    Shape,
    build,
    loss_of,
    machine,
    matrix_peak,
    rows_of,
    save_random,
    seconds,
    table,
    take_step,
)
from gram_mini.studies.speed.train import operations
from gram_mini.training import optimizer_and_schedule
from gram_mini.village.pairs import village_pairs

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

EXAMPLES = """\
  python -m gram_mini.studies.gpu_check                      # Qwen2.5-0.5B's shape
  python -m gram_mini.studies.gpu_check --shape Llama-3.2-1B --out page.md
  python -m gram_mini.studies.gpu_check --tiny               # without a GPU: tries the check"""

TINY = {"tiny": Shape("qwen3", 128, 2, 4, 2, 32, 384, 1024, True)}
RESULTS = Path(__file__).parent / "results"
OUT = Path("runs/gpu_check.md")
NO_GPU = "no GPU: checked on a CPU with tiny shapes"
MINUTES = 9  # after which no step is begun
SCRIPTS = {"pretrain": train_pretrain, "reward": train_reward}
STAGES = {"pretrain": "stage 1", "reward": "stage 2"}
# One batch again and again, so that the loss must fall. The rate of a real shape is a usual one of
# LoRA; the village has the defaults of the scripts.
BATCH = "--held-out 0 --limit 16 --batch-size 16 --log-every 1".split()
STEPS, REAL_RATE = 20, ["--lr", "1e-4"]
CARDS = (8, 12, 24)  # of the recipes, in GB
ROWS = 3  # of the recipe table

# Mean difference of log-odds between GPU and CPU; the largest one may be ten times that. The
# log-odds here are between -3 and 3. Measured on a CPU, in the mean: what bf16 rounds is 0.01 (16
# bits) and 0.03 (4 bits). These must not pass: NF4 in place of float32, 0.1; 4 bits read with wrong
# scales, 0.5; an adapter that is left out, 0.9.
SCORES_APART = {
    32: 1e-4,  # float32 on both, summed in another order; TF32 would be off by more
    16: 0.03,  # bf16 on both
    4: 0.06,  # bf16 on the GPU, float32 on the CPU; a weight between two levels may fall to either
}
# What resuming may change, as a share of what was learned (the norm of LoRA's B, which begins at
# zero). Sums on a GPU have no fixed order, so two runs that nobody interrupts differ too, and
# Adam's first steps make much of little.
RESUMED_APART = 0.01  # or three times what two uninterrupted runs are apart, if that is more,
RESUMED_AT_MOST = 0.2  # but not so much that a lost optimiser would pass: it makes 0.4
MEMORY_ABOVE = 1.05  # times the computed peak, as in tests/wings/test_memory.py

ABOUT = {
    "Machine": "",
    "Training": f"{STEPS} steps of the scripts on one batch of 16 of the village's pairs. Loss: "
    "mean of the first three steps and of the last three. It must be finite and fall; with random "
    "weights stage 2 need not fall.",
    "Resuming": "12 steps, interrupted in the sixth and resumed, against 12 at once; allowed is "
    f"{RESUMED_APART:.0%} of what was learned, or three times what two uninterrupted runs differ, "
    f"{RESUMED_AT_MOST:.0%} at most.",
    "Scores": "Difference of log-odds to those on the CPU, on 32 village pairs in both orders; "
    f"allowed are {', '.join(f'{v:g} ({k} bits)' for k, v in SCORES_APART.items())} in the mean, "
    "and ten times that at most. The code says why.",
    "Memory": "Rows of the recipe table for this card, with gradient checkpointing: measured peak "
    f"against computed, in GiB; allowed is {MEMORY_ABOVE} of the computed one.",
    "Speed": "NF4, whole sequences, without gradient checkpointing; operations are counted as in "
    "gram_mini/studies/speed, and matrix products are timed on this machine.",
}


class Failed(Exception):
    """A step does not show what it should. The message is its line on the page."""


@dataclass(frozen=True)
class Setting:
    """On what, and where, the steps run."""

    device: torch.device
    name: str  # of the shape
    shape: Shape
    folder: Path  # a temporary one, for runs and models
    tiny: bool  # tiny shapes on a CPU


# A step returns (result, figures), or raises. The result is "passed", or "measured" where there is
# nothing to hold the figures against.
Step = Callable[[Setting], tuple[str, str]]


# ---- machine -------------------------------------------------------------------------


def card(x: Setting) -> tuple[str, str]:
    """Name, memory, compute capability, and whether it has bf16."""
    if x.tiny:
        return "measured", f"{NO_GPU}; {platform.machine()}, {machine(x.device)}"
    facts = torch.cuda.get_device_properties(x.device)
    bf16 = "bf16" if compute_dtype(4, x.device) == torch.bfloat16 else "no bf16"
    return "measured", (
        f"{machine(x.device)}, {facts.total_memory / GIB:.1f} GiB, "
        f"compute capability {facts.major}.{facts.minor}, {bf16}"
    )


def driver(x: Setting) -> tuple[str, str]:
    """The driver, as nvidia-smi says it, and the CUDA that torch was built with."""
    said = "unknown (no nvidia-smi)"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
        said = lines[0] if lines else "unknown (nvidia-smi fails)"
    return "measured", f"driver {said}, CUDA {torch.version.cuda or 'none'}"


def versions(x: Setting) -> tuple[str, str]:
    """The libraries that compute."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return "measured", ", ".join([f"{name} {version(name)}" for name in names])


# ---- training ------------------------------------------------------------------------


def train(x: Setting, stage: str, model: str, bits: int, out: Path, *more: str) -> None:
    """Run the script of a stage on one batch; what it says goes to standard error."""
    if model == VILLAGE:
        name, rate = VILLAGE, []
    else:
        name, rate = str(x.folder / "model"), REAL_RATE
        if not (x.folder / "model" / "tokenizer.json").is_file():
            save_random(x.shape, x.folder / "model")
            load_tokenizer(VILLAGE).save_pretrained(x.folder / "model")
    where = ["--model", name, "--bits", str(bits), "--device", str(x.device), "--out", str(out)]
    with contextlib.redirect_stdout(sys.stderr):
        SCRIPTS[stage].main([*where, *BATCH, *rate, *more])


def run_of(x: Setting, stage: str, model: str, bits: int) -> Path:
    return x.folder / f"{model}-{bits}-{stage}"


def training(x: Setting, stage: str, model: str, bits: int) -> tuple[str, str]:
    """Losses are finite and fall. Stage 2 starts from stage 1.

    Stage 2 need not fall with random weights: their first verdicts jump about.
    """
    out = run_of(x, stage, model, bits)
    init = ["--init", str(run_of(x, "pretrain", model, bits))] if stage == "reward" else []
    train(x, stage, model, bits, out, "--steps", str(STEPS), *init)
    with open(out / "log.csv", newline="") as file:
        losses = [float(row["loss"] or "nan") for row in csv.DictReader(file)]
    if not all(map(math.isfinite, losses)):
        raise Failed(f"{sum(not math.isfinite(v) for v in losses)} losses are not finite")
    first, last = statistics.mean(losses[:3]), statistics.mean(losses[-3:])
    if stage == "reward" and model != VILLAGE:
        return "measured", f"loss {first:.3f} to {last:.3f}, finite"
    if last >= first:
        raise Failed(f"the loss does not fall: {first:.3f} to {last:.3f}")
    return "passed", f"loss {first:.3f} to {last:.3f}"


# ---- resuming ------------------------------------------------------------------------


@contextlib.contextmanager
def ctrl_c_in_step(number: int):
    """Context in which a run is interrupted in this step, as a user does it."""
    finite, calls = Run.finite, []

    def interrupted(run, gradient_norm):
        calls.append(gradient_norm)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return finite(run, gradient_norm)

    Run.finite = interrupted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.finite = finite  # type: ignore[method-assign]


def resuming(x: Setting, stage: str) -> tuple[str, str]:
    """An interrupted run that is resumed ends with the adapter of an uninterrupted one."""
    whole, again, resumed = (x.folder / f"{name}-{stage}" for name in ("whole", "again", "resumed"))
    arguments = x, stage, VILLAGE, 4
    for out in (whole, again):
        train(*arguments, out, "--steps", "12")
    with contextlib.suppress(Interrupted), ctrl_c_in_step(6):
        train(*arguments, resumed, "--steps", "12")
    if resumed.exists():
        raise Failed("the run was not interrupted")
    train(*arguments, resumed, "--steps", "12", "--resume")
    away, by_itself = apart(resumed, whole), apart(again, whole)
    if away == 0:
        return "passed", "bit for bit"
    text = f"differs by {away:.2g} of what was learned; two uninterrupted runs by {by_itself:.2g}"
    if not away <= min(max(RESUMED_APART, 3 * by_itself), RESUMED_AT_MOST):
        raise Failed(text)
    return "passed", text


def apart(run: Path, other: Path) -> float:
    """How far two adapters differ, as a share of what the other has learned; 0 for equal bits."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (run, other))
    if all(torch.equal(a[name], b[name]) for name in a):
        return 0.0
    learned = [name for name in a if "lora_B" in name]
    difference = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return math.sqrt(difference / sum(float(b[name].square().sum()) for name in learned))


# ---- scores --------------------------------------------------------------------------


def log_odds(run: Path, bits: int, device: torch.device) -> torch.Tensor:
    """Log-odds (32, 2) of a run's judge on village pairs, in both orders.

    On a CPU NF4 weights are turned back block by block, since bitsandbytes may read the village's
    wrongly there (runs/checks.py).
    """
    judge = load_judge(run, bits, str(device), merge=False)
    for module in judge.model.modules() if device.type == "cpu" else ():
        if isinstance(module, Linear4bit):  # under LoRA, not LoRA's own layer
            right = read_by_blocks(module.weight)
            forward = partial(F.linear, weight=right, bias=module.bias)
            module.forward = forward  # type: ignore[method-assign]
    return judge.log_odds(judge.encode(village_pairs("out-of-distribution", 32)))[0]


def scores(x: Setting, bits: int) -> tuple[str, str]:
    """The log-odds of the village's judge are those on the CPU."""
    run = run_of(x, "reward", VILLAGE, 4)
    here, on_cpu = log_odds(run, bits, x.device), log_odds(run, bits, torch.device("cpu"))
    differences = (here - on_cpu).abs()
    mean, largest = float(differences.mean()), float(differences.max())
    text = (
        f"log-odds between {on_cpu.min():.2f} and {on_cpu.max():.2f} differ by {mean:.1e} in the "
        f"mean, by {largest:.1e} at most"
    )
    if not (mean <= SCORES_APART[bits] and largest <= 10 * SCORES_APART[bits]):
        raise Failed(text)
    return "passed", text


# ---- memory --------------------------------------------------------------------------


def recipes(x: Setting) -> list[tuple[str, Shape, int, int, int]]:
    """(name, shape, bits, batch, length): the first rows of the recipe table that fit the card.

    A tiny shape is measured in bf16: so a CPU computes as the formula does.
    """
    if x.tiny:
        return [(x.name, x.shape, 16, 2, 256)]
    total = round(torch.cuda.get_device_properties(x.device).total_memory / GIB)  # 7.8 is "8 GB"
    size, rows = max([c for c in CARDS if c <= total], default=total), []
    for name, s in MODELS.items():
        if found := memory.largest_batch(s, size, 1024, LORA_RANK):
            rows.append((name, s, 4, found[0], 1024))
    return rows[:ROWS]


def peaks(x: Setting, s: Shape, bits: int, batch: int, length: int) -> tuple[str, str]:
    """The peaks of both stages are not above the computed ones."""
    on_gpu = x.device.type == "cuda"
    before = torch.cuda.memory_allocated(x.device) if on_gpu else 0  # by what is not this step
    model = memory.unless_full(build, s, bits, LORA_RANK, x.device)
    parts, ratios = [], []
    for stage, title in STAGES.items():
        computed = memory.compute(s, stage, bits, True, batch, length, LORA_RANK)["peak"]
        result = model and memory.unless_full(memory.measure, model, stage, True, batch, length, 2)
        if not result:
            raise Failed(f"{title} does not fit; computed {memory.gib(computed)}")
        peak = result[0] - before
        ratios.append(peak / computed)
        parts.append(
            f"{title} {memory.gib(peak)}, computed {memory.gib(computed)} ({ratios[-1]:.2f})"
        )
    text = "; ".join(parts)
    if compute_dtype(bits, x.device) != torch.bfloat16:
        return "measured", f"{text}; not judged: computed for bf16, which this card has not"
    if max(ratios) > MEMORY_ABOVE:
        raise Failed(text)
    return "passed", text


# ---- speed ---------------------------------------------------------------------------


def sizes_of(x: Setting) -> tuple[int, int]:
    """(pairs, tokens of each): at most 8 x 1024, and what leaves a fifth of the card free.

    Raises:
        Failed: not even one pair does.
    """
    if x.tiny:
        return 2, 256
    room = 0.8 * torch.cuda.get_device_properties(x.device).total_memory
    for batch in (8, 4, 2, 1):
        needed = [
            memory.compute(x.shape, stage, 4, False, batch, 1024, LORA_RANK)["peak"]
            for stage in STAGES
        ]
        if max(needed) <= room:
            return batch, 1024
    raise Failed(f"not even one pair fits; computed {memory.gib(max(needed))} GiB")


def full_rows(x: Setting, stage: str, pairs: int, length: int):
    """Pairs of different tokens, each of so many."""
    sizes = pair_of(x.shape, stage, length)[0].uncut
    return rows_of([sizes] * pairs, PIECES[stage], x.shape.vocabulary, length, seed=0)


def training_speed(x: Setting, stage: str) -> tuple[str, str]:
    """Tokens per second of a training step, the median of five."""
    pairs, length = sizes_of(x)
    rows = full_rows(x, stage, pairs, length)
    model = build(x.shape, 4, LORA_RANK, x.device).train()
    optimizer, _ = optimizer_and_schedule(model, 1e-4, 10)
    step = lambda: take_step(model, optimizer, loss_of(model, stage, rows, PIECES[stage]))
    step()  # warm-up; Adam's moments are made here
    needed = operations(x.shape, stage, rows, LORA_RANK, False)
    return speed(x, step, needed, pairs * length, f"{pairs} pairs of {length} tokens a step")


def scoring_speed(x: Setting) -> tuple[str, str]:
    """Tokens per second of scoring in both orders; what two orders share counts twice."""
    pairs, length = sizes_of(x)
    asked = Namespace(seed=0, bits=4, lora_rank=LORA_RANK, max_length=length, batch_size=pairs)
    judge = score.judge_of(x.shape, asked, x.device)
    rows = full_rows(x, "reward", 4 * pairs, length)
    score.ours(judge, rows[:2])  # warm-up
    needed = score.operations(x.shape, rows)
    step = lambda: score.ours(judge, rows)
    return speed(x, step, needed, 2 * 4 * pairs * length, f"{4 * pairs} pairs of {length} tokens")


def speed(x: Setting, step, needed: float, tokens: int, what: str) -> tuple[str, str]:
    """Tokens per second of a step that needs so many operations, and its share of the peak."""
    taken = statistics.median(seconds(x.device, step) for _ in range(5))
    dtype = compute_dtype(4, x.device)
    best = matrix_peak(x.device, dtype)
    return "measured", (
        f"{tokens / taken:,.0f} tokens/s ({what}); {needed / taken / best:.0%} of the "
        f"{best / 1e12:.3g} TFLOP/s that {str(dtype).removeprefix('torch.')} products reach"
    )


# ---- the page ------------------------------------------------------------------------


def steps_of(x: Setting) -> list[tuple[str, str, Step]]:
    """(section, name, step), in the order of the page."""
    steps: list[tuple[str, str, Step]]
    steps = [("Machine", f.__name__, f) for f in (card, driver, versions)]
    for model in (VILLAGE, x.name):
        for bits in (4, 16):
            for stage, title in STAGES.items():
                step = partial(training, stage=stage, model=model, bits=bits)
                steps.append(("Training", f"{title}, {model}, {bits} bits", step))
    for stage, title in STAGES.items():
        steps.append(("Resuming", f"{title}, village, 4 bits", partial(resuming, stage=stage)))
    for bits in SCORES_APART:
        steps.append(("Scores", f"village, {bits} bits", partial(scores, bits=bits)))
    for name, s, bits, batch, length in recipes(x):
        step = partial(peaks, s=s, bits=bits, batch=batch, length=length)
        steps.append(("Memory", f"{name}, {bits} bits, {batch} x {length} tokens", step))
    for stage, title in STAGES.items():
        steps.append(("Speed", f"{title}, {x.name}", partial(training_speed, stage=stage)))
    steps.append(("Speed", f"scoring, {x.name}", scoring_speed))
    return steps


def outcome(x: Setting, step: Step) -> tuple[str, str]:
    """(result, figures or reason) of a step, whatever becomes of it."""
    try:
        return step(x)
    except (Failed, UserError) as error:
        reason = str(error)
    except (Exception, SystemExit) as error:  # one broken step says nothing about the others
        if os.environ.get("GRAM_DEBUG"):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {last_line(error)}"  # type: ignore[arg-type]
    finally:
        gc.collect()
        if x.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a GPU that is broken has said so above
                torch.cuda.empty_cache()
    return "FAILED", " ".join(reason.split())


def verdict(results: list[str], names: list[str], planned: int) -> str:
    """The last line of the page."""
    count = {r: results.count(r) for r in ("passed", "measured", "FAILED", "left out")}
    said = ", ".join(f"{n} {result}" for result, n in count.items() if n)
    bad = [name for name, result in zip(names, results) if result in ("FAILED", "left out")]
    ending = f"Not shown: {'; '.join(bad)}." if bad else "All checks hold."
    if len(results) < planned:
        return f"**Unfinished: {len(results)} of {planned} steps: {said}.**"
    return f"**{planned} steps: {said}. {ending}**"


def check(x: Setting, write: Callable[[str], None]) -> bool:
    """Run all steps; whether every step passed or was measured.

    ``write`` gets the page after every step, so that one that hangs or kills the process takes
    nothing with it.
    """
    lines: dict[str, list[list[str]]] = {}
    began, results, names, steps = time.monotonic(), [], [], steps_of(x)
    for section, name, step in steps:
        started = time.monotonic()
        if not x.tiny and started - began > 60 * MINUTES:
            result, text = "left out", f"{MINUTES} minutes were over"
        else:
            result, text = outcome(x, step)
        text = text.replace("|", "/")
        print(f"{section}: {name}: {result}: {text}", file=sys.stderr)
        took = f"{time.monotonic() - started:.0f}"
        lines.setdefault(section, []).append([name, result, took, text])
        results.append(result)
        names.append(f"{section}: {name}")
        ending = verdict(results, names, len(steps))
        write(page(x, lines, time.monotonic() - began, ending))
    return not {"FAILED", "left out"} & set(results)


def page(x: Setting, lines: dict[str, list[list[str]]], taken: float, ending: str) -> str:
    """The page: the rows of each section, and the verdict."""
    where = NO_GPU if x.tiny else machine(x.device)
    when = f"{time.strftime('%Y-%m-%d')}, {taken:.0f} seconds"
    parts = [f"# GPU check\n\n`python -m gram_mini.studies.gpu_check`: {where}; {when}."]
    for section, rows in lines.items():
        about = f"{ABOUT[section]}\n\n" if ABOUT[section] else ""
        parts.append(f"## {section}\n\n{about}{table(['step', 'result', 'seconds', ''], rows)}")
    parts.append(f"## Verdict\n\n{ending}")
    return "\n\n".join(parts) + "\n"


def main(argv=None) -> int:
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--shape",
        choices=[name for name in SHAPES if name != VILLAGE],
        help="sizes of the model with random weights (default: Qwen2.5-0.5B)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PAGE.md",
        help=f"the page to write (default: {OUT}; with --tiny the page is only printed)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny shapes on the CPU, in a minute: tries this check and shows nothing about a GPU",
    )
    args = parser.parse_args(argv)
    if args.tiny and args.shape:
        parser.error("--shape does not go with --tiny")
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("there is no CUDA card here; --tiny tries this check on the CPU")
    out = args.out or (None if args.tiny else OUT)
    if out and args.tiny and out.resolve().is_relative_to(RESULTS):
        raise UserError(f"--out {out}: results are of GPUs; with --tiny give a file elsewhere")
    if out:
        check_output(out, args.overwrite, "--out")
    if args.tiny:
        device, (name, s) = torch.device("cpu"), next(iter(TINY.items()))
    else:
        device, name = pick_device("auto"), args.shape or "Qwen2.5-0.5B"
        s = SHAPES[name]
    torch.manual_seed(0)
    pages: list[str] = []

    def write(page: str) -> None:
        pages.append(page)
        if out:
            write_whole(out, [page], "--out")

    with tempfile.TemporaryDirectory() as folder:
        good = check(Setting(device, name, s, Path(folder), args.tiny), write)
    print(pages[-1], end="")
    if out:
        print(f"wrote {out}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main())

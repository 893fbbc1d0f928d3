"""How good is a reward model? Accuracy, cross-entropy to the truth, sensitivity to the order.

    python -m gram_mini.evaluation embedded runs/reward [RUN ...]

prints one row per model on the two test sets of the embedded village. Runs of the same recipe under
different seeds share a row: mean and 95% interval over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gram_mini import options
from gram_mini.backbone import local_folder, read_run
from gram_mini.data import Pair
from gram_mini.errors import clear_errors
from gram_mini.reward_model import Comparison, RewardModel
from gram_mini.world.pairs import world_pairs


@dataclass(frozen=True)
class Evaluation:
    """Figures over N labelled pairs, each judged in both orders."""

    pairs: int
    accuracy: float  # share of pairs whose preferred response gets P > 1/2; exactly 1/2 counts half
    interval: float  # half the 95% interval of the accuracy; pairs of one prompt count as one cluster
    loss: float  # two-label loss without smoothing, nats, mean over both orders
    margin: float  # mean Z_w - Z_l over both orders, in logits
    label_mass: float  # mean probability of answering with A or B at all
    position_gap: float  # mean |P(a better, a first) - P(a better, a second)|
    truncated: int  # pairs cut to the maximal length
    cross_entropy: float | None = None  # to the true probabilities, nats; the embedded world only


def evaluate(judge: RewardModel, pairs: list[Pair], average: str = "probabilities", progress: str | None = None) -> Evaluation:
    """Judge labelled pairs in both orders.

    Raises:
        ValueError: if there is no pair, or one without a label.
    """
    if not pairs or any(pair.label is None for pair in pairs):
        raise ValueError("evaluate needs at least one pair, and a label on each")
    return summarise(pairs, judge.compare_many(pairs, average, progress))


def summarise(pairs: list[Pair], results: list[Comparison]) -> Evaluation:
    """The figures of pairs that have been compared already."""
    hits, margins, entropies = defaultdict(list), [], []
    for pair, result in zip(pairs, results):
        p = result.probability
        hits[pair.prompt].append(0.5 if p == 0.5 else float((p > 0.5) == (pair.label == 0)))
        margins += [m if pair.label == 0 else -m for m in (result.log_odds_first, result.log_odds_second)]
        if pair.probability is not None:
            p, q = min(max(p, 1e-12), 1 - 1e-12), pair.probability
            entropies.append(-q * math.log(p) - (1 - q) * math.log(1 - p))
    accuracy = sum(map(sum, hits.values())) / len(pairs)
    # Pairs of one prompt stand or fall together, so the interval counts prompts (cluster-robust).
    residuals = sum((sum(h) - accuracy * len(h)) ** 2 for h in hits.values())
    prompts = len(hits)
    widen = student_t(prompts - 1) * math.sqrt(prompts / (prompts - 1)) if prompts > 1 else math.inf
    return Evaluation(
        pairs=len(pairs),
        accuracy=accuracy,
        interval=min(1.0, widen * math.sqrt(residuals) / len(pairs)) if residuals else 0.0,
        loss=sum(_softplus(-m) for m in margins) / len(margins),
        margin=sum(margins) / len(margins),
        label_mass=sum(r.label_mass for r in results) / len(results),
        position_gap=sum(r.position_gap for r in results) / len(results),
        truncated=sum(r.truncated for r in results),
        cross_entropy=sum(entropies) / len(entropies) if entropies else None,
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# ---- calibration, agreement of the orders, bootstrap --------------------------------------------------


def calibration(probabilities, outcomes, bins: int = 10) -> tuple[float, list[tuple[float | None, float | None, int]]]:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599), and how reliable each bin is.

    A pair is seen from the side of the response that the judge prefers, so it does not matter which of the two is called a.
    The P of that response, 1/2 to 1, falls into one of ``bins`` bins of equal width; ECE is the mean over the pairs of
    |mean P - share of preferred responses that are better|, both taken over the pair's bin. At P = 1/2 neither response is
    preferred and the pair counts as half right.

    Args:
        probabilities: (N,) P(a better).
        outcomes: (N,) 1 where a is better, 0 where b is.

    Returns the ECE and (mean P, share right, count) of each bin; without pairs (None, None, 0).
    """
    p, better = (torch.as_tensor(values, dtype=torch.float64) for values in (probabilities, outcomes))  # (N,)
    preferred = torch.maximum(p, 1 - p)
    right = torch.where(p > 0.5, better, 1 - better)
    right[p == 0.5] = 0.5
    place = ((2 * preferred - 1) * bins).long().clamp(max=bins - 1)  # number of the bin
    counts = torch.bincount(place, minlength=bins)  # (bins,)
    total_p, total_right = (torch.bincount(place, values, bins) for values in (preferred, right))  # (bins,)
    ece = float((total_p - total_right).abs().sum() / len(p))
    return ece, [(float(a / n), float(b / n), int(n)) if n else (None, None, 0) for a, b, n in zip(total_p, total_right, counts)]


def brier(probabilities, outcomes) -> float:
    """Brier score: the mean of (P(a better) - outcome)^2; 0 is perfect, always saying 1/2 gives 1/4.

    Takes the same as :func:`calibration`; which response is called a does not matter here either.
    """
    p, better = (torch.as_tensor(values, dtype=torch.float64) for values in (probabilities, outcomes))  # (N,)
    return float(((p - better) ** 2).mean())


def orders_agree(result: Comparison) -> bool:
    """Whether both orders prefer the same response; P = 1/2 prefers neither."""
    return (result.a_first - 0.5) * (result.a_second - 0.5) > 0


def consistency(results: list[Comparison]) -> float:
    """Share of the pairs whose two orders prefer the same response."""
    return sum(map(orders_agree, results)) / len(results)


def bootstrap(strata: list[list], figures: Callable[[list], dict[str, float | None]], draws: int = 1000, seed: int = 0) -> dict:
    """Percentile bootstrap: 95% intervals by drawing the units again, with replacement.

    Args:
        strata: lists of units; of each as many are drawn as it holds.
        figures: units -> {name: value}; None where there is no such value.

    Returns {name: (2.5% quantile, 97.5% quantile)} over the draws that gave a value.
    """
    rng, found = random.Random(seed), defaultdict(list)
    for _ in range(draws):
        drawn = [unit for stratum in strata for unit in rng.choices(stratum, k=len(stratum))]
        for name, value in figures(drawn).items():
            if value is not None:
                found[name].append(value)
    intervals = {}
    for name, values in found.items():
        values.sort()
        cut = len(values) // 40  # 2.5% at either end
        intervals[name] = (values[cut], values[-1 - cut])
    return intervals


# ---- the table of the demo ----------------------------------------------------------------------------

CAPTION = """\
Accuracy against the truly better response, ± 95% interval (over the prompts, 20 labelled and 80 unlabelled ones; over
the seeds where there are several). Fact pairs: one response right, the other wrong. Cross-entropy: to the true
probabilities, in nats. Position gap: mean |P(a better, a shown first) - P(a better, a shown second)|. The last three
are on unlabelled topics."""

# Options that may differ between runs of one recipe.
PASSING = ("seed", "init", *options.WITHOUT_EFFECT)


def recipe(run: dict | None) -> tuple[str, str]:
    """What a run did, in a word or two, and everything that must agree for two runs to share a row."""
    if run is None:
        return "zero-shot judge", ""
    given = {name: value for name, value in run["options"].items() if name not in PASSING}
    if run["stage"] == "pretrain":
        name = "stage 1 alone"
    else:
        start = run["init"]["stage"] if run["init"] else None
        name = {None: "labels alone", "pretrain": "stage 1 + labels", "reward": "labels twice"}[start]
        if given.get("head") == "scalar":
            name = name.replace("labels", "labels, scalar head")
        name += ", text loss" if given.get("text_weight") else ""
        name += ", frozen" if given.get("freeze") else ""
        name += ", smoothed" if given["label_smoothing"] > 0 else ""
        name += " = GRAM" if name == "stage 1 + labels, smoothed" else ""
    return name, json.dumps(given, sort_keys=True)


def world_table(models: list[str], device: str = "auto") -> str:
    """Judge both test sets of the village with each model and set the figures in a table."""
    for model in models:
        if not (Path(model) / "run.json").is_file():
            local_folder(model)  # what is missing is said before the first is judged
    known, unknown = world_pairs("in-distribution"), world_pairs("out-of-distribution")
    folders: dict[tuple[str, str], str] = {}
    rows: dict[tuple[str, str], dict[int, list[Evaluation]]] = defaultdict(dict)
    for model in models:
        run = read_run(Path(model)) if (Path(model) / "run.json").is_file() else None
        judge = RewardModel.load(model, device=device)
        results = judge.compare_many(unknown, progress=model)
        facts = [(pair, result) for pair, result in zip(unknown, results) if "fact" in pair.differs]
        seed = run["options"]["seed"] if run else 0
        folders[recipe(run)] = Path(model).name
        rows[recipe(run)][seed] = [evaluate(judge, known, progress=model), summarise(unknown, results), summarise(*zip(*facts))]

    head = ("", "labelled topics", "unlabelled topics", "fact pairs", "cross-entropy", "position gap", "run")
    lines = [head]
    for key, by_seed in rows.items():
        name, runs = key[0], list(by_seed.values())
        entropy = statistics.mean(unlabelled.cross_entropy for _, unlabelled, _ in runs)
        gap = statistics.mean(unlabelled.position_gap for _, unlabelled, _ in runs)
        accuracies = (with_interval([run[k] for run in runs]) for k in range(3))
        lines.append(
            (name + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""), *accuracies, f"{entropy:.3f}", f"{gap:.3f}", folders[key])
        )
    ideal = statistics.mean(_entropy(pair.probability) for pair in unknown)
    lines.append(("the true rewards", "1.000", "1.000", "1.000", f"{ideal:.3f}", "0.000", ""))
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]) for line in lines
    )


def with_interval(runs: list[Evaluation]) -> str:
    """Accuracy with its 95% interval: over the seeds where there are several, else over the prompts of the one."""
    mean = statistics.mean(run.accuracy for run in runs)
    if len(runs) == 1:
        return f"{mean:.3f} ± {runs[0].interval:.3f}"
    spread = statistics.stdev(run.accuracy for run in runs)
    return f"{mean:.3f} ± {student_t(len(runs) - 1) * spread / math.sqrt(len(runs)):.3f}"


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t: from the tables up to 5 degrees of freedom, then by expansion (to 0.01)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571)
    return table[freedom - 1] if freedom <= len(table) else 1.960 + 2.372 / freedom + 2.823 / freedom**2


def _entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gram_mini.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folders, or 'embedded' for the plain backbone")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    args = parser.parse_args()
    with clear_errors():
        print(world_table(args.models, args.device))
        print(CAPTION)


if __name__ == "__main__":
    main()

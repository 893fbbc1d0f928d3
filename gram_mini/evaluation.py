"""How good is a reward model? Accuracy, calibration against the truth, sensitivity to the order.

    python -m gram_mini.evaluation embedded runs/reward [RUN ...]

prints one row per model on the two test sets of the embedded village. Runs of the same recipe under
different seeds share a row: mean and 95% interval over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from gram_mini.data import Pair
from gram_mini.reward_model import Comparison, RewardModel


@dataclass(frozen=True)
class Evaluation:
    """Figures over N labelled pairs, each judged in both orders."""

    pairs: int
    accuracy: float  # share of pairs whose preferred response gets P > 1/2, strictly
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
        hits[pair.prompt].append(p > 0.5 if pair.label == 0 else p < 0.5)
        margins += [m if pair.label == 0 else -m for m in (result.odds_first, result.odds_second)]
        if pair.probability is not None:
            p, q = min(max(p, 1e-12), 1 - 1e-12), pair.probability
            entropies.append(-q * math.log(p) - (1 - q) * math.log(1 - p))
    accuracy = sum(map(sum, hits.values())) / len(pairs)
    # Pairs of one prompt stand or fall together, so the interval counts prompts (cluster-robust).
    residuals = sum((sum(h) - accuracy * len(h)) ** 2 for h in hits.values())
    return Evaluation(
        pairs=len(pairs),
        accuracy=accuracy,
        interval=1.96 * math.sqrt(residuals) / len(pairs),
        loss=sum(_softplus(-m) for m in margins) / len(margins),
        margin=sum(margins) / len(margins),
        label_mass=sum(r.label_mass for r in results) / len(results),
        position_gap=sum(r.position_gap for r in results) / len(results),
        truncated=sum(r.truncated for r in results),
        cross_entropy=sum(entropies) / len(entropies) if entropies else None,
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# ---- the table of the demo ----------------------------------------------------------------------------


def recipe(run: dict | None) -> str:
    """What a run did, in a word or two; the rows of the table are called by it."""
    if run is None:
        return "zero-shot judge"
    if run["stage"] == "pretrain":
        return "stage 1 alone"
    start = "stage 1 + labels" if run["options"]["init"] else "labels alone"
    return start + (", smoothed" if run["options"]["label_smoothing"] > 0 else "")


def world_table(models: list[str], device: str = "auto") -> str:
    """Judge both test sets of the village with each model and set the figures in a table."""
    from gram_mini.backbone import read_run
    from gram_mini.world.pairs import world_pairs

    known, unknown = world_pairs("in-distribution"), world_pairs("out-of-distribution")
    rows = defaultdict(list)
    for model in models:
        name = recipe(read_run(Path(model)) if (Path(model) / "run.json").is_file() else None)
        judge = RewardModel.load(model, device=device)
        results = judge.compare_many(unknown, progress=model)
        facts = [(pair, result) for pair, result in zip(unknown, results) if "fact" in pair.differs]
        rows[name].append([evaluate(judge, known, progress=model), summarise(unknown, results), summarise(*zip(*facts))])
    lines = [
        f"{'':28}{'labelled topics':>18}{'unlabelled topics':>20}{'- fact pairs':>18}{'cross-entropy':>15}{'position gap':>14}"
    ]
    for name, runs in rows.items():
        cells = [_mean([run[k] for run in runs]) for k in range(3)]
        entropy = statistics.mean(run[1].cross_entropy for run in runs)
        gap = statistics.mean(run[1].position_gap for run in runs)
        title = name + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
        lines.append(f"{title:28}{cells[0]:>18}{cells[1]:>20}{cells[2]:>18}{entropy:>15.3f}{gap:>14.3f}")
    ideal = statistics.mean(_entropy(pair.probability) for pair in unknown)
    lines.append(f"{'the true rewards':28}{'1.000':>18}{'1.000':>20}{'1.000':>18}{ideal:>15.3f}{0:>14.3f}")
    return "\n".join(lines)


def _mean(runs: list[Evaluation]) -> str:
    """Accuracy with its 95% interval: over seeds (Student's t) where there are several, else over prompts."""
    mean = statistics.mean(run.accuracy for run in runs)
    if len(runs) == 1:
        return f"{mean:.3f} ± {runs[0].interval:.3f}"
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}.get(len(runs), 2.2)
    return f"{mean:.3f} ± {t * statistics.stdev(run.accuracy for run in runs) / math.sqrt(len(runs)):.3f}"


def _entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def main() -> None:
    import argparse

    from gram_mini.errors import clear_errors

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folders, or 'embedded' for the plain backbone")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    args = parser.parse_args()
    with clear_errors():
        print(world_table(args.models, args.device))
        print("Accuracy ± 95% interval; cross-entropy to the true probabilities (nats) and position gap on unlabelled topics.")


if __name__ == "__main__":
    main()

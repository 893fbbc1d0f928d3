"""The claims of the paper, each as an experiment with a figure. On the embedded village the truth is known.

  table       every method on labelled topics, unlabelled topics, and by what the responses differ in
  bon         best of n: the judge's own score and the true reward, over KL
  adapt       a new topic with few labels, from each starting point
  smoothing   eps from 0 to 0.4: accuracy, margin, calibration
  noise       flipped labels, at random or by an adversary, with and without smoothing
  unlabelled  more or less stage 1, on the topics of the test or on others
  rl          a policy trained against the judge: the judge's reward and the true one, over KL
  all         these seven

Each study writes results/STUDY.json and results/STUDY.png. Trained models stay in runs/reproduce and are used again, so a
study goes on where it stopped.
"""

import contextlib
import io
import json
import math
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import train_pretrain
import train_reward
from gram_mini import options
from gram_mini.data import load_pairs, split_by_prompt
from gram_mini.errors import UserError, clear_errors
from gram_mini.evaluation import calibration, student_t, summarise
from gram_mini.formats import Pair
from gram_mini.output import write_whole
from gram_mini.prompts import LABELS
from gram_mini.reward_model import RewardModel
from gram_mini.world import question
from gram_mini.world.pairs import topics, world_pairs
from gram_mini.world.policy import responses, train_policy

EXAMPLES = """\
  python reproduce.py table                                     # seeds 1 to 5
  python reproduce.py all --quick                               # every study with one seed"""

PLAIN = ["--label-smoothing", "0"]
SCALAR = ["--head", "scalar", "--lr", "3e-4"]  # learning rates, and the weight of the text loss, were chosen on seed 0
METHODS = {  # name: (starts from stage 1?, options of train_reward.py)
    "D-Baseline": (False, SCALAR + PLAIN),
    "D-Freeze": (False, ["--head", "scalar", "--freeze", "--lr", "0.1", *PLAIN]),
    "D-Regularisation": (False, [*SCALAR, "--text-weight", "0.1", *PLAIN]),
    "D-Label-Smoothing": (False, SCALAR),
    "D from stage 1": (True, SCALAR + PLAIN),
    "G-Freeze": (False, ["--freeze", "--lr", "0.01", *PLAIN]),
    "G-Baseline": (False, PLAIN),
    "G-Label-Smoothing": (False, []),
    "G from stage 1, eps = 0": (True, PLAIN),
    "GRAM": (True, []),
}
MAIN = ("D-Baseline", "D from stage 1", "G-Baseline", "GRAM")  # the methods of the studies that are not about methods
SEEDS = (1, 2, 3, 4, 5)
NEEDS_TRUTH = ("bon", "adapt", "rl")


class Lab:
    """Data, trained models and figures of one backbone on one source of data, kept in a folder."""

    def __init__(self, folder: Path, model: str, data: str, training: list[str]):
        self.folder, self.model, self.data, self.training = folder, model, data, training

    def pairs(self, split: str, seed: int) -> list[Pair]:
        """The village's pairs; of other data a fifth of the prompts is the test, the rest is used in both stages."""
        if self.data == "world":
            return world_pairs(split, seed=0 if split.endswith("distribution") else seed)
        train, test = split_by_prompt(load_pairs(self.data, labelled=True).pairs, 0.2, seed=0)
        return {"unlabelled": train, "labelled": train, "in-distribution": test}[split]

    def tests(self) -> dict[str, list[Pair]]:
        names = ("in-distribution", "out-of-distribution") if self.data == "world" else ("in-distribution",)
        return {name: self.pairs(name, 0) for name in names}

    def file(self, name: str, pairs: list[Pair]) -> str:
        """The pairs as a file that the training scripts read."""
        path = self.folder / "data" / f"{name}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(_row(pair)) + "\n" for pair in pairs), "data")
        return str(path)

    def train(self, script, name: str, seed: int, *given: str) -> Path:
        """The run of this name, trained unless it is there already."""
        out = self.folder / f"seed{seed}" / name.replace(" ", "-")
        if not (out / "run.json").is_file():
            resume = ["--resume"] if out.with_name(out.name + ".partial").is_dir() else []
            always = ["--model", self.model, "--seed", str(seed), "--held-out", "0", "--out", str(out)]
            with contextlib.redirect_stdout(io.StringIO()):  # progress bars stay
                script.main([*always, *self.training, *given, *resume])
        return out

    def stage1(self, seed: int, name: str = "stage1", pairs: list[Pair] | None = None) -> Path:
        pairs = self.pairs("unlabelled", seed) if pairs is None else pairs
        return self.train(train_pretrain, name, seed, "--data", self.file(f"{name}-{seed}", pairs))

    def method(self, name: str, seed: int) -> Path:
        """One of METHODS on the labelled pairs."""
        starts_from_stage_1, given = METHODS[name]
        init = ["--init", str(self.stage1(seed))] if starts_from_stage_1 else []
        data = self.file(f"labelled-{seed}", self.pairs("labelled", seed))
        return self.train(train_reward, name, seed, "--data", data, *given, *init)

    def judge(self, model: str | Path) -> RewardModel:
        return RewardModel.load(str(model))

    def evaluate(self, model: str | Path) -> dict[str, float]:
        """Accuracy on each test set; all other figures are those of the last one, out of distribution."""
        judge, row = self.judge(model), {}
        for split, pairs in self.tests().items():
            results = judge.compare_many(pairs, progress=split)
            figures = summarise(pairs, results)
            # The village's test labels name the truly better response; how often a rater would agree is what P is about.
            truth = [float(p.label == 0) if p.probability is None else p.probability for p in pairs]
            row |= {split: figures.accuracy, "position gap": figures.position_gap, "margin": figures.margin, "loss": figures.loss}
            row["calibration error"] = calibration([r.probability for r in results], truth)[0]
            if figures.cross_entropy is not None:
                row["cross-entropy"] = figures.cross_entropy
            for aspect in ("fact", "courtesy", "length"):
                alone = [(p, r) for p, r in zip(pairs, results) if p.differs == {aspect}]
                if alone:
                    row[aspect] = summarise(*zip(*alone)).accuracy
        return row


def _row(pair: Pair) -> dict:
    label = {} if pair.label is None else {"label": LABELS[pair.label]}
    return {"prompt": pair.prompt, "response_a": pair.response_a, "response_b": pair.response_b, **label}


# ---- the studies: each yields rows of one seed --------------------------------------------------------


def table(lab: Lab, seed: int):
    """The paper's Table 1 and Figure 2: every method, in and out of distribution."""
    yield {"method": "zero-shot", **lab.evaluate(lab.model)}
    for name in METHODS:
        yield {"method": name, **lab.evaluate(lab.method(name, seed))}


def bon(lab: Lab, seed: int):
    """Figure 4: the best of n by the judge, by the judge's own score and in truth."""
    places = topics("out-of-distribution")
    draws = random.Random(f"bon/{seed}")
    candidates = {topic: responses(topic) for topic in places}
    order = {topic: [draws.randrange(len(candidates[topic])) for _ in range(256)] for topic in places}
    for name in MAIN:
        judge = lab.judge(lab.method(name, seed))
        games = [Pair(question(*t), text, candidates[t][0][0]) for t in places for text, _ in candidates[t]]
        results = iter(judge.compare_many(games, "logits", progress=name))
        scores = {t: [math.log(p / (1 - p)) for p in (next(results).probability for _ in candidates[t])] for t in places}
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            proxy, true = [], []
            for t in places:
                for start in range(0, 256, n):  # 256 / n disjoint groups of n
                    best = max(order[t][start : start + n], key=lambda i: scores[t][i])
                    proxy.append(scores[t][best])
                    true.append(candidates[t][best][1])
            kl = math.log(n) - (n - 1) / n
            yield {"method": name, "n": n, "KL": kl, "proxy score": statistics.mean(proxy), "true reward": statistics.mean(true)}


def adapt(lab: Lab, seed: int):
    """Figure 5: labels on the unlabelled villagers, 0 to 4,000 of them, from each starting point."""
    new = lab.pairs("adaptation", seed)
    everything = lab.file(f"everything-{seed}", lab.pairs("labelled", seed) + new)
    oracle = lab.evaluate(lab.train(train_reward, "oracle", seed, "--data", everything, "--init", str(lab.stage1(seed))))
    starts = {name: lab.method(name, seed) for name in MAIN} | {"nothing": None}
    for count in (0, 50, 100, 200, 500, 1000, len(new)):
        yield {"method": "oracle", "labels": count, **oracle}
        for name, start in starts.items():
            run = start or lab.model
            if count:
                data = lab.file(f"adaptation-{count}-{seed}", new[:count])
                given = METHODS.get(name, (False, []))[1]
                init = ["--init", str(start)] if start else []
                steps = ["--batch-size", "32", "--steps", str(max(20, min(125, count // 16)))]
                run = lab.train(train_reward, f"adapt-{count}-{name}", seed, "--data", data, *given, *steps, *init)
            yield {"method": name, "labels": count, **lab.evaluate(run)}


def smoothing(lab: Lab, seed: int):
    """What eps does to accuracy, margin and calibration, with stage 1 and without."""
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    for eps in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4):
        for name, init in (("from stage 1", ["--init", str(lab.stage1(seed))]), ("labels alone", [])):
            given = ["--data", data, "--label-smoothing", str(eps), *init]
            bound = math.log((1 - eps) / eps) if eps else None
            run = lab.train(train_reward, f"smoothing-{eps}-{name}", seed, *given)
            yield {"method": name, "eps": eps, "bound": bound, **lab.evaluate(run)}


def noise(lab: Lab, seed: int):
    """A share of the labels flipped, at random or, by an adversary, where they are clearest."""
    clean = lab.pairs("labelled", seed)
    sides = ("random", "adversary") if lab.data == "world" else ("random",)
    for side in sides:
        for share in (0.0, 0.1, 0.2, 0.3, 0.4):
            name = f"noise-{side}-{share}" if share else "noise-0"
            data = lab.file(f"{name}-{seed}", flipped(clean, share, side, seed))
            for eps in (0.0, 0.1):
                given = ["--data", data, "--label-smoothing", str(eps), "--init", str(lab.stage1(seed))]
                run = lab.train(train_reward, f"{name}-{eps}", seed, *given)
                yield {"method": f"{side}, eps {eps}", "flipped": share, **lab.evaluate(run)}


def flipped(pairs: list[Pair], share: float, side: str, seed: int) -> list[Pair]:
    """The pairs with a share of the labels turned round: any, or those whose true probability is farthest from 1/2."""
    order = random.Random(f"noise/{seed}").sample(range(len(pairs)), len(pairs))
    if side == "adversary":
        order.sort(key=lambda i: -abs(pairs[i].probability - 0.5))
    turned = set(order[: round(share * len(pairs))])
    return [replace(pair, label=1 - pair.label) if i in turned else pair for i, pair in enumerate(pairs)]


def unlabelled(lab: Lab, seed: int):
    """Stage 1 on more or fewer pairs, about the villagers of the test or, out of domain, about none of them."""
    everything = lab.pairs("unlabelled", seed)
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    tested = {pair.prompt for pair in lab.tests().get("out-of-distribution", [])}
    domains = {"in domain": everything, "out of domain": [pair for pair in everything if pair.prompt not in tested]}
    if not tested:
        del domains["out of domain"]
    for domain, pairs in domains.items():
        for count in (round(part * len(everything)) for part in (0, 1 / 16, 1 / 4, 1 / 2, 1)):
            if count > len(pairs):
                continue
            whole = count == len(everything)
            stage1 = lab.stage1(seed, "stage1" if whole else f"stage1-{domain}-{count}", pairs[:count]) if count else None
            init = ["--init", str(stage1)] if stage1 else []
            run = lab.train(train_reward, f"unlabelled-{domain}-{count}", seed, "--data", data, *init)
            yield {"method": domain, "pairs": count, **lab.evaluate(run)}


def rl(lab: Lab, seed: int):
    """A policy trained against the judge: what the judge thinks of it, and what it is worth."""
    for name in MAIN:
        judge = lab.judge(lab.method(name, seed))
        for step, kl, proxy, true in train_policy(judge, topics("out-of-distribution"), seed):
            yield {"method": name, "step": step, "KL": kl, "proxy reward": proxy, "true reward": true}


#         study       what a row is told apart by, the figure's x axis, what is shown
STUDIES = {
    "table": (table, ("method",), None, ("in-distribution", "out-of-distribution", "fact", "courtesy", "length")),
    "bon": (bon, ("method", "n"), "KL", ("proxy score", "true reward")),
    "adapt": (adapt, ("method", "labels"), "labels", ("out-of-distribution", "fact")),
    "smoothing": (smoothing, ("method", "eps"), "eps", ("out-of-distribution", "margin", "calibration error")),
    "noise": (noise, ("method", "flipped"), "flipped", ("in-distribution", "out-of-distribution")),
    "unlabelled": (unlabelled, ("method", "pairs"), "pairs", ("in-distribution", "out-of-distribution")),
    "rl": (rl, ("method", "step"), "KL", ("proxy reward", "true reward")),
}


# ---- seeds, tables, figures ---------------------------------------------------------------------------


def run_study(name: str, lab: Lab, seeds: list[int], results: Path) -> None:
    """Run a study for each seed that is missing, and write its table and figure."""
    study, keys, x, shown = STUDIES[name]
    rows, seconds = [], 0.0
    for seed in seeds:
        done = lab.folder / "rows" / f"{name}-{seed}.json"
        if not done.is_file():
            began = time.perf_counter()
            found = list(study(lab, seed))
            done.parent.mkdir(parents=True, exist_ok=True)
            record = {"seconds": round(time.perf_counter() - began), "rows": [{"seed": seed, **row} for row in found]}
            write_whole(done, [json.dumps(record)], "rows")
        record = json.loads(done.read_text())
        rows, seconds = rows + record["rows"], seconds + record["seconds"]
    results.mkdir(parents=True, exist_ok=True)
    means = average(rows, keys)
    record = {
        "study": name,
        "model": lab.model,
        "data": lab.data,
        "seeds": seeds,
        "seconds": seconds,
        "means": means,
        "rows": rows,
    }
    draw(means, x, shown, results / f"{name}.png", f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
    write_whole(results / f"{name}.json", [json.dumps(record, indent=1) + "\n"], "results")
    print(f"\n{name}: {study.__doc__}")
    print_table(means, keys)
    print(f"wrote {results / name}.json and .png")


def average(rows: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Rows of several seeds as [mean, half the 95% interval over the seeds (None for one seed)] of each figure."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    means = []
    for group, members in groups.items():
        mean = dict(zip(keys, group))
        for name in members[0]:
            values = [row[name] for row in members]
            if name not in (*keys, "seed") and None not in values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                half = spread and student_t(len(values) - 1) * spread / math.sqrt(len(values))
                mean[name] = [statistics.mean(values), half]
        means.append(mean)
    return means


def print_table(means: list[dict], keys: tuple[str, ...]) -> None:
    head = list(dict.fromkeys(name for row in means for name in row))
    lines = [head]
    for row in means:
        lines.append([str(row[name]) if name in keys else _figure(row.get(name)) for name in head])
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths))))


def _figure(value: list | None) -> str:
    if value is None:
        return ""
    mean, half = value
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def draw(means: list[dict], x: str | None, shown: tuple[str, ...], picture: Path, title: str) -> None:
    """Lines over x with their intervals, one panel for each figure; bars where there is no x."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in shown if any(name in row for row in means)]
    methods = list(dict.fromkeys(row["method"] for row in means))
    width = 5 if x else 2.6
    figure, axes = plt.subplots(1, len(shown), figsize=(width * len(shown), 3.8), squeeze=False, sharey=x is None)
    for axis, name in zip(axes[0], shown):
        for place, method in enumerate(methods):
            rows = [row for row in means if row["method"] == method and name in row]
            values, halves = [row[name][0] for row in rows], [row[name][1] or 0.0 for row in rows]
            if x is None:
                axis.barh(place, values, xerr=halves, height=0.7)
            else:
                places = [row[x][0] if isinstance(row[x], list) else row[x] for row in rows]
                (line,) = axis.plot(places, values, marker=".", label=method)
                low, high = ([v - s * h for v, h in zip(values, halves)] for s in (1, -1))
                axis.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        axis.set(title=name, xlabel=x or "")
        axis.grid(alpha=0.3)
        if x is None:
            axis.set_yticks(range(len(methods)), methods)
            axis.invert_yaxis()
        elif x in ("labels", "pairs"):
            axis.set_xscale("symlog", linthresh=50)
    if x is not None:
        axes[0][-1].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument("study", choices=(*STUDIES, "all"), metavar="STUDY", help="one of the above")
    parser.add_argument("--quick", action="store_true", help="one seed, 1, in the place of --seeds")
    parser.add_argument("--seeds", type=options.seed, nargs="+", default=list(SEEDS), metavar="N", help="seeds to run")
    parser.add_argument("--model", default="embedded", metavar="NAME", help="backbone, as in the training scripts")
    parser.add_argument("--data", default="world", metavar="SOURCE", help="labelled pairs; a fifth of the prompts is the test")
    parser.add_argument("--training", default="", metavar="OPTIONS", help="further options of both training scripts, in quotes")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), metavar="FOLDER", help="where trained models are kept"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help="where tables and figures go")
    args = parser.parse_args(argv)
    lab = Lab(args.runs, args.model, args.data, args.training.split())
    studies = list(STUDIES) if args.study == "all" else [args.study]
    if args.data != "world":
        if args.study in NEEDS_TRUTH:
            raise UserError(f"{args.study}: needs the true rewards, which only the village has; leave --data out")
        studies = [name for name in studies if name not in NEEDS_TRUTH]
    for name in studies:
        run_study(name, lab, [1] if args.quick else args.seeds, args.results)


if __name__ == "__main__":
    with clear_errors():
        main()

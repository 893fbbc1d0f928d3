"""The claims of the paper, each as an experiment with a figure. On the embedded village the truth is known.

  table       every method on labelled topics, unlabelled topics, and by what the responses differ in
  bon         best of n: the judge's own score and the true reward, over KL
  adapt       a new topic with few labels, from each starting point
  smoothing   eps from 0 to 0.4: accuracy, margin, calibration
  noise       flipped labels, at random or by an adversary, with and without smoothing
  unlabelled  more or less stage 1, on the topics of the test or on others
  rl          a policy trained against the judge: the judge's reward and the true one, over KL
  all         these seven

Each study writes results/STUDY.json and results/STUDY.png (--quick to results/quick). Trained models stay in
runs/reproduce and are used again, by other studies too, so a study goes on where it stopped. Who changes a study deletes
its files in runs/reproduce/rows.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm

import train_pretrain
import train_reward
from gram_mini import options
from gram_mini.data import load_pairs, split_by_prompt
from gram_mini.errors import Interrupted, UserError, clear_errors
from gram_mini.evaluation import calibration, student_t, summarise
from gram_mini.formats import Pair
from gram_mini.output import check_place, save_figure, write_whole
from gram_mini.prompts import LABELS
from gram_mini.reward_model import RewardModel
from gram_mini.world.pairs import topics, world_pairs
from gram_mini.world.policy import best_of_n, best_of_n_kl, responses, score_responses, train_policy

EXAMPLES = """\
  python reproduce.py table                                     # seeds 1 to 5
  python reproduce.py all --quick                               # every study with one seed
  python reproduce.py table --data pairs.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --runs runs/mine --results runs/mine/results"""

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
    """Data, trained models and their figures, of one backbone on one source of data, kept in a folder.

    ``loading`` are the options of training and judging alike: bits, max_length, device.

    Raises:
        UserError: if the folder is that of another backbone, other data or other options; if the data cannot be read, or
            all its pairs have one prompt.
    """

    def __init__(self, folder: Path, model: str, data: str, training: list[str] = (), loading: dict | None = None):
        self.folder, self.model, self.world = folder, model, data == "world"
        self.loading = {name: value for name, value in (loading or {}).items() if value is not None}
        self.training = [*training, *(f"--{name.replace('_', '-')}={value}" for name, value in self.loading.items())]
        self.about = {"model": model, "data": data, "training": self.training, "methods": METHODS}
        if not self.world:
            found = load_pairs(data, labelled=True)
            self.used, self.test = split_by_prompt(found.pairs, 0.2, seed=0)
            if not self.test:
                raise UserError(f"--data {data}: all pairs have the same prompt; a fifth of the prompts is to be the test")
            self.about["data"] = [data, found.fingerprint]
        self.about = json.loads(json.dumps(self.about))
        try:
            before = json.loads((folder / "about.json").read_text())
            other = [name for name in self.about if before[name] != self.about[name]]
        except FileNotFoundError:
            other = []
        except (ValueError, KeyError, TypeError):
            other = ["about.json, which cannot be read"]
        if other:
            raise UserError(f"--runs {folder}: what is there was made with other {', '.join(other)}; give another folder")

    def pairs(self, split: str, seed: int) -> list[Pair]:
        """The village's pairs; of other data a fifth of the prompts is the test, the rest is used in both stages."""
        if self.world:
            return world_pairs(split, seed=0 if split.endswith("distribution") else seed)
        return {"unlabelled": self.used, "labelled": self.used, "in-distribution": self.test}[split]

    @property
    def target(self) -> str:
        """The test set that the studies are about: out of distribution, where there is such a one."""
        return "out-of-distribution" if self.world else "in-distribution"

    def file(self, name: str, pairs: list[Pair]) -> str:
        """The pairs as a file that the training scripts read."""
        path = self.folder / "data" / f"{name}.jsonl"
        with self.alone(path):
            if not path.is_file():
                write_whole(path, (json.dumps(_row(pair)) + "\n" for pair in pairs), "data")
        return str(path)

    def alone(self, path: Path) -> FileLock:
        """While it is held no other process makes the same thing; a process that dies lets go of it."""
        lock = self.folder / "locks" / f"{path.parent.name}-{path.name}.lock"
        for folder in (lock.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock.parent / "about.lock"):
            if not (about := self.folder / "about.json").is_file():
                _write(about, self.about)
        return FileLock(lock)

    def train(self, script, name: str, seed: int, *given: str) -> Path:
        """The run of this name, trained unless it is there already."""
        out = self.folder / f"seed{seed}" / name.replace(" ", "-")
        with self.alone(out):
            if not (out / "run.json").is_file():
                resume = ["--resume"] if (out.with_name(out.name + ".partial") / "log.csv").is_file() else []
                always = ["--model", self.model, "--seed", str(seed), "--held-out", "0", "--out", str(out)]
                arguments = [*self.training, *always, *given, *resume]
                try:
                    with contextlib.redirect_stdout(io.StringIO()):  # progress bars stay
                        script.main(arguments)
                except SystemExit:
                    raise UserError(f"--training: {script.__name__}.py does not take {shlex.join(arguments)}") from None
                except Interrupted:
                    raise Interrupted(f"{out}: stopped; the same command goes on with it") from None
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
        return RewardModel.load(str(model), **self.loading)

    def evaluate(self, model: str | Path, split: str = "") -> dict[str, float]:
        """Accuracy on a test set, the target by default, overall and by what differs, and what tells how sure the judge is."""
        split = split or self.target
        place = self.folder / "zero-shot" if model == self.model else Path(model)
        known = place.with_name(f"{place.name}.{split}.json")
        with self.alone(known):
            if not known.is_file():
                _write(known, self._evaluate(model, split))
        return json.loads(known.read_text())

    def _evaluate(self, model: str | Path, split: str) -> dict[str, float]:
        pairs = self.pairs(split, 0)
        results = self.judge(model).compare_many(pairs, progress=split)
        found = summarise(pairs, results)
        # The village's test labels name the truly better response; how often a rater would agree is what P is about.
        truth = [float(p.label == 0) if p.probability is None else p.probability for p in pairs]
        error = calibration([r.probability for r in results], truth)[0]
        row = {split: found.accuracy, "position gap": found.position_gap, "margin": found.margin, "loss": found.loss}
        row |= {"calibration error": error} | ({"cross-entropy": found.cross_entropy} if found.cross_entropy is not None else {})
        for aspect in ("fact", "courtesy", "length"):
            alone = [(p, r) for p, r in zip(pairs, results) if p.differs == {aspect}]
            if alone:
                row[aspect] = summarise(*zip(*alone)).accuracy
        return row


def _write(path: Path, record: dict) -> None:
    write_whole(path, [json.dumps(record, indent=1) + "\n"], "results")


def _row(pair: Pair) -> dict:
    label = {} if pair.label is None else {"label": LABELS[pair.label]}
    return {"prompt": pair.prompt, "response_a": pair.response_a, "response_b": pair.response_b, **label}


# ---- the studies: each yields rows of one seed --------------------------------------------------------


def table(lab: Lab, seed: int):
    """The paper's Table 1 and Figure 2: every method, in and out of distribution."""
    for name in ("zero-shot", *METHODS):
        run = lab.method(name, seed) if name in METHODS else lab.model
        yield {"method": name, **lab.evaluate(run, "in-distribution"), **lab.evaluate(run)}


def bon(lab: Lab, seed: int):
    """Figure 4: the best of n by the judge, by the judge's own score (its log-odds against one of the responses) and in truth."""
    places, draws = topics("out-of-distribution")[:40], random.Random(f"bon/{seed}")
    rewards = {topic: [reward for _, reward in responses(topic)] for topic in places}
    drawn = {topic: [draws.randrange(len(rewards[topic])) for _ in range(256)] for topic in places}
    for name in MAIN:
        scores = score_responses(lab.judge(lab.method(name, seed)), places, progress=name)
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            proxy, true = zip(*(best_of_n(scores[topic], rewards[topic], drawn[topic], n) for topic in places))
            means = {"proxy score": statistics.mean(proxy), "true reward": statistics.mean(true)}
            yield {"method": name, "n": n, "KL": best_of_n_kl(n), **means}


def adapt(lab: Lab, seed: int):
    """Figure 5: labels on the unlabelled villagers, 0 to 2,000 of them, from each starting point."""
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
                run = lab.train(train_reward, f"adapt-{count}-{name}", seed, "--data", data, *given, *init, "--batch-size", "32")
            yield {"method": name, "labels": count, **lab.evaluate(run)}


def smoothing(lab: Lab, seed: int):
    """What eps does to accuracy, margin and calibration, from stage 1."""
    for eps in (0.0, 0.05, 0.1, 0.2, 0.4):
        bound = math.log((1 - eps) / eps) if eps else None
        yield {"method": "GRAM", "eps": eps, "bound": bound, **lab.evaluate(smoothed(lab, seed, eps))}


def smoothed(lab: Lab, seed: int, eps: float) -> Path:
    """GRAM with another eps."""
    known = {0.0: "G from stage 1, eps = 0", 0.05: "GRAM"}
    if eps in known:
        return lab.method(known[eps], seed)
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    given = ["--label-smoothing", str(eps), "--init", str(lab.stage1(seed))]
    return lab.train(train_reward, f"smoothing-{eps}", seed, "--data", data, *given)


def noise(lab: Lab, seed: int):
    """A share of the labels flipped: at random, or by an adversary, the clearest or the hardest ones (no ties)."""
    clean = lab.pairs("labelled", seed)
    shares = {"random": (0.2, 0.4), "clearest": (0.2,), "hardest": (0.2,)}
    for side in shares if lab.world else ("random",):
        for eps in (0.0, 0.1):
            method = f"{side}, eps {eps}"
            yield {"method": method, "flipped": 0.0, **lab.evaluate(smoothed(lab, seed, eps))}
            for share in shares[side]:
                name = f"noise-{side}-{share}"
                data = lab.file(f"{name}-{seed}", flipped(clean, share, side, seed))
                given = ["--data", data, "--label-smoothing", str(eps), "--init", str(lab.stage1(seed))]
                run = lab.train(train_reward, f"{name}-{eps}", seed, *given)
                yield {"method": method, "flipped": share, **lab.evaluate(run)}


def flipped(pairs: list[Pair], share: float, side: str, seed: int) -> list[Pair]:
    """The pairs with a share of the labels turned round: any, or those whose true probability is farthest from 1/2 or nearest."""
    order = random.Random(f"noise/{seed}").sample(range(len(pairs)), len(pairs))
    if side != "random":
        order = [i for i in order if pairs[i].probability != 0.5]  # a tie's label is a coin already
        order.sort(key=lambda i: abs(pairs[i].probability - 0.5), reverse=side == "clearest")
    turned = set(order[: round(share * len(pairs))])
    return [replace(pair, label=1 - pair.label) if i in turned else pair for i, pair in enumerate(pairs)]


def unlabelled(lab: Lab, seed: int):
    """Stage 1 on more or fewer pairs (and as many fewer steps), about the test's villagers too or, out of domain, not."""
    everything = lab.pairs("unlabelled", seed)
    data = lab.file(f"labelled-{seed}", lab.pairs("labelled", seed))
    parts = [("in domain", share, everything[: round(share * len(everything))]) for share in (1 / 16, 1 / 4, 1 / 2)]
    domains = ["in domain"]
    if lab.world:
        tested = {pair.prompt for pair in lab.pairs(lab.target, 0)}
        elsewhere = [pair for pair in everything if pair.prompt not in tested]  # half of them, within half a percent
        parts.append(("out of domain", 1 / 2, elsewhere[: len(everything) // 2]))
        domains.append("out of domain")
    for domain in domains:
        yield {"method": domain, "share": 0.0, **lab.evaluate(lab.method("G-Label-Smoothing", seed))}
    for domain, share, pairs in parts:
        stage1 = lab.stage1(seed, f"stage1-{domain}-{share}", pairs)
        run = lab.train(train_reward, f"unlabelled-{domain}-{share}", seed, "--data", data, "--init", str(stage1))
        yield {"method": domain, "share": share, **lab.evaluate(run)}
    yield {"method": "in domain", "share": 1.0, **lab.evaluate(lab.method("GRAM", seed))}


def rl(lab: Lab, seed: int):
    """A policy trained against the judge: what the judge thinks of it, and what it is worth."""
    for name in MAIN:
        judge = lab.judge(lab.method(name, seed))
        for step, kl, proxy, true in train_policy(judge, topics("out-of-distribution")[:40], seed):
            yield {"method": name, "step": step, "KL": kl, "proxy reward": proxy, "true reward": true}


#         study       what a row is told apart by, the figure's x axis, what is shown
STUDIES = {  # the longest first
    "table": (table, ("method",), None, ("in-distribution", "out-of-distribution", "fact", "courtesy", "length")),
    "unlabelled": (unlabelled, ("method", "share"), "share", ("out-of-distribution", "fact")),
    "adapt": (adapt, ("method", "labels"), "labels", ("out-of-distribution", "fact")),
    "noise": (noise, ("method", "flipped"), "flipped", ("out-of-distribution", "calibration error")),
    "smoothing": (smoothing, ("method", "eps"), "eps", ("out-of-distribution", "margin", "calibration error")),
    "bon": (bon, ("method", "n"), "KL", ("proxy score", "true reward")),
    "rl": (rl, ("method", "step"), "KL", ("proxy reward", "true reward")),
}


# ---- seeds, tables, figures ---------------------------------------------------------------------------


def run_seed(name: str, lab: Lab, seed: int) -> Path:
    """The rows of a study for one seed, as a file; made unless it is there already."""
    done = lab.folder / "rows" / f"{name}-{seed}.json"
    with lab.alone(done):
        if not done.is_file():
            began = time.perf_counter()
            rows = [{"seed": seed, **row} for row in STUDIES[name][0](lab, seed)]
            _write(done, {"seconds": round(time.perf_counter() - began), "rows": rows})
    return done


def run_side_by_side(names: list[str], lab: Lab, seeds: list[int], jobs: int) -> None:
    """Do run_seed for all of them, ``jobs`` at a time, each with its share of the processor's cores."""
    waiting, running = [(name, seed) for name in names for seed in seeds], set()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_worker, (threads,)) as pool:
        progress = tqdm(total=len(waiting), desc="studies x seeds")
        try:
            while waiting or running:
                while waiting and len(running) < jobs:  # none is handed over early: after an error none may begin
                    name, seed = waiting.pop(0)
                    running.add(pool.submit(run_seed, name, lab, seed))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for task in done:
                    task.result()
                    progress.update()
        except KeyboardInterrupt:
            raise Interrupted("the same command goes on where it stopped") from None
        except BrokenProcessPool:
            raise UserError(f"--jobs {jobs}: a process was killed, perhaps for want of memory; try --jobs 1") from None
        except Exception:
            for process in multiprocessing.active_children():
                process.terminate()  # training saves what it has; after Ctrl-C all have been told already
            raise


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    sys.stderr = open(os.devnull, "w")  # progress bars would write over each other; errors go to the parent


def run_study(name: str, lab: Lab, seeds: list[int], results: Path) -> None:
    """Run a study for each seed that is missing, and write its table and figure."""
    study, keys, x, shown = STUDIES[name]
    rows, seconds = [], {}
    for seed in seeds:
        record = json.loads(run_seed(name, lab, seed).read_text())
        rows, seconds[seed] = rows + record["rows"], record["seconds"]
    results.mkdir(parents=True, exist_ok=True)
    means = average(rows, keys)
    record = {
        "study": name,
        "model": lab.model,
        "data": lab.about["data"],
        "seeds": seeds,
        "seconds": seconds,  # of each seed; models that were there already took none
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
    from matplotlib.figure import Figure  # not pyplot, whose state belongs to the notebook that calls us

    shown = [name for name in shown if any(name in row for row in means)]
    methods = list(dict.fromkeys(row["method"] for row in means))
    width = 5 if x else 2.6
    figure = Figure(figsize=(width * len(shown), 3.8))
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=x is None)
    accuracies = ("in-distribution", "out-of-distribution", "fact", "courtesy", "length")
    x_label = {"KL": "KL, nats", "flipped": "share of the labels flipped", "share": "share of the unlabelled pairs"}.get(x, x)
    for axis, name in zip(axes[0], shown):
        for place, method in enumerate(methods):
            rows = [row for row in means if row["method"] == method and name in row]
            values, halves = [row[name][0] for row in rows], [row[name][1] or 0.0 for row in rows]
            if x is None:
                axis.barh(place, values, xerr=halves, height=0.7, color="tab:blue")
            else:
                places = [row[x][0] if isinstance(row[x], list) else row[x] for row in rows]
                (line,) = axis.plot(places, values, marker=".", label=method, ls=("-", "--")[place % 2])
                low, high = ([v - s * h for v, h in zip(values, halves)] for s in (1, -1))
                axis.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        bounds = {row[x]: row["bound"][0] for row in means if x and name == "margin" and "bound" in row}
        if bounds:
            axis.plot(bounds.keys(), bounds.values(), "--", color="gray", label="best for certain labels, log((1 - eps) / eps)")
            axis.legend(fontsize=8)
        axis.set(title=f"accuracy: {name}" if name in accuracies else name, xlabel=x_label or "")
        axis.grid(alpha=0.3)
        if x is None:
            axis.set_yticks(range(len(methods)), methods)
            axis.invert_yaxis()
            axis.axvline(0.5, color="black", lw=0.8)  # chance
        elif x == "labels":
            counts = sorted({row[x] for row in means})
            axis.set_xscale("symlog", linthresh=50)
            axis.set_xticks(counts, counts, fontsize=8)
    if x is not None:
        axes[0][-1].legend(fontsize=7, framealpha=0.5)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, picture)


def main(argv=None):
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument("study", choices=(*STUDIES, "all"), metavar="STUDY", help="one of the above")
    parser.add_argument("--quick", action="store_true", help="one seed, 1, in the place of --seeds; results go to results/quick")
    parser.add_argument("--seeds", type=options.seed, nargs="+", default=list(SEEDS), metavar="N", help="seeds to run")
    parser.add_argument(
        "--jobs", type=options.positive_int, metavar="N",
        help="studies and seeds at a time, which share the cores (default: 2 on a CPU, 1 on a GPU); the number of cores each has "
        "changes the last digits",
    )  # fmt: skip
    parser.add_argument("--model", default="embedded", metavar="NAME", help="backbone, as in the training scripts")
    parser.add_argument("--data", default="world", metavar="SOURCE", help="labelled pairs; a fifth of the prompts is the test")
    options.add_model_options(parser, bits_default=4, max_length_default=512)
    parser.add_argument(
        "--training", default="", metavar="OPTIONS",
        help='further options that both training scripts know, as one text: --training "--epochs 1 --lora-rank 16"',
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), metavar="FOLDER", help="where trained models are kept"
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where tables and figures go (default: results)")
    args = parser.parse_args(argv)
    seeds = [1] if args.quick else args.seeds
    if len(set(seeds)) < len(seeds):
        parser.error("--seeds: a seed stands there twice")
    try:
        training = shlex.split(args.training)
    except ValueError as error:
        parser.error(f"--training {args.training}: {error}")
    results = args.results or Path("results/quick" if args.quick else "results")
    studies = list(STUDIES) if args.study == "all" else [args.study]
    if args.data != "world":
        if args.study in NEEDS_TRUTH:
            raise UserError(f"{args.study}: needs the true rewards, which only the village has; leave --data out")
        studies = [name for name in studies if name not in NEEDS_TRUTH]
    check_place(args.runs, "--runs")
    check_place(results, "--results")
    loading = {"bits": args.bits, "max_length": args.max_length, "device": args.device}
    lab = Lab(args.runs, args.model, args.data, training, loading)
    jobs = args.jobs or (1 if torch.cuda.is_available() else 2)
    if jobs > 1 and len(studies) * len(seeds) > 1:
        run_side_by_side(studies, lab, seeds, jobs)
    for name in studies:
        run_study(name, lab, seeds, results)


if __name__ == "__main__":
    with clear_errors():
        main()

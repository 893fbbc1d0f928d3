"""A lab keeps data, trained models and their figures in a folder: one backbone, one data source."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import train_pretrain
import train_reward
from gram_mini.baselines import __main__ as baselines
from gram_mini.errors import Interrupted, UserError
from gram_mini.evaluation import summarise
from gram_mini.judge import Judge
from gram_mini.pairs import Pair, split_by_prompt
from gram_mini.prompts import LABELS
from gram_mini.reading.load import VILLAGE, load_pairs
from gram_mini.runs.defaults import DEFAULTS, for_model
from gram_mini.runs.load import load_judge
from gram_mini.runs.output import write_whole
from gram_mini.runs.record import fingerprint
from gram_mini.runs.report import say_doubts
from gram_mini.studies.metrics import calibration
from gram_mini.village.pairs import village_pairs

from filelock import FileLock

PLAIN = ["--label-smoothing", "0"]
# Learning rates and the weight of the text loss were chosen on seed 0.
SCALAR = ["--head", "scalar", "--lr", "3e-4"]
METHODS = {  # name: (whether it starts from stage 1, script, options of the script)
    "D-Baseline": (False, baselines, SCALAR + PLAIN),
    "D-Freeze": (False, baselines, ["--head", "scalar", "--freeze", "--lr", "0.1", *PLAIN]),
    "D-Regularisation": (False, baselines, [*SCALAR, "--text-weight", "0.1", *PLAIN]),
    "D-Label-Smoothing": (False, baselines, SCALAR),
    "D from stage 1": (True, baselines, SCALAR + PLAIN),
    "G-Freeze": (False, baselines, ["--head", "labels", "--freeze", "--lr", "0.01", *PLAIN]),
    "G-Baseline": (False, train_reward, PLAIN),
    "G-Label-Smoothing": (False, train_reward, []),
    "G from stage 1, eps = 0": (True, train_reward, PLAIN),
    "GRAM": (True, train_reward, []),
}
CUT = re.compile(r"[1-9]\d* cut to |dropped, since cutting|cutting made")  # of runs/report.py
# What a study gives to the scripts itself.
ITS_OWN = ("model", "data", "out", "init", "seed", "held-out", "bits", "max-length", "device")
# The methods of those studies that do not compare all of them.
MAIN = ("D-Baseline", "D from stage 1", "G-Baseline", "GRAM")


class Lab:
    """Data, trained models and their figures in a folder: one backbone, one data source.

    ``loading`` are the options of training and judging alike: bits, max_length, device.

    Raises:
        UserError: if the folder is that of another backbone, other data or other options; if the
            data cannot be read, or all its pairs have one prompt.
    """

    methods = METHODS

    def __init__(
        self,
        folder: Path,
        model: str,
        data: str,
        training: Sequence[str] = (),
        loading: dict | None = None,
    ):
        self.village, source = data == VILLAGE, [data]
        if not self.village:
            loaded = load_pairs(data, labelled=True)
            print(loaded.summary(), flush=True)
            self.used, self.test = split_by_prompt(loaded.pairs, 0.2, seed=0)
            if not self.test:
                raise UserError(
                    f"--data {data}: all pairs have the same prompt; "
                    "a fifth of the prompts is to be the test"
                )
            source += [loaded.fingerprint]
        self.set_up(folder, model, data if self.village else source, training, loading)

    def set_up(
        self, folder: Path, model: str, data, training: Sequence[str], loading: dict | None
    ) -> None:
        """Take a folder for this model, ``data`` (whatever tells it from other data) and options.

        Raises:
            UserError: if the folder is that of others.
        """
        self.folder, self.model = folder, model
        self.loading = {name: value for name, value in (loading or {}).items() if value is not None}
        self.training = [
            *training,
            *(f"--{name.replace('_', '-')}={value}" for name, value in self.loading.items()),
        ]
        methods = {
            name: [stage1, script.__name__, options]
            for name, (stage1, script, options) in self.methods.items()
        }
        self.about = {
            "model": model,
            "backbone": fingerprint(model),
            "data": data,
            "training": self.training,
            "defaults": {  # of the training scripts, which may change
                f"{stage} {name}": for_model(values, model)
                for stage, options in DEFAULTS.items()
                for name, values in options.items()
            },
            "methods": methods,
        }
        self.about = json.loads(json.dumps(self.about))  # lists, as they come back
        try:
            before = json.loads((folder / "about.json").read_text())
            other = [name for name in self.about if before.get(name) != self.about[name]]
            other = [name if name in before else f"{name} (not noted there)" for name in other]
        except FileNotFoundError:
            other = []
        except (ValueError, TypeError, AttributeError):
            other = ["about.json, which cannot be read"]
        if other:
            raise UserError(
                f"--runs {folder}: what is there was made with other {', '.join(other)}; "
                "give another folder"
            )

    def pairs(self, split: str, seed: int) -> list[Pair]:
        """Pairs of a split. Of other data a fifth of the prompts is the test, the rest trains."""
        if self.village:
            return village_pairs(split, seed=0 if split.endswith("distribution") else seed)
        return {"unlabelled": self.used, "labelled": self.used, "in-distribution": self.test}[split]

    @property
    def target(self) -> str:
        """The test set that the studies are about: on the village the one out of distribution."""
        return "out-of-distribution" if self.village else "in-distribution"

    def file(self, name: str, pairs: list[Pair]) -> str:
        """The pairs as a file that the training scripts read."""
        path = self.folder / "data" / f"{name}.jsonl"
        with self.alone(path):
            if not path.is_file():
                write_whole(path, (json.dumps(row_of(pair)) + "\n" for pair in pairs), "data")
        return str(path)

    def alone(self, path: Path) -> FileLock:
        """A lock for making ``path`` in one process only; a process that dies releases it."""
        lock = self.folder / "locks" / f"{path.parent.name}-{path.name}.lock"
        for folder in (lock.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock.parent / "about.lock"):
            if not (about := self.folder / "about.json").is_file():
                write_json(about, self.about)
        return FileLock(lock)

    def train(self, script, name: str, seed: int, *options: str) -> Path:
        """The run of this name, trained unless it is there already."""
        out = self.folder / f"seed{seed}" / name.replace(" ", "-")
        with self.alone(out):
            if not (out / "run.json").is_file():
                began = (out.with_name(out.name + ".partial") / "log.csv").is_file()
                resume = ["--resume"] if began else []
                always = ["--model", self.model, "--seed", str(seed), "--held-out", "0"]
                arguments = [*self.training, *always, "--out", str(out), *options, *resume]
                try:
                    with contextlib.redirect_stdout(io.StringIO()) as said:  # progress bars stay
                        script.main(arguments)
                except SystemExit:
                    module = script.__name__.removesuffix(".__main__")
                    raise UserError(
                        f"--training: {module} does not take {shlex.join(arguments)}"
                    ) from None
                except Interrupted:
                    raise Interrupted(f"{out}: stopped; the same command goes on with it") from None
                for line in filter(CUT.search, said.getvalue().splitlines()):
                    print(f"{out.name}, seed {seed}: {line}", flush=True)
        return out

    def stage1(self, seed: int, name: str = "stage1", pairs: list[Pair] | None = None) -> Path:
        pairs = self.pairs("unlabelled", seed) if pairs is None else pairs
        return self.train(train_pretrain, name, seed, "--data", self.file(f"{name}-{seed}", pairs))

    def method(self, name: str, seed: int, count: int | None = None) -> Path:
        """One of ``methods`` on the labelled pairs, or on the first ``count`` of them."""
        starts_from_stage_1, script, options = self.methods[name]
        init = ["--init", str(self.stage1(seed))] if starts_from_stage_1 else []
        pairs, few = self.pairs("labelled", seed)[:count], count is not None
        data = self.file(f"labelled-{count}-{seed}" if few else f"labelled-{seed}", pairs)
        run = f"{count} {name}" if few else name
        return self.train(script, run, seed, "--data", data, *options, *init)

    def judge(self, model: str | Path) -> Judge:
        return load_judge(model, **self.loading)

    def evaluate(self, model: str | Path, split: str = "") -> dict[str, float]:
        """Figures on a test set, the target by default: accuracies, and how sure the judge is."""
        split = split or self.target
        place = self.folder / "zero-shot" if model == self.model else Path(model)
        path = place.with_name(f"{place.name}.{split}.json")
        return self.keep(path, lambda: self._evaluate(model, split))

    def _evaluate(self, model: str | Path, split: str) -> dict[str, float]:
        row = figures_of(self.judge(model), self.pairs(split, 0), f"{Path(model).name}, {split}")
        return {split if name == "accuracy" else name: value for name, value in row.items()}

    def keep(self, path: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The figures of this file; made unless it is there already."""
        with self.alone(path):
            if not path.is_file():
                write_json(path, make())
        return json.loads(path.read_text())


def check_handed_on(option: str, words: Sequence[str], taken: Sequence[str] = ITS_OWN) -> None:
    """See that options for the scripts, handed on as one text, are none that are given anyway.

    Raises:
        UserError: if one is; it would have no effect, or make another method of one.
    """
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in taken:
            raise UserError(f"{option} {word}: the study sets --{name} itself; leave it out here")


def figures_of(judge: Judge, pairs: list[Pair], name: str) -> dict[str, float]:
    """Figures of a judge on labelled pairs: accuracies, and how sure it is; ``name`` is told."""
    results = judge.compare_many(pairs, progress=name)
    say_doubts(name, judge, results)
    figures = summarise(pairs, results)
    # The village's test labels name the truly better response. P is about something else: how
    # often a rater would agree.
    truth = [float(p.label == 0) if p.probability is None else p.probability for p in pairs]
    row = {
        "accuracy": figures.accuracy,
        "position gap": figures.position_gap,
        "margin": figures.margin,
        "loss": figures.loss,
        "calibration error": calibration([r.probability for r in results], truth)[0],
    }
    if figures.cross_entropy is not None:
        row["cross-entropy"] = figures.cross_entropy
    for aspect in ("fact", "courtesy", "length"):
        alone = [i for i, pair in enumerate(pairs) if pair.differs == {aspect}]
        if alone:
            figures = summarise([pairs[i] for i in alone], [results[i] for i in alone])
            row[aspect] = figures.accuracy
    return row


def write_json(path: Path, record: dict) -> None:
    write_whole(path, [json.dumps(record, indent=1) + "\n"], "results")


def row_of(pair: Pair) -> dict:
    """The pair as a row of a file that the scripts read."""
    label = {} if pair.label is None else {"label": LABELS[pair.label]}
    return {
        "prompt": pair.prompt,
        "response_a": pair.response_a,
        "response_b": pair.response_b,
        **label,
    }

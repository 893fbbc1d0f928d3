"""A lab keeps data, trained models and their figures in a folder: one backbone, one data source."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import train_pretrain
import train_reward
from gram_mini.baselines import __main__ as baselines
from gram_mini.errors import Interrupted, UserError
from gram_mini.evaluation import summarise
from gram_mini.judge import Judge
from gram_mini.likelihood import __main__ as joint
from gram_mini.pairs import Pair
from gram_mini.prompts import LABELS
from gram_mini.runs.defaults import DEFAULTS, for_model
from gram_mini.runs.load import load_judge
from gram_mini.runs.output import write_whole
from gram_mini.runs.record import PACKAGES, fingerprint
from gram_mini.runs.report import say_doubts
from gram_mini.studies.figures import on_part
from gram_mini.studies.metrics import calibration
from gram_mini.village import VILLAGE
from gram_mini.village.pairs import village_pairs

from filelock import FileLock

PLAIN = ["--label-smoothing", "0"]
BOTH = ["--both-orders", "1"]
# Rates, epochs and the weight of the text loss were chosen on seed 0.
SCALAR = ["--head", "scalar", "--lr", "1e-3", "--epochs", "2"]
LIKELIHOOD, JOINT = "likelihood", "GRAM + likelihood (ours)"
JOINT_BOTH = "GRAM, both orders + likelihood (ours)"
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
    "G, both orders (ours)": (False, train_reward, BOTH),
    "GRAM, both orders (ours)": (True, train_reward, BOTH),
    JOINT: (True, joint, []),
    JOINT_BOTH: (True, joint, BOTH),
}
# Judges that need no labels: kinds of the likelihood under stage 1.
LIKELIHOODS = {
    LIKELIHOOD: "sum",
    "likelihood per token": "per-token",
    "likelihood over the backbone": "over-backbone",
}
# The methods of those studies that do not compare all of them.
MAIN = ("D-Baseline", "D from stage 1", "G-Baseline", "GRAM", LIKELIHOOD, JOINT)
CUT = re.compile(r"[1-9]\d* cut to |dropped, since cutting|cutting made")  # of runs/report.py
TEST = "out-of-distribution"  # the split that the studies on the village are about
# What they show of the figures, in this order.
SHOWN = (
    *("position gap", "margin", "loss", "calibration error", "cross-entropy"),
    *("fact only", "courtesy only", "length only"),
)


def recorded_methods() -> dict[str, list]:
    """METHODS as results name what they were made with."""
    return {
        name: [from_stage_1, script.__name__, options]
        for name, (from_stage_1, script, options) in METHODS.items()
    }


class VillagePairs:
    """The pairs of the village; the test pairs are the same for all seeds."""

    about = VILLAGE

    def pairs(self, split: str, seed: int) -> list[Pair]:
        return village_pairs(split, seed=0 if split.endswith("distribution") else seed)


class Lab:
    """Data, trained models and their figures in a folder: one backbone, one data source.

    Args:
        source: gives its pairs by ``pairs(split, seed)``; ``about`` tells them from other pairs.
        training: options of all scripts.
        loading: options of training and judging alike: bits, max_length, device.
        stages: further options of a script, by the name of its module.

    Raises:
        UserError: if the folder is that of another backbone, other data or other options.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        source,
        training: Sequence[str] = (),
        loading: dict | None = None,
        stages: Mapping[str, Sequence[str]] | None = None,
    ):
        self.folder, self.model, self.source, self.pairs = folder, model, source, source.pairs
        self.loading, self.stages = loading or {}, stages or {}
        given = [f"--{name.replace('_', '-')}={value}" for name, value in self.loading.items()]
        self.training = [*training, *given]
        about = {
            "model": model,
            "backbone": fingerprint(model),
            "data": source.about,
            "training": self.training,
            "stages": self.stages,
            "defaults": {  # of the training scripts, which may change
                f"{stage} {name}": for_model(values, model)
                for stage, options in DEFAULTS.items()
                for name, values in options.items()
            },
            "methods": recorded_methods(),
            "versions": {name: version(name) for name in PACKAGES},
        }
        self.about = json.loads(json.dumps(about))  # lists, as they come back
        self._check_folder()

    def _check_folder(self) -> None:
        """See that the folder is new, or that of this model, these data and options.

        Methods that are new to the folder are noted there.

        Raises:
            UserError: if it is that of others.
        """
        about = self.folder / "about.json"
        if not (before := read_json(about)):
            return
        known = before.setdefault("methods", {})
        self.about["methods"] = known | self.about["methods"]
        before["methods"] = self.about["methods"] | known
        before["versions"] = released(before.get("versions", {}))
        now = self.about | {"versions": released(self.about["versions"])}
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            raise UserError(
                f"--runs {self.folder}: what is there was made with other {', '.join(other)}; "
                "give another folder"
            )
        if known != self.about["methods"]:
            write_json(about, self.about)

    # ---- files -----------------------------------------------------------------------

    def file(self, name: str, pairs: list[Pair]) -> str:
        """The pairs as a file that the training scripts read.

        Raises:
            UserError: if the file is there with other pairs.
        """
        path = self.folder / "data" / f"{name}.jsonl"
        with self.alone(path):
            lines = [json.dumps(row_of(pair)) + "\n" for pair in pairs]
            if not path.is_file():
                write_whole(path, lines, "data")
            elif path.read_text() != "".join(lines):
                raise UserError(f"{path}: holds other pairs than now; give another --runs")
        return str(path)

    def labelled(self, seed: int) -> str:
        """A file of the labelled pairs."""
        return self.file(f"labelled-{seed}", self.pairs("labelled", seed))

    def alone(self, path: Path) -> FileLock:
        """A lock for making ``path`` in one process only; a process that dies releases it."""
        lock = self.folder / "locks" / f"{path.parent.name}-{path.name}.lock"
        for folder in (lock.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock.parent / "about.lock"):
            if not (about := self.folder / "about.json").is_file():
                write_json(about, self.about)
        return FileLock(lock)

    def keep(self, path: Path, make: Callable[[], dict]) -> dict:
        """What is in this file; made unless it is there already."""
        with self.alone(path):
            if not path.is_file():
                write_json(path, make())
        return json.loads(path.read_text())

    # ---- models ----------------------------------------------------------------------

    def train(
        self,
        script,
        name: str,
        seed: int,
        data: str,
        init: Path | None = None,
        options: Sequence[str] = (),
    ) -> Path:
        """The run of this name, trained unless it is there already."""
        out = self.folder / f"seed{seed}" / name.replace(" ", "-")
        with self.alone(out):
            if not (out / "run.json").is_file():
                arguments = [
                    *[*self.training, "--model", self.model, "--seed", str(seed), "--data", data],
                    *["--held-out", "0", "--out", str(out), *options],
                    *(["--init", str(init)] if init else []),
                    *self.stages.get(script.__name__, []),
                ]
                self._train(script, out, arguments)
        return out

    def _train(self, script, out: Path, arguments: list[str]) -> None:
        """Train a run, or go on with it. Of what the script says, only what was cut is told."""
        if (out.with_name(f"{out.name}.partial") / "log.csv").is_file():
            arguments = [*arguments, "--resume"]
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:  # progress bars stay
                script.main(arguments)
        except SystemExit:
            module = script.__name__.removesuffix(".__main__")
            raise UserError(f"{module} does not take {shlex.join(arguments)}") from None
        except Interrupted:
            raise Interrupted(f"{out}: stopped; the same command goes on with it") from None
        for line in filter(CUT.search, said.getvalue().splitlines()):
            print(f"{out.parent.name}/{out.name}: {line}", flush=True)

    def stage1(self, seed: int, name: str = "stage1", pairs: list[Pair] | None = None) -> Path:
        """Stage 1 on the unlabelled pairs, or on others."""
        pairs = self.pairs("unlabelled", seed) if pairs is None else pairs
        return self.train(train_pretrain, name, seed, self.file(f"{name}-{seed}", pairs))

    def method(self, name: str, seed: int) -> Path:
        """One of METHODS on the labelled pairs."""
        from_stage_1, script, options = METHODS[name]
        if self.model != VILLAGE and "--lr" in options:  # the village's; others have their defaults
            at = options.index("--lr")
            options = options[:at] + options[at + 2 :]
        init = self.stage1(seed) if from_stage_1 else None
        return self.train(script, name, seed, self.labelled(seed), init, options)

    # ---- figures ---------------------------------------------------------------------

    def judge(self, model: str | Path, likelihood: str | None = None) -> Judge:
        return load_judge(model, **self.loading, likelihood=likelihood)

    def judge_of(self, name: str, seed: int) -> Judge:
        """The judge of one of METHODS or LIKELIHOODS."""
        if name in LIKELIHOODS:
            return self.judge(self.stage1(seed), LIKELIHOODS[name])
        return self.judge(self.method(name, seed))

    def evaluate(
        self, model: str | Path, split: str, likelihood: str | None = None
    ) -> dict[str, float]:
        """The figures of a judge on a test set; see :func:`figures_of`."""
        place = self.folder / "zero-shot" if model == self.model else Path(model)
        if likelihood:
            place = place.with_name(f"{place.name}-likelihood-{likelihood}")
        name = f"{Path(model).name}{', likelihood' if likelihood else ''}, {split}"
        return self.keep(
            place.with_name(f"{place.name}.{split}.figures.json"),
            lambda: figures_of(self.judge(model, likelihood), self.pairs(split, 0), name),
        )

    def row(
        self, model: str | Path, split: str = TEST, likelihood: str | None = None
    ) -> dict[str, float]:
        """The same as a row of a study on the village, with the accuracy under the split's name."""
        return shown(self.evaluate(model, split, likelihood), split)

    def row_of(self, name: str, seed: int, split: str = TEST) -> dict[str, float]:
        """The row of one of METHODS or LIKELIHOODS."""
        if name in LIKELIHOODS:
            return self.row(self.stage1(seed), split, LIKELIHOODS[name])
        run = self.method(name, seed)
        return self.row(run, split) | beta_of(run)


def released(versions: dict[str, str]) -> dict[str, str]:
    """The versions without what a build adds: 2.13.0+cpu is 2.13.0 for other machines."""
    return {name: text.partition("+")[0] for name, text in versions.items()}


def beta_of(run: Path) -> dict[str, float]:
    """The weight of the likelihood in a run, per nat, as "beta"; empty for a run without one."""
    results = read_json(run / "run.json").get("results", {})
    return {"beta": results["beta_per_nat"]} if "beta_per_nat" in results else {}


def shown(figures: dict[str, float], accuracy: str = "accuracy") -> dict[str, float]:
    """What the studies on the village show of the figures, with the accuracy under this name."""
    row = {accuracy: figures["accuracy"]}
    return row | {name: figures[name] for name in SHOWN if name in figures}


def figures_of(judge: Judge, pairs: list[Pair], name: str) -> dict[str, float]:
    """Figures of a judge on labelled pairs; "fact only": on those that differ in nothing else."""
    results = judge.compare_many(pairs, progress=name)
    say_doubts(name, judge, results)
    figures = summarise(pairs, results)
    # The village's test labels name the truly better response. P is about something else: how
    # often a rater would agree.
    truth = [float(p.label == 0) if p.probability is None else p.probability for p in pairs]
    row = {
        "accuracy": figures.accuracy,
        "± over prompts": figures.interval,
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
            row[f"{aspect} only"] = on_part(pairs, results, alone).accuracy
    return row


def read_json(path: Path) -> dict:
    """What :func:`write_json` wrote; empty if there is no such file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); mend it, or delete it") from None


def write_json(path: Path, record: dict) -> None:
    write_whole(path, [json.dumps(record, indent=1) + "\n"], "results")


def row_of(pair: Pair) -> dict:
    """The pair as a row of a file that the scripts read."""
    label = {} if pair.label is None else {"label": LABELS[pair.label]}
    responses = {"response_a": pair.response_a, "response_b": pair.response_b}
    return {"prompt": pair.prompt, **responses, **label}

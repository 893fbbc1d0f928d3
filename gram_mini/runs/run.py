"""A run of a training script: everything around the training loop.

    run = Run("reward", args)               folder, processes, device; errors come before any work
    for batch in run.steps(...):            draws pairs, resumes, logs, saves
        for rows, weight in run.passes(batch):    this process's pairs, as many as fit at once
            run.note(...)                   figures for the log
        run.sum_over_processes()            gradients and loss
        if run.step_is_finite(norm): ...    else run.skip_step(norm)
        if run.evaluation_is_due(): run.log_held_out(...)
    run.finish(...)                         adapter, tokenizer, run.json, log.csv, plot.png

Model call, loss, backward pass and optimiser step are in the script.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from gram_mini.batches import EncodedPair, trained_tokens
from gram_mini.errors import Interrupted, UserError
from gram_mini.model import output_head
from gram_mini.pairs import Pair, split_by_prompt
from gram_mini.prompts import PromptPieces, default_judge, label_tokens
from gram_mini.reading.load import PairData, load_pairs
from gram_mini.reading.template import read_template
from gram_mini.runs import checkpoint, defaults
from gram_mini.runs.checks import check_sizes
from gram_mini.runs.folder import RunFolder
from gram_mini.runs.log import Log
from gram_mini.runs.memory import (
    GIB,
    Longest,
    choose_passes,
    free_for_each,
    least_of_all,
    prepare_memory,
    total_bytes,
)
from gram_mini.runs.models import (
    checkpoint_gradients,
    keep_no_square,
    load_model,
    load_tokenizer,
)
from gram_mini.runs.options import reading_options
from gram_mini.runs.passes import split_by_tokens
from gram_mini.runs.processes import (
    in_parallel,
    start_processes,
    stopping_after_the_step,
    sum_over_processes,
)
from gram_mini.runs.record import (
    check_init,
    make_record,
    pinned,
    settings,
    tokenizer_fingerprint,
)
from gram_mini.runs.report import describe, lengths, say_if_spelled, without_cut_alike
from gram_mini.training import draw_batches, number_of_steps

import torch
from tqdm import tqdm

LORA_RANK = 32  # if there is neither --lora-rank nor --init
SKIP_LIMIT = 5  # steps in a row that are not finite, after which a run stops
TITLES = {"pretrain": "stage 1", "reward": "stage 2"}


class Run:
    """A run of one stage, "pretrain" or "reward", with the options of its script.

    Attributes:
        device: where to compute.
        backbone: args.model, at the version that --init was trained on.
        evaluation: the latest figures of the held-out pairs; empty if there are none.

    Raises:
        UserError: a folder, device or --init that cannot be used.
    """

    def __init__(self, stage: str, args):
        self.stage, self.args = stage, args
        self.folder = RunFolder(args.out, args.overwrite, args.resume)
        self._accelerator, self.device = start_processes(args.device)
        self.backbone = args.model
        self._template: str = ""  # from --judge-template or --init; "" for the default
        init = getattr(args, "init", None)
        self._init: dict | None = None
        if init:
            if init.resolve() == args.out.resolve():
                raise UserError(
                    f"--out {args.out}: is the run given as --init; give another folder"
                )
            kind = getattr(args, "head", None), hasattr(args, "beta_lr")
            record = check_init(init, args.model, args.lora_rank, *kind)
            args.lora_rank = record["options"]["lora_rank"]
            for name in ("bits", "max_length"):  # the adapter fits, but it has seen something else
                before, now = record["options"].get(name), getattr(args, name)
                if before not in (None, now):
                    option = f"--{name.replace('_', '-')}"
                    self.say(f"--init {init}: was trained with {option} {before}, this run: {now}")
            self.backbone = pinned(args.model, record["backbone"]["fingerprint"])
            self._template = record["prompt"]["judge"]
            self._init = record
        args.lora_rank = args.lora_rank or LORA_RANK
        if getattr(args, "judge_template", None):
            self._template = read_template(args.judge_template)
        self.data: PairData
        self.lengths: dict = {}
        self.evaluation: dict = {}
        self._step = self._total = self._dropped = 0

    # ---- before the loop -------------------------------------------------------------

    def say(self, line: object) -> None:
        """Print a line, from one process only."""
        self._accelerator.print(line)

    @property
    def _rows_per_step(self) -> int:
        """Pairs per optimiser step, over all processes."""
        return self.args.batch_size * self._accelerator.num_processes

    def load_split_pairs(self, labelled: bool) -> tuple[list[Pair], list[Pair]]:
        """The pairs of ``--data`` to train on, and those of the prompts that are held out.

        It prints what was read and dropped, and run.json keeps that.

        Raises:
            UserError: as reading.load.load_pairs.
        """
        self.data = load_pairs(
            self.args.data, labelled, seed=self.args.seed, **reading_options(self.args)
        )
        self.say(self.data.summary())
        if self._init and self._init["stage"] == "reward" and self.args.held_out:
            before, now = self._init["options"], self.args
            same_split = (before["seed"], before.get("held_out")) == (now.seed, now.held_out)
            labels = self._init.get("data", {}).get("fingerprint")
            if not same_split or labels != self.data.fingerprint:
                self.say(
                    f"--init {self.args.init}: was trained on other labels or another split, so "
                    "prompts that are held out here may have been trained on there"
                )
        return split_by_prompt(self.data.pairs, self.args.held_out, self.args.seed)

    def load_checked_model(self):
        """The model of ``--model`` with frozen weights, and its tokenizer.

        This checks that the model computes what we assume, that tokens and positions fit, that A
        and B are one token each, and that the tokenizer is that of ``--init``.

        Raises:
            UserError: if one of these is not so, or there is no such model.
        """
        args = self.args
        tokenizer = load_tokenizer(self.backbone)
        self._template = self.judge_template(tokenizer)
        label_tokens(tokenizer, self._template)
        some = self.data.pairs[:100]
        texts = [text for p in some for text in (p.prompt, p.response_a, p.response_b)]
        if self._accelerator.is_main_process:
            say_if_spelled(tokenizer, texts)
        model = load_model(self.backbone, args.bits, self.device, args.gradient_checkpointing)
        check_sizes(args.model, model, tokenizer, args.max_length)
        self._tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        if self._init and self._init.get("tokenizer") not in (None, self._tokenizer_fingerprint):
            raise UserError(
                f"--init {args.init}: was trained with another tokenizer or chat template than "
                f"{args.model} has now; put the old one back, or train stage 1 again"
            )
        return model, tokenizer

    def judge_template(self, tokenizer) -> str:
        """The judge prompt: that of --judge-template, or of --init, or prompts.default_judge."""
        return self._template or default_judge(tokenizer)

    def without_cut_alike(self, rows: list[EncodedPair]) -> list[EncodedPair]:
        """The rows without those whose responses differ in nothing but length since they were cut.

        Raises:
            UserError: if none is left.
        """
        kept = without_cut_alike(rows, self.args.max_length)
        self._dropped = len(rows) - len(kept)
        return kept

    def plan(
        self,
        model,
        train: list[EncodedPair],
        held_out: list[EncodedPair],
        prompt: PromptPieces,
        length: Callable[[EncodedPair], int] | None = None,
        sequences: int = 1,
    ) -> tuple[int, float, int]:
        """The number of steps, the learning rate, and the most tokens of a forward pass.

        The rate is --lr, or follows from the model's width. The tokens are --batch-tokens, or what
        a GPU's memory admits; if not even one pair fits, gradient checkpointing is switched on. All
        this is said, with the number of pairs and their lengths. In training a row takes
        ``sequences`` sequences of ``length`` tokens, by default the one sequence of its pair.
        ``model`` is the one with its adapter.

        Raises:
            UserError: a step takes more memory than there is.
        """
        self._train, self._prompt, self._sequences = train, prompt, sequences
        self._length = length or (lambda row: row.length + prompt.fixed_tokens)
        dropped = self._dropped
        self.lengths = {**lengths(train + held_out, prompt), "dropped_cut_alike": dropped}
        counts = f"{len(train)} pairs to train on, {len(held_out)} held out"
        self.say(f"{counts}; {describe(self.lengths, self.args.max_length, dropped)}")
        args = self.args
        self.say(defaults.choose_rate(args, self.stage, output_head(model).weight.shape[1]))
        self._choose_passes(model)
        steps = number_of_steps(len(train), self._rows_per_step, args.epochs, args.steps)
        tokens = args.batch_size * args.max_length
        return steps, args.lr, min(tokens, args.batch_tokens or tokens)

    # ---- the loop --------------------------------------------------------------------

    def steps(
        self, train: list[EncodedPair], steps: int, model, optimizer, schedule
    ) -> Iterator[list[EncodedPair]]:
        """Yield the pairs of each step, from the first step or from that after the checkpoint.

        They are drawn by :func:`gram_mini.training.draw_batches`.

        Raises:
            UserError: an unfinished run with other options or data, or one that cannot be read.
            Interrupted: after Ctrl-C, when the step is done and saved.
        """
        accelerator = self._accelerator
        if accelerator.is_main_process:
            self.folder.start()
        self._model, self._total = model, steps
        self._settings = settings(
            self.args,
            self.data,
            model,
            accelerator.num_processes,
            self._template,
            self._prompt,
            self._tokenizer_fingerprint,
        )
        begun = self._load(optimizer, schedule)
        batches = draw_batches(train, self._rows_per_step, self.args.seed)
        for _ in range(begun["step"]):
            next(batches)
        self.skipped, self._skipped_in_a_row = begun["skipped"], 0
        self._log = Log(
            self.folder.partial / "log.csv",
            self.args,
            steps,
            accelerator,
            begun["step"],
            begun["log"],
        )
        model.train()
        progress = tqdm(
            range(begun["step"] + 1, steps + 1),
            desc=TITLES[self.stage],
            mininterval=1,
            initial=begun["step"],
            total=steps,
            disable=not accelerator.is_main_process,
        )
        with stopping_after_the_step(accelerator):
            for self._step in progress:
                self._batch = next(batches)
                self._loss, self._applied, self._evaluated = 0.0, True, False
                rate = schedule.get_last_lr()[0]
                yield self._batch
                if self._applied:
                    self._skipped_in_a_row = 0
                means = self._log.train(
                    self._step, lr=rate, applied=self._applied, skipped=self.skipped
                )
                if means:
                    names = [name for name in ("loss", "accuracy") if name in means]
                    progress.set_postfix({name: f"{means[name]:.3f}" for name in names})
                if self._evaluated:
                    self._log.held_out(self._step, self.evaluation)
                stop = accelerator.check_trigger()
                # Before the last step, too: if the end fails, it alone is done again.
                due = self._step % self.args.save_every == 0 or self._step == steps - 1
                if self._step < steps and (stop or due):
                    self._save(optimizer, schedule)
                    if stop:
                        raise Interrupted(
                            f"stopped after step {self._step}, saved in {self.folder.partial}; "
                            "go on with the same command and --resume"
                        )

    def passes(self, batch: list[EncodedPair]) -> Iterator[tuple[list[EncodedPair], float]]:
        """Yield this process's pairs of a step, one forward pass at a time, with its weight.

        A pass holds at most ``--batch-tokens`` tokens, padding included. Its weight is its part of
        the step, so that the weighted losses of the passes add up to the loss of the step, however
        it is split. In stage 1 that is a mean over trained tokens, in stage 2 over pairs.
        """
        # The rows are sorted by length, so every process gets equal work.
        own = batch[self._accelerator.process_index :: self._accelerator.num_processes]
        sizes = [self._sequences * self._length(row) for row in own]
        for part in split_by_tokens(sizes, self.args.batch_tokens):
            rows = own[part]
            yield rows, self._terms(rows) / self._terms(batch)

    def _terms(self, rows: list[EncodedPair]) -> int:
        """How many terms the loss of these rows is the mean of."""
        return trained_tokens(self._prompt, rows) if self.stage == "pretrain" else len(rows)

    def sum_over_processes(self) -> None:
        """Sum the gradients and the loss of a step over the processes of accelerate launch."""
        self._loss = sum_over_processes(self._accelerator, self._model, self._loss)

    def note(self, weight: float, tokens: int = 0, **figures: torch.Tensor) -> None:
        """Note the figures of a forward pass, which has this ``weight`` in the means of its step.

        ``tokens`` counts its tokens with padding. The figures are scalars.
        """
        if "loss" in figures:
            self._loss += figures["loss"].detach() * weight
        self._log.note(tokens, weight, **figures)

    def logs_this_step(self) -> bool:
        """Whether this step ends a line of the log."""
        return self._log.due(self._step)

    @property
    def fraction_left(self) -> float:
        """Fraction of the steps still to be done, this one included: 1 at the first step."""
        return (self._total - self._step + 1) / self._total

    def step_is_finite(self, gradient_norm: float) -> bool:
        """Whether loss and gradient of the step are finite."""
        return math.isfinite(self._loss) and math.isfinite(gradient_norm)

    def skip_step(self, gradient_norm: float) -> None:
        """Count a step whose loss or gradient is not finite; it changes nothing.

        Raises:
            UserError: if SKIP_LIMIT steps in a row were skipped; names the rows of the last one.
        """
        self._applied = False
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= SKIP_LIMIT:
            rows = ", ".join(map(str, sorted(row.row for row in self._batch)))
            raise UserError(
                f"{SKIP_LIMIT} steps in a row had a loss or gradient that is not finite "
                f"(loss {self._loss:.4g}, gradient norm {gradient_norm:.4g}), the last one on rows "
                f"{rows} of {self.data.source}; lower --lr, or look at these rows"
            )

    def evaluation_is_due(self) -> bool:
        """Whether to judge the held-out pairs now: five times a run, at last at its end."""
        return self._step * 5 // self._total > (self._step - 1) * 5 // self._total

    def in_parallel(self, work: Callable[[list], list], items: list) -> list:
        """``work(items)``, one result per item; each process does some, and all get all results.

        The time that it takes is not counted in the log's tokens per second.
        """
        began = time.perf_counter()
        results = in_parallel(self._accelerator, work, items)
        self._log.exclude(time.perf_counter() - began)
        return results

    def log_held_out(self, figures: dict) -> None:
        """Log the figures of the held-out pairs; run.json keeps the last ones."""
        self.evaluation, self._evaluated = figures, True

    def _choose_passes(self, model) -> None:
        """Choose attention and, if they were left out, the passes; say what a step will take.

        Raises:
            UserError: if it will take more than is free.
        """
        args = self.args
        logits = 0.0
        if self.stage == "pretrain":
            parts = [trained_tokens(self._prompt, [row]) / self._length(row) for row in self._train]
            logits = max(parts)
        elif getattr(args, "text_weight", 0):
            logits = 1 / self._sequences  # of the last one alone
        longest = Longest(
            rows=min(args.batch_size, -(-len(self._train) // self._accelerator.num_processes)),
            sequences=self._sequences,
            length=max(map(self._length, self._train)),
            logits=logits,
            limit=args.batch_tokens,
        )
        keep_no_square(model, longest.length)
        total = least_of_all(total_bytes(self.device))
        if args.batch_tokens is None:
            chosen = total and choose_passes(model, longest, args.gradient_checkpointing, total)
            if chosen:
                args.batch_tokens = chosen[0]
                if chosen[1] and not args.gradient_checkpointing:
                    args.gradient_checkpointing = True
                    checkpoint_gradients(model)
            else:
                args.batch_tokens = defaults.for_model(defaults.BATCHES["batch_tokens"], args.model)
            longest = replace(longest, limit=args.batch_tokens)
        again = ", with gradient checkpointing" if args.gradient_checkpointing else ""
        card = f" (of {total / GIB:.0f} GB)" if total else ""
        self.say(f"{longest}{again}{card}")
        free = free_for_each(self._accelerator, self.device)
        if free is None:
            self.say(f"memory: not estimated on {self.device.type}")
        else:
            self.say(prepare_memory(model, longest, args.gradient_checkpointing, free))

    # ---- after the loop --------------------------------------------------------------

    def finish(self, model, tokenizer) -> None:
        """Write the run folder and rename it to its final name."""
        if not self._accelerator.is_main_process:
            return
        results = {"steps": self._total, "skipped": self.skipped, "lengths": self.lengths}
        if self.evaluation:
            results["held_out"] = self.evaluation
        if hasattr(model, "beta"):  # of gram_mini.likelihood
            results["beta_per_nat"] = model.beta.item() / model.beta_unit
        template = self.judge_template(tokenizer)
        began = {  # as --init was when the run began
            "stage": self._init and self._init["stage"],
            "fingerprint": self._settings["weights of --init"],
        }
        record = make_record(
            self.stage,
            self.args,
            self.data,
            model,
            label_tokens(tokenizer, template),
            template,
            self._prompt,
            tokenizer,
            results,
            began,
        )
        self.folder.finish(model, tokenizer, record)
        print(f"wrote {self.args.out}: adapter, tokenizer, run.json, log.csv, plot.png")

    # ---- checkpoints -----------------------------------------------------------------

    def _load(self, optimizer, schedule) -> dict:
        """The state at the checkpoint that the run goes on from, or that before the first step."""
        if not self.folder.resumes:
            if self.args.resume:
                self.say("there is no checkpoint yet: starting from the beginning")
            return {"step": 0, "skipped": 0, "log": None}
        begun = checkpoint.load(
            self.folder.checkpoint,
            self._accelerator,
            self._settings,
            self._model,
            optimizer,
            schedule,
        )
        self.say(f"going on after step {begun['step']}")
        return begun

    def _save(self, optimizer, schedule) -> None:
        checkpoint.save(
            self.folder.checkpoint,
            self._accelerator,
            self._step,
            self._settings,
            self._model,
            optimizer,
            schedule,
            self._log.state(),
            self.skipped,
        )

"""From label logits to preferences, rewards and rankings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from gram_mini.backbone import (
    fingerprint,
    hidden_states,
    load_backbone,
    load_lora,
    load_tokenizer,
    output_logits,
    pick_device,
    read_run,
)
from gram_mini.batches import encode_pairs, judge_batch
from gram_mini.data import Pair
from gram_mini.errors import UserError
from gram_mini.losses import label_mass
from gram_mini.prompts import judge_prompt, label_tokens

AVERAGES = ("probabilities", "logits")
METHODS = ("round-robin", "knock-out", "reference")


@dataclass(frozen=True)
class Comparison:
    """How response a fares against response b; every field is about a."""

    probability: float  # P(a better), averaged over both orders
    a_first: float  # P(a better) with a shown as assistant A
    a_second: float  # P(a better) with a shown as assistant B
    odds_first: float  # the same as log-odds, Z_a - Z_b
    odds_second: float
    label_mass: float  # mean probability that the model answers with A or B at all
    truncated: bool  # whether the texts were cut to fit max_length

    @property
    def position_gap(self) -> float:
        """How far the two orders disagree, 0 to 1: 0 for a judge that does not look at the order."""
        return abs(self.a_first - self.a_second)


@dataclass(frozen=True)
class Ranking:
    """Responses from best to worst."""

    order: list[int]  # positions in the list of responses, best first
    scores: list[float]  # one per response, in the order they were given
    comparisons: int  # pairs compared, each in both orders
    method: str


class RewardModel:
    """A generative reward model: a language model that answers A or B after a judge prompt.

    Args:
        model: causal language model, with or without an adapter.
        tokenizer: its tokenizer; the label tokens are looked up in it.
        max_length: tokens per judge prompt; longer texts are cut (see batches.truncate).
        batch_size: judge prompts per forward pass.
    """

    def __init__(self, model, tokenizer, max_length: int = 512, batch_size: int = 64):
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.prompt = judge_prompt(tokenizer)
        self.labels = label_tokens(tokenizer)

    @classmethod
    def load(cls, path: str, bits: int | None = None, device: str = "auto", **options) -> RewardModel:
        """Load a run folder of train_reward.py (or train_pretrain.py), or any checkpoint as a zero-shot judge.

        Args:
            path: run folder, model folder, hub name, or "embedded".
            bits: 4, 16 or 32; by default what the run was trained with, else 4.
            options: max_length, batch_size.

        Raises:
            UserError: if there is no such model, or the backbone is not the one the run was trained on.
        """
        place = pick_device(device)
        folder = Path(path)
        if (folder / "run.json").is_file():
            run = read_run(folder)
            name = run["backbone"]["name"]
            if fingerprint(name) != run["backbone"]["fingerprint"]:
                raise UserError(f"{path}: was trained on another version of the backbone {name!r}; train it again")
            model = load_lora(load_backbone(name, bits or run["options"]["bits"], place), folder, trainable=False)
            tokenizer = load_tokenizer(path)
        elif (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{path}: holds an adapter but no run.json, so its backbone is unknown; is the run finished?")
        else:
            model, tokenizer = load_backbone(path, bits or 4, place), load_tokenizer(path)
        return cls(model, tokenizer, **options)

    @torch.no_grad()
    def log_odds(self, pairs: list[Pair], progress: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge pairs in both orders.

        Returns log-odds (N, 2) that response a is better, with a shown first and with a shown second;
        the mass (N, 2) on the two labels; and which pairs (N,) were cut to ``max_length``.
        """
        rows = encode_pairs(pairs, self.prompt, self.tokenizer, self.max_length)
        # Both orders of a pair are two jobs of equal length; sorting by length keeps padding small.
        jobs = sorted(((i, swap) for i in range(len(rows)) for swap in (False, True)), key=lambda job: -rows[job[0]].length)
        odds, mass = torch.zeros(len(rows), 2), torch.zeros(len(rows), 2)  # (N, 2)
        training, device = self.model.training, self.model.device
        self.model.eval()
        starts = range(0, len(jobs), self.batch_size)
        for start in tqdm(starts, desc=progress, delay=2, disable=progress is None, leave=False):
            chosen = jobs[start : start + self.batch_size]
            batch = judge_batch([rows[i] for i, _ in chosen], [s for _, s in chosen], self.prompt, self.tokenizer.pad_token_id)
            hidden = hidden_states(self.model, batch["input_ids"].to(device))  # (B, T, H)
            at_end = hidden[torch.arange(len(chosen)), batch["last"]]  # (B, H)
            logits = output_logits(self.model, at_end).float().cpu()  # (B, V)
            for (i, swap), row, m in zip(chosen, logits, label_mass(logits, self.labels)):
                a, b = row[list(self.labels)]
                odds[i, int(swap)] = b - a if swap else a - b
                mass[i, int(swap)] = m
        self.model.train(training)
        return odds, mass, torch.tensor([row.truncated for row in rows])

    def compare_many(self, pairs: list[Pair], average: str = "probabilities", progress: str | None = None) -> list[Comparison]:
        """Compare the two responses of each pair in both orders.

        Args:
            average: "probabilities" takes the mean of the two probabilities, as the official evaluation does
                (NiuTrans/GRAM, evaluation/gram_eval.py); "logits" the mean of the log-odds.
            progress: what a progress bar is called, if there shall be one.

        Raises:
            ValueError: for another ``average``.
        """
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {AVERAGES}, got {average!r}")
        odds, mass, truncated = self.log_odds(pairs, progress)
        each = odds.sigmoid()  # (N, 2)
        mean = each.mean(dim=1) if average == "probabilities" else odds.mean(dim=1).sigmoid()  # (N,)
        columns = (mean, *each.T, *odds.T, mass.mean(dim=1), truncated)  # eight of (N,)
        return [Comparison(*row) for row in zip(*(column.tolist() for column in columns))]

    def compare(self, prompt: str, response_a: str, response_b: str, average: str = "probabilities") -> Comparison:
        """How ``response_a`` fares against ``response_b``."""
        return self.compare_many([Pair(prompt, response_a, response_b)], average)[0]

    def reward(self, prompt: str, response: str, reference: str, average: str = "probabilities") -> float:
        """P(better than the reference response), 0 to 1, 1/2 is a draw (NiuTrans/GRAM, README.md, "PPO")."""
        return self.compare(prompt, response, reference, average).probability

    def rank(
        self,
        prompt: str,
        responses: list[str],
        method: str = "round-robin",
        reference: str | None = None,
        average: str = "probabilities",
    ) -> Ranking:
        """Order n responses to one prompt from best to worst.

        round-robin: all against all, n (n - 1) / 2 comparisons; score = mean P(better than another one).
        knock-out:   winners meet until one is left, n - 1 comparisons; score = rounds survived plus the
                     probability in the last comparison. Only the first place is decided by comparing.
        reference:   each against ``reference``, n comparisons; score = the reward.

        Raises:
            ValueError: no response, unknown method, or method "reference" without a reference.
        """
        if not responses:
            raise ValueError("rank needs at least one response")
        if method == "reference":
            if reference is None:
                raise ValueError("method 'reference' needs a reference response")
            results = self.compare_many([Pair(prompt, r, reference) for r in responses], average)
            scores, count = [result.probability for result in results], len(responses)
        elif method == "round-robin":
            scores, count = self._round_robin(prompt, responses, average)
        elif method == "knock-out":
            scores, count = self._knock_out(prompt, responses, average)
        else:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        order = sorted(range(len(responses)), key=lambda i: -scores[i])
        return Ranking(order, scores, count, method)

    def _round_robin(self, prompt, responses, average):
        games = list(itertools.combinations(range(len(responses)), 2))
        wins = [0.0] * len(responses)
        for (i, j), result in zip(
            games, self.compare_many([Pair(prompt, responses[i], responses[j]) for i, j in games], average)
        ):
            wins[i] += result.probability
            wins[j] += 1 - result.probability
        return [w / max(1, len(responses) - 1) for w in wins], len(games)

    def _knock_out(self, prompt, responses, average):
        scores, alive, played, rounds = [0.0] * len(responses), list(range(len(responses))), 0, 0
        while len(alive) > 1:
            games = list(zip(alive[0::2], alive[1::2]))
            left_over = alive[len(games) * 2 :]  # an odd one goes through
            results = self.compare_many([Pair(prompt, responses[i], responses[j]) for i, j in games], average)
            alive = []
            for (i, j), result in zip(games, results):
                scores[i], scores[j] = rounds + result.probability, rounds + 1 - result.probability
                alive.append(i if result.probability >= 0.5 else j)
            alive, played, rounds = alive + left_over, played + len(games), rounds + 1
        return scores, played

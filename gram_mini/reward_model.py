"""From label logits to preferences, rewards and rankings."""

from __future__ import annotations

import itertools
import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig

from gram_mini.backbone import (
    EXPORTED,
    fingerprint,
    hidden_states,
    load_backbone,
    load_lora,
    load_merged,
    load_tokenizer,
    local_folder,
    output_head,
    output_logits,
    pick_device,
    read_run,
)
from gram_mini.batches import (
    EncodedPair,
    encode_pairs,
    judge_batch,
    pair_segments,
    response_batch,
    response_segments,
    split_by_tokens,
)
from gram_mini.errors import UserError
from gram_mini.formats import Pair, parse_pairs, read_prompt
from gram_mini.losses import LOGITS_AT_ONCE, label_mass
from gram_mini.prefixes import end_states
from gram_mini.prompts import JUDGE, judge_prompt, label_tokens, response_prompt

AVERAGES = ("probabilities", "logits")
METHODS = ("round-robin", "knock-out", "reference")
AGAINST = ("first", "all")
MERGE_UP_TO = 2**30  # bytes of float32 weights


@dataclass(frozen=True)
class Comparison:
    """How response a fares against response b; every field is about a."""

    probability: float  # P(a better), averaged over both orders
    a_first: float  # P(a better) with a shown as assistant A
    a_second: float  # P(a better) with a shown as assistant B
    log_odds_first: float  # the same as log-odds, Z_a - Z_b
    log_odds_second: float
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
    truncated: int  # how many of them had their texts cut to fit max_length
    method: str


class RewardModel:
    """A generative reward model: a language model that answers A or B after a judge prompt.

    Args:
        model: causal language model, with or without an adapter.
        tokenizer: its tokenizer; the label tokens are looked up in it.
        max_length: tokens per judge prompt; longer texts are cut (see batches.truncate).
        batch_size: judge prompts of max_length per forward pass; of shorter ones, as many as make up the same number of tokens.
        template: the judge prompt, with placeholders as in prompts.JUDGE.
        batch_tokens: fewer tokens per forward pass than these.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_length: int = 512,
        batch_size: int = 32,
        template: str = JUDGE,
        batch_tokens: int | None = None,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.max_length, self.batch_size, self.batch_tokens = max_length, batch_size, batch_tokens
        self.head = getattr(model, "head", None)
        self.scalar = self.head is not None and self.head.out_features == 1
        self.prompt = response_prompt(tokenizer) if self.scalar else judge_prompt(tokenizer, template)
        self.labels = label_tokens(tokenizer, template)

    @classmethod
    def load(
        cls,
        path: str,
        bits: int | None = None,
        device: str = "auto",
        max_length: int | None = None,
        batch_size: int = 32,
        template: str | None = None,
        merge: bool | None = None,
    ) -> RewardModel:
        """Load a run folder of train_reward.py (or train_pretrain.py), an exported one, or any checkpoint as a zero-shot judge.

        Args:
            path: run folder, model folder, hub name, or "embedded".
            bits: 4, 16 or 32; by default what the run was trained with, for an exported model what it was written in, else 4.
            max_length: tokens per judge prompt; by default what the run was trained with, else 512.
            template: the judge prompt; by default what the run was trained with, else prompts.JUDGE.
            merge: put the run's adapter into the weights, in float32. That spares the adapter's products and the unpacking of
                NF4, and changes no score by more than 1e-5; by default on a CPU, where the weights then take 1 GiB at most.
                (On a GPU export the run and score with that: gram_mini/export.py.)

        Raises:
            UserError: if there is no such model, or the backbone is not the one the run was trained on.
        """
        place = pick_device(device)
        folder = Path(path)
        if (folder / "run.json").is_file():
            run = read_run(folder)
            name, trained_on = run["backbone"]["name"], run["backbone"]["fingerprint"]
            on_hub = local_folder(name) is None
            if not on_hub and fingerprint(name) != trained_on:
                raise UserError(f"{path}: was trained on another version of the backbone {name!r}; train it again")
            bits, max_length = bits or run["options"]["bits"], max_length or run["options"]["max_length"]
            template = template or run["prompt"]["judge"]
            backbone = load_backbone(name, bits, place, revision=trained_on if on_hub else None)
            if merge is None:
                merge = place.type == "cpu" and backbone.dtype == torch.float32 and 4 * backbone.num_parameters() <= MERGE_UP_TO
            model, tokenizer = (load_merged if merge else load_lora)(backbone, folder), load_tokenizer(path)
        elif (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{path}: holds an adapter but no run.json, so its backbone is unknown; is the run finished?")
        elif folder.with_name(f"{folder.name}.partial").is_dir() and not folder.is_dir():
            raise UserError(f"{path}: is not finished; train it to its end with the same command and --resume")
        else:
            if (folder / EXPORTED).is_file():
                run = read_run(folder, EXPORTED)
                max_length, template = max_length or run["options"]["max_length"], template or run["prompt"]["judge"]
                bits = bits or (32 if AutoConfig.from_pretrained(folder).dtype == torch.float32 else 16)  # as it was written
            model, tokenizer = load_backbone(path, bits or 4, place), load_tokenizer(path)
        return cls(model, tokenizer, max_length or 512, batch_size, template or JUDGE)

    def label_logits(self, rows: list[EncodedPair], swaps: list[bool]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Z_A and Z_B of a batch of pairs, (B, 2); the hidden states they are read from, (B, H); and the batch.

        From a scalar head Z_A and Z_B are the rewards of the two responses, each seen by itself: the loss of
        losses.py is then the plain Bradley-Terry loss, and the hidden states are (2B, H).
        """
        make = response_batch if self.scalar else judge_batch
        batch = make(rows, swaps, self.prompt, self.tokenizer.pad_token_id)
        hidden = hidden_states(self.model, batch["input_ids"].to(self.model.device))  # (B, T, H)
        at_end = hidden[torch.arange(len(hidden)), batch["last"]]  # (B, H)
        logits = self._read(at_end)  # (B, 2), or (2B, 1): first responses, then second ones
        return logits.view(2, -1).T if self.scalar else logits, at_end, batch

    def _read(self, at_end: torch.Tensor) -> torch.Tensor:
        """Logits (B, 2) of the labels from hidden states (B, H), or rewards (B, 1) from a scalar head."""
        if self.head is None:
            return output_logits(self.model, at_end, self.labels)  # two rows of the output matrix
        return self.head(at_end.to(self.head.weight.dtype))

    def encode(self, pairs: list[Pair]) -> list[EncodedPair]:
        """Tokenise pairs, cut to ``max_length``."""
        return encode_pairs(pairs, self.prompt, self.tokenizer, self.max_length)

    def pass_tokens(self, row: EncodedPair) -> int:
        """Tokens that a pair takes in a forward pass of training: one judge prompt, or two responses after their prompts."""
        return 2 * max(self._length(row, 0), self._length(row, 1)) if self.scalar else self._length(row, 0)

    def _length(self, row: EncodedPair, k: int) -> int:
        if not self.scalar:
            return row.length + self.prompt.fixed_tokens
        return len(row.prompt) + len(row.response_b if k else row.response_a) + self.prompt.fixed_tokens

    @torch.no_grad()
    def log_odds(self, rows: list[EncodedPair], progress: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge encoded pairs in both orders; what several have in common is computed once (gram_mini/prefixes.py).

        Returns log-odds (N, 2) that response a is better, with a shown first and with a shown second; the mass (N, 2) on
        the two labels; and which pairs (N,) were cut. A scalar head sees each response by itself: both orders are one, and
        the mass is 1.
        """
        segments = response_segments if self.scalar else pair_segments
        jobs = [(i, k) for i in range(len(rows)) for k in (0, 1)]  # the pair's two orders, or its two responses
        lengths = [self._length(rows[i], k) for i, k in jobs]
        questions = [bytes(array("i", row.prompt)) for row in rows]
        longest: dict[bytes, int] = {}  # of the sequences on one question
        for (i, _), length in zip(jobs, lengths):
            longest[questions[i]] = max(length, longest.get(questions[i], 0))

        def place(j: int):
            """Similar lengths together, so that little is padded; what begins alike together, so that it is shared."""
            i, k = jobs[j]
            return -longest[questions[i]], questions[i], bytes(array("i", rows[i].response_b if k else rows[i].response_a))

        order = sorted(range(len(jobs)), key=place)
        limit = min(self.batch_size * self.max_length, self.batch_tokens or math.inf)
        value, mass = torch.zeros(len(rows), 2), torch.ones(len(rows), 2)
        training = self.model.training
        self.model.eval()
        with tqdm(total=len(jobs), desc=progress, delay=2, disable=progress is None, leave=False) as bar:
            passes = split_by_tokens(
                [lengths[j] for j in order], limit, padding=0.1, groups=[questions[jobs[j][0]] for j in order]
            )
            for some in passes:
                chosen = [jobs[j] for j in order[some]]
                sequences = [segments(self.prompt, rows[i], bool(k)) for i, k in chosen]
                at_end = end_states(self.model, sequences, self.tokenizer.pad_token_id)  # (B, H)
                logits = self._read(at_end).float()  # (B, 2), or (B, 1)
                at = tuple(torch.tensor(chosen).T)
                value[at] = (logits[:, 0] if self.scalar else logits[:, 0] - logits[:, 1]).cpu()
                if not self.scalar:
                    mass[at] = self.label_mass(at_end).cpu()
                bar.update(len(at_end))
        self.model.train(training)
        if self.scalar:
            odds = (value[:, :1] - value[:, 1:]).expand(-1, 2)
        else:
            odds = value * torch.tensor([1, -1])  # shown second, a is called B
        return odds, mass, torch.tensor([row.truncated for row in rows])

    def label_mass(self, at_end: torch.Tensor) -> torch.Tensor:
        """Probability (B,) of answering A or B at all, from the hidden states (B, H) where the verdict stands."""
        head = output_head(self.model)
        some = at_end.split(max(1, LOGITS_AT_ONCE // len(head.weight)))
        return torch.cat([label_mass(head(states), self.labels) for states in some])

    def compare_many(self, pairs: list[Pair], average: str = "probabilities", progress: str | None = None) -> list[Comparison]:
        """Compare the two responses of each pair in both orders.

        Args:
            average: "probabilities" takes the mean of the two probabilities, as the official evaluation does
                (NiuTrans/GRAM, evaluation/gram_eval.py); "logits" the mean of the log-odds.
            progress: what a progress bar is called, if there shall be one.

        Raises:
            ValueError: for another ``average``.
        """
        return self.compare_encoded(self.encode(pairs), average, progress)

    def compare_encoded(
        self, rows: list[EncodedPair], average: str = "probabilities", progress: str | None = None
    ) -> list[Comparison]:
        """:meth:`compare_many` for pairs that :meth:`encode` has made."""
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {AVERAGES}, got {average!r}")
        odds, mass, truncated = self.log_odds(rows, progress)
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
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if method == "reference" and reference is None:
            raise ValueError("method 'reference' needs a reference response")
        compared: list[Comparison] = []

        def compare(games: list[tuple[str, str]]) -> list[float]:
            compared.extend(self.compare_many([Pair(prompt, a, b) for a, b in games], average))
            return [result.probability for result in compared[len(compared) - len(games) :]]

        if method == "reference":
            scores = compare([(response, reference) for response in responses])
        else:
            scores = {"round-robin": round_robin, "knock-out": _knock_out}[method](responses, compare)
        order = sorted(range(len(responses)), key=lambda i: -scores[i])
        return Ranking(order, scores, len(compared), sum(result.truncated for result in compared), method)


def round_robin(responses: list[str], compare) -> list[float]:
    """Mean P(better than another one) of each response; ``compare`` gives the P of every pair, in itertools' order."""
    games = list(itertools.combinations(range(len(responses)), 2))
    totals = [0.0] * len(responses)
    for (i, j), p in zip(games, compare([(responses[i], responses[j]) for i, j in games])):
        totals[i] += p
        totals[j] += 1 - p
    return [total / max(1, len(responses) - 1) for total in totals]


def _knock_out(responses: list[str], compare) -> list[float]:
    scores, alive, rounds = [0.0] * len(responses), list(range(len(responses))), 0
    while len(alive) > 1:
        games = list(zip(alive[0::2], alive[1::2]))
        left_over = alive[2 * len(games) :]  # an odd one goes through
        alive = []
        for (i, j), p in zip(games, compare([(responses[i], responses[j]) for i, j in games])):
            scores[i], scores[j] = rounds + p, rounds + 1 - p
            alive.append(i if p >= 0.5 else j)
        alive, rounds = alive + left_over, rounds + 1
    return scores


def as_trl_reward(judge: RewardModel, against: str = "first", average: str = "probabilities"):
    """The judge as a reward function for TRL (GRPOTrainer(reward_funcs=...) and the trainers that take the same).

    A completion's reward is P(better than its reference), 0 to 1, where the data set has a column ``reference``.
    Without it (or where it is None) the completions of one prompt are compared with each other:

        first   reward = P(better than the first of them); the first one itself gets 1/2
        all     reward = mean P(better than another one), n (n - 1) / 2 comparisons for n completions

    Equal texts are a draw, 1/2, and are not shown to the model. All that one call needs is judged in one go.
    Each process sees its own completions only; where TRL spreads those of one prompt over several processes,
    add ``reference``, so that all are measured by the same thing.

    Returns f(prompts, completions, completion_ids=None, reference=None, **others) -> one reward for each completion.
    Texts and lists of messages are read as in training, by formats.parse_pairs; tool messages are not taken.

    Raises:
        ValueError: for another ``against``; from f, where a completion has nothing to be compared with.
    """
    if against not in AGAINST:
        raise ValueError(f"against must be one of {AGAINST}, got {against!r}")

    def gram_reward(prompts, completions, completion_ids=None, reference=None, **others) -> list[float]:
        references = reference or [None] * len(prompts)
        questions = [read_prompt(prompt, f"row {i}", "prompt") for i, prompt in enumerate(prompts)]
        groups: dict[str, list[int]] = {}
        for i, question in enumerate(questions):
            groups.setdefault(question, []).append(i)

        def rivals(i: int) -> list:
            group = groups[questions[i]]
            if references[i] is not None:
                return [references[i]]
            if len(group) == 1:
                raise ValueError(
                    f"the only completion of the prompt {questions[i][:60]!r} has nothing to be compared with; add a column "
                    "'reference' to the data set (a response to each prompt), or sample more than one completion"
                )
            return [completions[group[0]]] if against == "first" else [completions[j] for j in group if j != i]

        def pair_of(i: int, rival) -> Pair:
            row = {"prompt": questions[i], "chosen": completions[i], "rejected": rival}
            return parse_pairs([(f"row {i}", row)])[0][0]

        games = [[pair_of(i, rival) for rival in rivals(i)] for i in range(len(completions))]
        # P(b better) = 1 - P(a better), so two texts meet once, whichever is asked about, and however often.
        meetings = dict.fromkeys(
            Pair(game.prompt, *sorted((game.response_a, game.response_b)))
            for row in games
            for game in row
            if game.response_a != game.response_b
        )
        better = {}
        for pair, result in zip(meetings, judge.compare_many(list(meetings), average)):
            better[pair.prompt, pair.response_a, pair.response_b] = result.probability
            better[pair.prompt, pair.response_b, pair.response_a] = 1 - result.probability
        reward = lambda game: better.get((game.prompt, game.response_a, game.response_b), 0.5)  # equal texts: a draw
        return [sum(map(reward, row)) / len(row) for row in games]

    return gram_reward

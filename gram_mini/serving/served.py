"""A judge whose model vLLM computes.

The tokens are made here: tokenizer, judge prompt, label ids, and the cut to --max-length. The
server gets token ids and gives P(A) and P(B), so no weights are loaded. It is asked at
/v1/completions for the log-probabilities of both labels by their ids (logprob_token_ids), which
vLLM 0.32 gives (entrypoints/openai/completion/protocol.py).

A score is right, or the command ends in one line. So before the first score the server has to show
that it reads prompts of --max-length whole (:func:`prove`), and that it has the weights of an
exported run (known.py). Every answer is checked: its numbering, how many tokens were read, and
whether its numbers are probabilities.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

from gram_mini.batches import EncodedPair, join, pair_segments
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.pairs import Pair
from gram_mini.runs.defaults import MAX_LENGTH, REQUESTS, for_model
from gram_mini.runs.load import check_trained, find_record
from gram_mini.runs.models import load_tokenizer
from gram_mini.runs.record import HEAD, LIKELIHOOD, PROBE
from gram_mini.runs.report import say
from gram_mini.serving.engine import Engine, Refused, in_parallel
from gram_mini.serving.known import KNOWN, read_known

import torch
from tqdm import tqdm

ROUTE = "/v1/completions"
ITEMS = 16  # judge prompts of one question in a request
WAITS = (1, 2, 4)  # seconds before a failed request is sent again
TIMEOUT = 300  # seconds for one request
NO_PROBABILITY = -100  # log P: what servers write for "none" is below, and so is float32's range
ROUNDING = 0.25  # of log-odds, by bfloat16: logits of 16 to 32 come in steps of 1/8
SAME = 1e-3  # of log P: another last token or another model changes it by more

# Sampling that changes no probability; a server's own defaults may.
NEUTRAL = {
    "temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0,
    "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip


def served_judge(
    path: str | Path,
    server: str,
    served_name: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    template: str | None = None,
) -> ServedJudge:
    """A judge whose prompts are made as for ``path`` and computed by ``server``.

    Args:
        path: run folder, exported run, model folder or name, as for runs.load.load_judge; only its
            tokenizer, its record and the scores that export wrote are read.
        server: its address, for example http://127.0.0.1:8000.
        served_name: the name of the model there; may be left out where only one is served.
        max_length, template: as in load_judge.
        batch_size: requests at a time, 32 by default.

    Raises:
        UserError: no such folder, an unfinished run, a run with a head of its own, a server that
            does not give an exported run's own scores; and as ServedJudge.
    """
    record = find_record(path)
    if (Path(path) / HEAD).is_file() or (Path(path) / LIKELIHOOD).is_dir():
        raise UserError(f"{path}: has a head or a likelihood of its own, which no engine knows")
    if record:
        max_length = max_length or record["options"]["max_length"]
        template = template or record["prompt"]["judge"]
    tokenizer = load_tokenizer(str(path))
    max_length = max_length or for_model(MAX_LENGTH, str(path))
    given = max_length, batch_size or REQUESTS, template
    judge = ServedJudge(tokenizer, server, served_name, *given)
    check_trained(judge, path, record)
    judge.check_weights(Path(path))
    return judge


class ServedJudge(Judge):
    """A judge that asks a server. All that Judge does it does too; it has no ``model``.

    Args:
        server: address of the engine.
        served_name: name of the model there; None if it serves only one.
        batch_size: requests at a time; each holds up to ITEMS prompts of one question.
        The others are those of Judge.

    Raises:
        UserError: no server there, another model, another tokenizer, a server that cuts prompts
            of ``max_length``, or that does not answer as vLLM does.
    """

    def __init__(
        self,
        tokenizer,
        server: str,
        served_name: str | None = None,
        max_length: int = 512,
        batch_size: int = REQUESTS,
        template: str | None = None,
    ):
        super().__init__(None, tokenizer, max_length, batch_size, template)
        self.engine = Engine(server, TIMEOUT, WAITS)
        self.rounding = ROUNDING  # log-odds that are no farther apart count as equal
        pick_model(self.engine, served_name, max_length)
        compared = same_tokenizer(self.engine, tokenizer)
        self.served_as = self.engine.name
        self.probe = prove(self)
        say(
            f"{self.engine.url}: serves {self.engine.name!r}; its tokenizer "
            + ("is ours" if compared else "could not be compared with ours (no /tokenize)")
        )

    def check_weights(self, folder: Path) -> None:
        """See that the server gives the scores that export wrote beside the weights, if it did.

        Raises:
            UserError: it gives others.
        """
        known = read_known(folder) or {"prompts": [], "log_odds": [], "rounding": ROUNDING}
        self.rounding = known["rounding"]
        scored = zip(known["prompts"], known["log_odds"])
        expected = {tuple(ids): odds for ids, odds in scored if len(ids) <= self.max_length}
        if not expected:
            say(
                f"{folder}: holds no {KNOWN} that fits, so whether the server has its weights "
                "cannot be seen; python -m gram_mini.serving.compare shows it"
            )
            return
        logs = self.ask([*map(list, expected)])
        apart = max(abs(a - b - odds) for (a, b), odds in zip(logs, expected.values()))
        if apart > self.rounding:
            raise UserError(
                f"{self.engine.url}: {self.engine.name!r} is not {folder} as it was exported: on "
                f"the pairs of {KNOWN} log-odds are {apart:.2g} apart, and rounding explains "
                f"{self.rounding:.2g}; serve that folder, with the --dtype of its export"
            )

    def verdicts(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log P(A) and log P(B) (M, 2) of M judge prompts, and their sum as probabilities (M,).

        Raises:
            UserError: the server is gone, or answers with something else.
        """
        places: dict[tuple[int, ...], list[int]] = {}  # by what prompts begin with
        prompts = []
        for i, row in enumerate(orders):
            places.setdefault(pair_segments(self.prompt, row)[0], []).append(i)
            prompts.append(join(self.prompt, row))
        requests = [
            of_one[start : start + ITEMS]
            for of_one in places.values()
            for start in range(0, len(of_one), ITEMS)
        ]
        logs = torch.zeros(len(orders), 2, dtype=torch.float64)
        ask = lambda these: self.ask([prompts[i] for i in these])
        silent = progress is None
        with tqdm(total=len(orders), desc=progress, delay=2, disable=silent, leave=False) as bar:
            for place, answer in in_parallel(ask, requests, self.batch_size):
                logs[requests[place]] = torch.tensor(answer, dtype=torch.float64)
                bar.update(len(answer))
        return logs.float(), logs.exp().sum(dim=1).float()

    def ask(self, prompts: list[list[int]]) -> list[tuple[float, float]]:
        """log P(A) and log P(B) after each of the judge prompts of one question.

        Raises:
            Refused: the server answers with something else.
            UserError: it is gone.
        """
        request = {
            **NEUTRAL,
            "prompt": prompts,
            "max_tokens": 1,
            "logprobs": 20,
            "logprob_token_ids": list(self.labels),
            "return_tokens_as_token_ids": True,
        }
        where = self.engine.url + ROUTE
        reply = self.engine.post(ROUTE, request)
        try:
            sent, read = sum(map(len, prompts)), (reply.get("usage") or {}).get("prompt_tokens")
            if read not in (None, sent):
                raise Refused(f"{where}: reads {read} tokens of {sent} (usage.prompt_tokens)")
            choices = reply["choices"]
            if [choice["index"] for choice in choices] != list(range(len(prompts))):
                raise Refused(f"{where}: does not give {len(prompts)} answers, numbered in order")
            return [self._labels(choice["logprobs"]["top_logprobs"][0]) for choice in choices]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{where}: answers with something else ({error!r})") from None

    def _labels(self, top: dict[str, float]) -> tuple[float, float]:
        """log P(A) and log P(B) out of {"token_id:7": log P}."""
        names = [f"token_id:{label}" for label in self.labels]
        if not top.keys() >= {*names}:
            raise Refused(
                f"{self.engine.url}{ROUTE}: does not give both labels by their ids "
                "(logprob_token_ids); serve the judge with vLLM 0.32 or later"
            )
        a, b = (float(top[name]) for name in names)
        likely = NO_PROBABILITY < min(a, b) <= max(a, b) < 0.001
        if not (likely and math.exp(a) + math.exp(b) < 1.001):
            raise Refused(
                f"{self.engine.url}{ROUTE}: gives log P(A) = {a} and log P(B) = {b}, which are no "
                "probabilities"
            )
        return a, b


# ---- before the first score ----------------------------------------------------------


def pick_model(engine: Engine, served_name: str | None, max_length: int) -> None:
    """Set the name of the model to ask for, and if it is an adapter the name of its base.

    Raises:
        UserError: no such model, several and no name, or one that reads less than ``max_length``.
    """
    try:
        cards = {str(card["id"]): card for card in engine.get("/v1/models")["data"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{engine.url}/v1/models: names no models ({error!r})") from None
    if not served_name and len(cards) == 1:
        (served_name,) = cards
    if served_name not in cards:
        wanted = f"no model {served_name!r}" if served_name else "several models"
        raise UserError(
            f"{engine.url}: serves {wanted}; give --served-name, one of {', '.join(cards)}"
        )
    card = cards[served_name]
    base = card.get("parent") or ""
    if base and base not in cards:  # vLLM may give it another name there
        base = next((other for other in cards if not cards[other].get("parent")), base)
    engine.name, engine.base = served_name, base
    # An adapter's card does not say its length, that of its base does.
    limit = card.get("max_model_len") or cards.get(base, {}).get("max_model_len")
    if limit is not None and max_length >= limit:
        raise UserError(
            f"{engine.url}: reads {limit} tokens, its answer included, and --max-length is "
            f"{max_length}; it would cut the end, where the verdict stands: give --max-length "
            f"{limit - 1}, or serve it with more (vLLM: --max-model-len)"
        )


def same_tokenizer(engine: Engine, tokenizer) -> bool:
    """Whether the server's tokenizer could be compared with ours, on a probe.

    Raises:
        UserError: if they are not the same.
    """
    ours = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    try:
        theirs = engine.post("/tokenize", {"prompt": PROBE, "add_special_tokens": False})["tokens"]
    except (Refused, KeyError, TypeError):
        return False
    if theirs and theirs != ours:
        raise UserError(
            f"{engine.url}: {engine.name!r} has another tokenizer than --model; give the run or "
            "folder that is served"
        )
    return bool(theirs)


def prove(judge: ServedJudge) -> str:
    """See that the server reads whole prompts, and uses the adapter if the judge is one.

    Prompts of ``max_length`` that differ in one token only, the last, one in the middle or the
    first, must have different answers. An adapter must have other answers than its base.

    Returns the log-odds of a small prompt, by which another model may be noticed.

    Raises:
        UserError: if it does not.
    """
    engine = judge.engine
    row = judge.encode([Pair("Which?", "This.", "That.")])[0]
    small = [join(judge.prompt, row), join(judge.prompt, row.swapped())]
    answer = judge.ask(small)[0]

    spare = max(0, judge.max_length - len(small[0]))
    filler = (list(row.prompt) * spare)[:spare]
    full = join(judge.prompt, replace(row, prompt=[*filler, *row.prompt]))
    whole = judge.ask([full])[0]
    for place, name in ((-1, "last"), (len(full) // 2, "middle"), (0, "first")):
        other = [*full]
        other[place] = judge.labels[full[place] == judge.labels[0]]
        # A last token changes much, one before may change little.
        if apart(whole, judge.ask([other])[0]) <= (SAME if place == -1 else 0):
            raise UserError(
                f"{engine.url}: gives the same for two prompts of {len(full)} tokens that differ "
                f"in the {name} one, so it does not read all of them; let it read more, or give a "
                "smaller --max-length"
            )

    if engine.base:
        judge.engine = copy.copy(engine)
        judge.engine.name = engine.base
        of_base = judge.ask(small[:1])[0]
        judge.engine = engine
        if apart(answer, of_base) <= SAME:
            raise UserError(
                f"{engine.url}: gives the same for {engine.name!r} and its base {engine.base!r}, "
                "so it does not use the adapter; export the run and serve that"
            )
    return f"{answer[0] - answer[1]:.1f}"


def apart(one: tuple[float, float], other: tuple[float, float]) -> float:
    """How far log P(A) and log P(B) are apart at most."""
    return max(abs(a - b) for a, b in zip(one, other))

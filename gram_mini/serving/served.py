"""A judge whose model an engine computes: vLLM, SGLang, or any other with /v1/completions.

The tokens are made here: tokenizer, judge prompt, label ids, and the cut to --max-length. The
engine gets token ids and gives P(A) and P(B), so no weights are loaded. What it is asked, and the
first of these that it answers is kept (:data:`ROUTES`):

    /v1/completions with logprob_token_ids    log P of both labels by their ids (vLLM 0.32)
    /v1/score                                 P of both labels (SGLang; no adapters)
    /v1/completions                           log P of the likeliest 1,000 tokens (llama.cpp), or 20

A score is right, or the command ends in one line. So before the first score the engine has to show
that it reads prompts of --max-length whole (:func:`prove`), and that it has the weights of an
exported run (known.py). Every answer is checked: its numbering, how many tokens were read, and
whether its numbers are probabilities.

Read in vLLM 0.32.0 (entrypoints/openai/completion/protocol.py), SGLang 0.5.23
(srt/managers/tokenizer_manager_score_mixin.py) and llama.cpp (tools/server/server-task.cpp).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from gram_mini.serving.engine import Engine, Refused, TooMany, in_parallel
from gram_mini.serving.known import KNOWN, read_known

import torch
from tqdm import tqdm

MANY, FEW = 1000, 20  # likeliest tokens; FEW is vLLM's limit unless --max-logprobs raises it
ITEMS = 16  # judge prompts of one question in a request
WAITS = (1, 2, 4)  # seconds before a failed request is sent again
TIMEOUT = 300  # seconds for one request
NO_PROBABILITY = -100  # log P: what servers write for "none" is below, and so is float32's range
ROUNDING = 0.25  # of log-odds, by bfloat16: logits of 16 to 32 come in steps of 1/8
SAME = 1e-3  # of log P: another last token or another model changes it by more

# Sampling that changes no probability; a server's own defaults may. (repeat_penalty and the last
# are llama.cpp's.)
NEUTRAL = {
    "temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "typical_p": 1,
    "repetition_penalty": 1, "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "post_sampling_probs": False,
}  # fmt: skip


def served_judge(
    path: str | Path,
    server: str,
    served_name: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    template: str | None = None,
    route: str | None = None,
) -> ServedJudge:
    """A judge whose prompts are made as for ``path`` and computed by ``server``.

    Args:
        path: run folder, exported run, model folder or name, as for runs.load.load_judge; only its
            tokenizer, its record and the scores that export wrote are read.
        server: its address, for example http://127.0.0.1:8000.
        served_name: the name of the model there; may be left out where only one is served.
        max_length, template: as in load_judge.
        batch_size: requests at a time, 32 by default.
        route: one of ROUTES; by default the first that the server answers.

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
    given = max_length, batch_size or REQUESTS, template, route
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
        route: one of ROUTES; by default the first that the server answers.
        timeout: seconds for one request.
        The others are those of Judge.

    Raises:
        UserError: no server there, another model, another tokenizer, a server that cuts prompts
            of ``max_length``, or that answers none of ROUTES.
    """

    def __init__(
        self,
        tokenizer,
        server: str,
        served_name: str | None = None,
        max_length: int = 512,
        batch_size: int = REQUESTS,
        template: str | None = None,
        route: str | None = None,
        timeout: float = TIMEOUT,
    ):
        super().__init__(None, tokenizer, max_length, batch_size, template)
        self.engine = Engine(server, timeout, WAITS)
        self.items = ITEMS  # in a request; fewer where the server cannot take so many
        self.rounding = ROUNDING  # log-odds that are no farther apart count as equal

        def begin(_) -> bool:
            pick_model(self.engine, served_name, max_length)
            compared = same_tokenizer(self.engine, tokenizer)
            self.route = find_route(self, [route] if route else list(ROUTES))
            return compared

        ((_, compared),) = in_parallel(self.engine, begin, [None], 1)
        self.root = self.engine.root
        say(
            f"{self.engine.url}: serves {self.engine.name!r}, asked by {self.route}; its tokenizer "
            + ("is ours" if compared else "could not be compared with ours (no /tokenize)")
        )

    @property
    def served_as(self) -> list[str]:
        """The name of the model there, and how it is asked."""
        return [self.engine.name or "", self.route]

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
        ((_, logs),) = in_parallel(self.engine, self.ask, [[*map(list, expected)]], 1)
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
            for place, answer in in_parallel(self.engine, ask, requests, self.batch_size):
                logs[requests[place]] = torch.tensor(answer, dtype=torch.float64)
                bar.update(len(answer))
        return logs.float(), logs.exp().sum(dim=1).float()

    def ask(self, prompts: list[list[int]]) -> list[tuple[float, float]]:
        """log P(A) and log P(B) after each of the judge prompts of one question.

        Raises:
            Refused: as :meth:`logs`; numbers that are no probabilities.
            UserError: it does not give one of the labels.
        """
        answer = []
        for logs in self.logs(prompts):
            for label in self.labels:
                if label not in logs:
                    raise UserError(
                        f"{self.engine.url}, {self.route}: token {label}, a label, is not among "
                        f"the {len(logs)} likeliest; let the server give more (vLLM: "
                        f"--max-logprobs {MANY}), or use an engine that gives tokens by their ids"
                    )
            a, b = (logs[label] for label in self.labels)
            likely = NO_PROBABILITY < min(a, b) <= max(a, b) < 0.001
            if not (likely and math.exp(a) + math.exp(b) < 1.001):
                raise Refused(
                    f"{self.engine.url}, {self.route}: gives log P(A) = {a} and log P(B) = {b}, "
                    "which are no probabilities"
                )
            answer.append((a, b))
        return answer

    def logs(self, prompts: list[list[int]]) -> list[dict[int, float]]:
        """{token id: log P} after each prompt, of the tokens that the engine names.

        Raises:
            Refused: the engine does not answer this route, or with something else.
            UserError: it is gone.
        """
        if len(prompts) > self.items:
            half = len(prompts) // 2
            return [*self.logs(prompts[:half]), *self.logs(prompts[half:])]
        where = f"{self.engine.url}, {self.route}"
        try:
            answer = ROUTES[self.route](self.engine, self.labels, prompts)
            if len(answer) != len(prompts):
                raise Refused(f"gives {len(answer)} answers to {len(prompts)} prompts")
            return [{token: float(value) for token, value in one.items()} for one in answer]
        except TooMany as error:
            if len(prompts) == 1:
                raise Refused(f"{where}: {error}") from None
            self.items = min(self.items, len(prompts) // 2)
        except Refused as error:
            raise Refused(f"{where}: {error}") from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{where}: answers with something else ({error!r})") from None
        return self.logs(prompts)


# ---- the routes ----------------------------------------------------------------------

# Each takes the engine, the ids of the two labels and prompts; gives {token id: log P} for each.
Route = Callable[["Engine", tuple[int, int], list[list[int]]], list[dict[int, float]]]


def completions(engine, labels, prompts, top: int = FEW, named: bool = False):
    """OpenAI's completions: one token, with the log-probabilities of the ``top`` likeliest.

    ``named`` insists on an engine that gives the tokens of ``logprob_token_ids`` instead. Others do
    not know this field.
    """
    request = {
        **NEUTRAL,
        "prompt": prompts,
        "max_tokens": 1,
        "logprobs": top,
        "logprob_token_ids": list(labels),
        "return_tokens_as_token_ids": True,
    }
    reply = engine.post("/v1/completions", request)
    sent, read = sum(map(len, prompts)), (reply.get("usage") or {}).get("prompt_tokens")
    if read not in (None, sent):
        raise TooMany(f"reads {read} tokens of {sent} that were sent (usage.prompt_tokens)")
    choices = {choice["index"]: choice for choice in reply["choices"]}
    if sorted(choices) != list(range(len(reply["choices"]))):
        raise TooMany(f"numbers its answers {[choice['index'] for choice in reply['choices']]}")
    answer = [by_token_id(choices[i]["logprobs"]) for i in range(len(choices))]
    if named and any(len(logs) > len(labels) + 1 for logs in answer):  # and the sampled one
        raise Refused("does not know logprob_token_ids")
    return answer


def by_token_id(logprobs: dict) -> dict[int, float]:
    """{token id: log P} at the first token of a completion, in OpenAI's or llama.cpp's form."""
    if "content" in logprobs:
        return {one["id"]: one["logprob"] for one in logprobs["content"][0]["top_logprobs"]}
    top = logprobs["top_logprobs"][0]
    if not all(name.startswith("token_id:") for name in top):
        raise Refused("names tokens by their text, which may stand for several")
    return {int(name.removeprefix("token_id:")): value for name, value in top.items()}


def score(engine, labels, prompts):
    """SGLang: the probabilities of both labels. It takes no notice of the model's name."""
    if engine.base:
        raise Refused(f"would score {engine.base!r} without the adapter")
    shared = len(os.path.commonprefix([prompt[:-1] for prompt in prompts]))
    request = {
        "query": prompts[0][:shared],
        "items": [prompt[shared:] for prompt in prompts],
        "label_token_ids": list(labels),
        "apply_softmax": False,
        "item_first": False,
    }
    scores = engine.post("/v1/score", request)["scores"]
    log = lambda p: math.log(p) if p > 0 else -math.inf
    return [dict(zip(labels, map(log, both), strict=True)) for both in scores]


ROUTES: dict[str, Route] = {
    "/v1/completions with logprob_token_ids": partial(completions, named=True),
    "/v1/score": score,
    f"/v1/completions, {MANY} likeliest tokens": partial(completions, top=MANY),
    f"/v1/completions, {FEW} likeliest tokens": completions,
}


# ---- before the first score ----------------------------------------------------------


def pick_model(engine: Engine, served_name: str | None, max_length: int) -> None:
    """Set the name of the model to ask for, and if it is an adapter the name of its base.

    Raises:
        UserError: no such model, several and no name, or one that reads less than ``max_length``.
    """
    try:
        cards = {str(card["id"]): card for card in engine.get("/v1/models")["data"]}
        if not cards:
            raise Refused("an empty list")
    except (Refused, KeyError, TypeError) as error:
        if not served_name:
            raise UserError(
                f"{engine.url}/v1/models: names no models ({error}); give --served-name"
            ) from None
        engine.name = served_name
        return
    if not served_name and len(cards) == 1:
        (served_name,) = cards
    name = served_name or ""
    base, _, adapter = name.partition(":")  # as SGLang names an adapter
    if name in cards:
        base = cards[name].get("parent") or ""
        if base and base not in cards:  # vLLM may give it another name there
            base = next((other for other in cards if not cards[other].get("parent")), base)
    elif not {base, adapter} <= cards.keys():
        wanted = f"no model {name!r}" if name else "several models"
        raise UserError(
            f"{engine.url}: serves {wanted}; give --served-name, one of {', '.join(cards)}"
        )
    card = cards.get(name, {})
    engine.name, engine.base, engine.root = name, base, card.get("root")
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


def find_route(judge: ServedJudge, routes: list[str]) -> str:
    """The first of these routes by which the server answers as it should.

    Raises:
        UserError: there is none.
    """
    reasons = []
    for judge.route in routes:
        try:
            prove(judge)
            return judge.route
        except Refused as error:
            reasons.append(str(error).removeprefix(f"{judge.engine.url}, "))
    raise UserError(f"{judge.engine.url}: cannot be asked: {'; '.join(reasons)}")


def prove(judge: ServedJudge) -> None:
    """See that the server answers by ``judge.route``, reads whole prompts, and uses the adapter.

    Prompts of ``max_length`` that differ in one token only, the last, one in the middle or the
    first, must have different answers. An adapter must have other answers than its base.

    Raises:
        Refused: if it does not.
    """
    engine, where = judge.engine, f"{judge.engine.url}, {judge.route}"
    row = judge.encode([Pair("Which?", "This.", "That.")])[0]
    small = [join(judge.prompt, row), join(judge.prompt, row.swapped())]
    judge.ask(small)

    spare = max(0, judge.max_length - len(small[0]))
    filler = (list(row.prompt) * spare)[:spare]
    full = join(judge.prompt, replace(row, prompt=[*filler, *row.prompt]))
    (whole,) = judge.logs([full])
    for place, name in ((-1, "last"), (len(full) // 2, "middle"), (0, "first")):
        other = [*full]
        other[place] = judge.labels[full[place] == judge.labels[0]]
        # A last token changes much, one before may change little.
        least = SAME if place == -1 else 0
        if apart(whole, judge.logs([other])[0]) <= least:
            raise Refused(
                f"{where}: gives the same for two prompts of {len(full)} tokens that differ in the "
                f"{name} one, so it does not read all of them; let it read more, or give a smaller "
                "--max-length"
            )

    if engine.base:
        answer = judge.logs(small[:1])[0]
        judge.engine = copy.copy(engine)
        judge.engine.name = engine.base
        try:
            of_base = judge.logs(small[:1])[0]
        finally:
            judge.engine = engine
        if apart(answer, of_base) <= SAME:
            raise Refused(
                f"{where}: gives the same for {engine.name!r} and its base {engine.base!r}, so it "
                "does not use the adapter; export the run and serve that"
            )


def apart(one: dict[int, float], other: dict[int, float]) -> float:
    """How far log P are apart at most, of the tokens that both name."""
    shared = one.keys() & other.keys()
    return max((abs(one[token] - other[token]) for token in shared), default=math.inf)

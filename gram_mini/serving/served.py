"""A judge whose model an engine computes: vLLM, SGLang, or any other with /v1/completions.

The tokens are made here: tokenizer, judge prompt, label ids, and the cut to --max-length. The
engine gets token ids and gives P(A) and P(B), so no weights are loaded. What it is asked, and the
first of these that it answers is kept (:data:`ROUTES`):

    /v1/completions with logprob_token_ids    log P of both labels by their ids (vLLM 0.32)
    /generative_scoring                       P of the first label; asked twice (vLLM)
    /v1/score                                 P of both labels (SGLang)
    /v1/completions                           log P of the likeliest 1,000 tokens (llama.cpp), or 20

Read in vLLM 0.32.0 (entrypoints/openai/completion/protocol.py and
entrypoints/generate/generative_scoring/serving.py), SGLang 0.5.23
(srt/managers/tokenizer_manager_score_mixin.py) and llama.cpp (tools/server/server-task.cpp).
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from gram_mini.batches import EncodedPair, Segments, pair_segments
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.pairs import Pair
from gram_mini.runs.defaults import MAX_LENGTH, REQUESTS, for_model
from gram_mini.runs.load import check_trained, find_record
from gram_mini.runs.models import load_tokenizer
from gram_mini.runs.record import HEAD, PROBE
from gram_mini.runs.report import say

import torch
from tqdm import tqdm

MANY, FEW = 1000, 20  # likeliest tokens; FEW is vLLM's limit unless --max-logprobs raises it
ITEMS = 16  # judge prompts of one question in a request
WAITS = (1, 2, 4)  # seconds before a failed request is sent again
TIMEOUT = 300  # seconds for one request
BUSY = (429, 500, 502, 503, 504)  # HTTP status with which trying again may help
KEY = "GRAM_SERVER_KEY"  # environment variable: sent as the server's API key, if it is set


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
            tokenizer and record are read.
        server: its address, for example http://127.0.0.1:8000.
        served_name: the name of the model there; may be left out where only one is served.
        max_length, template: as in load_judge.
        batch_size: requests at a time, 32 by default.
        route: one of ROUTES; by default the first that the server answers.

    Raises:
        UserError: no such folder, an unfinished run, a run with a head of its own; and as
            ServedJudge.
    """
    record = find_record(path)
    if (Path(path) / HEAD).is_file():
        raise UserError(f"{path}: has a head of its own, which an engine does not know")
    if record:
        max_length = max_length or record["options"]["max_length"]
        template = template or record["prompt"]["judge"]
    tokenizer = load_tokenizer(str(path))
    max_length = max_length or for_model(MAX_LENGTH, str(path))
    given = max_length, batch_size or REQUESTS, template, route
    judge = ServedJudge(tokenizer, server, served_name, *given)
    check_trained(judge, path, record)
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
        self.engine = Engine(server, timeout)
        self.engine.name = pick_model(self.engine, served_name, max_length)
        compared = same_tokenizer(self.engine, tokenizer)
        self.route = find_route(self, [route] if route else list(ROUTES))
        say(
            f"{self.engine.url}: serves {self.engine.name!r}, asked by {self.route}; its tokenizer "
            + ("is ours" if compared else "could not be compared with ours (no /tokenize)")
        )

    @property
    def served_as(self) -> list[str]:
        """The name of the model there, and how it is asked."""
        return [self.engine.name or "", self.route]

    def verdicts(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log P(A) and log P(B) (M, 2) of M judge prompts, and their sum as probabilities (M,).

        Raises:
            UserError: the server is gone, or answers with something else.
        """
        sequences = [pair_segments(self.prompt, row) for row in orders]
        places: dict[tuple[int, ...], list[int]] = {}  # by what prompts begin with
        for i, sequence in enumerate(sequences):
            places.setdefault(sequence[0], []).append(i)
        requests = [
            of_one[start : start + ITEMS]
            for of_one in places.values()
            for start in range(0, len(of_one), ITEMS)
        ]
        logs = torch.zeros(len(orders), 2, dtype=torch.float64)
        pool = ThreadPoolExecutor(self.batch_size)
        try:
            answers = pool.map(lambda these: self.ask([sequences[i] for i in these]), requests)
            silent = progress is None
            with tqdm(
                total=len(orders), desc=progress, delay=2, disable=silent, leave=False
            ) as bar:
                for these, answer in zip(requests, answers):
                    logs[these] = torch.tensor(answer, dtype=torch.float64)
                    bar.update(len(these))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return logs.float(), logs.exp().sum(dim=1).float()

    def ask(self, sequences: list[Segments]) -> list[tuple[float, float]]:
        """log P(A) and log P(B) after each of the judge prompts of one question.

        Raises:
            Refused: the engine does not answer this route, or with something else.
            UserError: it is gone, or does not give one of the labels.
        """
        query, items = list(sequences[0][0]), [[*a, *b] for _, a, b in sequences]
        where = f"{self.engine.url}, {self.route}"
        try:
            answer = ROUTES[self.route](self.engine, self.labels, query, items)
            check_answer(answer, len(items))
            return answer
        except Refused as error:
            raise Refused(f"{where}: {error}") from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{where}: answers with something else ({error!r})") from None


# ---- the routes ----------------------------------------------------------------------

# Each takes the engine, the ids of the two labels, the tokens that all prompts begin with, and what
# follows in each; gives log P of the two labels for each prompt.
Route = Callable[["Engine", tuple[int, int], list[int], list[list[int]]], list[tuple[float, float]]]


def completions(engine, labels, query, items, top: int = FEW, named: bool = False):
    """OpenAI's completions: one token, with the log-probabilities of the ``top`` likeliest.

    ``named`` insists on an engine that gives the tokens of ``logprob_token_ids`` instead. Others do
    not know this field. A label that is not among the likeliest is an error.
    """
    path = "/v1/completions"
    request = {
        "prompt": [query + item for item in items],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": top,
        "logprob_token_ids": list(labels),
        "return_tokens_as_token_ids": True,
    }
    choices = sorted(engine.post(path, request)["choices"], key=lambda choice: choice["index"])
    answer = []
    for choice in choices:
        logs = by_token_id(choice["logprobs"])
        if named and len(logs) > len(labels) + 1:  # and the sampled one
            raise Refused("does not know logprob_token_ids")
        for label in labels:
            if label not in logs:
                raise UserError(
                    f"{engine.url}{path}: token {label}, a label, is not among the {len(logs)} "
                    f"likeliest; let the server give more (vLLM: --max-logprobs {MANY}), or use an "
                    "engine that gives tokens by their ids"
                )
        answer.append((logs[labels[0]], logs[labels[1]]))
    return answer


def by_token_id(logprobs: dict) -> dict[int, float]:
    """{token id: log P} at the first token of a completion, in OpenAI's or llama.cpp's form."""
    if "content" in logprobs:
        return {one["id"]: one["logprob"] for one in logprobs["content"][0]["top_logprobs"]}
    top = logprobs["top_logprobs"][0]
    if not all(name.startswith("token_id:") for name in top):
        raise Refused("names tokens by their text, which may stand for several")
    return {int(name.removeprefix("token_id:")): value for name, value in top.items()}


def generative_scoring(engine, labels, query, items):
    """vLLM: the probability of the first label; so it is asked with each label as the first.

    The second time the engine has the prompt in its cache.
    """
    both = []
    for first, second in (labels, labels[::-1]):
        request = {
            "query": query,
            "items": items,
            "label_token_ids": [first, second],
            "apply_softmax": False,
        }
        data = sorted(
            engine.post("/generative_scoring", request)["data"], key=lambda one: one["index"]
        )
        both.append([log(one["score"]) for one in data])
    return list(zip(*both))


def score(engine, labels, query, items):
    """SGLang: the probabilities of both labels."""
    request = {
        "query": query,
        "items": items,
        "label_token_ids": list(labels),
        "apply_softmax": False,
        "item_first": False,
    }
    return [(log(a), log(b)) for a, b in engine.post("/v1/score", request)["scores"]]


ROUTES: dict[str, Route] = {
    "/v1/completions with logprob_token_ids": partial(completions, named=True),
    "/generative_scoring": generative_scoring,
    "/v1/score": score,
    f"/v1/completions, {MANY} likeliest tokens": partial(completions, top=MANY),
    f"/v1/completions, {FEW} likeliest tokens": completions,
}


def log(p: float) -> float:
    """log p, -inf for 0."""
    return math.log(p) if p > 0 else -math.inf


def check_answer(answer: list[tuple[float, float]], count: int) -> None:
    """See that an answer holds log-probabilities of both labels for ``count`` prompts.

    Raises:
        Refused: if it does not.
    """
    if len(answer) != count:
        raise Refused(f"gives {len(answer)} answers to {count} prompts")
    for a, b in answer:
        if not (math.isfinite(a) and math.isfinite(b) and math.exp(a) + math.exp(b) < 1.001):
            raise Refused(f"gives log P(A) = {a} and log P(B) = {b}, which are no probabilities")


# ---- the server ----------------------------------------------------------------------


class Refused(UserError):
    """The server answers, but not with what it was asked for."""


class Engine:
    """An HTTP server that speaks JSON. ``name`` is that of the model to ask for.

    Raises:
        UserError: an address that is not one; from get and post, no answer.
    """

    def __init__(self, server: str, timeout: float):
        if not server.startswith(("http://", "https://")):
            raise UserError(f"--server {server}: give an address such as http://127.0.0.1:8000")
        self.url, self.timeout = server.rstrip("/").removesuffix("/v1"), timeout
        self.name: str | None = None

    def get(self, path: str) -> dict:
        return self._send(path, None)

    def post(self, path: str, body: dict) -> dict:
        return self._send(path, json.dumps({"model": self.name, **body}).encode())

    def _send(self, path: str, body: bytes | None) -> dict:
        """Send a request, and again where that may help.

        Raises:
            Refused: the server does not want it, or its answer is not JSON.
            UserError: no answer.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(self.url + path, body, headers)
        for wait in (*WAITS, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                what = f"HTTP {error.code}: {message(error)}"
                if error.code not in BUSY:
                    raise Refused(what) from None
            except ValueError:
                raise Refused("answers with something that is not JSON") from None
            except (OSError, http.client.HTTPException) as error:
                if isinstance(getattr(error, "reason", error), TimeoutError):
                    raise UserError(
                        f"{self.url}{path}: no answer within {self.timeout:g} s; ask for fewer at "
                        "a time (--batch-size), or look whether the server hangs"
                    ) from None
                what = str(getattr(error, "reason", None) or error or type(error).__name__)
            if wait is not None:
                time.sleep(wait)
        raise UserError(
            f"{self.url}{path}: no answer after {len(WAITS) + 1} tries ({what}); look whether the "
            "server runs and read its log"
        )


def message(error: urllib.error.HTTPError) -> str:
    """What a server says is wrong, in one line."""
    text = error.read(2000).decode(errors="replace")
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:200] or str(error.reason)


def pick_model(engine: Engine, served_name: str | None, max_length: int) -> str:
    """The name of the model to ask for.

    Raises:
        UserError: no such model, several and no name, or one that reads less than ``max_length``.
    """
    try:
        cards = engine.get("/v1/models")["data"]
        names = [str(card["id"]) for card in cards]
    except (Refused, KeyError, TypeError) as error:
        raise UserError(f"{engine.url}/v1/models: names no models ({error})") from None
    if served_name is None and len(names) == 1:
        served_name = names[0]
    if served_name not in names:
        wanted = "several models" if served_name is None else f"no model {served_name!r}"
        raise UserError(
            f"{engine.url}: serves {wanted}; give --served-name, one of {', '.join(names)}"
        )
    # vLLM's card of an adapter does not say it, that of its base does.
    limit = min(
        (card["max_model_len"] for card in cards if card.get("max_model_len")), default=None
    )
    if limit is not None and max_length >= limit:
        raise UserError(
            f"{engine.url}: reads {limit} tokens, its answer included, and --max-length is "
            f"{max_length}; it would cut the end, where the verdict stands: give --max-length "
            f"{limit - 1}, or serve it with more (vLLM: --max-model-len)"
        )
    return served_name


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
    """The first of these routes that the server answers, tried on a small pair.

    Raises:
        UserError: it answers none.
    """
    row = judge.encode([Pair("Which?", "This.", "That.")])[0]
    reasons = []
    for judge.route in routes:
        try:
            judge.ask(
                [pair_segments(judge.prompt, row), pair_segments(judge.prompt, row.swapped())]
            )
            return judge.route
        except Refused as error:
            reasons.append(str(error).removeprefix(f"{judge.engine.url}, "))
    raise UserError(f"{judge.engine.url}: cannot be asked: {'; '.join(reasons)}")

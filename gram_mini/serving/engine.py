"""vLLM over HTTP: how likely two tokens are after given prompts. Every answer is checked."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from gram_mini.errors import UserError

KEY = "GRAM_SERVER_KEY"  # environment variable: sent as the server's API key, if it is set
WAITS = (1, 2, 4)  # seconds before a failed request is sent again
TIMEOUT = 300  # seconds for one request
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP status with which trying again may help
NO_PROBABILITY = -100  # log P: what servers write for "none" is below, and so is float32's range

# Sampling that changes no probability; a server's own defaults may.
NEUTRAL = {
    "temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0,
    "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip


class Engine:
    """A vLLM server and the name of the model to ask it for.

    Args:
        server: address, such as http://127.0.0.1:8000. No proxy is used.
        name: of the model; None if it serves only one.

    Raises:
        UserError: an address that is none, no such model there; from every method, no answer or
            something else than what was asked for.
    """

    def __init__(self, server: str, name: str | None = None):
        try:
            address = urlsplit(server)
        except ValueError:  # such as half of an IPv6 address
            address = urlsplit("")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(f"--server {server}: give an address such as http://127.0.0.1:8000")
        self.url = server.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY, "").strip():
            if not key.isascii():
                raise UserError(f"{KEY}: holds a character that no key has; set it anew")
            self.headers["Authorization"] = f"Bearer {key}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            cards = {str(card["id"]): card for card in self.send("/v1/models")["data"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.url}/v1/models: names no models ({error!r})") from None
        if not name and len(cards) == 1:
            (name,) = cards
        if name not in cards:
            wanted = f"no model {name!r}" if name else "several models"
            raise UserError(
                f"{self.url}: serves {wanted}; give --served-name, one of {', '.join(cards)}"
            )
        if cards[name].get("parent"):
            raise UserError(
                f"{self.url}: {name!r} is an adapter beside its base, which is not supported; "
                "export the run and serve that"
            )
        self.name = name

    def tokenize(self, text: str) -> list[int]:
        """The ids that the server's tokenizer gives a text."""
        request = {"model": self.name, "prompt": text, "add_special_tokens": False}
        return self.send("/tokenize", request).get("tokens", [])

    def log_probabilities(
        self, prompts: list[list[int]], tokens: tuple[int, int]
    ) -> list[tuple[float, float]]:
        """log P of each of two ``tokens`` after each of the prompts, which are token ids."""
        route = "/v1/completions"
        request = {
            **NEUTRAL,
            "model": self.name,
            "prompt": prompts,
            "max_tokens": 1,
            "logprobs": 20,
            "logprob_token_ids": list(tokens),
            "return_tokens_as_token_ids": True,
        }
        reply = self.send(route, request)
        try:
            sent, read = sum(map(len, prompts)), reply["usage"]["prompt_tokens"]
            if read != sent:
                raise UserError(f"{self.url}{route}: reads {read} tokens of {sent} (usage)")
            choices = reply["choices"]
            if [choice["index"] for choice in choices] != list(range(len(prompts))):
                raise UserError(
                    f"{self.url}{route}: does not give {len(prompts)} answers, numbered in order"
                )
            tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
            return [self._of_two(top, tokens) for top in tops]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.url}{route}: answers with something else ({error!r})") from None

    def _of_two(self, top: dict[str, float], tokens: tuple[int, int]) -> tuple[float, float]:
        """log P of both tokens out of {"token_id:7": log P}."""
        names = [f"token_id:{token}" for token in tokens]
        if not top.keys() >= {*names}:
            raise UserError(
                f"{self.url}: does not give both labels by their ids (logprob_token_ids); serve "
                "the judge with vLLM 0.32 or later"
            )
        a, b = (float(top[name]) for name in names)
        likely = NO_PROBABILITY < min(a, b) <= max(a, b) < 0.001
        if not (likely and math.exp(a) + math.exp(b) < 1.001):
            raise UserError(
                f"{self.url}: gives log P(A) = {a} and log P(B) = {b}, which are no probabilities"
            )
        return a, b

    def send(self, route: str, body: dict | None = None) -> dict:
        """The server's JSON; a request that fails is sent again after each of WAITS."""
        where = self.url + route
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(where, data, self.headers)
        for wait in (*WAITS, None):
            try:
                with self.opener.open(request, timeout=TIMEOUT) as reply:
                    return read_object(reply.read(), where)
            except TimeoutError:
                raise UserError(
                    f"{where}: no answer within {TIMEOUT} s; ask for fewer at a time "
                    "(--batch-size), or look whether the server hangs"
                ) from None
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(500).decode(errors="replace").split())
                said = f"HTTP {error.code}: {said or error.reason}"
                if error.code not in BUSY:
                    key = f"; put its API key into the variable {KEY}" * (error.code == 401)
                    raise UserError(f"{where}: {said}{key}") from None
            except (OSError, http.client.HTTPException) as error:
                said = str(error) or type(error).__name__
            except ValueError:  # its text may hold the key
                raise UserError(
                    f"{where}: cannot be asked; look for odd characters in the address and in {KEY}"
                ) from None
            if wait is not None:
                time.sleep(wait)
        raise UserError(
            f"{where}: no answer after {len(WAITS) + 1} tries ({said}); look whether the server "
            "runs and read its log"
        )


def read_object(text: bytes, where: str) -> dict:
    """A JSON object.

    Raises:
        UserError: the text is none.
    """
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"{where}: answers with no JSON object") from None

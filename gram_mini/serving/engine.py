"""An HTTP server that speaks JSON: several requests at a time, sent again where that may help."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

from gram_mini.errors import UserError

BUSY = (408, 429, 500, 502, 503, 504)  # HTTP status with which trying again may help
KEY = "GRAM_SERVER_KEY"  # environment variable: sent as the server's API key, if it is set


class Refused(UserError):
    """The server answers, but not with what it was asked for."""


class Engine:
    """A server: its address, and the model to ask it for.

    ``name`` is that of the model, and ``base`` that of its base if it is an adapter.

    Args:
        server: address, such as http://127.0.0.1:8000. No proxy is used.
        timeout: seconds for one request.
        waits: seconds before a request is sent again.

    Raises:
        UserError: an address that is none; from get and post, no answer.
        Refused: from get and post, the server does not want it, or its answer is not JSON.
    """

    def __init__(self, server: str, timeout: float, waits: Sequence[float]):
        address = urlsplit(server)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(f"--server {server}: give an address such as http://127.0.0.1:8000")
        self.url = server.rstrip("/").removesuffix("/v1")
        self.timeout, self.waits = timeout, waits
        self.name: str | None = None
        self.base = ""
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY, "").strip():
            self.headers["Authorization"] = f"Bearer {key}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> dict:
        return self._send(path, None)

    def post(self, path: str, body: dict) -> dict:
        return self._send(path, json.dumps({"model": self.name, **body}).encode())

    def _send(self, path: str, body: bytes | None) -> dict:
        request = urllib.request.Request(self.url + path, body, self.headers)
        where, said = self.url + path, ""
        for wait in (*self.waits, None):
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    answer = json.loads(reply.read())
                if not (isinstance(answer, dict) and answer.get("error")):
                    return answer
                said = in_one_line(answer)  # an error, although the status is 200
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}: {in_one_line(error.read(2000)) or error.reason}"
                if error.code not in BUSY:
                    key = f"; put its API key into the variable {KEY}" * (error.code == 401)
                    raise Refused(f"{where}: {said}{key}") from None
            except ValueError:
                raise Refused(f"{where}: answers with something that is not JSON") from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                if isinstance(reason, TimeoutError):
                    raise UserError(
                        f"{where}: no answer within {self.timeout:g} s; ask for fewer at a time "
                        "(--batch-size), or look whether the server hangs"
                    ) from None
                said = str(reason) or type(error).__name__
            if wait is not None:
                time.sleep(wait)
        raise UserError(
            f"{where}: no answer after {len(self.waits) + 1} tries ({said}); look whether the "
            "server runs and read its log"
        )


def in_parallel(call: Callable, requests: Sequence, workers: int) -> Iterator[tuple[int, list]]:
    """Yield (place, call(request)) for each request as it is done, up to ``workers`` at a time.

    The threads are daemons: a process that is interrupted does not wait for their answers.
    """
    with ThreadPool(workers) as pool:
        yield from pool.imap_unordered(lambda one: (one[0], call(one[1])), enumerate(requests))


def in_one_line(answer: dict | bytes) -> str:
    """What a server says is wrong: OpenAI's {"error": {"message": ...}}, or as it stands."""
    said = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    try:
        said = json.loads(said) if isinstance(said, str) else said
    except ValueError:
        pass
    for name in ("error", "message"):
        said = said.get(name, said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:200]

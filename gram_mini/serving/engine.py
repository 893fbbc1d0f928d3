"""An HTTP server that speaks JSON: requests that are sent again where that may help, several at a
time, and a look whether the server is still there.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from gram_mini.errors import UserError

LOOK = 5  # seconds without an answer after which we look whether the server is there
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP status with which trying again may help
KEY = "GRAM_SERVER_KEY"  # environment variable: sent as the server's API key, if it is set


class Refused(UserError):
    """The server answers, but not with what it was asked for."""


class TooMany(Refused):
    """The request holds more prompts than the server takes, or gets right."""


class Busy(Exception):
    """No answer, but a later request may have one.

    Args:
        what: what the server, or the network, says.
        wait: seconds to wait, if the server says so.
        gone: whether nothing answered at all.
    """

    def __init__(self, what: str, wait: float | None = None, gone: bool = False):
        super().__init__(what)
        self.wait, self.gone = wait, gone


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A request that follows a redirect loses its body, so none is followed."""

    def redirect_request(self, *arguments):
        return None


class Engine:
    """A server: its address, and the model to ask it for.

    ``name`` is that of the model, ``base`` that of its base if it is an adapter, and ``root`` where
    the server has it from, if it says so.

    Args:
        server: address, such as http://127.0.0.1:8000.
        timeout: seconds for one request.
        waits: seconds before a request is sent again.

    Raises:
        UserError: an address or a key that is not one; from get and post, no answer.
    """

    def __init__(self, server: str, timeout: float, waits: Sequence[float]):
        try:
            address = urlsplit(server)
            port = address.port or {"http": 80, "https": 443}[address.scheme]
            if not address.hostname or not re.fullmatch("[!-~]+", server):
                raise ValueError
        except (ValueError, KeyError):
            raise UserError(
                f"--server {server}: give an address such as http://127.0.0.1:8000"
            ) from None
        self.url = server.rstrip("/").removesuffix("/v1")
        self.timeout, self.waits = timeout, waits
        self.name: str | None = None
        self.base = ""
        self.root: str | None = None
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY, "").strip():
            if not re.fullmatch("[!-~]+", key):
                raise UserError(f"{KEY}: holds blanks or letters that no key has; set it anew")
            self.headers["Authorization"] = f"Bearer {key}"
        host = address.hostname
        self.place = host, port
        here = host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")
        proxy = urllib.request.getproxies().get(address.scheme)
        if here or urllib.request.proxy_bypass(host):
            proxy = None
        self.through = f" (through the proxy {proxy.split('@')[-1]})" if proxy else ""
        proxies = urllib.request.ProxyHandler({address.scheme: proxy} if proxy else {})
        self.opener = urllib.request.build_opener(NoRedirect, proxies)

    def get(self, path: str) -> dict:
        return self._send(path, None)

    def post(self, path: str, body: dict) -> dict:
        return self._send(path, json.dumps({"model": self.name, **body}).encode())

    def look(self) -> None:
        """See that something still listens at the address.

        Raises:
            UserError: nothing does. A server that stops may leave requests open.
        """
        if self.through:
            return
        try:
            socket.create_connection(self.place, timeout=LOOK).close()
        except ConnectionRefusedError:
            raise UserError(
                f"{self.url}: is gone, and has left a request without an answer; read its log"
            ) from None
        except OSError:  # too busy for another connection
            pass

    def _send(self, path: str, body: bytes | None) -> dict:
        """Send a request, and again where that may help.

        Raises:
            Refused: the server does not want it, or its answer is not JSON.
            UserError: no answer.
        """
        request = urllib.request.Request(self.url + path, body, self.headers)
        where = f"{self.url}{path}{self.through}"
        for wait in (*self.waits, None):
            try:
                return self._try(request, where)
            except Busy as error:
                last = error
            if wait is None:
                break
            wait = wait if last.wait is None else last.wait
            if wait > self.timeout:
                raise UserError(f"{where}: asks to wait {wait:.0f} s ({last}); try again later")
            time.sleep(wait)
        kind = UserError if last.gone else Refused
        raise kind(
            f"{where}: no answer after {len(self.waits) + 1} tries ({last}); look whether the "
            "server runs and read its log"
        )

    def _try(self, request: urllib.request.Request, where: str) -> dict:
        """Send a request once.

        Raises:
            Busy: trying again may help.
            Refused, UserError: as _send.
        """
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                answer = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise self._failed(error) from None
        except ValueError:
            raise Refused(f"answers with something that is not JSON{self.through}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise UserError(
                    f"{where}: no answer within {self.timeout:g} s; ask for fewer at a time "
                    "(--batch-size), or look whether the server hangs"
                ) from None
            raise Busy(str(reason) or type(error).__name__, gone=True) from None
        if isinstance(answer, dict) and answer.get("error"):  # although the status is 200
            raise Busy(f"error: {in_one_line(answer)}")
        return answer

    def _failed(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status other than 200 means."""
        text = ""
        try:
            text = error.read(2000).decode(errors="replace")
            text = in_one_line(json.loads(text))
        except (ValueError, OSError, http.client.HTTPException):  # no JSON, or cut off
            pass
        said = " ".join(text.split())[:200] or error.reason
        what = f"HTTP {error.code}: {said}{self.through}"
        if error.code in BUSY:
            return Busy(what, seconds(error.headers.get("Retry-After")))
        if error.code == 401:
            return UserError(f"{self.url}: {what}; put its API key into the variable {KEY}")
        if error.code == 413:
            return TooMany(what)
        if 300 <= error.code < 400:
            return Refused(f"{what}: it redirects to {error.headers.get('Location')}; ask there")
        return Refused(what)


def in_parallel(
    engine: Engine, call: Callable, requests: Sequence, workers: int
) -> Iterator[tuple[int, list]]:
    """Yield (place, call(request)) for each request as it is done, up to ``workers`` at a time.

    While none is done, look now and then whether the server is there. The threads are daemons: a
    process that is interrupted does not wait for their answers.

    Raises:
        UserError: the server is gone; and what a call raises.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    for item in enumerate(requests):
        todo.put(item)

    def work() -> None:
        while not stop.is_set():
            try:
                place, request = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, call(request), None))
            except Exception as error:
                done.put((place, None, error))

    for _ in range(min(workers, len(requests))):
        threading.Thread(target=work, daemon=True).start()
    left = len(requests)
    try:
        while left:
            try:
                place, answer, error = done.get(timeout=LOOK)
            except queue.Empty:
                engine.look()
                continue
            if error:
                raise error
            left -= 1
            yield place, answer
    finally:
        stop.set()


def in_one_line(answer) -> str:
    """What a server says is wrong: OpenAI's {"error": {"message": ...}}, or as it stands."""
    said = answer.get("error", answer) if isinstance(answer, dict) else answer
    said = said.get("message", said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:200]


def seconds(header: str | None) -> float | None:
    """What a header Retry-After asks for, as a number or as a date; None for neither."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header or "").timestamp() - time.time())
    except (TypeError, ValueError):
        return None

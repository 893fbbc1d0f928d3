"""A served judge gives the scores of the local one, by every protocol, and fails in one line.

The server here is a stand-in: it speaks the protocols and computes with the village's local judge.
"""

import json
import math
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import score
import train_reward
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.pairs import Pair
from gram_mini.runs.defaults import REQUESTS
from gram_mini.runs.load import load_judge
from gram_mini.runs.loading import VILLAGE
from gram_mini.serving import compare, served
from gram_mini.serving.export import export
from gram_mini.serving.served import ROUTES, ServedJudge, served_judge
from gram_mini.serving.trl import as_trl_reward
from gram_mini.studies import village_table as table
from gram_mini.village import wide_heads
from gram_mini.village.pairs import village_pairs

import pytest
import torch

PAIRS = village_pairs("out-of-distribution")[:8]
PAIR = ("What does Anna eat?", "Anna eats soup.", "Stop bothering me. Anna eats fish.")
SPEAKS = {  # what a server of each kind speaks, by our name of the route
    "/v1/completions with logprob_token_ids": {"named", "/generative_scoring"},
    "/generative_scoring": {"/generative_scoring", "/v1/completions"},
    "/v1/score": {"/v1/score", "/v1/completions"},
    "/v1/completions, 1000 likeliest tokens": {"/v1/completions"},
    "/v1/completions, 20 likeliest tokens": {"/v1/completions", "few"},
}


class TooMany(Exception):
    """More likeliest tokens than this server gives."""


class StandIn(ThreadingHTTPServer):
    """Speaks the protocols of ``speaks``. ``fault(path, body)`` may give (status, text) instead."""

    def __init__(self, judge, speaks):
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge, self.speaks = judge, speaks
        self.fault = lambda path, body: None
        self.cards = [{"id": "judge", "max_model_len": 2048}]
        self.seen: list[tuple[str, dict]] = []
        self.keys: list[str | None] = []
        self.active = self.most = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @torch.no_grad()
    def logs(self, ids: list[int]) -> torch.Tensor:
        with self.lock:
            return self.judge.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)

    def answer(self, path: str, body: dict):
        """The reply, None for an unknown route."""
        if path == "/v1/models":
            return {"data": self.cards}
        if path == "/tokenize" and "/tokenize" in self.speaks:
            ids = self.judge.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return {"tokens": ids}
        if path == "/v1/completions" and self.speaks & {"named", path}:
            if "few" in self.speaks and body["logprobs"] > 20:
                raise TooMany
            return {"choices": [self.choice(k, ids, body) for k, ids in enumerate(body["prompt"])]}
        if path not in self.speaks:
            return None
        labels = body["label_token_ids"]
        assert body["apply_softmax"] is False
        scores = [self.logs(body["query"] + item)[labels].exp().tolist() for item in body["items"]]
        if path == "/v1/score":
            return {"scores": scores}
        return {"data": [{"index": k, "score": one[0]} for k, one in enumerate(scores)]}

    def choice(self, index: int, ids: list[int], body: dict) -> dict:
        logs = self.logs(ids)
        top = logs.topk(min(body["logprobs"], len(logs))).indices.tolist()
        if "named" in self.speaks:
            top = {top[0], *body["logprob_token_ids"]}
        if "content" in self.speaks:  # llama.cpp
            shown = [{"id": i, "logprob": float(logs[i])} for i in top]
            return {"index": index, "logprobs": {"content": [{"top_logprobs": shown}]}}
        shown = {f"token_id:{i}": float(logs[i]) for i in top}
        return {"index": index, "logprobs": {"top_logprobs": [shown]}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        server = self.server
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else {}
        with server.lock:
            server.seen.append((self.path, body))
            server.keys.append(self.headers.get("Authorization"))
            server.active += 1
            server.most = max(server.most, server.active)
        try:
            status, reply = server.fault(self.path, body) or (200, None)
            if reply is None:
                answer = server.answer(self.path, body)
                status, reply = (404, "") if answer is None else (200, json.dumps(answer))
        except TooMany:
            status, reply = 400, "too many logprobs"
        finally:
            with server.lock:
                server.active -= 1
        self.send_response(status)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(village_judge, monkeypatch):
    monkeypatch.setattr(served, "WAITS", (0.01, 0.01))
    servers = []

    def start(*speaks, judge=village_judge) -> StandIn:
        servers.append(StandIn(judge, {*speaks, "/tokenize"}))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("route", ROUTES)
def test_scores_are_those_of_the_local_judge(route, serve, tokenizer, village_judge, capsys):
    # Only one that names tokens finds labels that are not among the likeliest.
    judge = ServedJudge(tokenizer, serve(*SPEAKS[route]).url)
    said = capsys.readouterr().err
    assert judge.route == route and f"asked by {route}; its tokenizer is ours" in said
    rows = judge.encode(PAIRS)
    for ours, theirs in zip(judge.log_odds(rows), village_judge.log_odds(rows)):
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-4)
    assert torch.allclose(judge.plain_log_odds(rows), village_judge.plain_log_odds(rows), atol=1e-4)


def test_everything_that_a_judge_does(serve, tokenizer, village_judge):
    server = serve("named")
    judge = ServedJudge(tokenizer, server.url, batch_size=3)
    assert judge.compare(*PAIR).probability == pytest.approx(
        village_judge.compare(*PAIR).probability, abs=1e-5
    )
    texts = ["Anna eats soup.", "Anna eats fish.", "Go away.", "Anna eats rice.", "Soup."]
    server.seen.clear()
    ours, theirs = (one.rank(PAIR[0], texts) for one in (judge, village_judge))
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-5) and ours.order == theirs.order
    # 20 prompts of one question: 16 and 4 in a request
    assert sorted(len(body["prompt"]) for _, body in server.seen) == [4, 16]
    rewards = [
        as_trl_reward(one)([PAIR[0]] * 2, list(PAIR[1:]), reference=[texts[2]] * 2)
        for one in (judge, village_judge)
    ]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_the_form_of_llama_cpp(serve, tokenizer, village_judge):
    judge = ServedJudge(tokenizer, serve("/v1/completions", "content").url)
    theirs = village_judge.compare(*PAIR)
    assert judge.compare(*PAIR).log_odds_first == pytest.approx(theirs.log_odds_first, abs=1e-4)


def test_a_key_is_sent_only_if_it_is_set(serve, tokenizer, monkeypatch):
    server = serve("named")
    ServedJudge(tokenizer, server.url)
    assert set(server.keys) == {None}
    monkeypatch.setenv("GRAM_SERVER_KEY", "secret")
    server.keys.clear()
    ServedJudge(tokenizer, server.url)
    assert set(server.keys) == {"Bearer secret"}


def test_requests_go_out_together_and_no_more_than_allowed(serve, tokenizer):
    server = serve("named")
    judge = ServedJudge(tokenizer, server.url, batch_size=3)
    server.fault = lambda path, body: time.sleep(0.05)
    judge.log_odds(judge.encode([Pair(f"{k}?", *PAIR[1:]) for k in range(9)]))
    assert server.most == 3


def test_long_prompts_are_cut_here(serve, tokenizer, village_judge):
    server = serve("named")
    judge = ServedJudge(tokenizer, server.url, max_length=60)
    long = Pair("What? " * 50, "Soup. " * 40, "Fish. " * 30)
    ours = judge.compare_many([long])[0]
    assert ours.truncated
    assert max(len(ids) for _, body in server.seen for ids in body.get("prompt", [])) <= 60
    local = Judge(village_judge.model, tokenizer, max_length=60).compare_many([long])[0]
    assert ours.probability == pytest.approx(local.probability, abs=1e-5)


# ---- from a run, and on the command line ---------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a judge prompt and a length of its own."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "judge.txt").write_text("{prompt} Better: {response_a} or {response_b}?")
    options = "--limit 50 --steps 1 --max-length 64 --lr 1e-2 --judge-template".split()
    train_reward.main(["--out", str(folder / "reward"), *options, str(folder / "judge.txt")])
    return folder / "reward"


def test_score_py_with_a_server(run, serve, tmp_path, capsys, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    rows = [dict(prompt=p.prompt, chosen=p.response_a, rejected=p.response_b) for p in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(run), "--data", str(data), "--out"]
    score.main([*common, str(tmp_path / "local.jsonl")])
    server = serve("named", judge=load_judge(run))
    server.cards.append({"id": "other"})
    monkeypatch.setattr("gram_mini.runs.load.load_model", lambda *a: 1 / 0)  # no weights
    there = ["--server", server.url + "/v1/", "--served-name", "judge"]
    score.main([*common, str(tmp_path / "served.jsonl"), *there])
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("served", "local")
    )
    assert len(ours) == len(PAIRS)
    for one, other in zip(ours, theirs):
        for key in ("probability", "a_first", "a_second", "label_mass"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)
        assert (one["truncated"], one["better"]) == (other["truncated"], other["better"])
    texts = ["--prompt", PAIR[0], "--response", PAIR[1], "--response", PAIR[2]]
    score.main(["--model", str(run), *texts, *there])
    assert "is better" in capsys.readouterr().out
    assert {body["model"] for path, body in server.seen if path != "/v1/models"} == {"judge"}


def test_compare_finds_nothing_between_a_judge_and_itself(run, serve, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    rows = [
        dict(prompt=p.prompt, response_a=p.response_a, response_b=p.response_b, label="AB"[p.label])
        for p in PAIRS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = serve("named", judge=load_judge(run))
    there = ["--server", server.url, "--data", str(data)]
    compare.main(["--model", str(run), *there])
    said = capsys.readouterr().out
    assert "the same verdict on 8 of 8 pairs" in said
    (apart,) = re.findall("log-odds apart: mean .*, at most (.*)", said)
    assert float(apart) < 1e-4
    # The untrained backbone is another judge; only the tokenizer and the prompt are the same.
    server.judge = load_judge(VILLAGE, bits=32)
    compare.main(["--model", str(run), *there])
    (apart,) = re.findall("log-odds apart: mean .*, at most (.*)", capsys.readouterr().out)
    assert float(apart) > 0.01


def test_the_table_of_the_village(run, serve, monkeypatch):
    monkeypatch.setattr(table, "village_pairs", lambda name: village_pairs(name)[:12])
    server = serve("named", judge=load_judge(run))
    assert table.village_table([str(run)], server=server.url) == table.village_table([str(run)])
    with pytest.raises(SystemExit):
        table.main(["village", str(run), "--server", server.url])


def test_a_served_run_keeps_its_prompt_and_length(run, serve):
    judge = served_judge(run, serve("named", judge=load_judge(run)).url)
    assert judge.model is None and judge.trained and judge.max_length == 64
    assert judge.batch_size == REQUESTS
    assert judge.template == "{prompt} Better: {response_a} or {response_b}?"


@pytest.mark.parametrize(
    "options",
    ["--served-name x", "--server http://x --bits 4", "--server http://x --device cpu"],
)
def test_options_that_do_not_go_together(options, run):
    texts = "--prompt x --response a --response b".split()
    with pytest.raises(SystemExit) as error:
        score.main(["--model", str(run), *texts, *options.split()])
    assert error.value.code == 2


# ---- what goes wrong -----------------------------------------------------------------


def line(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_server(tokenizer, serve):
    server = serve("named")
    server.shutdown()
    server.server_close()
    assert "no answer after 3 tries" in line(lambda: ServedJudge(tokenizer, server.url))
    assert "give an address" in line(lambda: ServedJudge(tokenizer, "file:///etc/passwd"))


def test_a_server_that_dies(tokenizer, serve):
    server = serve("named")
    judge = ServedJudge(tokenizer, server.url)
    server.shutdown()
    server.server_close()
    assert "Connection refused" in line(lambda: judge.compare(*PAIR))


def test_a_busy_server_is_asked_again_but_not_for_ever(tokenizer, serve, village_judge):
    server = serve("named")
    judge = ServedJudge(tokenizer, server.url)
    faults = iter([(503, "busy"), (500, "")])
    server.fault = lambda path, body: next(faults, None)
    expected = village_judge.compare(*PAIR).probability
    assert judge.compare(*PAIR).probability == pytest.approx(expected, abs=1e-5)
    server.seen.clear()
    server.fault = lambda path, body: (500, json.dumps({"error": {"message": "out\nof memory"}}))
    assert "after 3 tries (HTTP 500: out of memory)" in line(lambda: judge.compare(*PAIR))
    assert len(server.seen) == 3
    server.seen.clear()
    server.fault = lambda path, body: (400, '{"error": {"message": "too long"}}')
    assert "HTTP 400: too long" in line(lambda: judge.compare(*PAIR))
    assert len(server.seen) == 1


def test_a_server_that_hangs(tokenizer, serve):
    server = serve("named")
    judge = ServedJudge(tokenizer, server.url, timeout=0.3)
    server.fault = lambda path, body: time.sleep(1)
    assert "no answer within 0.3 s" in line(lambda: judge.compare(*PAIR))


def choices(*logs):
    top = [{"top_logprobs": [{f"token_id:{k}": v for k, v in one.items()}]} for one in logs]
    return json.dumps({"choices": [dict(index=k, logprobs=one) for k, one in enumerate(top)]})


def test_nonsense(tokenizer, serve):
    server = serve("named")
    judge = ServedJudge(tokenizer, server.url)
    a, b = judge.labels
    good = {a: -1.0, b: -1.0}
    for reply, what in (
        ("<html>", "not JSON"),
        ("[]", "something else"),
        ('{"choices": [{"index": 0}]}', "something else"),
        (choices(good), "1 answers to 2 prompts"),
        (choices(good, {a: math.nan, b: -1.0}), "no probabilities"),
        (choices(good, {a: -0.1, b: -0.1}), "no probabilities"),
        (choices(good, {a: "x", b: -0.1}), "something else"),
        (choices(good, {a: -0.1, 1: -0.2}), f"token {b}, a label, is not among the 2 likeliest"),
    ):
        server.fault = lambda path, body, reply=reply: (200, reply)
        assert what in line(lambda: judge.compare(*PAIR))
    server = serve("/v1/score")
    judge = ServedJudge(tokenizer, server.url)
    server.fault = lambda path, body: (200, '{"scores": [[0.0, 0.5], [0.1, 0.1]]}')
    assert "log P(A) = -inf" in line(lambda: judge.compare(*PAIR))


def test_a_label_that_is_not_among_the_likeliest(tokenizer, serve):
    judge = ServedJudge(tokenizer, serve("/v1/completions", "few").url)
    judge.labels = (5, 6)  # never said
    said = line(lambda: judge.compare(*PAIR))
    assert "is not among the 20 likeliest" in said and "--max-logprobs 1000" in said
    judge = ServedJudge(tokenizer, serve("/v1/completions").url)
    judge.labels = (5, 6)
    assert judge.compare(*PAIR).label_mass < 1e-3


def test_tokens_named_by_their_text_are_not_guessed(tokenizer, serve):
    server = serve("/v1/completions")
    reply = '{"choices": [{"index": 0, "logprobs": {"top_logprobs": [{"A": -1, "B": -1}]}}]}'
    server.fault = lambda path, body: (200, reply) if path == "/v1/completions" else None
    said = line(lambda: ServedJudge(tokenizer, server.url))
    assert "names tokens by their text" in said and "/v1/score: HTTP 404" in said


def test_another_model(tokenizer, serve, run):
    server = serve("named")
    said = line(lambda: ServedJudge(tokenizer, server.url, "reward"))
    assert "serves no model 'reward'; give --served-name, one of judge" in said
    server.cards.append({"id": "base"})
    assert "serves several models" in line(lambda: ServedJudge(tokenizer, server.url))
    server.cards = [{"id": "judge", "max_model_len": 512}]
    said = line(lambda: ServedJudge(tokenizer, server.url, max_length=512))
    assert "reads 512 tokens" in said and "give --max-length 511" in said
    server.cards = []
    server.fault = lambda path, body: (200, "{}") if path == "/v1/models" else None
    assert "names no models" in line(lambda: ServedJudge(tokenizer, server.url))


def test_another_tokenizer(tokenizer, serve):
    server = serve("named")
    server.fault = lambda path, body: (200, '{"tokens": [1, 2]}') if path == "/tokenize" else None
    assert "has another tokenizer" in line(lambda: ServedJudge(tokenizer, server.url))


def test_a_head_cannot_be_served(run, tmp_path):
    (tmp_path / "run").mkdir()
    for file in run.iterdir():
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run" / "head.safetensors").write_bytes(b"")
    assert "has a head of its own" in line(lambda: served_judge(tmp_path / "run", "http://x"))


# ---- a real server -------------------------------------------------------------------


def test_wide_heads_compute_the_same(run, tmp_path):
    export(run, tmp_path / "narrow", "float32")
    wide_heads.main([str(tmp_path / "narrow"), str(tmp_path / "wide")])
    narrow, wide = (load_judge(tmp_path / name) for name in ("narrow", "wide"))
    assert wide.model.config.head_dim == 32 and wide.max_length == narrow.max_length == 64
    rows = narrow.encode(PAIRS)
    assert torch.allclose(wide.log_odds(rows)[0], narrow.log_odds(rows)[0], atol=1e-4)
    assert "is there already" in line(
        lambda: wide_heads.main([str(tmp_path / "narrow"), str(tmp_path / "wide")])
    )
    assert "is for the village's model" in line(lambda: wide_heads.widen(wide.model))


@pytest.mark.server
@pytest.mark.skipif("GRAM_SERVER" not in os.environ, reason="give GRAM_SERVER and GRAM_SERVED")
def test_a_real_server():
    """GRAM_SERVER is its address, GRAM_SERVED the exported folder that it serves."""
    folder, pairs = os.environ["GRAM_SERVED"], village_pairs("out-of-distribution")[:20]
    local = load_judge(folder, bits=32)
    judge = served_judge(folder, os.environ["GRAM_SERVER"])
    rows = local.encode(pairs)
    expected, mass, _ = local.log_odds(rows)
    answered = []
    for judge.route in ROUTES:
        try:
            odds, their_mass, _ = judge.log_odds(rows)
        except served.Refused:
            continue
        answered.append(judge.route)
        # In bfloat16 logits of 16 to 32 come in steps of 1/8, so log-odds do.
        assert torch.allclose(odds, expected, atol=0.25)
        assert torch.allclose(their_mass, mass, atol=0.02)
    print(f"answered: {answered}")
    assert judge.route and answered

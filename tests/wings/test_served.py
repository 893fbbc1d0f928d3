"""A served judge gives the scores of the local one, and fails in one line.

The server here is a stand-in: it speaks as vLLM does and computes with the village's local judge.
"""

import json
import math
import os
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import score
import train_reward
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.pairs import Pair
from gram_mini.runs import scores
from gram_mini.runs.defaults import REQUESTS
from gram_mini.runs.load import load_judge
from gram_mini.runs.ranking import rank
from gram_mini.serving import compare, engine
from gram_mini.serving.engine import KEY
from gram_mini.serving.export import export
from gram_mini.serving.known import KNOWN
from gram_mini.serving.served import ServedJudge, served_judge
from gram_mini.serving.trl import as_trl_reward
from gram_mini.village import VILLAGE
from gram_mini.village.pairs import village_pairs

import pytest
import torch

PAIRS = village_pairs("out-of-distribution")[:8]
PAIR = ("What does Anna eat?", "Anna eats soup.", "Stop bothering me. Anna eats fish.")


class StandIn(ThreadingHTTPServer):
    """Speaks vLLM's protocol; ``named`` is whether it knows logprob_token_ids.

    ``fault(path, body)`` may give (status, text) instead. ``cut`` is what the server makes of a
    prompt, ``count`` how many tokens of it count as read, and ``number`` what it makes of the index
    of an answer. ``defaults`` are its own settings of sampling.
    """

    def __init__(self, judge, named):
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge, self.named = judge, named
        self.fault = lambda path, body: None
        self.cut = lambda ids: ids
        self.count = len
        self.number = lambda k: k
        self.defaults: dict[str, float] = {}
        self.cards = [{"id": "judge"}]
        self.seen: list[tuple[str, dict]] = []
        self.keys: list[str | None] = []
        self.active = self.most = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @torch.no_grad()
    def logs(self, ids: list[int], body: dict) -> torch.Tensor:
        neutral = {"temperature": 1, "top_p": 1, "top_k": -1, "repetition_penalty": 1}
        sampling = self.defaults | {k: v for k, v in body.items() if k in self.defaults}
        with self.lock:
            z = self.judge.model(input_ids=torch.tensor([self.cut(ids)])).logits[0, -1]
        wrong = sum(value != neutral.get(name, 0) for name, value in sampling.items())
        return (z * (1 + wrong)).log_softmax(0)

    def answer(self, path: str, body: dict):
        """The reply, None for an unknown route."""
        if path == "/v1/models":
            return {"data": self.cards}
        if path == "/tokenize":
            ids = self.judge.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return {"tokens": ids}
        if path != "/v1/completions":
            return None
        prompts = body["prompt"]
        return {
            "choices": [self.choice(k, ids, body) for k, ids in enumerate(prompts)],
            "usage": {"prompt_tokens": sum(self.count(self.cut(ids)) for ids in prompts)},
        }

    def choice(self, index: int, ids: list[int], body: dict) -> dict:
        logs, index = self.logs(ids, body), self.number(index)
        top = logs.topk(min(body["logprobs"], len(logs))).indices.tolist()
        if self.named:
            top = {top[0], *body["logprob_token_ids"]}
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
    monkeypatch.setattr(engine, "WAITS", (0.01, 0.01))
    servers = []

    def start(judge=village_judge, named=True) -> StandIn:
        servers.append(StandIn(judge, named))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_scores_are_those_of_the_local_judge(serve, tokenizer, village_judge, capsys):
    judge = ServedJudge(tokenizer, serve().url)
    assert "serves 'judge'; its tokenizer is ours" in capsys.readouterr().err
    rows = judge.encode(PAIRS)
    for ours, theirs in zip(judge.log_odds(rows), village_judge.log_odds(rows)):
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-4)
    assert torch.allclose(judge.log_odds(rows)[0], village_judge.log_odds(rows)[0], atol=1e-4)


def test_everything_that_a_judge_does(serve, tokenizer, village_judge):
    server = serve()
    judge = ServedJudge(tokenizer, server.url, batch_size=3)
    assert judge.compare(*PAIR).probability == pytest.approx(
        village_judge.compare(*PAIR).probability, abs=1e-5
    )
    texts = ["Anna eats soup.", "Anna eats fish.", "Go away.", "Anna eats rice.", "Soup."]
    server.seen.clear()
    ours, theirs = (rank(one, PAIR[0], texts) for one in (judge, village_judge))
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-5) and ours.order == theirs.order
    # 20 prompts: 16 and 4 in a request
    assert sorted(len(body["prompt"]) for _, body in server.seen) == [4, 16]
    rewards = [
        as_trl_reward(one)([PAIR[0]] * 2, list(PAIR[1:]), reference=[texts[2]] * 2)
        for one in (judge, village_judge)
    ]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_a_key_is_sent_only_if_it_is_set(serve, tokenizer, monkeypatch):
    server = serve()
    ServedJudge(tokenizer, server.url)
    assert set(server.keys) == {None}
    monkeypatch.setenv("GRAM_SERVER_KEY", "secret")
    server.keys.clear()
    ServedJudge(tokenizer, server.url)
    assert set(server.keys) == {"Bearer secret"}


def test_requests_go_out_together_and_no_more_than_allowed(serve, tokenizer):
    server = serve()
    judge = ServedJudge(tokenizer, server.url, batch_size=3)
    server.fault = lambda path, body: time.sleep(0.05)
    judge.log_odds(judge.encode([Pair(f"{k}?", *PAIR[1:]) for k in range(40)]))
    assert server.most == 3


def test_long_prompts_are_cut_here(serve, tokenizer, village_judge):
    server = serve()
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
    server = serve(judge=load_judge(run))
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
    server = serve(judge=load_judge(run))
    there = ["--server", server.url, "--data", str(data)]
    compare.main(["--model", str(run), *there])
    said = capsys.readouterr().out
    assert "the same verdict on 8 of 8 pairs" in said
    (apart,) = re.findall("log-odds apart: mean .*, at most (.*)", said)
    assert float(apart) < 1e-4
    # The untrained backbone is another judge; only the tokenizer and the prompt are the same.
    server.judge = load_judge(VILLAGE, bits=32)
    with pytest.raises(SystemExit, match="the server is not this judge"):
        compare.main(["--model", str(run), *there])
    (apart,) = re.findall("log-odds apart: mean .*, at most (.*)", capsys.readouterr().out)
    assert float(apart) > 0.25


def test_a_served_run_keeps_its_prompt_and_length(run, serve):
    judge = served_judge(run, serve(judge=load_judge(run)).url)
    assert judge.model is None and judge.trained and judge.max_length == 64
    assert judge.batch_size == REQUESTS
    assert judge.template == "{prompt} Better: {response_a} or {response_b}?"


@pytest.mark.parametrize(
    "options",
    [
        "--served-name x",
        "--server http://x --bits 4",
        "--server http://x --device cpu",
        "--server=",
    ],
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


def test_no_server(tokenizer, serve, monkeypatch):
    server = serve()
    server.shutdown()
    server.server_close()
    assert "no answer after 3 tries" in line(lambda: ServedJudge(tokenizer, server.url))
    assert "give an address" in line(lambda: ServedJudge(tokenizer, "file:///etc/passwd"))
    wrong = "http://127.0.0..1:8000"
    assert "cannot be asked; look for odd characters" in line(lambda: ServedJudge(tokenizer, wrong))
    monkeypatch.setenv(KEY, "secret\nX: y")
    said = line(lambda: ServedJudge(tokenizer, server.url))
    assert f"odd characters in the address and in {KEY}" in said and "secret" not in said


def test_a_server_that_dies(tokenizer, serve):
    server = serve()
    judge = ServedJudge(tokenizer, server.url)
    server.shutdown()
    server.server_close()
    assert "Connection refused" in line(lambda: judge.compare(*PAIR))


def test_a_busy_server_is_asked_again_but_not_for_ever(tokenizer, serve, village_judge):
    server = serve()
    judge = ServedJudge(tokenizer, server.url)
    faults = iter([(503, "busy"), (500, "")])
    server.fault = lambda path, body: next(faults, None)
    expected = village_judge.compare(*PAIR).probability
    assert judge.compare(*PAIR).probability == pytest.approx(expected, abs=1e-5)
    server.seen.clear()
    server.fault = lambda path, body: (500, "out\nof memory")
    assert "after 3 tries (HTTP 500: out of memory)" in line(lambda: judge.compare(*PAIR))
    assert len(server.seen) == 3
    server.seen.clear()
    server.fault = lambda path, body: (400, "too long")
    assert "HTTP 400: too long" in line(lambda: judge.compare(*PAIR))
    assert len(server.seen) == 1


def test_a_server_that_hangs(tokenizer, serve, monkeypatch):
    server = serve()
    judge = ServedJudge(tokenizer, server.url)
    monkeypatch.setattr(engine, "TIMEOUT", 0.3)
    server.fault = lambda path, body: time.sleep(1)
    assert "no answer within 0.3 s" in line(lambda: judge.compare(*PAIR))


def choices(*logs):
    top = [{"top_logprobs": [{f"token_id:{k}": v for k, v in one.items()}]} for one in logs]
    return [dict(index=k, logprobs=one) for k, one in enumerate(top)]


def answering(choices):
    """A fault: the server gives these choices, and says that it has read every token."""

    def fault(path, body):
        usage = {"prompt_tokens": sum(map(len, body["prompt"]))}
        return 200, json.dumps({"choices": choices, "usage": usage})

    return fault


def test_nonsense(tokenizer, serve):
    server = serve()
    judge = ServedJudge(tokenizer, server.url)
    for text, what in (
        ("<html>", "no JSON object"),
        ("[]", "something else"),
        ('{"choices": []}', "something else (KeyError('usage'))"),
    ):
        server.fault = lambda path, body, text=text: (200, text)
        assert what in line(lambda: judge.compare(*PAIR))
    a, b = judge.labels
    good = {a: -1.0, b: -1.0}
    for found, what in (
        ([{"index": 0}], "does not give 2 answers"),
        (choices(good), "does not give 2 answers"),
        (choices(good, {a: math.nan, b: -1.0}), "no probabilities"),
        (choices(good, {a: -0.1, b: -0.1}), "no probabilities"),
        (choices(good, {a: "x", b: -0.1}), "something else"),
        (choices(good, {a: -0.1, 1: -0.2}), "does not give both labels"),
    ):
        server.fault = answering(found)
        assert what in line(lambda: judge.compare(*PAIR))


def test_a_server_that_gives_only_the_likeliest_tokens(tokenizer, serve):
    server = serve(named=False)
    said = line(lambda: ServedJudge(tokenizer, server.url))
    assert "serve the judge with vLLM 0.32 or later" in said


def test_another_model(tokenizer, serve, run):
    server = serve()
    said = line(lambda: ServedJudge(tokenizer, server.url, "reward"))
    assert "serves no model 'reward'; give --served-name, one of judge" in said
    server.cards.append({"id": "base"})
    assert "serves several models" in line(lambda: ServedJudge(tokenizer, server.url))
    server.cards.append({"id": "reward", "parent": "base"})
    said = line(lambda: ServedJudge(tokenizer, server.url, "reward"))
    assert "is an adapter beside its base" in said and "export the run" in said
    server.fault = lambda path, body: (200, "{}") if path == "/v1/models" else None
    assert "names no models" in line(lambda: ServedJudge(tokenizer, server.url))


def test_another_tokenizer(tokenizer, serve):
    server = serve()
    server.fault = lambda path, body: (200, '{"tokens": [1, 2]}') if path == "/tokenize" else None
    assert "has another tokenizer" in line(lambda: ServedJudge(tokenizer, server.url))
    server.fault = lambda path, body: (404, "Not Found") if path == "/tokenize" else None
    assert "/tokenize: HTTP 404: Not Found" in line(lambda: ServedJudge(tokenizer, server.url))


def test_a_server_that_reads_too_little_says_so_before_the_first_score(tokenizer, serve):
    server = serve()
    too_long = (400, "maximum context length is 512 tokens")
    longest = lambda body: max(map(len, body.get("prompt", [])))
    server.fault = lambda path, body: (
        too_long if path == "/v1/completions" and longest(body) >= 512 else None
    )
    said = line(lambda: ServedJudge(tokenizer, server.url, max_length=512))
    assert "HTTP 400: maximum context length is 512 tokens" in said
    ServedJudge(tokenizer, server.url, max_length=511)


def test_a_head_cannot_be_served(run, tmp_path):
    (tmp_path / "run").mkdir()
    for file in run.iterdir():
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run" / "head.safetensors").write_bytes(b"")
    assert "has a head or a likelihood of its own" in line(
        lambda: served_judge(tmp_path / "run", "http://x")
    )


# ---- a figure is right, or one line says why not --------------------------------------


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not counted"])
@pytest.mark.parametrize(
    "cut",
    [lambda ids: ids[:200], lambda ids: ids[:-1], lambda ids: ids[1:], lambda ids: ids[-200:]],
    ids=["end", "last", "first", "beginning"],
)
def test_a_server_that_cuts_prompts(cut, counted, tokenizer, serve):
    server = serve()
    server.cut = lambda ids: cut(ids) if len(ids) > 200 else ids
    if not counted:  # it says that it has read what it was sent
        server.count = lambda ids: 256
    said = line(lambda: ServedJudge(tokenizer, server.url, max_length=256))
    assert ("of 256 (usage" in said) == counted
    assert ("does not read all of them" in said) != counted
    server.count = len
    judge = ServedJudge(tokenizer, server.url, max_length=200)
    judge.compare(*PAIR)
    server.cut = lambda ids: ids[:-1]  # cuts from now on
    assert "(usage)" in line(lambda: judge.compare(*PAIR))


def test_answers_without_their_numbers(tokenizer, serve):
    server = serve()
    judge = ServedJudge(tokenizer, server.url)
    server.number = lambda k: 0
    assert "does not give 2 answers, numbered in order" in line(lambda: judge.compare(*PAIR))


@pytest.mark.parametrize("none", [(-9999, -9999), (-3.4e38, -3.4e38), (0, -3.4e38), (900, -1)])
def test_no_probability_is_none(none, tokenizer, serve):
    server = serve()
    judge = ServedJudge(tokenizer, server.url)
    values = dict(zip(judge.labels, none))
    server.fault = answering(choices(values, values))
    assert "which are no probabilities" in line(lambda: judge.compare(*PAIR))


def test_the_sampling_of_the_server_changes_nothing(tokenizer, serve, village_judge):
    server = serve()
    server.defaults = {
        "repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5,
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1,
    }  # fmt: skip
    expected = village_judge.compare(*PAIR).probability
    found = ServedJudge(tokenizer, server.url).compare(*PAIR).probability
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_exported_run_knows_its_scores(run, serve, tmp_path, capsys):
    exported = tmp_path / "exported"
    export(run, exported, "bfloat16")
    server = serve(judge=load_judge(exported, bits=16))  # rounds as bfloat16 does
    judge = served_judge(exported, server.url)
    assert KNOWN not in capsys.readouterr().err and 0.01 < judge.rounding < 0.2
    server.judge = load_judge(VILLAGE, bits=32)
    said = line(lambda: served_judge(exported, server.url))
    assert "'judge' is not" in said and "serve that folder" in said
    (exported / KNOWN).unlink()
    served_judge(exported, server.url)
    assert f"holds no {KNOWN}, so whether" in capsys.readouterr().err
    (exported / KNOWN).write_text("{}")
    assert "export the run anew" in line(lambda: served_judge(exported, server.url))


def test_resuming_names_another_model_under_the_same_name(
    run, serve, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(scores, "CHUNK", 2)
    data = tmp_path / "rows.jsonl"
    rows = [dict(prompt=p.prompt, chosen=p.response_a, rejected=p.response_b) for p in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = serve(judge=load_judge(run))
    common = ["--model", str(run), "--data", str(data), "--server", server.url]
    score.main([*common, "--out", str(tmp_path / "whole.jsonl")])

    for name in ("same", "other"):
        out = tmp_path / f"{name}.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(scores.Scores, "write", self_stopping(scores.Scores.write, after=2))
            with pytest.raises(KeyError):
                score.main([*common, "--out", str(out)])
        if name == "other":
            server.judge = load_judge(VILLAGE, bits=32)
            server.judge.model.model.norm.weight.data *= -3  # its log-odds are certainly others
        capsys.readouterr()
        score.main([*common, "--out", str(out), "--resume"])
        said = capsys.readouterr().out
        assert ("log-odds of a probe was" in said) == (name == "other")
    assert (tmp_path / "same.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def self_stopping(write, after: int):
    calls = []

    def stopping(*arguments):
        calls.append(write(*arguments))
        if len(calls) == after:
            raise KeyError("stop")

    return stopping


# ---- what a server says ---------------------------------------------------------------


def test_keys_and_proxies(tokenizer, serve, monkeypatch):
    server = serve()
    judge = lambda: ServedJudge(tokenizer, server.url)
    server.fault = lambda path, body: (401, "no key")
    assert "HTTP 401: no key; put its API key into the variable GRAM_SERVER_KEY" in line(judge)
    server.fault = lambda path, body: None
    monkeypatch.setenv("GRAM_SERVER_KEY", " secret\n")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    server.keys.clear()
    judge()
    assert set(server.keys) == {"Bearer secret"}


def test_ctrl_c_ends_at_once_beside_a_server_that_hangs(tokenizer, serve):
    server = serve()
    judge = ServedJudge(tokenizer, server.url)
    server.fault = lambda path, body: time.sleep(3)
    main = threading.main_thread()
    before = set(threading.enumerate())
    # What a shell starts in the background ignores the signal, and so would this test.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, lambda: signal.pthread_kill(main.ident, signal.SIGINT)).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            judge.compare(*PAIR)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - begun < 2
    # What still waits keeps no process from its end.
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)


# ---- a real server -------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.skipif("GRAM_SERVER" not in os.environ, reason="give GRAM_SERVER and GRAM_SERVED")
def test_a_real_server():
    """GRAM_SERVER is its address, GRAM_SERVED the exported folder that it serves."""
    folder, pairs = os.environ["GRAM_SERVED"], village_pairs("out-of-distribution")[:20]
    local = load_judge(folder, bits=32)
    judge = served_judge(folder, os.environ["GRAM_SERVER"])
    rows = local.encode(pairs)
    expected, mass, _ = local.log_odds(rows)
    odds, their_mass, _ = judge.log_odds(rows)
    # In bfloat16 logits of 16 to 32 come in steps of 1/8, so log-odds do.
    assert torch.allclose(odds, expected, atol=0.25)
    assert torch.allclose(their_mass, mass, atol=0.02)

"""A policy that writes: what its texts are worth, its KL, GRPO against the truth, best of n."""

import functools
import json
import math
import sys

from gram_mini.errors import UserError
from gram_mini.serving.trl import as_trl_reward
from gram_mini.studies import __main__ as studies
from gram_mini.studies import seeds, writing
from gram_mini.studies.lab import Lab, VillagePairs
from gram_mini.village import question
from gram_mini.village.pairs import topics, village_pairs
from gram_mini.village.writer import (
    LONGEST,
    NO_ANSWER,
    TrueJudge,
    Writer,
    rewards,
    train_start,
    train_writer,
    true_reward,
)

import pytest
import torch

# one of the four kinds of questions, so that the policy learns within seconds
KIND = "What does"
PROMPTS = [
    prompt
    for topic in topics("out-of-distribution")
    if (prompt := question(*topic)).startswith(KIND)
]
share = lambda prompts, texts: (
    sum(true_reward(*answer) == NO_ANSWER for answer in zip(prompts, texts)) / len(texts)
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a policy that was taught for 62 steps only."""
    folder = tmp_path_factory.mktemp("start") / "policy"
    pairs = [pair for pair in village_pairs("unlabelled", 8_000) if pair.prompt.startswith(KIND)]
    train_start(pairs, folder, seed=0)
    return folder


def test_what_is_no_answer_is_worth_less_than_the_worst_answer():
    assert len(rewards(PROMPTS[0])) == 72 and min(rewards(PROMPTS[0]).values()) > NO_ANSWER
    for pair in village_pairs("out-of-distribution", 50):
        judged = TrueJudge().compare_many([pair])[0]
        assert judged.probability == pytest.approx(pair.probability)
        assert true_reward(pair.prompt, f" {pair.response_a}\n") > NO_ANSWER
        twice = f"{pair.response_a} {pair.response_a}"
        for text in ("", twice, pair.response_a[:-1], pair.response_a.lower()):
            assert true_reward(pair.prompt, text) == NO_ANSWER
    other = next(prompt for prompt in PROMPTS if prompt != pair.prompt)
    assert true_reward(other, pair.response_a) == NO_ANSWER  # an answer to another question


def test_it_learns_to_answer_and_writes_nonsense_when_hot(start):
    torch.manual_seed(0)
    writer = Writer(start)
    texts = {heat: writer.write(PROMPTS, heat).texts for heat in (0, 1.0, 3.0)}
    assert writer.write(PROMPTS, 0).texts == texts[0]
    shares = [share(PROMPTS, of_heat) for of_heat in texts.values()]
    assert shares[0] < 0.2 < 0.9 < shares[2] and shares[0] <= shares[1] < shares[2]


def test_kl_is_the_sum_over_the_tokens_of_a_text(start):
    torch.manual_seed(0)
    writer = Writer(start)
    drawn = writer.write(PROMPTS[:6], 1.5)
    assert writer.kl(drawn) == 0
    with torch.no_grad():
        for parameter in writer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    by_hand = []
    for ids, mask, written in zip(drawn.ids, drawn.mask, drawn.written):
        alone = ids[mask.bool()][None]  # (1, T) without padding
        log_p, log_q = (
            model(alone).logits[0, :-1].log_softmax(-1)[-int(written.sum()) :].detach()
            for model in (writer.model, writer.start)
        )
        by_hand.append(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    assert len({int(mask.sum()) for mask in drawn.mask}) > 1
    assert writer.kl(drawn) == pytest.approx(float(sum(by_hand)) / 6, rel=1e-4)
    for text, length in zip(drawn.texts, drawn.lengths):
        assert 0 < length <= LONGEST and len(text) > length  # most tokens are whole words


# TRL still uses the old name of the option.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_grpo_against_the_truth_makes_it_better(start):
    writer, seen = Writer(start), []
    references = [max(rewards(prompt), key=rewards(prompt).get) for prompt in PROMPTS]

    def measure(step):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn = writer.write(PROMPTS * 4)
        true = [true_reward(*answer) for answer in zip(PROMPTS * 4, drawn.texts)]
        seen.append((step, writer.kl(drawn), sum(true) / len(true)))

    reward = as_trl_reward(TrueJudge())
    how = {"steps": 10, "every": 4, "lr": 2e-4, "questions": 4, "completions": 16}
    train_writer(writer, reward, PROMPTS, references, 0, measure, **how)
    assert [step for step, _, _ in seen] == [0, 4, 8, 10]
    assert seen[0][1] == 0 < seen[-1][1] and seen[-1][2] > seen[0][2] + 0.1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_studies_write_tables_pictures_and_answers_and_go_on(start, tmp_path, monkeypatch):
    small = functools.partial(train_writer, every=1, questions=2, completions=2)
    monkeypatch.setattr(writing, "train_writer", small)
    for name, value in {"TRAINED": {"rl": (0.2, 2)}, "EACH": 1, "DRAWN": 32, "ASKED": 2}.items():
        monkeypatch.setattr(writing, name, value)
    place = tmp_path / "runs" / "seed3" / "start-policy"
    place.parent.mkdir(parents=True)
    place.symlink_to(start)
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    for kind in ("rl", "bon"):
        monkeypatch.setitem(writing.JUDGES_OF, kind, ("true reward",))
        arguments = [f"writing-{kind}", "--seeds", "3", "--jobs", "1", *folders]
        studies.main(arguments)
        result = tmp_path / "results" / f"writing-{kind}"
        record = json.loads(result.with_suffix(".json").read_text())
        answers = json.loads(result.with_name(f"{result.name}-answers.json").read_text())
        assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        said = answers["true reward"]["3"]
        summary = json.loads(result.with_name(f"{result.name}-summary.json").read_text())
        assert summary["rows"][0]["last"] == record["rows"][-1]["true reward"]
        for prompt, row in said.items():
            assert row["true reward"] == true_reward(prompt, row["answer"])
        with monkeypatch.context() as patch:
            patch.setattr(writing, "start_of", lambda lab, seed: pytest.fail("it was done"))
            studies.main(arguments)
        if kind == "rl":
            assert [row["step"] for row in record["rows"]] == [0, 1, 2]
        else:
            true = [row["true reward"] for row in record["rows"]]
            assert true == sorted(true) and [row["n"] for row in record["rows"]][-1] == 1024
            assert record["rows"][-1]["true reward"] == pytest.approx(
                sum(row["true reward"] for row in said.values()) / len(said)
            )
            assert record["rows"][3]["KL"] == pytest.approx(math.log(8) - 7 / 8)


def test_answers_of_seeds_that_are_there_are_kept(tmp_path, monkeypatch):
    asked = []

    def against(kind, name, lab, seed):
        asked.append(seed)
        figures = {"KL": 0.0, "true reward": float(seed), "no answer": 0.0, "judge's score": 0.0}
        answers = {PROMPTS[0]: {"answer": f"said with seed {seed}"}}
        return {"rows": [{"method": name, "n": 1, **figures}], "answers": answers, "seconds": seed}

    monkeypatch.setattr(writing, "against", against)
    monkeypatch.setitem(writing.JUDGES_OF, "bon", (writing.TRUTH,))
    results = tmp_path / "results"

    def run(machine, *given):
        asked.clear()
        lab = Lab(tmp_path / machine, "village", VillagePairs())
        seeds.run(["writing-bon"], lab, list(given), results)
        parts = ("answers", "summary")
        return [json.loads((results / f"writing-bon-{part}.json").read_text()) for part in parts]

    run("one", 2)
    answers, summary = run("another", 1, 2)
    assert set(asked) == {1}
    for seed in ("1", "2"):
        assert answers[writing.TRUTH][seed][PROMPTS[0]]["answer"] == f"said with seed {seed}"
    assert [row["last"] for row in summary["rows"]] == [1.0, 2.0]
    assert summary["seconds"] == {writing.TRUTH: [1, 2]}
    (results / "writing-bon-answers.json").unlink()
    assert run("another", 1, 2)[0] == answers and set(asked) == {1, 2}


def test_summary_has_the_peak_and_counts_answers_to_other_questions():
    true = {0.0: 1.0, 0.5: 2.0, 3.0: -0.5}  # over KL
    labelled = question(*topics("in-distribution")[0])
    said = {
        PROMPTS[0]: max(rewards(labelled), key=rewards(labelled).get),
        PROMPTS[1]: min(rewards(PROMPTS[0]), key=rewards(PROMPTS[0]).get),
        PROMPTS[2]: min(rewards(PROMPTS[2]), key=rewards(PROMPTS[2]).get),
        PROMPTS[3]: "Happy to help. long.",
    }
    assert writing.summary([{"KL": kl, "true reward": x} for kl, x in true.items()], said) == {
        "first": 1.0,
        "highest": 2.0,
        "KL of the highest": 0.5,
        "at a KL of 0.5": 2.0,
        "at a KL of 1.0": pytest.approx(1.5),
        "last": -0.5,
        "KL of the last": 3.0,
        "commonest claims": 1.0,
        "to another question": 0.5,
        "of these true": 0.5,
    }


def test_true_rewards_at_equal_kl():
    rows = [{"KL": kl, "true reward": x} for kl, x in ((0, 1.0), (0.4, 2.0), (0.8, 3.0), (0.2, 9))]
    assert writing.at_kl(rows, 0.5) == pytest.approx(2.25)
    assert writing.at_kl(rows, 0.8) == 3.0 and writing.at_kl(rows, 1.0) is None


def test_without_trl_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="pip install trl"):
        next(writing.rl(None, 1))

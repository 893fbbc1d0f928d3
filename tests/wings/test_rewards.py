"""The judge in other loops: each function is called as the loop's own code calls it."""

import asyncio
import importlib.util
from pathlib import Path
from types import SimpleNamespace

from gram_mini.errors import UserError
from gram_mini.runs.ranking import rank
from gram_mini.serving import openrlhf, rewards, verl

import numpy as np
import pytest
import torch

QUESTION = "What does Anna eat?"
SOUP, FISH, CAKE = (
    "Glad you asked. Anna eats soup.",
    "If you must. Anna eats fish.",
    "Anna eats cake.",
)


@pytest.fixture
def loop(village_judge, monkeypatch):
    """A loop whose judge is the village's."""
    monkeypatch.setenv("GRAM_JUDGE", "village")
    monkeypatch.setattr(rewards, "_load", lambda *named: village_judge)
    return village_judge


def test_verl_hands_over_a_whole_group(loop):
    # as BatchRewardManager.verify: numpy arrays of objects, and its own entry in extra_info
    info = {"question": QUESTION, "index": 0, "rollout_reward_scores": {}}
    call = {
        "data_sources": np.array(["village"] * 3, dtype=object),
        "solution_strs": [SOUP, FISH, CAKE],
        "ground_truths": ["", None, ""],
        "extra_infos": np.array([info, info, {"prompt": QUESTION}], dtype=object),
    }
    by_first = [0.5, loop.reward(QUESTION, FISH, SOUP), loop.reward(QUESTION, CAKE, SOUP)]
    assert verl.compute_score(**call) == pytest.approx(by_first, abs=1e-5)
    by_all = rank(loop, QUESTION, [SOUP, FISH, CAKE]).scores
    assert verl.compute_score(**call, against="all") == pytest.approx(by_all, abs=1e-5)
    call["ground_truths"] = [CAKE, CAKE, CAKE]
    by_truth = [loop.reward(QUESTION, SOUP, CAKE), loop.reward(QUESTION, FISH, CAKE), 0.5]
    assert verl.compute_score(**call) == pytest.approx(by_truth, abs=1e-5)


def test_verl_asks_for_one_response_at_a_time(loop):
    # as NaiveRewardManager.run_single
    call = {"data_source": "village", "solution_str": SOUP, "extra_info": {"question": QUESTION}}
    found = verl.compute_score_of_one(**call, ground_truth=FISH, reward_router_address="x")
    assert found == pytest.approx(loop.reward(QUESTION, SOUP, FISH), abs=1e-5)
    with pytest.raises(ValueError, match="nothing to be compared with"):
        verl.compute_score_of_one(**call, ground_truth="")
    with pytest.raises(UserError, match="row 0: verl passes no prompt"):
        verl.compute_score_of_one("village", SOUP, FISH, None)


def test_openrlhf_loads_the_file_by_its_path(loop, tokenizer):
    # as SingleTurnAgentExecutor does
    spec = importlib.util.spec_from_file_location("reward_func", Path(openrlhf.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    message = {"role": "user", "content": QUESTION}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    label = {"prompt": QUESTION, "reference": FISH}
    found = module.reward_func([f"{prompt}{SOUP}<|end|>"], [prompt], [label])
    expected = loop.compare(QUESTION, SOUP, FISH)
    assert found["rewards"].shape == (1,) and torch.equal(found["rewards"], found["scores"])
    assert found["rewards"].item() == pytest.approx(expected.probability, abs=1e-5)
    logs = {name: value.item() for name, value in found["extra_logs"].items()}
    assert logs == pytest.approx(
        {"gram_position_gap": expected.position_gap, "gram_label_mass": expected.label_mass},
        abs=1e-5,
    )


def test_openrlhf_with_plain_prompts_and_several_queries(loop, capsys):
    queries = [f"{QUESTION} {text}</s>\n" for text in (SOUP, FISH)]
    found = openrlhf.reward_func(queries, [QUESTION] * 2, ["", ""])
    by_first = [0.5, loop.reward(QUESTION, FISH, SOUP)]
    assert found["rewards"].tolist() == pytest.approx(by_first, abs=1e-5)
    drawn = openrlhf.reward_func(queries[:1], [QUESTION], [SOUP])  # equal texts: nothing was asked
    assert drawn["rewards"].tolist() == [0.5]
    assert drawn["extra_logs"].keys() == found["extra_logs"].keys()  # OpenRLHF stacks them
    # OpenRLHF swallows errors, so they are on stderr too.
    for query, label, message in ((queries[0], "", "nothing to be"), ("x", SOUP, "not begin with")):
        with pytest.raises((ValueError, UserError), match=message):
            openrlhf.reward_func([query], [QUESTION], [label])
        assert message in capsys.readouterr().err


def test_openrlhf_with_a_first_token(loop):
    label = {"prompt": QUESTION, "reference": FISH}
    prompt, expected = f"[INST] {QUESTION} [/INST]", loop.reward(QUESTION, SOUP, FISH)
    found = openrlhf.reward_func([f"<s>{prompt} {SOUP}</s>"], [prompt], [label])["rewards"].item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_loop_without_a_judge_is_told_how_to_name_one(monkeypatch):
    monkeypatch.delenv("GRAM_JUDGE", raising=False)
    with pytest.raises(UserError, match="GRAM_JUDGE is not set: .*GRAM_JUDGE=runs/reward"):
        rewards.judge_of_the_loop()


def test_the_judge_is_loaded_once_and_may_be_a_served_one(monkeypatch):
    monkeypatch.setenv("GRAM_JUDGE", "village")
    monkeypatch.delenv("GRAM_SERVER", raising=False)
    assert rewards.judge_of_the_loop() is rewards.judge_of_the_loop()
    monkeypatch.setattr(rewards, "served_judge", lambda *given: given)
    monkeypatch.setenv("GRAM_SERVER", "http://127.0.0.1:8000")
    assert rewards.judge_of_the_loop() == ("village", "http://127.0.0.1:8000", None)
    monkeypatch.setenv("GRAM_SERVED_NAME", "reward")
    assert rewards.judge_of_the_loop()[2] == "reward"
    monkeypatch.undo()
    monkeypatch.setenv("GRAM_JUDGE", "village")
    monkeypatch.setenv("GRAM_SERVER", "")  # not a judge that is computed here, silently
    with pytest.raises(UserError, match="give an address"):
        rewards.judge_of_the_loop()


# ---- the real callers, where their packages are installed ----------------------------
# pip install --no-deps verl==0.9.1 openrlhf==0.11.2 tensordict ray omegaconf
#     antlr4-python3-runtime==4.9.3 hydra-core codetiming orjson cloudpickle pyvers
#     importlib_metadata msgpack jsonschema pylatexenc aiohttp aiosignal aiohappyeyeballs frozenlist
#     multidict yarl propcache attrs dacite modelscope modelscope_hub json-repair einops addict
#     simplejson sortedcontainers cryptography cffi pycparser oss2


def test_the_reward_managers_of_verl(loop, tokenizer):
    pytest.importorskip("verl.workers.reward_manager.batch")
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager
    from verl.workers.reward_manager import BatchRewardManager

    encode = lambda texts: tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    asked, answered = encode([QUESTION] * 2), encode([SOUP, FISH])
    mask = torch.cat([asked["attention_mask"], answered["attention_mask"]], dim=1)
    ids = {"prompts": asked["input_ids"], "responses": answered["input_ids"]}
    columns = {
        "data_source": ["village"] * 2,
        "reward_model": [{"ground_truth": CAKE}] * 2,
        "extra_info": [{"question": QUESTION}, {"question": QUESTION}],
    }
    data = DataProto.from_dict(
        tensors={**ids, "attention_mask": mask},
        non_tensors={name: np.array(column, dtype=object) for name, column in columns.items()},
    )

    def configured(name: str):
        function = {"path": "pkg://gram_mini.serving.verl", "name": name}
        manager = {"source": "register", "name": "naive"}
        reward = {"custom_reward_function": function, "reward_manager": manager}
        return OmegaConf.create({"reward": reward})

    expected = [loop.reward(QUESTION, text, CAKE) for text in (SOUP, FISH)]
    batch = BatchRewardManager(tokenizer, 0, get_custom_reward_fn(configured("compute_score")))
    assert batch(data).sum(dim=1).tolist() == pytest.approx(expected, abs=1e-5)

    async def one_by_one():
        manager = load_reward_manager(configured("compute_score_of_one"), tokenizer)
        return [(await manager.run_single(data[i : i + 1]))["reward_score"] for i in range(2)]

    assert asyncio.run(one_by_one()) == pytest.approx(expected, abs=1e-5)


def test_the_executor_of_openrlhf(loop, tokenizer):
    executor = pytest.importorskip("openrlhf.utils.agent").SingleTurnAgentExecutor

    class Engine:
        async def generate(self, ids, params, multi_modal_data=None):
            answer = tokenizer(f"{SOUP}<|end|>", add_special_tokens=False)["input_ids"]
            output = SimpleNamespace(token_ids=answer, finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    sampling = SimpleNamespace(max_tokens=64, logprobs=None)
    given = QUESTION, FISH, sampling, 512, tokenizer, Engine()
    done = asyncio.run(executor(openrlhf.__file__).execute(*given))
    expected = loop.reward(QUESTION, SOUP, FISH)
    assert done["reward"].item() == pytest.approx(expected, abs=1e-5)
    assert set(done["extra_logs"]) == {"gram_position_gap", "gram_label_mass"}

"""The functions that rewards.md shows, each called as the code of its training loop calls it."""

import asyncio
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

from gram_mini.serving import rewards

import numpy as np
import pytest
import torch

QUESTION = "What does Anna eat?"
SOUP, FISH = "Glad you asked. Anna eats soup.", "If you must. Anna eats fish."


@pytest.fixture
def file(tmp_path):
    """The file of the page, with the village's judge."""
    (code,) = re.findall(
        "```python\n(.*?)```", Path(rewards.__file__).with_suffix(".md").read_text(), re.DOTALL
    )
    load = 'load_judge("/home/me/runs/reward")'
    assert code.count(load) == 1
    path = tmp_path / "my_reward.py"
    path.write_text(code.replace(load, 'load_judge("village", bits=32)'))
    return path


@pytest.fixture
def page(file):
    """Its module, loaded by its path as the loops do it."""
    spec = importlib.util.spec_from_file_location("my_reward", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verl(page, village_judge):
    # as NaiveRewardManager.run_single
    call = {"data_source": "village", "solution_str": SOUP, "extra_info": {"question": QUESTION}}
    found = page.compute_score(**call, ground_truth=FISH, reward_router_address="x")
    assert found == pytest.approx(village_judge.reward(QUESTION, SOUP, FISH), abs=1e-4)
    with pytest.raises(ValueError, match="nothing to be compared with"):
        page.compute_score(**call, ground_truth="")
    with pytest.raises(KeyError, match="question"):  # not a reward for an answer to nothing
        page.compute_score(**{**call, "extra_info": {}}, ground_truth=FISH)


def test_openrlhf(page, village_judge, tokenizer):
    # as SingleTurnAgentExecutor, whose query may have a first token before its prompt
    message = {"role": "user", "content": QUESTION}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    label = {"question": QUESTION, "reference": FISH}
    expected = village_judge.reward(QUESTION, SOUP, FISH)
    for query in (f"{prompt}{SOUP}<|im_end|>", f"<s>{prompt} {SOUP}"):
        found = page.reward_func([query], [prompt], [label])
        assert found["rewards"].tolist() == pytest.approx([expected], abs=1e-4)
    with pytest.raises(IndexError):  # the query does not hold its prompt
        page.reward_func([SOUP], [prompt], [label])


# ---- the real callers, where their packages are installed ----------------------------
# pip install --no-deps verl==0.9.1 openrlhf==0.11.2 tensordict ray omegaconf
#     antlr4-python3-runtime==4.9.3 hydra-core codetiming orjson cloudpickle pyvers
#     importlib_metadata msgpack jsonschema pylatexenc aiohttp aiosignal aiohappyeyeballs frozenlist
#     multidict yarl propcache attrs dacite modelscope modelscope_hub json-repair einops addict
#     simplejson sortedcontainers cryptography cffi pycparser oss2


def test_the_reward_manager_of_verl(file, village_judge, tokenizer):
    pytest.importorskip("verl.workers.reward_manager")
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    encode = lambda texts: tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    asked, answered = encode([QUESTION]), encode([SOUP])
    mask = torch.cat([asked["attention_mask"], answered["attention_mask"]], dim=1)
    ids = {"prompts": asked["input_ids"], "responses": answered["input_ids"]}
    columns = {
        "data_source": ["village"],
        "reward_model": [{"ground_truth": FISH}],
        "extra_info": [{"question": QUESTION}],
    }
    data = DataProto.from_dict(
        tensors={**ids, "attention_mask": mask},
        non_tensors={name: np.array(column, dtype=object) for name, column in columns.items()},
    )
    function = {"path": str(file), "name": "compute_score"}
    manager = {"source": "register", "name": "naive"}
    reward = {"custom_reward_function": function, "reward_manager": manager}

    async def one():
        manager = load_reward_manager(OmegaConf.create({"reward": reward}), tokenizer)
        return (await manager.run_single(data))["reward_score"]

    expected = village_judge.reward(QUESTION, SOUP, FISH)
    assert asyncio.run(one()) == pytest.approx(expected, abs=1e-4)


def test_the_executor_of_openrlhf(file, village_judge, tokenizer):
    executor = pytest.importorskip("openrlhf.utils.agent").SingleTurnAgentExecutor

    class Engine:
        async def generate(self, ids, params, multi_modal_data=None):
            answer = tokenizer(SOUP, add_special_tokens=False)["input_ids"]
            output = SimpleNamespace(token_ids=answer, finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    label = {"question": QUESTION, "reference": FISH}
    sampling = SimpleNamespace(max_tokens=64, logprobs=None)
    given = QUESTION, label, sampling, 512, tokenizer, Engine()
    done = asyncio.run(executor(str(file)).execute(*given))
    expected = village_judge.reward(QUESTION, SOUP, FISH)
    assert done["reward"].item() == pytest.approx(expected, abs=1e-4)

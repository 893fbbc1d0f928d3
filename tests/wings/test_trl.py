"""The judge as a reward function for TRL: what is compared, and two steps of the real trainer."""

import copy
import math

from gram_mini.errors import UserError
from gram_mini.reading.formats import parse_pairs
from gram_mini.runs.models import load_model
from gram_mini.runs.ranking import rank
from gram_mini.serving.trl import as_trl_reward
from gram_mini.village import VILLAGE

import pytest
import torch

QUESTION = "What does Anna eat?"
SOUP, FISH, CAKE = (
    "Glad you asked. Anna eats soup.",
    "If you must. Anna eats fish.",
    "Anna eats cake.",
)


@pytest.fixture
def judged(village_judge, monkeypatch):
    """The calls of compare_many, each as its list of pairs."""
    calls, compare_many = [], village_judge.compare_many
    monkeypatch.setattr(
        village_judge,
        "compare_many",
        lambda pairs: calls.append(pairs) or compare_many(pairs),
    )
    return calls


def test_reference_column_gives_the_reward_against_it(village_judge, judged):
    found = as_trl_reward(village_judge)([QUESTION] * 2, [SOUP, FISH], reference=[CAKE, SOUP])
    expected = [
        village_judge.reward(QUESTION, SOUP, CAKE),
        village_judge.reward(QUESTION, FISH, SOUP),
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(judged[0]) == 2  # both in one call


def test_a_group_is_compared_with_its_first(village_judge, judged):
    # Two prompts, their completions mixed: a group is what shares a prompt, wherever it stands.
    prompts, completions = [QUESTION, "x", QUESTION, "x", QUESTION], [SOUP, "y", FISH, "z", CAKE]
    found = as_trl_reward(village_judge)(prompts, completions)
    assert (found[0], found[1]) == (0.5, 0.5)
    expected = [
        village_judge.reward(QUESTION, FISH, SOUP),
        village_judge.reward("x", "z", "y"),
        village_judge.reward(QUESTION, CAKE, SOUP),
    ]
    assert found[2:] == pytest.approx(expected, abs=1e-5)
    assert len(judged[0]) == 3  # all in one call, and the first of a group meets nobody


def test_a_group_is_compared_all_with_all(village_judge, judged):
    found = as_trl_reward(village_judge, against="all")([QUESTION] * 3, [SOUP, FISH, CAKE])
    assert [len(pairs) for pairs in judged] == [3]
    assert found == pytest.approx(
        rank(village_judge, QUESTION, [SOUP, FISH, CAKE]).scores, abs=1e-5
    )
    assert sum(found) == pytest.approx(1.5)


@pytest.mark.parametrize("against", ["first", "all"])
def test_equal_texts_are_a_draw_the_model_is_not_asked(village_judge, judged, against):
    reward = as_trl_reward(village_judge, against)
    assert reward([QUESTION] * 3, [SOUP, f" {SOUP}\n", SOUP]) == [0.5] * 3 and judged == [[]]
    found = reward([QUESTION] * 3, [SOUP, FISH, SOUP])
    p = village_judge.reward(QUESTION, SOUP, FISH)
    expected = [0.5, 1 - p, 0.5] if against == "first" else [(p + 0.5) / 2, 1 - p, (p + 0.5) / 2]
    assert found == pytest.approx(expected, abs=1e-5) and len(judged[1]) == 1
    assert as_trl_reward(village_judge, against)([QUESTION], [SOUP], reference=[SOUP]) == [0.5]


def test_rows_without_a_reference_fall_back_to_their_group(village_judge):
    found = as_trl_reward(village_judge)(
        [QUESTION, QUESTION, "x"], [SOUP, FISH, "y"], reference=[None, None, "z"]
    )
    expected = [
        0.5,
        village_judge.reward(QUESTION, FISH, SOUP),
        village_judge.reward("x", "y", "z"),
    ]
    assert found == pytest.approx(expected, abs=1e-5)


def test_messages_are_read_as_in_training(village_judge, judged):
    says = lambda role, text: {"role": role, "content": text}
    dialogue = [
        says("system", "Be kind."),
        says("user", "Hello."),
        says("assistant", "Hello!"),
        says("user", QUESTION),
    ]
    answers = [[says("assistant", text)] for text in (SOUP, FISH)]
    as_trl_reward(village_judge)([dialogue] * 2, answers)
    row = {"prompt": dialogue, "chosen": answers[0], "rejected": answers[1]}
    in_training = parse_pairs([("here", row)])[0][0]
    pair = judged[0][0]
    assert pair.prompt == in_training.prompt and {pair.response_a, pair.response_b} == {SOUP, FISH}
    alone = as_trl_reward(village_judge)(
        [[says("user", QUESTION)]],
        [[says("assistant", SOUP)]],
        reference=[[says("assistant", FISH)]],
    )
    assert alone == pytest.approx([village_judge.reward(QUESTION, SOUP, FISH)], abs=1e-5)


def test_completions_may_look_like_anything(village_judge, judged):
    """Texts that a file of data would not hold as they are: lists, a dialogue, the prompt."""
    odd = ['["apple"]', '["pear", "plum"]', f"Human: {QUESTION}"]
    as_trl_reward(village_judge)(['["a"]'] * 3, odd, reference=[SOUP] * 3)
    assert {pair.response_b for pair in judged[0]} | {pair.response_a for pair in judged[0]} == {
        *odd,
        SOUP,
    }
    assert {pair.prompt for pair in judged[0]} == {'["a"]'}


def test_a_blank_reference_is_none(village_judge):
    rewards = [
        as_trl_reward(village_judge)([QUESTION] * 2, [SOUP, FISH], reference=[blank] * 2)
        for blank in (None, "", "  ", float("nan"))
    ]
    assert rewards[1:] == rewards[:1] * 3


def test_a_number_as_a_reference_is_refused(village_judge):
    with pytest.raises(UserError, match="row 0: column 'reference' must be text"):
        as_trl_reward(village_judge)([QUESTION] * 2, [SOUP, FISH], reference=[3.0, None])


def test_lists_of_other_lengths_are_refused(village_judge):
    with pytest.raises(ValueError, match="2 prompts, 3 completions, 2 references"):
        as_trl_reward(village_judge)(["x"] * 2, ["a", "b", "c"])


def test_what_trl_passes_besides_is_accepted_and_the_metrics_logged(village_judge):
    logged = {}
    others = {
        "trainer_state": None,
        "log_extra": print,
        "log_metric": lambda name, value: logged.update({name: value}),
        "environments": None,
        "difficulty": [1, 2],
    }
    found = as_trl_reward(village_judge)(
        prompts=["x"] * 2, completions=["y", ""], completion_ids=[[1], []], **others
    )
    assert found[0] == 0.5 and 0 < found[1] < 1
    result = village_judge.compare("x", "", "y")
    assert logged["gram/position_gap"] == pytest.approx(result.position_gap, abs=1e-5)
    assert logged["gram/label_mass"] == pytest.approx(result.label_mass, abs=1e-5)
    assert logged["gram/truncated"] == 0
    logged.clear()
    as_trl_reward(village_judge)(["x"] * 2, ["y", "y"], **others)  # equal texts: nothing to log
    assert not logged


def test_a_completion_with_nothing_to_compare_it_with(village_judge):
    with pytest.raises(
        ValueError, match="the only completion of the prompt 'x' .* add a column 'reference'"
    ):
        as_trl_reward(village_judge)(["x", "y", "y"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="against must be one of"):
        as_trl_reward(village_judge, against="last")(["x", "x"], ["a", "b"])


# TRL still uses the old name of the option.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_two_steps_of_grpo(village_judge, tokenizer, tmp_path):
    import datasets
    from trl import GRPOConfig, GRPOTrainer  # slow to import, so only here

    policy = load_model(VILLAGE, bits=32).requires_grad_(True)
    before = copy.deepcopy(policy.state_dict())
    prompt = lambda name: [{"role": "user", "content": f"What does {name} eat?"}]
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=16, learning_rate=1e-2, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=as_trl_reward(village_judge, against="all"),
        args=config,
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": [prompt(name) for name in ("Anna", "Bella", "Carla", "Dora")]}
        ),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "rewards/gram_reward/mean" in line]
    assert len(logs) == 2
    for line in logs:
        # all against all: what one wins another loses
        assert line["rewards/gram_reward/mean"] == pytest.approx(0.5)
        assert line["rewards/gram_reward/std"] > 0
        assert 0 < line["gram/position_gap"] < 1 and 0 < line["gram/label_mass"] <= 1
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert any(
        not torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items()
    )

"""A judge as a reward function for verl (https://github.com/volcengine/verl).

The judge is the one that GRAM_JUDGE names. verl passes no prompt: it must stand in the column
``extra_info`` under "prompt" or, as verl's own examples have it, "question". A ground truth is a
response to compare with; None or an empty text is none.

    reward_model.reward_manager=batch                       # up to verl 0.7
    custom_reward_function.path=pkg://gram_mini.serving.verl
    custom_reward_function.name=compute_score

verl's batch manager sees whole groups. From 0.8 on its trainer has no such manager and asks for one
response at a time, with the options reward.custom_reward_function.path and .name. Then the name is
compute_score_of_one, and every row needs a ground truth.
"""

from gram_mini.errors import UserError
from gram_mini.serving.rewards import group_rewards, judge_of_the_loop


def compute_score(
    data_sources, solution_strs, ground_truths, extra_infos, against="first", **others
) -> list[float]:
    """One reward for each of N responses, 0 to 1 (rewards.group_rewards).

    verl/workers/reward_manager/batch.py, BatchRewardManager.verify, calls ``compute_score(
    data_sources=..., solution_strs=..., ground_truths=..., extra_infos=..., **reward_kwargs)`` with
    N values in each; ``against`` can be one of the reward_kwargs.

    Raises:
        UserError: a row without a prompt, or GRAM_JUDGE is not set.
        ValueError: as from group_rewards.
    """
    prompts = [_prompt(i, info or {}) for i, info in enumerate(extra_infos)]
    judge = judge_of_the_loop()
    return group_rewards(judge, prompts, solution_strs, ground_truths, against).rewards


def compute_score_of_one(
    data_source, solution_str, ground_truth, extra_info=None, **others
) -> float:
    """The reward of one response against its ground truth.

    verl/experimental/reward_loop/reward_manager/naive.py, NaiveRewardManager.run_single, calls
    ``compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=...)``.

    Raises:
        as compute_score; ValueError without a ground truth.
    """
    return compute_score([data_source], [solution_str], [ground_truth], [extra_info])[0]


def _prompt(i: int, info: dict):
    for name in ("prompt", "question"):
        if info.get(name):
            return info[name]
    raise UserError(
        f"row {i}: verl passes no prompt; put it into the column 'extra_info' under 'prompt' or "
        "'question'"
    )

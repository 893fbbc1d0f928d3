"""A judge as a reward function for TRL (https://github.com/huggingface/trl)."""

from __future__ import annotations

from statistics import mean

from gram_mini.serving.rewards import group_rewards


def as_trl_reward(judge, against: str = "first"):
    """The judge as a reward function for TRL's GRPOTrainer(reward_funcs=...) and similar trainers.

    If the data set has a column ``reference``, a completion's reward is P(better than its
    reference), from 0 to 1. Otherwise (or if it is None) the completions of one prompt are compared
    with each other, as rewards.group_rewards says. Each process sees only its own completions. If
    TRL spreads the completions of one prompt over several processes, add ``reference``, so that all
    have the same reference.

    The trainer's log gets the means over the comparisons of gram/position_gap, gram/label_mass and
    gram/truncated, the share of them in which a text was cut to the judge's length.

    Args:
        judge: a Judge, or a served judge with the same ``compare_many``.
        against: "first" or "all".

    Returns f(prompts, completions, reference=None, log_metric=None, **others) -> one reward for
    each completion. Texts and lists of messages are read as in training. Tool messages are not
    supported. It raises what group_rewards does.
    """

    def gram_reward(prompts, completions, reference=None, log_metric=None, **others) -> list[float]:
        found = group_rewards(judge, prompts, completions, reference, against)
        if log_metric and found.comparisons:
            for name in ("position_gap", "label_mass", "truncated"):
                log_metric(f"gram/{name}", mean(getattr(x, name) for x in found.comparisons))
        return found.rewards

    return gram_reward

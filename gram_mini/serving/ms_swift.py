"""A judge as a reward for ms-swift (https://github.com/modelscope/ms-swift).

The judge is the one that GRAM_JUDGE names. ms-swift takes a plugin file of yours:

    from gram_mini.serving.ms_swift import GramReward
    from swift.rewards import orms      # up to ms-swift 3: from swift.plugin import orms

    orms["gram"] = GramReward

and the options ``--external_plugins plugin.py --reward_funcs gram``. Keep that file in a folder of
its own. ms-swift puts the plugin's folder before all others on the path, so in this folder here
``import trl`` would find our trl.py.
"""

from gram_mini.serving.rewards import group_rewards, judge_of_the_loop


class GramReward:
    """An outcome reward (ORM): swift/rewards/orm.py says which methods it needs."""

    def __init__(self, args=None, **others):
        self.args = args
        self.judge = judge_of_the_loop()  # a judge that is missing ends the run before it begins

    def __call__(self, completions, messages, reference=None, **others) -> list[float]:
        """One reward for each of N completions, 0 to 1 (rewards.group_rewards).

        swift/rl_core/grpo_algorithm.py, compute_rewards_per_func, calls ``reward_func(completions,
        **reward_kwargs)`` with texts, and with a list of N for ``messages`` (the dialogue with the
        completion at its end) and for each column of the data set, such as ``reference``. A
        process sees its own samples only.

        Raises:
            ValueError: as from group_rewards.
        """
        prompts = [dialogue[:-1] for dialogue in messages]
        return group_rewards(self.judge, prompts, completions, reference).rewards

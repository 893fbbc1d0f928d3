"""A judge as a reward function for OpenRLHF (https://github.com/OpenRLHF/OpenRLHF).

The judge is the one that GRAM_JUDGE names. OpenRLHF loads this file by ``--reward.remote_url`` with
its path. ``--data.label_key reference`` gives each row the response that it is compared with.
OpenRLHF 0.11 asks for one response at a time, so there every row needs one. Where many are asked
for at once, a row without a label is compared with others of its prompt.

The prompt is the text that the policy read. With ``--data.apply_chat_template`` it holds the
policy's chat markup, which the judge was not trained on. So give such data a label of the form
{"prompt": the plain prompt, "reference": the response}.
"""

import sys

from gram_mini.errors import UserError
from gram_mini.serving.rewards import group_rewards, judge_of_the_loop

import torch

BEGINS = ("<s>", "<bos>", "<|begin_of_text|>")  # first tokens that a tokenizer adds
# A query is decoded with its special tokens. These end a response in common chat templates.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
        "<end_of_turn>", "<eos>", "</s>")  # fmt: skip


def reward_func(queries, prompts, labels, **others) -> dict:
    """Rewards of N responses, 0 to 1, as tensors (N,); "extra_logs" has means over the comparisons.

    openrlhf/utils/agent.py, SingleTurnAgentExecutor._fetch_rewards_via_func, calls
    ``reward_func(queries, prompts, labels)``; each query is the text of a prompt and its response.

    Raises:
        UserError: a query that does not begin with its prompt, or GRAM_JUDGE is not set.
        ValueError: as from group_rewards.
        OpenRLHF goes on without a reward after any error, so this one also goes to stderr.
    """
    try:
        rows = [label if isinstance(label, dict) else {"reference": label} for label in labels]
        plain = [row.get("prompt") or prompt for row, prompt in zip(rows, prompts)]
        responses = [_response(*texts) for texts in zip(queries, prompts)]
        references = [row.get("reference") for row in rows]
        found = group_rewards(judge_of_the_loop(), plain, responses, references)
    except Exception as error:
        print(f"error: gram_mini/serving/openrlhf.py: {error}", file=sys.stderr)
        raise
    rewards = torch.tensor(found.rewards)
    means = {"position_gap": 0.0, "label_mass": 1.0} | found.means  # equal texts: nothing was asked
    logs = {f"gram_{name}": torch.full_like(rewards, mean) for name, mean in means.items()}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


def _response(query: str, prompt: str) -> str:
    """What follows the prompt. A tokenizer may have put its first token before it."""
    begin = next((begin for begin in ("", *BEGINS) if query.startswith(begin + prompt)), None)
    if begin is None:
        raise UserError(f"the query {query[:60]!r} does not begin with its prompt {prompt[:60]!r}")
    response = query[len(begin + prompt) :].strip()
    while last := next((last for last in ENDS if response.endswith(last)), None):
        response = response.removesuffix(last).rstrip()
    return response
